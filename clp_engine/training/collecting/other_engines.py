"""Engines that a run's settings or arguments ask for, instead of the policy's own: vLLM, or a user's function."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from clp_engine.core.errors import ConfigError
from clp_engine.rollouts.engines.vllm.colocated import Colocated
from clp_engine.rollouts.engines.vllm.draws import Vllm
from clp_engine.rollouts.engines.vllm.engine import VllmEngine
from clp_engine.rollouts.engines.vllm.server import Server
from clp_engine.rollouts.types import RolloutEngine
from clp_engine.training.collecting.rollout_function import RolloutFunction
from clp_engine.training.parallel.processes import Parallel
from clp_engine.training.settings.config import CLPConfig

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy

logger = logging.getLogger(__name__)


@runtime_checkable
class Publishing(Protocol):
    """What an engine has whose completions come from elsewhere, where the policy has to be sent."""

    def publish(self) -> None:
        """Send the policy as it is. Of several processes every one calls it before any draws; a single one need not."""

    def close(self) -> None:
        """Let go of what is held elsewhere, at the end of a training."""


def engine_for(
    a: CLPConfig,
    policy: ConditionedPolicy,
    parallel: Parallel,
    rollout_func: Callable | None,
    trainer: Any,
) -> RolloutEngine | None:
    """The engine that was asked for; None: the policy's own. Raises ConfigError where it cannot draw from this policy."""
    if rollout_func is not None and a.use_vllm:
        raise ConfigError(
            "rollout_func and use_vllm were both given; give one (a function may ask a vLLM server itself)"
        )
    if rollout_func is None and not a.use_vllm:
        return None
    if not a.vllm_importance_sampling_correction:
        logger.warning(
            "vllm_importance_sampling_correction=False: completions are trained on as if the policy's own kernels had drawn "
            "them; the gradient is biased by the gap that sampling/sampling_logp_difference shows"
        )
    if rollout_func is not None:
        return RolloutFunction(rollout_func, policy, a, trainer)
    return _vllm(a, policy, parallel)


def _vllm(a: CLPConfig, policy: ConditionedPolicy, parallel: Parallel) -> VllmEngine:
    if policy.model.config.is_encoder_decoder:
        raise ConfigError(
            f"use_vllm=True: vLLM has no LoRA for {type(policy.model).__name__}, an encoder-decoder; leave it out"
        )
    if whole := sorted(set(policy.conditioning.carriers) - {"lora", "logit"}):
        raise ConfigError(
            f"use_vllm=True: deltas of whole weights ({whole[0]}) have no rank, and a request's weighting in vLLM is one of "
            "low-rank factors; use conditioning='lora', or use_vllm=False"
        )
    if a.partial_rollouts and a.stop_strings:
        raise ConfigError(
            "use_vllm=True with partial_rollouts and stop_strings: vLLM looks for a stop string in new text alone, and would "
            "miss one that a part before began; leave one of them out"
        )
    vllm: Vllm
    if a.vllm_mode == "server":
        vllm = Server(a.vllm_url, a.vllm_server_timeout, a.rollout_rows or 256)
    else:
        vllm = _colocated(a, policy, parallel)
    folder = Path(a.vllm_stack_dir) if a.vllm_stack_dir else Path(a.output_dir) / "vllm"
    return VllmEngine(
        policy, vllm, policy.export_stack, folder, parallel.by_main if parallel.count > 1 else None
    )


def _colocated(a: CLPConfig, policy: ConditionedPolicy, parallel: Parallel) -> Colocated:
    if parallel.count > 1:
        raise ConfigError(
            f"vllm_mode='colocate' with {parallel.count} processes: each would start a vLLM of its own on its device; start "
            "`vllm serve` and give vllm_mode='server'"
        )
    base = policy.spec.base_model
    if not base:
        raise ConfigError(
            "vllm_mode='colocate': the base model is one in memory, which vLLM cannot read; save it (save_pretrained) and give "
            "its folder as model="
        )
    if a.vllm_enable_sleep_mode and policy.device.type == "cpu":
        raise ConfigError("vllm_enable_sleep_mode=True: on a CPU vLLM has nothing to leave; use False")
    more: dict[str, Any] = dict(a.vllm_engine_args or {})  # type: ignore[arg-type]
    if a.rollout_rows is not None:
        more.setdefault("max_num_seqs", a.rollout_rows)
    return Colocated(
        {
            "model": base,
            "dtype": str(policy.model.dtype).removeprefix("torch."),
            "gpu_memory_utilization": a.vllm_gpu_memory_utilization,
            "max_model_len": a.vllm_max_model_length,
            **more,
        },
        a.vllm_enable_sleep_mode,
    )


def scored_again(a: CLPConfig) -> bool:
    """Whether the policy's own log-probs of another engine's completions are needed before its first pass over them."""
    return a.steps_per_rollout > 1 or a.rollout_selection != "none"
