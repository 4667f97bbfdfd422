"""This project's own kernels: the back-end that is chosen by itself, and those that --backends names, each forced.

With `strategies`, pairs (product, dY) of clp_kernels' multi_lora_strategy, multi_lora_linear has a variant for each of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import clp_kernels
from clp_kernels import linear_logprob as _linear_logprob
from clp_kernels import logits_logprob as _logits_logprob
from clp_kernels import multi_lora_linear as _multi_lora_linear
from clp_kernels import sample_tokens as _sample_tokens

from bench.core.case import Case, Prepare, Prepared, Refused, Tensors, differentiated

NAME = "clp-engine"
PACKAGE = "clp-engine"
backends: list[str] = []  # filled from the command line
strategies: list[tuple[str, str]] = []  # filled by bench.gpu.figures


def unavailable(device: str) -> str | None:
    return None


def _with_backends(variants: dict[str, Prepare]) -> dict[str, Prepare]:
    """The variants as they are, and once more with each back-end asked for."""
    found = dict(variants)
    for backend in backends:
        for name, prepare in variants.items():
            found[f"{name} [{backend}]"] = functools.partial(_forced, backend, prepare)
    return found


def _forced(backend: str, prepare: Prepare, case: Case, inputs: Tensors) -> Prepared:
    status = clp_kernels.backends().get(backend)
    if status is None or not status.available:
        raise Refused(status.reason if status else f"this build has no back-end {backend!r}")
    return _inside(lambda: clp_kernels.use_backend(backend), prepare, case, inputs)


def _inside(
    context: Callable[[], contextlib.AbstractContextManager], prepare: Prepare, case: Case, inputs: Tensors
) -> Prepared:
    prepared = prepare(case, inputs)

    def call():
        with context():
            return prepared.call()

    return Prepared(call, prepared.outputs, prepared.partial)


@contextlib.contextmanager
def _strategy(product: str, dy: str):
    from clp_kernels.triton_kernels import multi_lora_strategy

    with clp_kernels.use_backend("triton"), multi_lora_strategy.force(product=product, dy=dy):
        yield


def multi_lora_linear(case: Case) -> dict[str, Prepare]:
    def forward(t: Tensors) -> Tensors:
        return {"y": _multi_lora_linear(t["x"], t["weight"], t["lora_a"], t["lora_b"], t["gate"])}

    variants = {NAME: differentiated(forward)}
    for product, dy in strategies if case.wanted else ():
        context = functools.partial(_strategy, product, dy)
        variants[f"{NAME} [{product}, dY {dy}]"] = functools.partial(_inside, context, variants[NAME])
    return _with_backends(variants)


def linear_logprob(case: Case) -> dict[str, Prepare]:
    softcap = case.options.get("softcap")

    def forward(t: Tensors) -> Tensors:
        stats = _linear_logprob(
            t["hidden"],
            t["weight"],
            t["targets"],
            ref_hidden=t.get("ref_hidden"),
            softcap=softcap,
            outputs=case.outputs,
        )
        return {name: getattr(stats, name) for name in case.outputs}

    def two_passes(t: Tensors) -> Tensors:
        policy = _linear_logprob(t["hidden"], t["weight"], t["targets"], softcap=softcap)
        reference = _linear_logprob(t["ref_hidden"], t["weight"], t["targets"], softcap=softcap)
        return {"logprob": policy.logprob, "ref_logprob": reference.logprob}

    variants = {NAME: differentiated(forward)}
    if "ref_logprob" in case.outputs and not case.wanted:
        variants[f"{NAME}, two log-prob passes"] = differentiated(two_passes, partial=True)
    return _with_backends(variants)


def logits_logprob(case: Case) -> dict[str, Prepare]:
    def forward(t: Tensors) -> Tensors:
        stats = _logits_logprob(
            t["logits"], t["targets"], ref_logits=t.get("ref_logits"), outputs=case.outputs
        )
        return {name: getattr(stats, name) for name in case.outputs}

    return _with_backends({NAME: differentiated(forward)})


def sample_tokens(case: Case) -> dict[str, Prepare]:
    options = {
        name: case.options[name]
        for name in ("temperature", "top_k", "top_p", "min_p")
        if name in case.options
    }

    def forward(t: Tensors) -> Tensors:
        tokens, logprob = _sample_tokens(t["logits"], **options)
        return {"tokens": tokens, "logprob": logprob}

    return _with_backends({NAME: differentiated(forward)})


def _named(name: str):
    """An op that a build may not have."""
    op = getattr(clp_kernels, name, None)
    if op is None:
        raise Refused("not in this build")
    return op


def interpolate(case: Case) -> dict[str, Prepare]:
    op = _named("interpolate")
    return _with_backends({NAME: differentiated(lambda t: {"y": op(t["stack"], t["weights"])})})


def slerp(case: Case) -> dict[str, Prepare]:
    op, share = _named("slerp"), case.options["t"]
    return _with_backends({NAME: differentiated(lambda t: {"y": op(t["a"], t["b"], share)})})


def interpolated_linear(case: Case) -> dict[str, Prepare]:
    op = _named("interpolated_linear")
    return _with_backends({NAME: differentiated(lambda t: {"y": op(t["x"], t["stack"], t["blend"])})})


def ema_(case: Case) -> dict[str, Prepare]:
    op, decay = _named("ema_"), case.options["decay"]

    def prepare(case: Case, inputs: Tensors) -> Prepared:
        from bench.cases.interpolate import averages

        return averages(inputs, lambda average, new: op(average, new, decay))

    return _with_backends({NAME: prepare})
