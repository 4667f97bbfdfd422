"""Plain torch, as one would write the formula, and where there is one, its best form in torch alone."""

from __future__ import annotations

from bench.cases import formulas
from bench.core.case import Case, Prepare, Prepared, Refused, Tensors, differentiated
from bench.core.memory import available

NAME = "torch"
PACKAGE = "torch"


def unavailable(device: str) -> str | None:
    return None


def multi_lora_linear(case: Case) -> dict[str, Prepare]:
    return {
        NAME: differentiated(formulas.multi_lora),
        f"{NAME}, addmm": differentiated(formulas.multi_lora_addmm),
        "peft-like loop (torch)": differentiated(formulas.multi_lora_loop(case.options["ranks"])),
    }


def refuse_if_too_large(case: Case) -> None:
    """All logits in float32, their log-softmax and its gradient, twice with a reference, must fit."""
    copies = (8 if case.wanted else 4) * (2 if "ref_logprob" in case.outputs or "kl" in case.outputs else 1)
    needed = copies * 4 * case.shape["T"] * case.shape["V"]
    if needed > 0.9 * available(case.device):
        raise Refused(
            f"out of memory: full logits would take some {needed / 2**30:.0f} GiB, "
            f"{available(case.device) / 2**30:.0f} are free"
        )


def linear_logprob(case: Case) -> dict[str, Prepare]:
    refuse_if_too_large(case)
    return {
        f"{NAME}, full logits": differentiated(
            formulas.token_statistics(case.outputs, case.options.get("softcap"))
        )
    }


def logits_logprob(case: Case) -> dict[str, Prepare]:
    refuse_if_too_large(case)
    return {
        NAME: differentiated(
            lambda t: formulas.of_logits(t["logits"], t.get("ref_logits"), t["targets"], case.outputs)
        )
    }


def sample_tokens(case: Case) -> dict[str, Prepare]:
    o = case.options
    if not {"top_k", "top_p", "min_p"} & o.keys():
        return {NAME: differentiated(lambda t: formulas.draw(t["logits"], o["temperature"]))}
    return {
        NAME: differentiated(
            lambda t: formulas.draw_truncated(
                t["logits"], o["temperature"], o.get("top_k"), o.get("top_p"), o.get("min_p")
            )
        )
    }


def interpolate(case: Case) -> dict[str, Prepare]:
    return {NAME: differentiated(formulas.interpolate)}


def slerp(case: Case) -> dict[str, Prepare]:
    return {NAME: differentiated(lambda t: formulas.slerp(t, case.options["t"]))}


def interpolated_linear(case: Case) -> dict[str, Prepare]:
    return {NAME: differentiated(formulas.interpolated_linear)}


def ema_(case: Case) -> dict[str, Prepare]:
    import torch

    from bench.cases.interpolate import averages

    share = 1 - case.options["decay"]

    def each(average, new):
        for a, b in zip(average, new):
            a.lerp_(b, share)

    def prepare(case: Case, inputs: Tensors) -> Prepared:
        return averages(inputs, each)

    def prepare_foreach(case: Case, inputs: Tensors) -> Prepared:
        return averages(inputs, lambda average, new: torch._foreach_lerp_(average, new, share))

    return {NAME: prepare, f"{NAME}, foreach": prepare_foreach}
