"""CLPTrainer: multi-task RL over conditions, with the constructor and conventions of TRL's GRPOTrainer.

    J = E_{(w, alpha) ~ Q, x, y ~ pi(.|x; w, alpha)} [ (1 - alpha) w.R(x, y) - alpha KL(pi(.|x; w, alpha) || pi_ref(.|x)) ]

One step: draw prompts and a condition for each, roll out a group of completions per prompt, reward them, and for each
micro-batch of whole groups score policy and reference and add the gradient. Every random draw comes from
(seed, step, purpose), so a resumed run repeats an uninterrupted one to the bit.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import get_scheduler, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput, speed_metrics

from clp_engine.core.conditions import check_objectives
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import append_text, check_folder, write_text
from clp_engine.core.sizes import BOOKKEEPING, check_size
from clp_engine.data import chat_template
from clp_engine.data.prompts import Prompts
from clp_engine.data.rewards import RewardSet
from clp_engine.data.streams import EndOfData, PromptStream, prompts_of
from clp_engine.models.base import holds_adapters
from clp_engine.models.forms import Conditioning
from clp_engine.objectives.estimators import MixController
from clp_engine.objectives.value_head import ValueHead, explained_variance
from clp_engine.objectives.weightings import ConditionSampler, build_sampler
from clp_engine.policy.peft import lora_config
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.engines.choice import detours
from clp_engine.rollouts.scoring import score
from clp_engine.training import best, callback_states, checkpoints, run_folder
from clp_engine.training.budget import Budget, finish_step_on_interrupt
from clp_engine.training.collecting.collector import Collector, Generation
from clp_engine.training.collecting.partial_rollouts import PartialRollouts
from clp_engine.training.collecting.rollout_selection import select
from clp_engine.training.config import WITHOUT_EFFECT, CLPConfig
from clp_engine.training.stepping.flat_adamw import FlatAdamW
from clp_engine.training.stepping.metrics import CLIP_RATIOS, MetricLog, PhaseTimer, clip_ratios, read_scalars
from clp_engine.training.stepping.update import backward, micro_batches
from clp_engine.training.trl_compat import model_init_kwargs
from clp_engine.training.trl_compat.dataloader_view import PromptLoader
from clp_engine.training.trl_compat.surface import ScriptSurface

logger = logging.getLogger(__name__)

# Settings that describe a policy to be built.
_BUILDING = (
    "conditioning",
    "carrier",
    "prompt_template",
    "rank",
    "lora_alpha",
    "target_modules",
    "kl_conditioning",
)


class CLPTrainer(ScriptSurface):
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
    condition_sampler: draws (w, kl), instead of the one `args` describes.
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
        condition_sampler: ConditionSampler | None = None,
    ):
        if reward_funcs is None:
            raise ConfigError("reward_funcs is missing; give at least one reward function")
        if quantization_config is not None:
            raise ConfigError(
                "quantization_config: quantised base models are not supported; load the model in bfloat16"
            )
        for name, value in (
            ("tools", tools),
            ("rollout_func", rollout_func),
            ("environment_factory", environment_factory),
        ):
            if value:
                raise ConfigError(
                    f"{name}: a completion is one turn of text, drawn by the engine itself; leave it out (TRL has tools and "
                    "environments)"
                )
        self.args = args or CLPConfig()
        self.run_id: str | None = uuid.uuid4().hex  # of the run that it goes on with, where it resumes one
        self.rewards = RewardSet(reward_funcs, reward_processing_classes, self.args.reward_workers)
        if condition_sampler is not None and self.args.reward_weights is not None:
            raise ConfigError(
                "reward_weights fix the objective, and condition_sampler draws it; give one of the two"
            )
        check_objectives(self.rewards.names)
        self._check_room()
        self.sampler = condition_sampler or self._build_sampler()
        self.policy = self._build_policy(model, processing_class, peft_config)
        if self.policy.device.type == "cpu" and not self.args.use_cpu and torch.cuda.is_available():
            self.policy.to("cuda")
        self.rewards.to(self.policy.device)
        self.tokenizer = processing_class or self.policy.tokenizer
        if self.tokenizer is None:
            raise ConfigError("no tokenizer: give processing_class=")
        self.tokenizer = chat_template.with_values(self.tokenizer, self.args.chat_template_kwargs)
        self.policy.tokenizer = self.tokenizer
        self.train_dataset = None if train_dataset is None else self._training_prompts(train_dataset)
        self.eval_dataset = self._evaluation_prompts(eval_dataset)
        if self.eval_dataset is None and (self.args.eval_strategy != "no" or self.args.eval_on_start):
            raise ConfigError(
                f"eval_strategy={self.args.eval_strategy!r}, eval_on_start={self.args.eval_on_start}: there is no "
                "eval_dataset; give one, or eval_strategy='no'"
            )
        if self.args.gradient_checkpointing:
            self.policy.checkpoint_layers()
        for detour in detours(self.policy):
            logger.warning("%s: %s", type(self.policy.model).__name__, detour)
        self.timer = PhaseTimer(self.policy.device)
        self.collector = Collector(
            self.policy, self.rewards, self.sampler, self.tokenizer, self.args, self.timer
        )
        self.partial = PartialRollouts(self.collector) if self.args.partial_rollouts else None
        self.controller = MixController()
        self.value_head = self._build_value_head() if self.args.baseline == "value" else None
        self.num_generated_tokens = 0
        self._schedule_over_tokens: bool | None = None  # None until there is an optimiser
        self.state = TrainerState(is_local_process_zero=True, is_world_process_zero=True)
        self.control = TrainerControl()
        self.optimizer, self.lr_scheduler = optimizers
        try:
            reporting = get_reporting_integration_callbacks(self.args.report_to)
        except ValueError as error:  # names those there are
            raise ConfigError(f"report_to={self.args.report_to!r}: {error}") from error
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback, *reporting, *(callbacks or [])],
            self.policy.model,
            self.tokenizer,
            self.optimizer,
            self.lr_scheduler,
        )
        self._epoch_begun: int | None = None
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)

    # -- construction -------------------------------------------------------------------------------------------------

    def _check_room(self) -> None:
        """Before anything is loaded: the rollouts fit into this machine."""
        a = self.args
        check_size(
            f"a rollout of {a.rollout_size:,} completions of up to max_completion_length = {a.max_completion_length:,} tokens",
            a.rollout_size * a.max_completion_length * BOOKKEEPING,
            "cuda" if torch.cuda.is_available() and not a.use_cpu else "cpu",
        )

    def _training_prompts(self, rows) -> Prompts:
        a = self.args
        seed = a.seed if a.shuffle_dataset else None
        prompts = prompts_of(
            rows, self.tokenizer, a.max_prompt_length, seed, a.skip_bad_rows, self._check_prompt
        )
        if isinstance(prompts, PromptStream):
            if a.max_steps <= 0 and a.max_generated_tokens is None:
                raise ConfigError(
                    f"train_dataset is a {type(rows).__name__}, which has no length: give max_steps or max_generated_tokens "
                    "instead of num_train_epochs"
                )
            if prompts.read_once and a.save_strategy != "no":
                logger.warning(
                    "train_dataset is a %s, which can be read once: checkpoints of this run can be used, not resumed from",
                    type(rows).__name__,
                )
        return prompts

    def _evaluation_prompts(self, rows) -> Prompts | dict[str, Prompts] | None:
        if isinstance(rows, Mapping):
            return {str(name): self._evaluation_prompts(part) for name, part in rows.items()}
        if rows is None:
            return None
        a = self.args
        return prompts_of(
            rows,
            self.tokenizer,
            a.max_prompt_length,
            skip_bad_rows=a.skip_bad_rows,
            check=self._check_prompt,
        )

    def _check_prompt(self, ids: list[int], where: str) -> None:
        """Raises ConfigError where the model cannot read a prompt and its completion."""
        self.policy.room.check_prompt(ids, self.args.max_completion_length, where, self.tokenizer)

    def _build_sampler(self) -> ConditionSampler:
        a = self.args
        kind, fixed = a.weight_sampler, a.fixed_weights
        if a.reward_weights is not None:
            kind, fixed = "fixed", self._shares(a.reward_weights)
        many = len(self.rewards) > 1 and kind != "fixed"
        try:
            return build_sampler(
                len(self.rewards),
                kind,
                a.concentration,
                a.corner_probability if many else 0.0,
                a.grid_resolution,
                fixed,
                a.kl,
                a.stratified_weights,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _shares(self, reward_weights: list[float]) -> list[float]:
        """w, whose entries sum to 1; `reward_scale` has the rest."""
        if len(reward_weights) != len(self.rewards):
            raise ConfigError(
                f"reward_weights has {len(reward_weights)} entries for {len(self.rewards)} rewards "
                f"({', '.join(self.rewards.names)}); expected one each"
            )
        if len(reward_weights) > 1:
            logger.info(
                "reward_weights=%s: one objective for the whole run, as in TRL. Without them one run trains a model that is "
                "steerable between %s",
                reward_weights,
                ", ".join(self.rewards.names),
            )
        return [weight / self.args.reward_scale for weight in reward_weights]

    def _build_policy(self, model, tokenizer, peft_config) -> ConditionedPolicy:
        a = self.args
        kl = {
            "min_kl": self.sampler.min_kl,
            "kl_is_beta": a.kl_is_beta,
            "default_kl": a.default_kl,
        }
        self._check_loaded(model)
        if isinstance(model, ConditionedPolicy):
            if peft_config is not None:
                raise ConfigError(
                    "peft_config was given with a ConditionedPolicy, which has its adapters already; leave one out"
                )
            if model.objectives != self.rewards.names:
                raise ConfigError(
                    f"the policy's objectives are {', '.join(model.objectives)}, the rewards are "
                    f"{', '.join(self.rewards.names)}; they must be the same in the same order "
                    "(reward_funcs may be a mapping from names to functions)"
                )
            self._check_policy(model)
            model.spec = dataclasses.replace(model.spec, **kl)
            return model
        if peft_config is not None and not Conditioning.parse(a.conditioning, a.carrier).has_ranks:
            raise ConfigError(
                f"peft_config describes low-rank factors; conditioning={a.conditioning!r} has none"
            )
        adapter = {"rank": a.rank, "lora_alpha": a.lora_alpha, "target_modules": a.target_modules}
        if holds_adapters(model):
            if peft_config is not None:
                raise ConfigError(
                    "peft_config was given with a model that holds adapters already; leave one out"
                )
            # The adapters' own rank, unless another was asked for.
            adapter |= {"rank": None if a.rank == CLPConfig.rank else a.rank}
        elif peft_config is not None:
            adapter = self._described_adapter(peft_config, adapter)
        return ConditionedPolicy.from_pretrained(
            model,
            self.rewards.names,
            conditioning=a.conditioning,
            carrier=a.carrier,
            prompt_template=a.written_prompt,
            tokenizer=tokenizer,
            kl_conditioning=a.kl_conditioning,
            seed=a.seed,
            dtype=a.base_dtype,
            device="cpu" if a.use_cpu else None,
            attention=model_init_kwargs.attention(a.model_init_kwargs),
            **adapter,
            **kl,
        )

    def _described_adapter(self, peft_config, own: dict) -> dict:
        """The adapters that `peft_config` describes; own: what the settings say of them, which must be nothing."""
        a = self.args
        defaults = {option.name: option.default for option in dataclasses.fields(a)}
        given = [name for name, value in own.items() if value != defaults[name]]
        if given:
            raise ConfigError(
                f"{', '.join(given)} in args and peft_config both describe the adapters; give one of the two"
            )
        adapter = lora_config.described(peft_config)
        carriers = Conditioning.parse(a.conditioning, a.carrier).carriers
        if "lora" not in carriers:
            if peft_config.target_modules is not None:
                raise ConfigError(
                    f"peft_config: target_modules is for 'lora'; conditioning={a.conditioning!r} has none"
                )
            adapter["target_modules"] = None
        return adapter

    def _check_loaded(self, model) -> None:
        """Settings of how a base model is loaded cannot change one that is there already: say so where they ask for another."""
        a = self.args
        if isinstance(model, str | Path):
            return
        if any((a.model_init_kwargs or {}).values()):
            raise ConfigError(
                "model_init_kwargs say how a model is loaded, and this one is loaded already; leave them out, or give its "
                "name"
            )
        base = model.model if isinstance(model, ConditionedPolicy) else model
        if a.bf16 and base.dtype != torch.bfloat16:
            raise ConfigError(
                f"bf16=True, and the model is loaded already, in {base.dtype}; load it with dtype=torch.bfloat16, or give "
                "its name"
            )
        if a.use_cpu and isinstance(model, ConditionedPolicy) and model.device.type != "cpu":
            raise ConfigError(f"use_cpu=True, and the policy is on {model.device}; move it: policy.to('cpu')")

    def _check_policy(self, policy: ConditionedPolicy) -> None:
        """A policy that is there already is not changed by settings that build one: say so where they ask for another."""
        a, spec = self.args, policy.spec
        fixed = ("conditioning", "carrier") if a.reward_weights is not None else ()
        for option in dataclasses.fields(a):
            if (
                option.name not in _BUILDING
                or getattr(a, option.name) == option.default
                or option.name in fixed
            ):
                continue
            asked = getattr(a, option.name)
            has = {
                "rank": set(spec.ranks),
                "lora_alpha": set(spec.lora_alphas),
                "target_modules": None,  # names in the policy are whole paths
            }.get(option.name, {getattr(spec, option.name, None)})
            if has is not None and has != {asked}:
                shown = ", ".join(map(str, sorted(map(str, has))))
                raise ConfigError(
                    f"args has {option.name}={asked!r}, the policy was built with {shown}; leave it out of args, or give the "
                    "model's name instead of a policy"
                )
        tells = "{kl}" in (spec.prompt_template or "{kl}")
        if (
            policy.conditioning.prompt
            and spec.kl_conditioning == "none"
            and not isinstance(a.kl, float)
            and not tells
        ):
            raise ConfigError(
                "the KL coefficient varies and nothing tells the policy: build it with {kl} in its prompt_template, or with "
                "kl_conditioning"
            )

    def _build_value_head(self) -> ValueHead:
        width = self.policy.backbone.head.module.weight.shape[-1]
        return ValueHead(width, len(self.rewards), self.args.seed).to(self.policy.device)

    def _create_optimizer(self) -> None:
        a = self.args
        if self._schedule_over_tokens is not None:
            return
        if self.optimizer is not None and self.value_head is not None and self.lr_scheduler is not None:
            raise ConfigError(
                "optimizers: a scheduler of your own knows nothing of the value head of baseline='value'; "
                "give the optimiser alone, or another baseline"
            )
        if self.optimizer is None:
            self.optimizer = FlatAdamW(
                list(self.policy.adapter_parameters().values()),
                lr=a.learning_rate,
                betas=(a.adam_beta1, a.adam_beta2),
                eps=a.adam_epsilon,
                weight_decay=a.weight_decay,
            )
        if self.value_head is not None:
            self.optimizer.add_param_group(
                {
                    "params": list(self.value_head.parameters()),
                    "lr": a.value_learning_rate,
                    "weight_decay": 0.0,
                }
            )
        self._schedule_over_tokens = self.lr_scheduler is None and self.budget.tokens is not None
        if self.lr_scheduler is None:
            whole = self.budget.tokens or self.budget.steps
            warmup = a.warmup_steps or math.ceil(a.warmup_ratio * whole)
            self.lr_scheduler = get_scheduler(
                a.lr_scheduler_type, self.optimizer, warmup, whole, a.lr_scheduler_kwargs
            )
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = (
            self.optimizer,
            self.lr_scheduler,
        )

    # -- one step -----------------------------------------------------------------------------------------------------

    def _advance_schedule(self) -> None:
        """The learning rate of the next step: by the steps done, or by the share of the token budget used."""
        if self._schedule_over_tokens:
            self.lr_scheduler.last_epoch = min(self.num_generated_tokens, self.budget.tokens) - 1
        self.lr_scheduler.step()

    def _update(self, generation: Generation) -> dict[str, float]:
        """Gradient of every micro-batch, clipping, one optimiser step; returns metrics."""
        a, drawn = self.args, generation.rollout
        first = generation.passes == 0
        results = []
        values = None if self.value_head is None else torch.zeros_like(drawn.logprobs)
        if isinstance(self.optimizer, FlatAdamW):
            self.optimizer.bind()
        with self.timer("update"):
            for here, part in micro_batches(generation, a):
                if results:
                    self.control = self.callback_handler.on_substep_end(a, self.state, self.control)
                result = backward(
                    self.policy, part, a, self.controller, self.value_head, generation.num_generated_tokens
                )
                if values is not None:
                    values[here] = result.values
                results.append((part.rollout, result))
        tokens = max(generation.num_generated_tokens, 1)
        found = self._update_metrics(results, tokens, first, generation.old_logprob is None)
        generation.passes += 1
        if first:
            generation.values = values
        with self.timer("optimizer"):
            found["grad_norm"] = self._clip()
            self.control = self.callback_handler.on_pre_optimizer_step(a, self.state, self.control)
            learning_rate = self.lr_scheduler.get_last_lr()[0]
            self.optimizer.step()
            self.control = self.callback_handler.on_optimizer_step(a, self.state, self.control)
            self._advance_schedule()
            self.optimizer.zero_grad(set_to_none=True)
            metrics = read_scalars(found)
        self._check_norm(metrics["grad_norm"])
        metrics["learning_rate"] = learning_rate
        if a.kl_estimator == "mixed":
            metrics["kl_mix"] = self.controller.mix
            self.controller.update(metrics.pop("mix_dot"), metrics.pop("mix_norm"))
        return metrics

    def _clip(self) -> torch.Tensor:
        """Clip the gradients; returns the norm of the adapters', unread where the optimiser itself leaves out a step whose
        norm is not finite."""
        limit = self.args.max_grad_norm or None
        if isinstance(self.optimizer, FlatAdamW):
            norm = self.optimizer.clip(limit)
        else:
            parameters = list(self.policy.adapter_parameters().values())
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
            self._check_norm(norm.item())
        if self.value_head is not None:
            parameters = list(self.value_head.parameters())
            torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
            if isinstance(
                self.optimizer, FlatAdamW
            ):  # whose step divides all gradients by the adapters' scale
                torch._foreach_mul_([p.grad for p in parameters], self.optimizer.grad_scale)
        return norm

    def _check_norm(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise RuntimeError(
                f"the gradient norm is {norm} at step {self.state.global_step}: a reward or log-prob is not "
                "finite, or the learning rate is too high; the parameters are those of the step before"
            )

    def _update_metrics(
        self, results: list, tokens: int, first: bool, on_policy: bool
    ) -> dict[str, torch.Tensor | float]:
        """Means over the step's micro-batches, which have `tokens` completion tokens. first: of the passes over
        these completions. on_policy: the policy is the one
        that sampled them; then also how far training is from what rollout said, otherwise what was clipped.

        Scalars that are still where they were computed, for the caller to read at once.
        """
        rows = sum(part.completion_ids.shape[0] for part, _ in results)
        found = {
            "loss": sum(r.loss for _, r in results),
            "entropy": sum(r.entropy.sum(dtype=torch.float64) for _, r in results) / tokens,
        }
        if all(r.kl is not None for _, r in results):
            kl = sum(r.kl.sum(dtype=torch.float64) for _, r in results)
            found |= {"kl": kl / tokens, "kl_sequence": kl / max(rows, 1)}
        if on_policy:
            # The ratio is one by construction: TRL logs as much.
            found |= dict.fromkeys(CLIP_RATIOS, 0.0)
            gaps = [torch.where(p.completion_mask, (r.logprob - p.logprobs).abs(), 0.0) for p, r in results]
            found |= {
                "sampling/sampling_logp_difference/mean": sum(gap.sum(dtype=torch.float64) for gap in gaps)
                / tokens,
                "sampling/sampling_logp_difference/max": torch.stack([gap.amax() for gap in gaps]).amax(),
            }
        else:
            found |= clip_ratios([r.coefficients for _, r in results])
        if self.value_head is not None:
            targets, predictions = (
                torch.cat([getattr(r, name) for _, r in results]) for name in ("targets", "predictions")
            )
            found |= {
                "value_loss": (targets - predictions).square().mean(),
                "explained_variance": explained_variance(predictions, targets),
            }
            if first:
                self.value_head.observe(targets)
        if self.args.kl_estimator == "mixed":
            found["mix_dot"], found["mix_norm"] = sum(r.mix_sums for _, r in results).unbind()
        return found

    # -- the run ------------------------------------------------------------------------------------------------------

    @property
    def budget(self) -> Budget:
        a = self.args
        per_step = a.rollout_size * a.max_completion_length
        return Budget(self.max_steps, a.max_generated_tokens, per_step, a.steps_per_rollout)

    @property
    def max_steps(self) -> int | None:
        """Optimiser steps of the whole run, None where generated tokens alone end it."""
        a = self.args
        if a.max_steps > 0:
            return a.max_steps
        if a.max_generated_tokens is not None:
            return None
        prompts = a.rollout_size // a.num_generations
        return max(1, math.ceil(a.num_train_epochs * len(self.train_dataset) / prompts)) * a.steps_per_rollout

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
        self.control = self.callback_handler.on_train_begin(a, state, self.control)
        started, first_step, losses = time.time(), state.global_step, []
        if a.eval_on_start and state.global_step == 0:
            self.evaluate()
        by_tokens = a.max_generated_tokens is not None
        bar = tqdm(
            total=a.max_generated_tokens if by_tokens else state.max_steps,
            initial=self.num_generated_tokens if by_tokens else state.global_step,
            desc="train",
            unit="token" if by_tokens else "step",
            unit_scale=by_tokens,
            disable=a.disable_tqdm,
            dynamic_ncols=True,
        )
        with bar, finish_step_on_interrupt() as interrupted:
            while not self._spent and not self.control.should_training_stop:
                try:
                    losses.append(self._step(bar))
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
        self.control = self.callback_handler.on_train_end(a, state, self.control)
        return TrainOutput(state.global_step, loss, metrics)

    @property
    def _spent(self) -> bool:
        return self.budget.spent(self.state.global_step, self.num_generated_tokens)

    def _prepare(self, resume_from_checkpoint: str | Path | bool | None) -> None:
        """Optimiser, state and log, from the start or from a checkpoint."""
        a, state = self.args, self.state
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(state, name, a.steps_of(name, self.max_steps))
        state.train_batch_size, state.num_train_epochs = (
            a.per_device_train_batch_size,
            math.ceil(a.num_train_epochs),
        )
        self._create_optimizer()
        self.metric_log, self._epoch_begun = MetricLog(), None
        self.callback_handler.train_dataloader = PromptLoader(
            self.train_dataset,
            a.rollout_size // a.num_generations,
            a.num_generations,
            a.steps_per_rollout * a.gradient_accumulation_steps,
            a.seed if a.shuffle_dataset else None,
        )
        read = self.policy.read_from
        if resume_from_checkpoint:
            path = checkpoints.resolve(a.output_dir, resume_from_checkpoint)
            read, self.run_id = [*read, path], checkpoints.read_state(path).get("run")
        run_folder.check_free(a.output_dir, self.run_id, a.overwrite_output_dir, read)
        if resume_from_checkpoint:
            self._restore(path)
        else:
            set_seed(a.seed)  # nothing here draws from the global generators, but reward functions may
        self.state.max_steps = self.budget.max_steps(self.state.global_step, self.num_generated_tokens)
        # Nothing in the folder has changed so far: what is refused leaves it as it was.
        run_folder.begin(a.output_dir, self.run_id)
        self._has_folder = True
        if a.log_completions:
            run_folder.note(a.output_dir, [Path(a.output_dir) / "completions.jsonl"])
        self._open_log(resumed=bool(resume_from_checkpoint))

    def _step(self, bar) -> float:
        a, state = self.args, self.state
        iteration = state.global_step % a.steps_per_rollout
        if iteration == 0:
            self._begin_epoch_if_new()  # an epoch that ends here may be evaluated: not a part of the step's time
        start = time.perf_counter()
        self.timer.seconds.clear()
        self.control = self.callback_handler.on_step_begin(a, state, self.control)
        if iteration == 0:
            generated = self._collect()
        self._generation = self._generations[iteration % a.rollout_steps]
        if iteration > 0 or self.partial is not None:
            self._generation.old_logprob = self._generation.rollout.logprobs
        metrics = self._update(self._generation)
        if iteration == 0:
            metrics |= self._generation.metrics
        state.global_step += 1
        state.max_steps = self.budget.max_steps(state.global_step, self.num_generated_tokens)
        state.epoch = self._epoch(state.global_step)
        metrics |= {"step_time": time.perf_counter() - start} | {
            f"time/{k}": v for k, v in self.timer.seconds.items()
        }
        self.metric_log.add(metrics)
        bar.update(1 if a.max_generated_tokens is None else generated if iteration == 0 else 0)
        shown = {"reward": f"{self._generation.metrics['reward']:.3f}"}
        if "kl_sequence" in metrics:
            shown["kl"] = f"{metrics['kl_sequence']:.2f}"
        bar.set_postfix(**shown, refresh=False)
        self.control = self.callback_handler.on_step_end(a, state, self.control)
        self._log_evaluate_save()
        return metrics["loss"]

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

    def _collect(self) -> int:
        """The completions of the steps up to the next rollout; returns how many tokens were drawn."""
        a, state = self.args, self.state
        self._generation = self._generations = None  # what they keep would lie beside the next rollout
        source = self.collector if self.partial is None else self.partial
        whole = source.training_batch(self.train_dataset, state.global_step, state)
        state.num_input_tokens_seen += whole.num_tokens
        self.num_generated_tokens += whole.new_tokens
        if a.rollout_selection != "none" or a.token_selection != "none":
            with self.timer("selection"):
                whole = select(self.policy, whole, a, state.global_step / max(state.max_steps, 1))
        self._generations = whole.split(a.rollout_steps)
        return whole.new_tokens

    def _position(self, step: int) -> float:
        """How far in the endless stream of prompts optimiser step `step` begins: at a rollout, its first prompt's place."""
        a = self.args
        return step * (a.rollout_size // a.num_generations) / a.steps_per_rollout

    def _epoch(self, step: int) -> float:
        return self.train_dataset.epoch(self._position(step), step / max(self.state.max_steps, 1))

    def _begin_epoch_if_new(self) -> None:
        epoch = self.train_dataset.epoch_number(int(self._position(self.state.global_step)))
        if epoch != self._epoch_begun:
            self._end_epoch()
            self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
            self._epoch_begun = epoch

    def _end_epoch(self) -> None:
        if self._epoch_begun is not None:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._log_evaluate_save()

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean metrics over an evaluation set, conditions drawn by the sampler from a fixed seed; logged under `eval_`.

        eval_dataset: instead of the trainer's own; the name of one of those, where they have names. Several are evaluated one
        after another, under `eval_<name>_`, and returned together. ignore_keys: transformers'; refused, there are none.
        """
        if ignore_keys:
            raise ConfigError(
                f"ignore_keys={ignore_keys!r}: an evaluation keeps no outputs of the model; leave it out"
            )
        if isinstance(eval_dataset, str):
            if not isinstance(self.eval_dataset, dict) or eval_dataset not in self.eval_dataset:
                known = (
                    ", ".join(self.eval_dataset)
                    if isinstance(self.eval_dataset, dict)
                    else "none with a name"
                )
                raise ConfigError(f"eval_dataset={eval_dataset!r}: there are {known}")
            dataset = self.eval_dataset[eval_dataset]
        else:
            dataset = self.eval_dataset if eval_dataset is None else self._evaluation_prompts(eval_dataset)
        if dataset is None:
            raise ConfigError("evaluate() needs an eval_dataset")
        if isinstance(dataset, dict):
            parts = [self._evaluate(part, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {name: value for part in parts for name, value in part.items()}
        return self._evaluate(dataset, metric_key_prefix)

    def _evaluate(self, dataset: Prompts, prefix: str) -> dict[str, float]:
        a, log, started, rows, batches = self.args, MetricLog(), time.time(), 0, 0
        group = a.evaluation_group
        per_batch = max(1, a.per_device_eval_batch_size // group)
        self.callback_handler.eval_dataloader = PromptLoader(dataset, per_batch, group, drop_last=False)
        for start, batch in dataset.in_order(per_batch):
            rows, batches = rows + len(batch.prompts), batches + 1
            generation = self.collector.evaluation_batch(batch, start, self.state)
            stats = score(
                self.policy,
                generation.rollout,
                generation.conditions,
                outputs=("logprob", "kl", "entropy"),
                temperature=a.temperature,
            )
            tokens = generation.rollout.completion_mask.sum().item()
            log.add(
                generation.metrics
                | {
                    "kl": stats.kl.sum().item() / tokens,
                    "entropy": stats.entropy.sum().item() / tokens,
                    "kl_sequence": stats.kl.sum(-1).mean().item(),
                }
            )
            self.control = self.callback_handler.on_prediction_step(a, self.state, self.control)
        metrics = {f"{prefix}_{name}": value for name, value in log.drain().items()}
        metrics |= speed_metrics(prefix, started, rows * group, batches)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(a, self.state, self.control, metrics)
        return metrics

    # -- logs and files -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Append to log.jsonl and the state's history, and tell the callbacks. `logs` gets the epoch, as in transformers."""
        logs["epoch"] = round(self.state.epoch or 0.0, 4)
        entry = {**logs, "step": self.state.global_step}
        self.state.log_history.append(entry)
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        append_text(Path(self.args.output_dir) / "log.jsonl", json.dumps(entry) + "\n")
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _open_log(self, resumed: bool) -> None:
        """Start log.jsonl anew, or keep of it what happened up to the checkpoint."""
        history = self.state.log_history if resumed else []
        write_text(
            Path(self.args.output_dir) / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in history)
        )

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> Path:
        """Write the policy to `output_dir`, by default <args.output_dir>/policy."""
        run = Path(self.args.output_dir)
        path = run / "policy" if output_dir is None else Path(output_dir)
        if output_dir is None and not self._has_folder:
            run_folder.check_free(run, self.run_id, self.args.overwrite_output_dir)
        if path.resolve().is_relative_to(run.resolve()):
            with run_folder.writing(run, path.resolve().relative_to(run.resolve())) as temporary:
                self.policy.write_files(temporary)
        else:
            self.policy.save_pretrained(path)
        return path

    _has_folder = False  # output_dir holds the run of this trainer
    _save_pending = False

    def _save_when_whole(self) -> None:
        """Write a checkpoint, or remember to: the steps on one rollout are not cut in two."""
        self._save_pending = self.state.global_step % self.args.steps_per_rollout != 0
        if self._save_pending:
            return
        self.state.stateful_callbacks = callback_states.exported(self.callback_handler.callbacks)
        checkpoints.save(
            self.args.output_dir,
            self.state.global_step,
            self.run_id,
            self.policy,
            self.optimizer,
            {
                "config": self.args.to_dict(),
                "scheduler": self.lr_scheduler.state_dict(),
                "sampler": self.sampler.state_dict(),
                "mix_controller": self.controller.state_dict(),
                "metric_log": self.metric_log.state_dict(),
                "trainer": dataclasses.asdict(self.state),
                "data": self.train_dataset.state_dict(),
                "num_generated_tokens": self.num_generated_tokens,
            },
            self.args.save_total_limit,
            self.value_head,
            None if self.partial is None else self.partial.state_dict(),
        )
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _restore(self, path: Path) -> None:
        saved = checkpoints.read_state(path)
        # A setting that the checkpoint does not know had no other value then than its default.
        before = {**CLPConfig().to_dict(), **saved["config"]}
        changed = [
            name
            for name, value in before.items()
            if name not in WITHOUT_EFFECT and getattr(self.args, name, None) != value
        ]
        if changed:
            raise ConfigError(
                f"{path} was written with other settings for {', '.join(changed)}; resume with the same ones "
                "(or start a new run from its policy folder)"
            )
        checkpoints.load(path, self.policy, self.optimizer, self.value_head)
        with checkpoints.restoring(path):
            self._restore_state(path, saved)

    def _restore_state(self, path: Path, saved: Mapping) -> None:
        self.train_dataset.load_state_dict(saved.get("data", {}))
        if self.partial is not None:
            self.partial.load_state_dict(checkpoints.load_unfinished(path), self.train_dataset)
        self.lr_scheduler.load_state_dict(saved["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr()):
            group["lr"] = rate
        self.sampler.load_state_dict(saved["sampler"])
        self.controller.load_state_dict(saved["mix_controller"])
        self.metric_log.load_state_dict(saved["metric_log"])
        self.num_generated_tokens = saved.get("num_generated_tokens", 0)
        limits = {
            k: getattr(self.state, k)
            for k in ("logging_steps", "eval_steps", "save_steps", "num_train_epochs")
        }
        self.state = TrainerState(**{**saved["trainer"], **limits})
        callback_states.restore(self.callback_handler.callbacks, self.state.stateful_callbacks)
