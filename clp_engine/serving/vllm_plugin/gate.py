"""In the process that computes: the gate of every token, and of every row of logits, of a step.

A step's rows are requests: some with a stack and coefficients, some with a plain adapter (gate 1) and some of the base model
(gate 0). The 0 matters in vLLM 0.32 on CPUs: its kernels read the index of no adapter, -1, as the last adapter's. Without the
plug-in a base row beside max_loras adapters is computed with one of them.

The gate lies in buffers that live as long as the adapters' layers: a captured CUDA graph reads what was written for the step
that replays it. Under tensor parallelism every process has the whole gate, because `add_expand` is given whole ranks, also with
fully sharded adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from clp_engine.serving.vllm_plugin.admission import GATE
from clp_engine.serving.vllm_plugin.patching import Patch

# Of one request: (coefficients, ranks) of a stack, or one number for all ranks.
Row = tuple[tuple[float, ...], tuple[int, ...]] | float
PLAIN, BASE = 1.0, 0.0


class Gate:
    """The gate (tokens, ranks) of the tokens and (rows, ranks) of the logits, both float32 on the model's device."""

    def __init__(self, tokens: int, rank: int, device: torch.device | str):
        self.of_tokens = torch.ones(tokens, rank, dtype=torch.float32, device=device)
        self.of_logits = torch.ones(tokens, rank, dtype=torch.float32, device=device)
        self._filled: tuple | None = None

    def fill(self, rows: Sequence[Row], tokens: Sequence[int], logits: Sequence[int]) -> None:
        """rows: of each request. tokens, logits: how many tokens, and rows of logits, it has in this step."""
        step = tuple(rows), tuple(tokens), tuple(logits)
        if step == self._filled:  # decoding repeats a step's composition
            return
        distinct: dict[Row, int] = {}
        index = np.array([distinct.setdefault(row, len(distinct)) for row in rows], dtype=np.int64)
        table = torch.from_numpy(np.stack([self._expand(row) for row in distinct])).to(self.of_tokens.device)
        for buffer, counts in ((self.of_tokens, tokens), (self.of_logits, logits)):
            of_row = torch.from_numpy(index.repeat(counts)).to(buffer.device)
            torch.index_select(table, 0, of_row, out=buffer[: len(of_row)])
        self._filled = step

    def _expand(self, row: Row) -> np.ndarray:
        gate = np.ones(self.of_tokens.shape[1], dtype=np.float32)
        if isinstance(row, float):
            gate *= row
        else:
            each = np.asarray(row[0], dtype=np.float32).repeat(row[1])
            gate[: len(each)] = each
        return gate


def gated(wrapper: type) -> type:
    """A platform's punica wrapper that multiplies by the gate between A and B."""

    class GatedPunicaWrapper(wrapper):  # type: ignore[misc, valid-type]
        def __init__(self, max_num_batched_tokens, max_batches, device, **kwargs):
            super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
            self.clp_gate = Gate(max_num_batched_tokens, kwargs["lora_config"].max_lora_rank, device)
            self._clp_identity = None

        def add_expand(self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs):
            for shrunk in x if isinstance(x, tuple) else (x,):  # (tokens, ranks), or (slices, tokens, ranks)
                shrunk.mul_(self.clp_gate.of_tokens[: shrunk.shape[-2], : shrunk.shape[-1]])
            return super().add_expand(
                y,
                x,
                lora_b_stacked,
                output_slices,
                offset_start=offset_start,
                add_inputs=add_inputs,
                **kwargs,
            )

        def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs):
            # The wrapper's own kernel does both products at once. With the identity for one of the two it does the other.
            rank = lora_b_stacked.shape[-1]
            if self._clp_identity is None or self._clp_identity.dtype != lora_b_stacked.dtype:
                identity = torch.eye(rank, dtype=lora_b_stacked.dtype, device=lora_b_stacked.device)
                self._clp_identity = identity.expand(len(lora_b_stacked), 1, rank, rank).contiguous()
            rows = x.reshape(-1, x.shape[-1])
            shrunk = torch.zeros(len(rows), rank, dtype=x.dtype, device=x.device)
            super().add_lora_logits(shrunk, rows, lora_a_stacked, self._clp_identity, scale, **kwargs)
            shrunk.mul_(self.clp_gate.of_logits[: len(rows), :rank])
            return super().add_lora_logits(
                y, shrunk, self._clp_identity, lora_b_stacked, 1.0, buffer=buffer, **kwargs
            )

    GatedPunicaWrapper.__name__ = f"Gated{wrapper.__name__}"
    return GatedPunicaWrapper


def row_of(sampling_params, lora_request) -> Row:
    """The row of one request, as the process that took it admitted it."""
    if lora_request is None:
        return BASE
    found = (getattr(sampling_params, "extra_args", None) or {}).get(GATE)
    return PLAIN if found is None else (tuple(found[0]), tuple(found[1]))


def _gate(runner) -> Gate:
    """The gate of the language model's layers. A model with images has further wrappers, for its towers."""
    adapters = runner.lora_manager._adapter_manager
    name = adapters.mm_mapping.language_model[0] if adapters.supports_mm else None
    wrappers = adapters.punica_wrapper_mapping
    return (wrappers[name] if name is not None else next(iter(wrappers.values()))).clp_gate


# -- where vLLM's functions are replaced -------------------------------------------------------------------------------


def _get_punica_wrapper(original):
    @functools.wraps(original)
    def get_punica_wrapper(*args, **kwargs):
        from vllm.platforms import current_platform
        from vllm.utils.import_utils import resolve_obj_by_qualname

        return gated(resolve_obj_by_qualname(current_platform.get_punica_wrapper()))(*args, **kwargs)

    return get_punica_wrapper


def _set_active_loras(original):
    """The first model runner: its rows are those of `input_batch`."""

    @functools.wraps(original)
    def set_active_loras(self, input_batch, num_scheduled_tokens, num_sampled_tokens=None, *rest, **kwargs):
        original(self, input_batch, num_scheduled_tokens, num_sampled_tokens, *rest, **kwargs)
        requests = [self.requests[name] for name in input_batch.req_ids[: input_batch.num_reqs]]
        rows = [row_of(request.sampling_params, request.lora_request) for request in requests]
        logits = [1] * len(rows) if num_sampled_tokens is None else num_sampled_tokens.tolist()
        _gate(self).fill(rows, num_scheduled_tokens.tolist(), logits)

    return set_active_loras


def _add_requests(original):
    """The second model runner: its LoraState is given no parameters of sampling, so that their rows are kept there."""

    @functools.wraps(original)
    def add_requests(self, scheduler_output):
        original(self, scheduler_output)
        state = self.lora_state
        kept = {
            name: row for name, row in getattr(state, "clp_rows", {}).items() if name in state.lora_requests
        }
        for new in scheduler_output.scheduled_new_reqs:
            kept[new.req_id] = row_of(new.sampling_params, new.lora_request)
        state.clp_rows = kept

    return add_requests


def _make_lora_inputs(original):
    @functools.wraps(original)
    def make_lora_inputs(self, req_ids, idx_mapping, num_scheduled_tokens):
        rows = getattr(self, "clp_rows", {})
        self.clp_step = (
            [rows.get(name, BASE) for name in req_ids],
            num_scheduled_tokens.tolist(),
            [1] * len(req_ids),
        )
        return original(self, req_ids, idx_mapping, num_scheduled_tokens)

    return make_lora_inputs


def _fill_before_the_step(original):
    @functools.wraps(original)
    def _set_active_loras(self, *args, **kwargs):
        original(self, *args, **kwargs)
        state = getattr(self, "lora_state", None)
        if (step := getattr(state, "clp_step", None)) is not None:
            state.clp_step = None
            _gate(self).fill(*step)

    return _set_active_loras


def patches() -> list[Patch]:
    mixin, step = (
        "vllm.v1.worker.lora_model_runner_mixin",
        ("self", "req_ids", "idx_mapping", "num_scheduled_tokens"),
    )
    active = ("self", "input_batch", "num_scheduled_tokens", "num_sampled_tokens", "mapping_type")
    mapping = ("self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests", "mapping_type")
    return [
        Patch("vllm.lora.model_manager", "get_punica_wrapper", ("args", "kwargs"), _get_punica_wrapper),
        Patch(mixin, "LoRAModelRunnerMixin.set_active_loras", active, _set_active_loras),
        Patch(mixin, "LoRAModelRunnerMixin._set_active_loras", mapping, _fill_before_the_step),
        Patch("vllm.v1.worker.gpu.lora_utils", "LoraState.make_lora_inputs", step, _make_lora_inputs),
        Patch(
            "vllm.v1.worker.gpu.model_runner",
            "GPUModelRunner.add_requests",
            ("self", "scheduler_output"),
            _add_requests,
        ),
    ]
