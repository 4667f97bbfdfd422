"""Write all objectives as one rank-stacked PEFT adapter, which vLLM serves under a weighting per request.

    y = x W^T + ((x A^T) * gate) B^T,      A = [A_1; ...; A_D],   B = [s_1 B_1, ..., s_D B_D],   s_i = lora_alpha_i / rank_i

The plug-in `serving.vllm_plugin` multiplies by the gate: c_i, repeated once for each row of A_i. Without it, and in peft, the
adapter is an ordinary one: the sum of all deltas with unit weights. BLEND_FILE beside it says which rows are whose.

vLLM holds every adapter at its max_lora_rank, one of VLLM_RANKS. The stack is padded to the next of these with zeros, which
change no number.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional

from clp_engine.core.conditions import STACK_FORMAT
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import digest, refuse_overlap, write_directory
from clp_engine.policy.peft.writing import (
    VLLM_RANKS,
    complete,
    cut_layer,
    vllm_rank,
    warn_of_tied_head,
    write_adapter,
    write_blend,
)
from clp_engine.policy.steerable import SteerableModel


def export_stack(policy: SteerableModel, path: str | Path, rank: int | None, weights, kl) -> float:
    """See `ConditionedPolicy.export_stack`."""
    refuse_overlap(path, policy.read_from)
    condition = policy.conditions(weights, kl)
    policy.coefficients(condition)  # raises for a default that has no blend
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank}: expected at least 1")
    if biased := [
        name for name, layer in policy.layers.items() if getattr(layer, "delta_bias", None) is not None
    ]:
        raise ConfigError(
            f"the delta of {biased[0]} has a bias, which no gate of ranks reaches; write one weighting instead: "
            "export_adapter(weights), or merge(weights) for vLLM"
        )
    deltas = torch.eye(len(policy.spec.ranks))
    cuts = {
        name: [cut_layer(name, layer, one, policy.spec.scalings, 1.0, rank) for one in deltas]
        for name, layer in policy.layers.items()
    }
    ranks = [max(of_layer[i].a.shape[0] for of_layer in cuts.values()) for i in range(len(deltas))]
    served = vllm_rank(sum(ranks))
    if served is None:
        raise ConfigError(
            f"the ranks of {len(ranks)} deltas sum to {sum(ranks)}, and vLLM takes {VLLM_RANKS[-1]} at most: give rank="
            f"{VLLM_RANKS[-1] // len(ranks)} or less (--rank) to cut each by SVD (the error is reported), or serve one "
            "weighting: export_adapter(weights), merge(weights)"
        )
    factors = {}
    for name, of_layer in cuts.items():
        missing = [r - cut.a.shape[0] for r, cut in zip(ranks, of_layer)]
        a = torch.cat([functional.pad(cut.a, (0, 0, 0, m)) for cut, m in zip(of_layer, missing)])
        b = torch.cat([functional.pad(cut.b, (0, m)) for cut, m in zip(of_layer, missing)], 1)
        factors[name] = a, b
    warn_of_tied_head(policy)
    with write_directory(path) as temporary:
        write_adapter(temporary, policy, factors, 1.0, rank=served)
        entries = {
            "stack": STACK_FORMAT,
            "objectives": list(policy.objectives),
            "ranks": ranks,
            "blended": policy.conditioning.blended,
            "default_weights": dict(zip(policy.objectives, condition.weights[0].tolist())),
            "default_kl": policy.spec.default_kl if kl is None else condition.kl[0].item(),
            "version": digest(temporary / "adapter_model.safetensors")[:16],
        }
        write_blend(temporary, policy, entries)
        complete(temporary, policy)
    lost, size = (
        sum(getattr(cut, part) for cuts_ in cuts.values() for cut in cuts_) for part in ("lost", "size")
    )
    return (lost / size) ** 0.5 if lost else 0.0
