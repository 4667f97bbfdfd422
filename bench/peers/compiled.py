"""torch.compile (inductor, default mode, static shapes) of the plain formulas. Compilation is not timed."""

from __future__ import annotations

import os
import shutil

import torch

from bench.cases import formulas
from bench.core.case import Case, Prepare, differentiated
from bench.peers.plain import refuse_if_too_large

NAME = "torch.compile"
PACKAGE = "torch"


def unavailable(device: str) -> str | None:
    if device == "cuda":
        return None
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"needs a C++ compiler; {compiler} was not found"


def _compiled(forward) -> Prepare:
    """Compiled once for a case, whatever the number of its input sets; what earlier cases left is dropped."""
    torch._dynamo.reset()
    return differentiated(torch.compile(forward, dynamic=False, fullgraph=True))


def multi_lora_linear(case: Case) -> dict[str, Prepare]:
    return {NAME: _compiled(formulas.multi_lora)}


def linear_logprob(case: Case) -> dict[str, Prepare]:
    refuse_if_too_large(case)
    return {NAME: _compiled(formulas.token_statistics(case.outputs, case.options.get("softcap")))}


def logits_logprob(case: Case) -> dict[str, Prepare]:
    refuse_if_too_large(case)
    return {
        NAME: _compiled(
            lambda t: formulas.of_logits(t["logits"], t.get("ref_logits"), t["targets"], case.outputs)
        )
    }


def interpolate(case: Case) -> dict[str, Prepare]:
    return {NAME: _compiled(formulas.interpolate)}


def slerp(case: Case) -> dict[str, Prepare]:
    return {NAME: _compiled(lambda t: formulas.slerp(t, case.options["t"]))}
