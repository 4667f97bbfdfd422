"""OpenRLHF's log-prob and entropy of logits on clp_kernels, and `patch_openrlhf`. Its Actor calls both, on float32 logits."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

from torch import Tensor

from clp_kernels.integrations.patching import Replacement, patched
from clp_kernels.logits_logprob import logits_logprob

TESTED = ("0.11.2",)


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at labels: `openrlhf.models.utils.log_probs_from_logits`.

    logits (..., V), labels (...) -> (...), float32 (float64 for float64 logits; OpenRLHF's are 16-bit for 16-bit logits without
    FlashAttention), differentiable in logits. The logits are left as they are: OpenRLHF divides them by the temperature in
    place, so that whoever reads them afterwards finds them scaled. (Its Actor scales them before, and calls with 1.)

    Raises what logits_logprob raises; labels of -100 give 0 and no gradient.
    """
    return logits_logprob(logits, labels.long(), temperature=temperature).logprob


def compute_entropy(logits: Tensor) -> Tensor:
    """-sum p log p, p = softmax(logits): logits (..., V) -> (...), float32 (float64 for float64), differentiable."""
    return logits_logprob(logits, None, outputs=("entropy",)).entropy


REPLACEMENTS = (
    Replacement("openrlhf.models.utils", "log_probs_from_logits", log_probs_from_logits),
    Replacement("openrlhf.models.utils", "compute_entropy", compute_entropy),
)


@contextlib.contextmanager
def patch_openrlhf(*, skip: Collection[str] = (), allow_untested: bool = False) -> Iterator[None]:
    """OpenRLHF computes log-probs and entropies with clp_kernels in the block; undone at its end, also by an exception.

    skip            names that stay OpenRLHF's own: log_probs_from_logits, compute_entropy
    allow_untested  try another version than those in TESTED

    Blocks may be nested. In a process per worker (Ray), each worker needs the patch.

    Raises RuntimeError for a version of OpenRLHF this was not tested with, ImportError where it is missing.
    """
    with patched("patch_openrlhf", "openrlhf", TESTED, REPLACEMENTS, skip, allow_untested):
        yield
