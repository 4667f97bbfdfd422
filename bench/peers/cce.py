"""Cut cross-entropy, with its gradient filter as it comes and without it."""

from __future__ import annotations

from bench.core.case import Case, Prepare, Refused, Tensors, differentiated
from bench.core.environment import why_not_importable

NAME = "cce"
PACKAGE = "cut-cross-entropy"


def unavailable(device: str) -> str | None:
    if device != "cuda":
        return "needs CUDA (Triton kernels)"
    return why_not_importable("cut_cross_entropy")


def linear_logprob(case: Case) -> dict[str, Prepare]:
    if case.outputs != ("logprob",):
        raise Refused("gives the log-prob alone")
    if case.dtype_name == "float32":
        raise Refused("is for float16 and bfloat16")
    from cut_cross_entropy import linear_cross_entropy

    def with_options(**options) -> Prepare:
        def forward(t: Tensors) -> Tensors:
            loss = linear_cross_entropy(
                t["hidden"],
                t["weight"],
                t["targets"],
                softcap=case.options.get("softcap"),
                reduction="none",
                **options,
            )
            return {"logprob": -loss.float()}

        return differentiated(forward)

    if not case.wanted:
        return {NAME: with_options()}
    return {NAME: with_options(), f"{NAME}, no gradient filter": with_options(filter_eps=None)}
