"""multi_lora_linear at training sizes, forward alone and with the gradients of x, A and B (the base weight is frozen).

One main shape, and from it one thing varied at a time: layer, tokens, number of adapters, ranks, kind of blend, dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from clp_kernels import expand_gate

from bench.cases import formulas
from bench.cases.models import MODELS, blends, normal, sequences
from bench.core.case import Case, Prepared, Tensors, Work, plain_exact

WANTED = ("x", "lora_a", "lora_b")
BLENDS = ("dirichlet", "one-hot", "shared", "half-reference")
RANKS = ((16,), (16, 16), (16,) * 8, (8,) * 3, (64,) * 3, (8, 16, 64))


def cases(device: str, sizes: str) -> list[Case]:
    main = {"T": 8192, "N": 4096, "K": 4096} if sizes == "gpu" else {"T": 2048, "N": 1024, "K": 1024}
    if sizes == "tiny":
        main = {"T": 64, "N": 48, "K": 32}
    dtype = torch.bfloat16 if sizes == "gpu" else torch.float32

    def case(wanted=WANTED, ranks=(16, 16, 16), blend="dirichlet", dtype=dtype, **shape) -> Case:
        return _case(device, {**main, **shape}, dtype, ranks, blend, wanted)

    found = [case(), case(wanted=())]
    if sizes == "tiny":
        return found + [case(blend="shared", ranks=(4, 8))]
    if sizes == "cpu":
        found += [case(N=256, K=256), case(N=1024, K=256), case(T=1937), case(dtype=torch.bfloat16)]
    else:
        found += [case(N=896, K=896), case(N=896, K=896, wanted=())]
        for model in MODELS.values():
            layers = {(model.hidden, model.hidden), (model.intermediate, model.hidden)} - {
                (4096, 4096),
                (896, 896),
            }
            found += [case(N=n, K=k) for n, k in sorted(layers)]
        found += [case(T=tokens) for tokens in (1937, 2048, 32768)]
        found += [case(dtype=torch.float32)]
    found += [case(ranks=ranks) for ranks in RANKS]
    found += [case(blend=kind) for kind in BLENDS[1:]] + [case(blend="one-hot", wanted=())]
    return found


def _case(device: str, shape: dict[str, int], dtype: torch.dtype, ranks, blend: str, wanted) -> Case:
    n, k, tokens = shape["N"], shape["K"], shape["T"]
    rank, count = sum(ranks), sequences(tokens)

    def make(generator: torch.Generator) -> Tensors:
        inputs = layer_inputs(n, k, ranks, dtype, generator)
        inputs["x"] = normal(*count, k, generator=generator, dtype=dtype)
        inputs["gate"] = expand_gate(
            blends(blend, count[0], len(ranks), generator), ranks, [1.0] * len(ranks)
        )
        if wanted:
            inputs["grad_y"] = normal(*count, n, generator=generator, dtype=dtype)
        return inputs

    size = dtype.itemsize
    forward = Work(
        2 * tokens * k * n + 2 * tokens * rank * (k + n), size * (tokens * (k + n) + n * k + rank * (k + n))
    )
    backward = Work(
        2 * tokens * k * n + 4 * tokens * rank * (k + n),
        size * (tokens * n + n * k + 2 * tokens * k + tokens * rank + 2 * rank * (k + n)),
    )
    targets = ()
    if wanted and ranks == (16, 16, 16) and blend == "dirichlet":
        targets = {
            (4096, 4096, 8192): () if dtype is torch.float32 else ("multi-lora-4096",),
            (896, 896, 8192): () if dtype is torch.float32 else ("multi-lora-896",),
            (1024, 1024, 2048): ("multi-lora-cpu",) if dtype is torch.float32 else (),
        }.get((n, k, tokens), ())
    return Case(
        group="multi_lora",
        op="multi_lora_linear",
        title="forward+backward" if wanted else "forward",
        shape=shape,
        dtype=dtype,
        device=device,
        make=make,
        exact=plain_exact(wanted, formulas.multi_lora),
        work=Work(forward.flops + backward.flops, forward.bytes + backward.bytes) if wanted else forward,
        wanted=wanted,
        options={"ranks": tuple(ranks), "blend": blend},
        bare=frozen_linear,
        targets=targets,
    )


def layer_inputs(n: int, k: int, ranks, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    rank = sum(ranks)
    return {
        "weight": normal(n, k, generator=generator, dtype=dtype, scale=k**-0.5),
        "lora_a": normal(rank, k, generator=generator, dtype=dtype, scale=k**-0.5),
        "lora_b": normal(n, rank, generator=generator, dtype=dtype, scale=0.1),
    }


def frozen_linear(case: Case, inputs: Tensors) -> Prepared:
    """The frozen layer alone: x W^T, and dy W where gradients are asked for."""
    x, weight = inputs["x"], inputs["weight"]
    if not case.wanted:
        return Prepared(lambda: F.linear(x, weight))
    dy = inputs["grad_y"]
    return Prepared(lambda: (F.linear(x, weight), dy @ weight))
