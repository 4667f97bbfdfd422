"""The settings of rollouts from vLLM, and of the correction for completions that another program drew. Names are TRL's."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from clp_engine.core.errors import ConfigError
from clp_engine.objectives.importance import CORRECTIONS, Correction

MODES = ("colocate", "server")
# Where and how vLLM is reached: a resumed run may change these.
WITHOUT_EFFECT = frozenset(
    """vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_stack_dir vllm_enable_sleep_mode
    vllm_gpu_memory_utilization""".split()
)
_OF_SERVER = ("vllm_server_base_url", "vllm_stack_dir")
_OF_COLOCATED = ("vllm_enable_sleep_mode", "vllm_max_model_length", "vllm_engine_args")
# Arguments of vllm.LLM that other settings give, or that the engine relies on.
_GIVEN = {
    "model": "the policy's base model",
    "dtype": "bf16",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "max_model_len": "vllm_max_model_length",
    "enable_sleep_mode": "vllm_enable_sleep_mode",
    **dict.fromkeys(
        ("enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank"), "the stack of the policy's adapters"
    ),
    "logprobs_mode": "processed_logprobs, those of sampling",
    "tensor_parallel_size": "1 in this process: for more start a server, vllm_mode='server'",
}


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class VllmSettings:
    """Fields of `CLPConfig`."""

    use_vllm: bool = option(False, "draw the completions by vLLM, as vllm_mode says")
    vllm_mode: str = option(
        "colocate", "vLLM in this process (colocate), or a `vllm serve` that runs elsewhere (server)"
    )
    vllm_server_base_url: str | None = option(
        None, "address of the server, as http://localhost:8000; default vllm_server_host and _port"
    )
    vllm_server_host: str = option("0.0.0.0", "host of the server")
    vllm_server_port: int = option(8000, "port of the server")
    vllm_server_timeout: float = option(
        240.0, "seconds that a server which does not answer is waited for, at the start and within a step"
    )
    vllm_stack_dir: str | None = option(
        None, "folder that trainer and server share, for the adapters of each step; default <output_dir>/vllm"
    )
    vllm_enable_sleep_mode: bool = option(
        False, "vLLM in this process leaves the device while the policy learns (GPUs alone)"
    )
    vllm_gpu_memory_utilization: float = option(0.3, "share of the device's memory for vLLM in this process")
    vllm_max_model_length: int | None = option(
        None, "most tokens of prompt and completion in vLLM in this process; default the model's own"
    )
    vllm_engine_args: dict[str, Any] | str | None = option(
        None, "further arguments of vllm.LLM in this process, such as max_num_seqs or enforce_eager"
    )
    vllm_importance_sampling_correction: bool = option(
        True,
        "multiply the gradient by the ratio of the policy to what another program (vLLM, rollout_func) drew with; without it "
        "the gradient is biased by their gap, which is logged",
    )
    vllm_importance_sampling_mode: str = option(
        "token_truncate",
        "ratio of a token or of its completion, truncated at the bounds or left out beyond them: token_truncate, token_mask, "
        "sequence_truncate, sequence_mask",
    )
    vllm_importance_sampling_clip_max: float | None = option(3.0, "upper bound of that ratio; none with null")
    vllm_importance_sampling_clip_min: float | None = option(None, "lower bound of that ratio")

    @property
    def vllm_url(self) -> str:
        return self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"

    @property
    def correction(self) -> Correction | None:
        if not self.vllm_importance_sampling_correction:
            return None
        return Correction(
            self.vllm_importance_sampling_mode,
            self.vllm_importance_sampling_clip_min,
            self.vllm_importance_sampling_clip_max,
        )


def check(c: Any) -> None:
    """Raises ConfigError for settings of vLLM that contradict each other."""
    for name, allowed in (("vllm_mode", MODES), ("vllm_importance_sampling_mode", CORRECTIONS)):
        if getattr(c, name) not in allowed:
            raise ConfigError(f"{name}={getattr(c, name)!r}: expected one of {', '.join(allowed)}")
    low, high = c.vllm_importance_sampling_clip_min, c.vllm_importance_sampling_clip_max
    if low is not None and high is not None and low >= high:
        raise ConfigError(
            f"vllm_importance_sampling_clip_min={low:g}: expected less than vllm_importance_sampling_clip_max = {high:g}"
        )
    if c.correction is not None and c.correction.mode.endswith("truncate") and low is None and high is None:
        raise ConfigError(
            f"vllm_importance_sampling_mode={c.correction.mode!r} truncates at a bound; give "
            "vllm_importance_sampling_clip_max"
        )
    others = [
        name
        for name in (_OF_COLOCATED if c.vllm_mode == "server" else _OF_SERVER)
        if getattr(c, name) not in (None, False)
    ]
    if c.use_vllm and others:
        raise ConfigError(
            f"{others[0]} is for vllm_mode={'colocate' if c.vllm_mode == 'server' else 'server'!r}; got "
            f"vllm_mode={c.vllm_mode!r}"
        )
    for name, instead in _GIVEN.items():
        if name in (c.vllm_engine_args or {}):
            raise ConfigError(f"vllm_engine_args: {name} is given already ({instead}); leave it out")
    if c.vllm_engine_args is not None:
        try:
            json.dumps(c.vllm_engine_args)
        except (TypeError, ValueError):
            raise ConfigError(
                "vllm_engine_args: expected plain values, which a run's record can hold"
            ) from None
