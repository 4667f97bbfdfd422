"""What a trainer is made of, built from its arguments and settings: prompts, weighting, policy, objective."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from clp_engine.core.conditions import check_objectives
from clp_engine.core.errors import ConfigError
from clp_engine.core.sizes import BOOKKEEPING, check_size
from clp_engine.data import chat_template
from clp_engine.data.prompts import Prompts
from clp_engine.data.rewards import RewardSet
from clp_engine.data.streams import PromptStream, prompts_of
from clp_engine.models import fingerprint
from clp_engine.models.base import holds_adapters
from clp_engine.models.forms import Conditioning
from clp_engine.objectives.objective import Objective
from clp_engine.objectives.policy_gradient import PolicyGradient
from clp_engine.objectives.value_head import ValueHead
from clp_engine.objectives.weightings import Weighting, build_sampler
from clp_engine.policy.peft import lora_config
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.policy.references import Reference
from clp_engine.rollouts.engines.choice import detours
from clp_engine.rollouts.types import RolloutEngine
from clp_engine.training.collecting.collector import CollectorParts
from clp_engine.training.collecting.other_engines import scored_again
from clp_engine.training.collecting.planning import Planner
from clp_engine.training.collecting.rewarding import Rewarding
from clp_engine.training.metrics import PhaseTimer
from clp_engine.training.parallel.processes import Parallel
from clp_engine.training.settings.config import CLPConfig
from clp_engine.training.trl_compat import model_init_kwargs

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


def check(
    a: CLPConfig, rewards: RewardSet, weighting: Weighting | None, objective: Objective | None = None
) -> None:
    """Before anything is loaded: one source of weightings, names that can be objectives, groups that the objective can compare,
    rollouts that fit this machine."""
    if objective is not None and objective.needs.group and a.num_generations < 2:
        raise ConfigError(
            f"{type(objective).__name__} compares completions of one prompt; num_generations must be at least 2"
        )
    if weighting is not None and a.reward_weights is not None:
        raise ConfigError(
            "reward_weights fix the objective, and condition_sampler draws it; give one of the two"
        )
    check_objectives(rewards.names)
    check_size(
        f"a rollout of {a.rollout_size:,} completions of up to max_completion_length = {a.max_completion_length:,} tokens",
        a.rollout_size * a.max_completion_length * BOOKKEEPING,
        "cuda" if torch.cuda.is_available() and not a.use_cpu else "cpu",
    )


def tokenizer_of(policy: ConditionedPolicy, given, a: CLPConfig):
    """The tokenizer that was given, else the policy's own, with the values for its chat template."""
    tokenizer = given or policy.tokenizer
    if tokenizer is None:
        raise ConfigError("no tokenizer: give processing_class=")
    return chat_template.with_values(tokenizer, a.chat_template_kwargs)


def training_prompts(rows, a: CLPConfig, policy: ConditionedPolicy, tokenizer) -> Prompts:
    seed = a.seed if a.shuffle_dataset else None
    prompts = prompts_of(
        rows, tokenizer, a.max_prompt_length, seed, a.skip_bad_rows, _prompt_check(a, policy, tokenizer)
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


def evaluation_prompts(
    rows, a: CLPConfig, policy: ConditionedPolicy, tokenizer
) -> Prompts | dict[str, Prompts] | None:
    if isinstance(rows, Mapping):
        return {str(name): evaluation_prompts(part, a, policy, tokenizer) for name, part in rows.items()}
    if rows is None:
        return None
    return prompts_of(
        rows,
        tokenizer,
        a.max_prompt_length,
        skip_bad_rows=a.skip_bad_rows,
        check=_prompt_check(a, policy, tokenizer),
    )


def _prompt_check(a: CLPConfig, policy: ConditionedPolicy, tokenizer):
    """Raises ConfigError where the model cannot read a prompt and its completion."""

    def check(ids: list[int], where: str) -> None:
        policy.room.check_prompt(ids, a.max_completion_length, where, tokenizer)

    return check


def build_weighting(a: CLPConfig, rewards: RewardSet) -> Weighting:
    kind, fixed = a.weight_sampler, a.fixed_weights
    if a.reward_weights is not None:
        kind, fixed = "fixed", _shares(a, rewards)
    many = len(rewards) > 1 and kind != "fixed"
    try:
        return build_sampler(
            len(rewards),
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


def _shares(a: CLPConfig, rewards: RewardSet) -> list[float]:
    """w, whose entries sum to 1; `reward_scale` has the rest."""
    reward_weights = a.reward_weights
    if len(reward_weights) != len(rewards):
        raise ConfigError(
            f"reward_weights has {len(reward_weights)} entries for {len(rewards)} rewards "
            f"({', '.join(rewards.names)}); expected one each"
        )
    if len(reward_weights) > 1:
        logger.info(
            "reward_weights=%s: one objective for the whole run, as in TRL. Without them one run trains a model that is "
            "steerable between %s",
            reward_weights,
            ", ".join(rewards.names),
        )
    return [weight / a.reward_scale for weight in reward_weights]


def build_policy(
    model, tokenizer, peft_config, a: CLPConfig, rewards: RewardSet, min_kl: float
) -> ConditionedPolicy:
    """The policy that `model` is, or that is built on it, on the device that it is trained on. One that is to be sharded is
    left in the host's memory: `shard` moves it layer by layer, as it may fit in no GPU."""
    policy = _policy_of(model, tokenizer, peft_config, a, rewards, min_kl)
    if policy.device.type == "cpu" and _on_gpu(a) and a.sharding is None:
        policy.to("cuda")
    return policy


def _on_gpu(a: CLPConfig) -> bool:
    return torch.cuda.is_available() and not a.use_cpu


def say_detours(policy: ConditionedPolicy) -> None:
    """Warn of what is slower for this policy, on the device and in the pieces that it is trained in."""
    for detour in detours(policy):
        logger.warning("%s: %s", type(policy.model).__name__, detour)


def _policy_of(
    model, tokenizer, peft_config, a: CLPConfig, rewards: RewardSet, min_kl: float
) -> ConditionedPolicy:
    kl = {
        "min_kl": min_kl,
        "kl_is_beta": a.kl_is_beta,
        "default_kl": a.default_kl,
    }
    _check_loaded(model, a)
    if isinstance(model, ConditionedPolicy):
        if peft_config is not None:
            raise ConfigError(
                "peft_config was given with a ConditionedPolicy, which has its adapters already; leave one out"
            )
        if model.objectives != rewards.names:
            raise ConfigError(
                f"the policy's objectives are {', '.join(model.objectives)}, the rewards are "
                f"{', '.join(rewards.names)}; they must be the same in the same order "
                "(reward_funcs may be a mapping from names to functions)"
            )
        _check_policy(model, a)
        model.spec = dataclasses.replace(model.spec, **kl)
        return model
    if peft_config is not None and not Conditioning.parse(a.conditioning, a.carrier).has_ranks:
        raise ConfigError(f"peft_config describes low-rank factors; conditioning={a.conditioning!r} has none")
    adapter = {"rank": a.rank, "lora_alpha": a.lora_alpha, "target_modules": a.target_modules}
    if holds_adapters(model):
        if peft_config is not None:
            raise ConfigError("peft_config was given with a model that holds adapters already; leave one out")
        # The adapters' own rank, unless another was asked for.
        adapter |= {"rank": None if a.rank == CLPConfig.rank else a.rank}
    elif peft_config is not None:
        adapter = _described_adapter(peft_config, adapter, a)
    dtype, device = a.base_dtype, "cpu" if a.use_cpu else None
    if a.sharding is not None and _on_gpu(a) and isinstance(model, str | Path):
        dtype, device = dtype or "auto", "cpu"
    return ConditionedPolicy.from_pretrained(
        model,
        rewards.names,
        conditioning=a.conditioning,
        carrier=a.carrier,
        prompt_template=a.written_prompt,
        tokenizer=tokenizer,
        kl_conditioning=a.kl_conditioning,
        seed=a.seed,
        dtype=dtype,
        device=device,
        attention=model_init_kwargs.attention(a.model_init_kwargs),
        **adapter,
        **kl,
    )


def _described_adapter(peft_config, own: dict, a: CLPConfig) -> dict:
    """The adapters that `peft_config` describes; own: what the settings say of them, which must be nothing."""
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


def _check_loaded(model, a: CLPConfig) -> None:
    """Settings of how a base model is loaded cannot change one that is there already: say so where they ask for another."""
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


def _check_policy(policy: ConditionedPolicy, a: CLPConfig) -> None:
    """A policy that is there already is not changed by settings that build one: say so where they ask for another."""
    spec = policy.spec
    fixed = ("conditioning", "carrier") if a.reward_weights is not None else ()
    for option in dataclasses.fields(a):
        if option.name not in _BUILDING or getattr(a, option.name) == option.default or option.name in fixed:
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


def build_collector_parts(
    a: CLPConfig,
    policy: ConditionedPolicy,
    rewards: RewardSet,
    objective: Objective,
    reference: Reference,
    weighting: Weighting,
    timer: PhaseTimer,
    parallel: Parallel,
    engine: RolloutEngine | None = None,
) -> CollectorParts:
    rewarding = Rewarding(
        policy,
        rewards,
        policy.tokenizer,
        objective,
        reference,
        weighting,
        a.micro_batching,
        timer,
        a.reward_scale,
        Path(a.output_dir) / "completions.jsonl" if a.log_completions else None,
        parallel,
        a.rollout_settings.prompts_per_step,
    )
    planner = Planner(weighting, a.rollout_settings)
    return CollectorParts(policy, planner, rewarding, timer, parallel, engine, scored_again(a))


@torch.no_grad()
def sums(policy: ConditionedPolicy) -> list[float]:
    """Sums of the base model's and of the trained parameters, by which copies of one policy are told from another."""
    trained = policy.adapter_parameters().values()
    base = sum(found.sum for found in fingerprint.of(policy.model).values())
    return [base, float(sum(p.sum(dtype=torch.float32).cpu() for p in trained))]


def build_objective(a: CLPConfig, policy: ConditionedPolicy) -> PolicyGradient:
    """With the value head of baseline "value", on the policy's device."""
    head = None
    if a.baseline == "value":
        width = policy.backbone.head.module.weight.shape[-1]
        head = ValueHead(width, len(policy.objectives), a.seed).to(policy.device)
    return PolicyGradient(a.loss_settings, head)
