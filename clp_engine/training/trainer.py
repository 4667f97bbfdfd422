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

import logging
import math
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput, speed_metrics

from clp_engine.core.errors import ConfigError
from clp_engine.core.files import check_folder
from clp_engine.data.prompts import Prompts
from clp_engine.data.rewards import RewardSet
from clp_engine.data.streams import EndOfData
from clp_engine.objectives.objective import Objective
from clp_engine.objectives.weightings import Weighting
from clp_engine.policy.references import FrozenReference, Reference
from clp_engine.training import building, evaluating
from clp_engine.training.budget import Budget, Epochs, Progress, finish_step_on_interrupt, of_run
from clp_engine.training.checkpoints import best, checkpoint, resuming
from clp_engine.training.collecting.batches import TrainingBatch
from clp_engine.training.collecting.collector import WholeRollouts
from clp_engine.training.collecting.partial_rollouts import PartialRollouts
from clp_engine.training.collecting.rollout_selection import Selector
from clp_engine.training.metrics import MetricLog, PhaseTimer, read_scalars
from clp_engine.training.runs import run_folder
from clp_engine.training.settings.checks import STEPS
from clp_engine.training.settings.config import CLPConfig
from clp_engine.training.stepping.optimisation import Optimisation, check_norm
from clp_engine.training.stepping.step_metrics import update_metrics
from clp_engine.training.stepping.update import backward, micro_batches
from clp_engine.training.trl_compat import surface
from clp_engine.training.trl_compat.dataloader_view import PromptLoader

logger = logging.getLogger(__name__)


class CLPTrainer(surface.ScriptSurface):
    """Trains a conditioned policy; order and names of the arguments are GRPOTrainer's.

    model: a ConditionedPolicy, a model name or path, or a loaded causal or encoder-decoder language model; the latter become
        a policy with one objective per reward, as `args` and `peft_config` (see `lora_config`) say. A PeftModel's adapters are
        where its objectives begin, see `ConditionedPolicy.from_pretrained`. As in transformers' Trainer, what lies on the CPU
        is moved to the GPU where there is one, unless args.use_cpu.
    reward_funcs: see `rewards.RewardSet`; their names are the objectives. args: a CLPConfig.
    train_dataset, eval_dataset: rows with a `prompt` (text or chat messages); other columns go to the reward functions. A list,
        a `datasets.Dataset`, or an iterable, which is streamed (`streams`); eval_dataset also a mapping from names to datasets.
    processing_class: the tokenizer, if it is not the model's own. callbacks: transformers.TrainerCallback classes or objects.
    optimizers: (optimizer, scheduler) over `policy.adapter_parameters()`, instead of fused AdamW and `lr_scheduler_type`.
    tools, rollout_func, environment_factory: TRL's; refused.
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
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        self.args = a = args or CLPConfig()
        self.run_id: str | None = uuid.uuid4().hex  # of the run that it goes on with, where it resumes one
        self.rewards = RewardSet(reward_funcs, reward_processing_classes, a.reward_workers)
        building.check(a, self.rewards, condition_sampler, objective)
        self.sampler = condition_sampler or building.build_weighting(a, self.rewards)
        self.policy = building.build_policy(
            model, processing_class, peft_config, a, self.rewards, self.sampler.min_kl
        )
        self.rewards.to(self.policy.device)
        self.policy.tokenizer = self.tokenizer = building.tokenizer_of(self.policy, processing_class, a)
        self.train_dataset = None if train_dataset is None else self._training_prompts(train_dataset)
        self.eval_dataset = self._evaluation_prompts(eval_dataset)
        if self.eval_dataset is None and (a.eval_strategy != "no" or a.eval_on_start):
            raise ConfigError(
                f"eval_strategy={a.eval_strategy!r}, eval_on_start={a.eval_on_start}: there is no "
                "eval_dataset; give one, or eval_strategy='no'"
            )
        self._build_loop(objective, reference)
        self.num_generated_tokens = 0
        self.state = TrainerState(is_local_process_zero=True, is_world_process_zero=True)
        self.control = TrainerControl()
        self.optimizer, self.lr_scheduler = optimizers
        self.callback_handler = surface.callback_handler(
            a.report_to, callbacks, self.policy.model, self.tokenizer, *optimizers
        )
        self._epoch_begun: int | None = None
        self._hear("on_init_end")

    def _build_loop(self, objective: Objective | None, reference: Reference | None) -> None:
        """Objective, reference, and what batches come from."""
        a = self.args
        self.timer = PhaseTimer(self.policy.device)
        self.objective = objective or building.build_objective(a, self.policy)
        self.reference = reference or FrozenReference()
        self.collector_parts = building.build_collector_parts(
            a, self.policy, self.rewards, self.objective, self.reference, self.sampler, self.timer
        )
        self.collector = (PartialRollouts if a.partial_rollouts else WholeRollouts)(self.collector_parts)
        self.selector = Selector(
            self.policy, self.objective, self.reference, a.selection_settings, a.micro_batching
        )
        self.optimisation: Optimisation | None = None

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
        self._generation = batch = self._generations[iteration % a.rollout_steps]
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
        self._log_evaluate_save()
        return metrics["loss"]

    def _collect(self) -> int:
        """The completions of the steps up to the next rollout; returns how many tokens were drawn."""
        a, state = self.args, self.state
        self._generation = self._generations = None  # what they keep would lie beside the next rollout
        whole = self.collector.training_batch(self.train_dataset, state.global_step, state)
        state.num_input_tokens_seen += whole.num_tokens
        self.num_generated_tokens += whole.new_tokens
        if self.selector.settings.selects:
            with self.timer("selection"):
                whole = self.selector.selected(whole, state.global_step / max(state.max_steps, 1))
        self._generations = whole.split(a.rollout_steps)
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
        found = update_metrics(passes, max(batch.num_generated_tokens, 1), batch.old_logprob is None)
        found |= self.objective.metrics([result.learned for _, result in passes], first)
        batch.passes += 1
        if first:
            batch.values = values
        with self.timer("optimizer"):
            found["grad_norm"] = self.optimisation.clip(a.max_grad_norm, self.state.global_step)
            self._hear("on_pre_optimizer_step")
            learning_rate = self.lr_scheduler.get_last_lr()[0]
            self.optimizer.step()
            self._hear("on_optimizer_step")
            self.optimisation.advance_schedule(self.num_generated_tokens)
            self.optimizer.zero_grad(set_to_none=True)
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
        check_folder("output_dir", self.args.output_dir)
        with run_folder.training_in(self.args.output_dir):
            return self._train(resume_from_checkpoint)

    def _train(self, resume_from_checkpoint: str | Path | bool | None) -> TrainOutput:
        self._prepare(resume_from_checkpoint)
        a, state = self.args, self.state
        self._hear("on_train_begin")
        started, first_step, losses = time.time(), state.global_step, []
        if a.eval_on_start and state.global_step == 0:
            self.evaluate()
        bar = Progress(a, state, self.num_generated_tokens)
        with bar as progress, finish_step_on_interrupt() as interrupted:
            while not self._is_over():
                try:
                    losses.append(self._step(progress))
                except EndOfData as end:
                    logger.warning(
                        "%s, at step %d of %d: training ends here", end, state.global_step, state.max_steps
                    )
                    break
                if interrupted.is_set():
                    self._save_when_whole()
                    raise KeyboardInterrupt
        self._end_epoch()
        steps, loss = state.global_step - first_step, sum(losses) / max(len(losses), 1)
        metrics = {
            **speed_metrics("train", started, steps * a.batch_size, steps),
            "train_loss": loss,
            "num_tokens": state.num_input_tokens_seen,
            "num_generated_tokens": self.num_generated_tokens,
        }
        if a.load_best_model_at_end:
            best.load(state, self.policy)
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
        state.train_batch_size, state.num_train_epochs = (
            a.per_device_train_batch_size,
            math.ceil(a.num_train_epochs),
        )
        if self.optimisation is None:
            self.optimisation = Optimisation(
                self.policy,
                self.objective,
                a.optimiser_settings,
                self.budget,
                self.optimizer,
                self.lr_scheduler,
            )
            self.optimizer, self.lr_scheduler = self.optimisation.optimizer, self.optimisation.scheduler
            self.callback_handler.optimizer = self.optimizer
            self.callback_handler.lr_scheduler = self.lr_scheduler
        self.metric_log, self._epoch_begun = MetricLog(), None
        self.callback_handler.train_dataloader = PromptLoader.of_training(a, self.train_dataset)
        read = self.policy.read_from
        if resume_from_checkpoint:
            path = checkpoint.resolve(a.output_dir, resume_from_checkpoint)
            read, self.run_id = [*read, path], checkpoint.read_state(path).get("run")
        run_folder.check_free(a.output_dir, self.run_id, a.overwrite_output_dir, read)
        if resume_from_checkpoint:
            resuming.restore(self, path)
        else:
            set_seed(a.seed)  # nothing here draws from the global generators, but reward functions may
        self.state.max_steps = self.budget.max_steps(self.state.global_step, self.num_generated_tokens)
        # Nothing in the folder has changed so far: what is refused leaves it as it was.
        run_folder.begin(a.output_dir, self.run_id)
        self._has_folder = True
        if a.log_completions:
            run_folder.note(a.output_dir, [Path(a.output_dir) / "completions.jsonl"])
        run_folder.start_log(a.output_dir, self.state.log_history if resume_from_checkpoint else [])

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
            best.note(self.evaluate(), self.args, self.state, self.policy)
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

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean metrics over an evaluation set, conditions drawn by the sampler from a fixed seed; logged under `eval_`.

        eval_dataset: instead of the trainer's own; the name of one of those, where they have names. Several are evaluated one
        after another, under `eval_<name>_`, and returned together. ignore_keys: transformers'; refused, there are none.
        """
        dataset = evaluating.chosen(self.eval_dataset, eval_dataset, ignore_keys, self._evaluation_prompts)
        if isinstance(dataset, dict):
            parts = [self._evaluate(part, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {name: value for part in parts for name, value in part.items()}
        return self._evaluate(dataset, metric_key_prefix)

    def _evaluate(self, dataset: Prompts, prefix: str) -> dict[str, float]:
        a, started = self.args, time.time()
        loader = PromptLoader.of_evaluation(a, dataset)
        self.callback_handler.eval_dataloader = loader
        means, completions, batches = evaluating.evaluation_metrics(
            self.collector_parts,
            dataset,
            loader.prompts,
            self.state,
            lambda: self._hear("on_prediction_step"),
        )
        metrics = {f"{prefix}_{name}": value for name, value in means.items()}
        metrics |= speed_metrics(prefix, started, completions, batches)
        self.log(metrics)
        self._hear("on_evaluate", metrics)
        return metrics

    # -- logs and files -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Append to log.jsonl and the state's history, and tell the callbacks. `logs` gets the epoch, as in transformers."""
        logs["epoch"] = round(self.state.epoch or 0.0, 4)
        entry = {**logs, "step": self.state.global_step}
        self.state.log_history.append(entry)
        run_folder.append_log(self.args.output_dir, entry)
        self._hear("on_log", logs)

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> Path:
        """Write the policy to `output_dir`, by default <args.output_dir>/policy."""
        run = Path(self.args.output_dir)
        if output_dir is None and not self._has_folder:
            run_folder.check_free(run, self.run_id, self.args.overwrite_output_dir)
        path = run / "policy" if output_dir is None else Path(output_dir)
        run_folder.write_policy(run, path, self.policy)
        return path

    _has_folder = False  # output_dir holds the run of this trainer
    _save_pending = False

    def _save_when_whole(self) -> None:
        """Write a checkpoint, or remember to: the steps on one rollout are not cut in two."""
        self._save_pending = self.state.global_step % self.args.steps_per_rollout != 0
        if not self._save_pending:
            resuming.save(self)
            self._hear("on_save")
