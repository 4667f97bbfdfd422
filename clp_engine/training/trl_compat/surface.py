"""The attributes beside training that scripts and callbacks for transformers' Trainer and TRL's expect of a trainer.

An attribute that those trainers have and this one lacks raises an AttributeError with the reason, so that `hasattr` is False.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from clp_engine.core.errors import ConfigError

ABSENT = {
    "push_to_hub": "write what should be shared, policy.export_adapter(path, weights=...) or policy.merge(weights=...)."
    "save_pretrained(path), and upload that folder with huggingface_hub.upload_folder",
    "create_model_card": "nothing is pushed to the Hub from here; run.json and report.md describe a run",
    "init_hf_repo": "nothing is pushed to the Hub from here",
    "predict": "use evaluate(), or policy.generate(prompts, weights=...)",
    "prediction_step": "use evaluate()",
    "compute_loss": "a loss is put together in clp_engine.training.stepping and clp_engine.objectives; subclassing the trainer "
    "does not change it",
    "training_step": "a step is CLPTrainer._step; callbacks hear its parts",
    "hyperparameter_search": "start a run for each setting: clp-engine train config.yaml --learning_rate ...",
    "ref_model": "the reference is the policy with every adapter off, unless trainer.reference is another",
    "model_wrapped": "the model is not wrapped; use trainer.model",
    "tools": "prompts and completions are text of one turn; there are no tools",
    "vllm_generation": "use_vllm=True draws by trainer.rollout_engine; it has no generate of its own",
    "environments": "prompts come from a dataset; there are no environments",
}


def refuse(reward_funcs: Any, quantization_config: Any, **absent: Any) -> None:
    """Raises ConfigError for arguments of GRPOTrainer that cannot be honoured, and for missing reward functions."""
    if reward_funcs is None:
        raise ConfigError("reward_funcs is missing; give at least one reward function")
    if quantization_config is not None:
        raise ConfigError(
            "quantization_config: quantised base models are not supported; load the model in bfloat16"
        )
    for name, value in absent.items():
        if value:
            raise ConfigError(
                f"{name}: completions are text, without calls of tools; draw several turns with rollout_func, whose env_mask "
                "says which tokens an environment wrote"
            )


def callback_handler(report_to: Any, callbacks: Any, *parts: Any) -> CallbackHandler:
    """The trainer's callbacks: transformers' own, the reporting callbacks, and the user's.

    parts: model, tokenizer, optimiser and schedule, which callbacks receive. Raises ConfigError for a `report_to` that
        transformers does not know.
    """
    try:
        reporting = get_reporting_integration_callbacks(report_to)
    except ValueError as error:  # the message lists the known integrations
        raise ConfigError(f"report_to={report_to!r}: {error}") from error
    return CallbackHandler([DefaultFlowCallback, *reporting, *(callbacks or [])], *parts)


@dataclass(frozen=True)
class OneProcess:
    """The part of accelerate.Accelerator that scripts ask a trainer for, for a single process."""

    device: torch.device
    is_main_process: bool = True
    is_local_main_process: bool = True
    is_last_process: bool = True
    process_index: int = 0
    local_process_index: int = 0
    num_processes: int = 1

    def print(self, *values: Any, **options: Any) -> None:
        print(*values, **options)

    def wait_for_everyone(self) -> None:
        """Returns at once: there is no other process."""

    def unwrap_model(self, model: Any, *_: Any, **__: Any) -> Any:
        return model

    def gather(self, values: Any) -> Any:
        return values

    gather_for_metrics = gather

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"trainer.accelerator has no {name}: one process does not go through accelerate here; there are "
            f"{', '.join(sorted(n for n in dir(type(self)) if not n.startswith('_')))}, device"
        )


class ScriptSurface:
    """A mixin of CLPTrainer, which has policy, tokenizer, args and callback_handler."""

    callback_handler: CallbackHandler

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> TrainerCallback | None:
        """Remove a callback, or the first one of a class, and return it. None if there is none."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        self.callback_handler.remove_callback(callback)

    @property
    def model(self):
        """The conditioned model itself. Use `policy` to generate under weights, and to save."""
        return self.policy.model

    @property
    def processing_class(self):
        return self.tokenizer

    @property
    def accelerator(self) -> Any:
        """accelerate's Accelerator where there are several processes."""
        return self.parallel.accelerator or OneProcess(self.policy.device)

    def is_world_process_zero(self) -> bool:
        return self.state.is_world_process_zero

    def is_local_process_zero(self) -> bool:
        return self.state.is_local_process_zero

    def end(self) -> None:
        """Does nothing: the reporting callbacks close their trackers after training, and processes part when they end."""

    def __getattr__(self, name: str) -> Any:
        if name in ABSENT:
            raise AttributeError(f"CLPTrainer has no {name}: {ABSENT[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
