"""CLPTrainer: multi-task RL over conditions, with the constructor and conventions of TRL's GRPOTrainer.

    J = E_{(w, alpha) ~ Q, x, y ~ pi(.|x; w, alpha)} [ (1 - alpha) w.R(x, y) - alpha KL(pi(.|x; w, alpha) || pi_ref(.|x)) ]

A step (`CLPTrainer._step`) is: schedule, roll out, reward, update.

    schedule   draw prompts and a condition (w, alpha) for each         collecting.planning
    roll out   sample a group of completions per prompt                 rollouts.rollout
    reward     call the reward functions on them                        collecting.rewarding
    update     by micro-batch of whole groups: score policy and         stepping.update
               reference, add the gradient; then one optimiser step     stepping.optimisation

The first three are `Collector.training_batch`; one rollout may serve several updates. Every random draw comes from (seed, step,
purpose), so a resumed run repeats an uninterrupted one to the bit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput, speed_metrics

from clp_engine.core.errors import ConfigError
from clp_engine.data.prompts import Prompts
from clp_engine.data.rewards import RewardSet
from clp_engine.data.streams import EndOfData
from clp_engine.objectives.objective import Objective
from clp_engine.objectives.weightings import Weighting
from clp_engine.policy.references import FrozenReference, Reference
from clp_engine.rollouts.types import RolloutRequest
from clp_engine.training import building
from clp_engine.training.budget import Budget, Epochs, Progress, of_run
from clp_engine.training.checkpoints.keeping import KeptRun
from clp_engine.training.collecting.batches import TrainingBatch
from clp_engine.training.collecting.collector import WholeRollouts
from clp_engine.training.collecting.other_engines import engine_for
from clp_engine.training.collecting.partial_rollouts import PartialRollouts
from clp_engine.training.collecting.rollout_selection import Selector
from clp_engine.training.evaluating import Evaluating
from clp_engine.training.metrics import MetricLog, PhaseTimer, read_scalars
from clp_engine.training.parallel.faults import agree, finish_step_on_interrupt, one_voice
from clp_engine.training.parallel.processes import Parallel
from clp_engine.training.parallel.sharding import check_own, shard
from clp_engine.training.settings.checks import STEPS
from clp_engine.training.settings.config import CLPConfig
from clp_engine.training.stepping.optimisation import Optimisation, check_norm
from clp_engine.training.stepping.step_metrics import of_all, update_metrics
from clp_engine.training.stepping.update import backward, keep_pace, micro_batches
from clp_engine.training.trl_compat import surface
from clp_engine.training.trl_compat.dataloader_view import PromptLoader

logger = logging.getLogger(__name__)


class CLPTrainer(KeptRun, Evaluating, surface.ScriptSurface):
    """Trains a conditioned policy; order and names of the arguments are GRPOTrainer's. KeptRun has the run's folder,
    checkpoints and best model, Evaluating `evaluate`, ScriptSurface what scripts expect of a Trainer beside training.

    model: a ConditionedPolicy, a model name or path, or a loaded causal or encoder-decoder language model; the latter become
        a policy with one objective per reward, as `args` and `peft_config` (see `lora_config`) say. A PeftModel's adapters are
        where its objectives begin, see `ConditionedPolicy.from_pretrained`. As in transformers' Trainer, what lies on the CPU
        is moved to the GPU where there is one, unless args.use_cpu.
    reward_funcs: see `rewards.RewardSet`; their names are the objectives. args: a CLPConfig.
    train_dataset, eval_dataset: rows with a `prompt` (text or chat messages); other columns go to the reward functions. A list,
        a `datasets.Dataset`, or an iterable, which is streamed (`streams`); eval_dataset also a mapping from names to datasets.
    processing_class: the tokenizer, if it is not the model's own. callbacks: transformers.TrainerCallback classes or objects.
    optimizers: (optimizer, scheduler) over `policy.adapter_parameters()`, instead of fused AdamW and `lr_scheduler_type`.
    rollout_func: a function (prompts, trainer) that draws the completions, see `RolloutFunction`. tools, environment_factory:
        TRL's; refused.
    condition_sampler: a `Weighting` that draws (w, kl), instead of the one `args` describes. objective: an `Objective`, instead
        of the policy gradient that `args` describes. reference: a `Reference`; the base model, all run long, unless given.
    """

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: CLPConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        tools=None,
        rollout_func=None,
        environment_factory=None,
        *,
        condition_sampler: Weighting | None = None,
        objective: Objective | None = None,
        reference: Reference | None = None,
    ):
        surface.refuse(
            reward_funcs,
            quantization_config,
            tools=tools,
            environment_factory=environment_factory,
        )
        self.args = a = args or CLPConfig()
        self.parallel = Parallel.joined(a.use_cpu, a.ddp_timeout, a.ddp_backend)
        # A run that is resumed keeps the id that it had.
        self.run_id: str | None = self.parallel.gather(uuid.uuid4().hex)[0]
        with one_voice(self.parallel):
            self.rewards = RewardSet(reward_funcs, reward_processing_classes, a.reward_workers)
            building.check(a, self.rewards, condition_sampler, objective)
            self.sampler = condition_sampler or building.build_weighting(a, self.rewards)
            self.policy = building.build_policy(
                model, processing_class, peft_config, a, self.rewards, self.sampler.min_kl
            )
            self.sharded = None if a.sharding is None else shard(self.policy, a.sharding, self.parallel)
            check_own(self.sharded, optimizers[0], reference)
            if a.gradient_checkpointing:  # which tries the model, and so on the device that it is trained on
                self.policy.checkpoint_layers()
            building.say_detours(self.policy)
            self.rewards.to(self.policy.device)
            self.policy.tokenizer = self.tokenizer = building.tokenizer_of(self.policy, processing_class, a)
            self.train_dataset = None if train_dataset is None else self._training_prompts(train_dataset)
            self.eval_dataset = self._evaluation_prompts(eval_dataset)
            if self.eval_dataset is None and (a.eval_strategy != "no" or a.eval_on_start):
                raise ConfigError(
                    f"eval_strategy={a.eval_strategy!r}, eval_on_start={a.eval_on_start}: there is no "
                    "eval_dataset; give one, or eval_strategy='no'"
                )
            self.timer = PhaseTimer(self.policy.device)
            self.objective = objective or building.build_objective(a, self.policy)
            self.reference = reference or FrozenReference()
            self.rollout_engine = engine_for(a, self.policy, self.parallel, rollout_func, self)
            self.collector_parts = building.build_collector_parts(
                a,
                self.policy,
                self.rewards,
                self.objective,
                self.reference,
                self.sampler,
                self.timer,
                self.parallel,
                self.rollout_engine,
            )
            self.collector = (PartialRollouts if a.partial_rollouts else WholeRollouts)(self.collector_parts)
            self.selector = Selector(
                self.policy,
                self.objective,
                self.reference,
                a.selection_settings,
                a.micro_batching,
                self.parallel,
            )
            self.optimisation: Optimisation | None = None
        self._batches: list[TrainingBatch] | None = (
            None  # of the last rollout, one for each step that it serves
        )
        self._batch: TrainingBatch | None = None  # of the last step
        self.num_generated_tokens = 0
        self.rollout_request: RolloutRequest | None = None  # while a rollout_func runs
        local_main = self.parallel.accelerator is None or self.parallel.accelerator.is_local_main_process
        self.state = TrainerState(
            is_local_process_zero=local_main, is_world_process_zero=self.parallel.is_main
        )
        self.control = TrainerControl()
        self.optimizer, self.lr_scheduler = optimizers
        self.callback_handler = surface.callback_handler(
            a.report_to, callbacks, self.policy.model, self.tokenizer, *optimizers
        )
        self._epoch_begun: int | None = None
        self._interrupted, self._stops = threading.Event(), False  # this process, any of them
        self._hear("on_init_end")

    def _training_prompts(self, rows) -> Prompts:
        return building.training_prompts(rows, self.args, self.policy, self.tokenizer)

    def _evaluation_prompts(self, rows) -> Prompts | dict[str, Prompts] | None:
        return building.evaluation_prompts(rows, self.args, self.policy, self.tokenizer)

    def _hear(self, event: str, *values: Any) -> None:
        """Tell the callbacks of an event; what they ask for is in `control`."""
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control, *values)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _step(self, progress: Progress) -> float:
        """Schedule, roll out and reward where a rollout is due; update; tell everyone. Returns the loss."""
        a, state = self.args, self.state
        iteration = state.global_step % a.steps_per_rollout
        if iteration == 0:
            self._begin_epoch_if_new()  # an epoch that ends here may be evaluated: not a part of the step's time
        start = time.perf_counter()
        self.timer.seconds.clear()
        self._hear("on_step_begin")
        generated = self._collect() if iteration == 0 else 0
        self._batch = batch = self._batches[iteration % a.rollout_steps]
        if self.objective.needs.old_logprob and (iteration > 0 or batch.stale):
            batch.old_logprob = batch.rollout.logprobs
        metrics = self._update(batch)
        if iteration == 0:
            metrics |= batch.metrics
        state.global_step += 1
        self.reference.after_step(self.policy, state.global_step)
        state.max_steps = self.budget.max_steps(state.global_step, self.num_generated_tokens)
        state.epoch = Epochs(a, self.train_dataset).at(state.global_step, state.max_steps)
        metrics |= {"step_time": time.perf_counter() - start}
        metrics |= {f"time/{k}": v for k, v in self.timer.seconds.items()}
        self.metric_log.add(metrics)
        progress.step(generated, batch.metrics["reward"], metrics.get("kl_sequence"))
        self._hear("on_step_end")
        self._stops = agree(self.parallel, self.control, self._interrupted)
        self._log_evaluate_save()
        return metrics["loss"]

    def _collect(self) -> int:
        """The completions of the steps up to the next rollout; returns how many tokens were drawn."""
        a, state = self.args, self.state
        self._batch = self._batches = None  # what they keep would lie beside the next rollout
        with self.at_own_pace():
            whole = self.collector.training_batch(self.train_dataset, state.global_step, state)
            state.num_input_tokens_seen += whole.num_tokens
            self.num_generated_tokens += whole.new_tokens
            if self.selector.settings.selects:
                with self.timer("selection"):
                    whole = self.selector.selected(whole, state.global_step / max(state.max_steps, 1))
        self._batches = whole.split(a.rollout_steps)
        return whole.new_tokens

    def _update(self, batch: TrainingBatch) -> dict[str, float]:
        """Gradient of every micro-batch, clipping, one optimiser step; returns metrics."""
        a, first, passes = self.args, batch.passes == 0, []
        values = torch.zeros_like(batch.rollout.logprobs) if self.objective.needs.value else None
        self.optimisation.begin_step()
        with self.timer("update"):
            for here, part in micro_batches(batch, self.objective, a.micro_batching):
                if passes:
                    self._hear("on_substep_end")
                result = backward(
                    self.policy, part, self.objective, batch.num_generated_tokens, self.reference
                )
                if values is not None:
                    values[here] = result.values
                passes.append((part.rollout, result))
            keep_pace(self.policy, batch, self.objective, a.micro_batching, self.reference)
        rows, tokens = batch.rollout.completion_ids.shape[0], max(batch.num_generated_tokens, 1)
        found, learned = of_all(
            self.parallel,
            update_metrics(passes, rows, tokens, batch.old_logprob is None),
            [result.learned for _, result in passes],
            self.policy.device,
        )
        found |= self.objective.metrics(learned, first)
        batch.passes += 1
        if first:
            batch.values = values
        with self.timer("optimizer"):
            self.optimisation.add_up(self.parallel)
            found["grad_norm"] = self.optimisation.clip(
                a.max_grad_norm, self.state.global_step, self.parallel
            )
            self._hear("on_pre_optimizer_step")
            learning_rate = self.lr_scheduler.get_last_lr()[0]
            self.optimizer.step()
            self._hear("on_optimizer_step")
            self.optimisation.advance_schedule(self.num_generated_tokens)
            self.optimisation.zero_grad()
            metrics = read_scalars(found)
        check_norm(metrics["grad_norm"], self.state.global_step)
        return self.objective.after_step(metrics) | {"learning_rate": learning_rate}

    # -- the run ------------------------------------------------------------------------------------------------------

    @property
    def budget(self) -> Budget:
        return of_run(self.args, self.train_dataset)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainOutput:
        """Run to the end. resume_from_checkpoint: a checkpoint folder, or True for the newest in output_dir; the steps that
        follow are, to the bit, those of a run that was never interrupted (same settings, machine and versions).

        Ctrl-C finishes the step, writes a checkpoint and raises KeyboardInterrupt; a second one stops at once.
        """
        if self.train_dataset is None:
            raise ConfigError("train_dataset is missing")
        with one_voice(self.parallel), self._folder(), self._drawing():
            return self._train(resume_from_checkpoint)

    def _train(self, resume_from_checkpoint: str | Path | bool | None) -> TrainOutput:
        self._prepare(resume_from_checkpoint)
        a, state = self.args, self.state
        self._hear("on_train_begin")
        started, first_step, losses = time.time(), state.global_step, []
        if a.eval_on_start and state.global_step == 0:
            self.evaluate()
        bar = Progress(a, state, self.num_generated_tokens)
        with bar as progress, finish_step_on_interrupt() as self._interrupted:
            while not self._is_over():
                try:
                    with self._kept_where_drawing_fails(first_step):
                        losses.append(self._step(progress))
                except EndOfData as end:
                    logger.warning(
                        "%s, at step %d of %d: training ends here", end, state.global_step, state.max_steps
                    )
                    break
                if self._stops:
                    self._save_when_whole()
                    raise KeyboardInterrupt
        with self._kept_where_drawing_fails(first_step):
            self._end_epoch()
        steps, loss = state.global_step - first_step, sum(losses) / max(len(losses), 1)
        metrics = {
            **speed_metrics("train", started, steps * a.batch_size, steps),
            "train_loss": loss,
            "num_tokens": state.num_input_tokens_seen,
            "num_generated_tokens": self.num_generated_tokens,
        }
        self._load_best()
        self.save_model()
        self.log(metrics)
        self._hear("on_train_end")
        return TrainOutput(state.global_step, loss, metrics)

    def _is_over(self) -> bool:
        spent = self.budget.spent(self.state.global_step, self.num_generated_tokens)
        return spent or self.control.should_training_stop

    def _prepare(self, resume_from_checkpoint: str | Path | bool | None) -> None:
        """Optimiser, state and log, from the start or from a checkpoint."""
        a, state = self.args, self.state
        for name in STEPS:
            setattr(state, name, a.steps_of(name, self.budget.steps))
        state.train_batch_size = a.per_device_train_batch_size
        state.num_train_epochs = math.ceil(a.num_train_epochs)
        if self.optimisation is None:
            self.optimisation = Optimisation(
                self.policy,
                self.objective,
                a.optimiser_settings,
                self.budget,
                self.optimizer,
                self.lr_scheduler,
                {} if self.sharded is None else self.sharded.trained,
            )
            self.optimizer, self.lr_scheduler = self.optimisation.optimizer, self.optimisation.scheduler
            self.callback_handler.optimizer = self.optimizer
            self.callback_handler.lr_scheduler = self.lr_scheduler
        self.metric_log, self._epoch_begun = MetricLog(), None
        self.callback_handler.train_dataloader = PromptLoader.of_training(a, self.train_dataset)
        self._begin_run(resume_from_checkpoint)
        self.state.max_steps = self.budget.max_steps(self.state.global_step, self.num_generated_tokens)

    def _log_evaluate_save(self) -> None:
        """What the callbacks have asked for."""
        if self.control.should_epoch_stop:
            raise ConfigError(
                "a callback set should_epoch_stop; prompts come from an endless stream of epochs here, which ends with "
                "should_training_stop alone"
            )
        if self.control.should_log and (means := self.metric_log.drain()):
            self.log(
                {
                    **means,
                    "num_tokens": self.state.num_input_tokens_seen,
                    "num_generated_tokens": self.num_generated_tokens,
                    **({"data/skipped_rows": self.train_dataset.skipped} if self.args.skip_bad_rows else {}),
                }
            )
        if self.control.should_evaluate:
            self._note_best(self.evaluate())
        if self.control.should_save or self._save_pending:
            self._save_when_whole()

    def _begin_epoch_if_new(self) -> None:
        epoch = Epochs(self.args, self.train_dataset).number(self.state.global_step)
        if epoch != self._epoch_begun:
            self._end_epoch()
            self._hear("on_epoch_begin")
            self._epoch_begun = epoch

    def _end_epoch(self) -> None:
        if self._epoch_begun is not None:
            self._hear("on_epoch_end")
            self._log_evaluate_save()

    def whole_base(self) -> contextlib.AbstractContextManager[None]:
        """Where the base model is sharded: with all weights in every process. Every process must enter."""
        return contextlib.nullcontext() if self.sharded is None else self.sharded.whole()

    def at_own_pace(self) -> contextlib.AbstractContextManager[None]:
        """Where the base model is sharded: for `policy.generate` and `evaluate`. Every process must enter. With
        `gather_for_generation: false` the layers are gathered for each pass, else as in `whole_base`."""
        return contextlib.nullcontext() if self.sharded is None else self.sharded.at_own_pace()
