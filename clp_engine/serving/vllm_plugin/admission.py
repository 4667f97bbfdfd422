"""In the process that takes requests: a request's weights become the coefficients of its gate, or its error.

A request that fails here never reaches the engine, so that the others of its batch go on. The coefficients travel with the
request (`SamplingParams.extra_args`). The prefix cache knows an adapter's name and path; keys and values also depend on the
coefficients and on the version of the stack, which are added to the request's cache salt.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from clp_engine.core.conditions import BLEND_FILE
from clp_engine.core.errors import ConfigError
from clp_engine.serving.vllm_plugin import stack
from clp_engine.serving.vllm_plugin.patching import Patch

GATE = "clp-engine gate"  # the key of extra_args under which an admitted request has (coefficients, ranks)
_KEYS = (GATE, stack.WHOLE, stack.WEIGHTS, stack.KL)


def admit(request: Any, directory: str | None) -> None:
    """Check an EngineCoreRequest and complete it. directory: of its adapter, None for the base model.

    Raises ConfigError. A request without weights gets the stack's default; one for the base model or a plain adapter must have
    none, and stays as it is.
    """
    params = request.sampling_params
    extra = params.extra_args if params is not None else None
    if extra and GATE in extra:
        raise ConfigError(
            f"unknown field {GATE!r}; expected {stack.WHOLE}, or {stack.WEIGHTS} and {stack.KL}"
        )
    wanted = stack.asked(extra)
    found = None if directory is None else stack.read(directory)
    if found is None:
        if wanted is not None:
            served = "the base model" if directory is None else f"an adapter without {BLEND_FILE}"
            raise ConfigError(
                f"this request has weights or a KL coefficient, and {served} has no objectives; name a stack as its model, or "
                "leave them out"
            )
        return
    coefficients = found.coefficients(**(wanted or {}))
    if params is None:
        raise ConfigError("a stack completes texts; pooling has no weighting")
    others = {key: value for key, value in (extra or {}).items() if key not in _KEYS}
    # The caller's dict may be shared by many requests.
    params.extra_args = {**others, GATE: [list(coefficients), list(found.ranks)]}
    kept = f"{found.version} {' '.join(map(float.hex, coefficients))}"
    request.cache_salt = f"{request.cache_salt or ''}clp-engine {sha256(kept.encode()).hexdigest()[:32]}"


def _process_inputs(original):
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.utils import get_adapter_absolute_path

    @functools.wraps(original)
    def process_inputs(self, *args, **kwargs):
        request = original(self, *args, **kwargs)
        adapter = request.lora_request
        try:
            admit(request, None if adapter is None else get_adapter_absolute_path(adapter.lora_path))
        except ConfigError as error:
            raise VLLMValidationError(str(error), parameter=stack.WHOLE) from error
        return request

    return process_inputs


def _to_beam_search_params(original):
    from vllm.exceptions import VLLMValidationError

    @functools.wraps(original)
    def to_beam_search_params(self, *args, **kwargs):
        if isinstance(self.vllm_xargs, Mapping) and any(key in self.vllm_xargs for key in _KEYS):
            raise VLLMValidationError(
                "vLLM's beam search passes no vllm_xargs on; export the weighting (export_adapter), or no use_beam_search",
                parameter=stack.WHOLE,
            )
        return original(self, *args, **kwargs)

    return to_beam_search_params


def patches() -> list[Patch]:
    process_inputs = (
        *("self", "request_id", "prompt", "params", "supported_tasks", "arrival_time", "lora_request"),
        *(
            "tokenization_kwargs",
            "trace_headers",
            "priority",
            "data_parallel_rank",
            "resumable",
            "session_id",
        ),
        "kv_hints",
    )
    beams = ("self", "max_tokens", "default_sampling_params")
    return [
        Patch(
            "vllm.v1.engine.input_processor", "InputProcessor.process_inputs", process_inputs, _process_inputs
        ),
        *(
            Patch(
                f"vllm.entrypoints.openai.{kind}.protocol",
                f"{name}.to_beam_search_params",
                beams,
                _to_beam_search_params,
            )
            for kind, name in (
                ("completion", "CompletionRequest"),
                ("chat_completion", "ChatCompletionRequest"),
            )
        ),
    ]
