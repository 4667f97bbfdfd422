"""linear_logprob: statistics of softmax(hidden W^T) without the logits. Scoring (no gradients) and training.

The bare variant is the matrix products alone, into buffers that exist: one for the logits, one more with a reference, one for
the gradient of hidden, one for the head's where it is trained.
"""

from __future__ import annotations

import torch

from bench.cases import formulas
from bench.cases.models import MODELS, integers, normal
from bench.core.case import Case, Prepared, Refused, Tensors, Work
from bench.core.memory import available

ALL = ("logprob", "ref_logprob", "entropy", "kl")
# (title, outputs, inputs that gradients are taken in)
MODES = (
    ("logprob+entropy+kl, fwd+bwd, frozen head", ("logprob", "entropy", "kl"), ("hidden",)),
    ("logprob+entropy+kl, fwd+bwd, trained head", ("logprob", "entropy", "kl"), ("hidden", "weight")),
    ("logprob+entropy, fwd+bwd, frozen head", ("logprob", "entropy"), ("hidden",)),
    ("logprob, fwd+bwd, frozen head", ("logprob",), ("hidden",)),
    ("logprob, fwd+bwd, trained head", ("logprob",), ("hidden", "weight")),
    ("logprob, scoring", ("logprob",), ()),
    ("logprob+ref_logprob+entropy+kl, scoring", ALL, ()),
)
WHOLE, LOGPROB, SCORING, ALL_FOUR = MODES[0], MODES[3], MODES[5], MODES[6]


def cases(device: str, sizes: str) -> list[Case]:
    if sizes == "tiny":
        return [_case(device, {"T": 40, "H": 32, "V": 301}, torch.float32, mode) for mode in MODES]
    if sizes == "cpu":
        main, dtype = {"T": 2048, "H": 512, "V": 32000}, torch.float32
        more = [
            ({**main, "T": 1937}, dtype),
            ({"T": 1280, "H": 256, "V": 4096}, dtype),
            (main, torch.bfloat16),
        ]
        more += [({"T": 512, "H": MODELS["T5-large"].hidden, "V": MODELS["T5-large"].vocabulary}, dtype)]
        found = [_case(device, main, dtype, mode) for mode in MODES]
        return found + [
            _case(device, shape, d, mode) for shape, d in more for mode in (WHOLE, LOGPROB, SCORING)
        ]
    main, dtype = {"T": 8192, "H": 4096, "V": 131072}, torch.bfloat16
    found = [_case(device, main, dtype, mode) for mode in MODES]
    for model in MODELS.values():
        shape = {"T": 8192, "H": model.hidden, "V": model.vocabulary}
        modes = (WHOLE, LOGPROB, SCORING)
        found += [_case(device, shape, dtype, mode, model.softcap) for mode in modes]
    for tokens in (1937, 2048, 32768):
        found += [_case(device, {**main, "T": tokens}, dtype, mode) for mode in (WHOLE, SCORING)]
    return found


def _case(device: str, shape: dict[str, int], dtype: torch.dtype, mode, softcap: float | None = None) -> Case:
    title, outputs, wanted = mode
    rows, width, vocabulary = shape["T"], shape["H"], shape["V"]
    reference = bool({"kl", "ref_logprob"} & set(outputs))

    def make(generator: torch.Generator) -> Tensors:
        inputs = {
            "hidden": normal(rows, width, generator=generator, dtype=dtype),
            "weight": normal(vocabulary, width, generator=generator, dtype=dtype, scale=width**-0.5),
            "targets": integers(vocabulary, rows, generator),
        }
        if reference:
            # Near the policy, as in training: a KL of about 5e-3.
            noise = normal(rows, width, generator=generator, dtype=dtype, scale=0.1)
            inputs["ref_hidden"] = inputs["hidden"] + noise
        if wanted:
            for name in outputs:
                inputs[f"grad_{name}"] = normal(rows, generator=generator, dtype=torch.float32)
        return inputs

    product, size = 2.0 * rows * width * vocabulary, dtype.itemsize
    passes = 2 if reference else 1
    work = Work(
        product * passes,
        size * (passes * rows * width + vocabulary * width),
        float(passes * rows * vocabulary),
    )
    if wanted:
        # At least the forward products, and one for each gradient; what a recomputing kernel does again is not counted.
        flops = product * (passes + len(wanted))
        moved = work.bytes + size * ((1 + passes) * rows * width + vocabulary * width)
        moved += size * vocabulary * width if "weight" in wanted else 0
        work = Work(flops, moved, work.exps)
    forward = formulas.token_statistics(outputs, softcap)
    options = {} if softcap is None else {"softcap": softcap}
    return Case(
        group="linear_logprob",
        op="linear_logprob",
        title=title,
        shape=shape,
        dtype=dtype,
        device=device,
        make=make,
        exact=formulas.in_row_chunks(forward, wanted, vocabulary, shared="weight"),
        work=work,
        outputs=outputs,
        wanted=wanted,
        options=options,
        bare=bare_products,
        targets=_targets(shape, dtype, title),
    )


def _targets(shape: dict[str, int], dtype: torch.dtype, title: str) -> tuple[str, ...]:
    if tuple(shape.values()) == (8192, 4096, 131072):
        return {
            SCORING[0]: ("logprob-forward",),
            LOGPROB[0]: ("logprob-backward",),
            ALL_FOUR[0]: ("one-pass",),
        }.get(title, ())
    if tuple(shape.values()) == (2048, 512, 32000) and dtype is torch.float32:
        if title in (WHOLE[0], MODES[2][0], LOGPROB[0]):
            return ("statistics-cpu", "statistics-cpu-memory")
    return ()


def bare_products(case: Case, inputs: Tensors) -> Prepared:
    hidden, weight = inputs["hidden"], inputs["weight"]
    rows, vocabulary = case.shape["T"], case.shape["V"]
    if hidden.element_size() * rows * vocabulary > 0.4 * available(case.device):
        raise Refused("out of memory: the products' result does not fit")
    logits = torch.empty(rows, vocabulary, dtype=hidden.dtype, device=hidden.device)
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.empty_like(weight) if "weight" in case.wanted else None

    def call() -> None:
        if "ref_hidden" in inputs:
            torch.mm(inputs["ref_hidden"], weight.t(), out=logits)
        torch.mm(hidden, weight.t(), out=logits)
        if case.wanted:
            torch.mm(logits, weight, out=d_hidden)
        if d_weight is not None:
            torch.mm(logits.t(), hidden, out=d_weight)

    return Prepared(call)
