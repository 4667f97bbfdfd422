"""TRL: its chunked log-prob (what its trainers call), its chunked divergence, its log-softmax over given logits."""

from __future__ import annotations

from bench.core.case import Case, Prepare, Refused, Tensors, differentiated
from bench.core.environment import why_not_importable

NAME = "trl"
PACKAGE = "trl"


def unavailable(device: str) -> str | None:
    return why_not_importable("trl.trainer.utils")


def linear_logprob(case: Case) -> dict[str, Prepare]:
    """GRPOTrainer's fused head; for the exact KL, the distillation trainer's divergence in a second pass."""
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk
    except ImportError:
        raise Refused("this version has no chunked log-prob") from None
    softcap = case.options.get("softcap")
    optional = ("entropy",) if "entropy" in case.outputs else ()

    def log_probs(t: Tensors, hidden: str):
        return ChunkedLogProbFunction.apply(
            t[hidden], t["weight"], None, t["targets"], 1.0, chunk, softcap, 1.0, optional
        )

    def forward(t: Tensors) -> Tensors:
        logprob, entropy, *_ = log_probs(t, "hidden")
        found = {"logprob": logprob}
        if entropy is not None:
            found["entropy"] = entropy
        if "ref_logprob" in case.outputs:
            found["ref_logprob"] = log_probs(t, "ref_hidden")[0]
        if "kl" in case.outputs:
            from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

            # beta 1: KL(student || teacher), of the policy to the reference.
            found["kl"], _ = ChunkedDivergenceFunction.apply(
                t["hidden"], t["weight"], None, t["ref_hidden"], t["weight"].detach(), None, 1.0, 1.0, 1.0, softcap,
                1.0, softcap,
            )  # fmt: skip
        return found

    name = f"{NAME}, chunked" + (" log-prob + divergence" if "kl" in case.outputs else "")
    return {name: differentiated(forward)}


def logits_logprob(case: Case) -> dict[str, Prepare]:
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    if "kl" in case.outputs:
        raise Refused("has no exact KL of given logits")

    def forward(t: Tensors) -> Tensors:
        # A batch of sequences, as the trainers have it: TRL goes over it one sequence at a time.
        rows = t["logits"].shape[0]
        batch = 8 if rows % 8 == 0 else 1
        logits, targets = t["logits"].unflatten(0, (batch, -1)), t["targets"].unflatten(0, (batch, -1))
        if "entropy" in case.outputs:
            logprob, entropy = selective_log_softmax_and_entropy(logits, targets)
            return {"logprob": logprob.flatten(), "entropy": entropy.flatten()}
        return {"logprob": selective_log_softmax(logits, targets).flatten()}

    return {NAME: differentiated(forward)}
