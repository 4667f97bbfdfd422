"""Whether each candidate of a Tunable is launched by the example that its module's aot_specs makes for it, and whether an entry
of the table is compiled for its device's generation: python aot_choices.py prints one JSON object.

A process of its own, as tests/kernels/aot.py is: where Triton's interpreter is switched on, nothing can be recorded.
"""

import importlib
import json
from unittest import mock

import torch
from clp_kernels.triton_kernels import base_product, tuning
from clp_kernels.triton_kernels.aot import recorded, recorded_choices

# kernel -> its module, the functions that it launches, and which number of a choice each constant is
PLACES = {
    "linear": ("multi_lora", ("_linear", "_linear_described"), {"BLOCK_M": 0, "BLOCK_N": 1, "BLOCK_K": 2}),
    "skinny": ("multi_lora", ("_skinny",), {"BLOCK_M": 0, "BLOCK_K": 2}),
    "both": ("multi_lora", ("_both",), {"BLOCK_M": 0, "BLOCK_N": 1, "BLOCK_R": 2}),
    "rank_grad": ("multi_lora", ("_rank_grad",), {"BLOCK_N": 0, "BLOCK_M": 2}),
    "head_forward": ("token_stats", ("_linear_forward",), {"BLOCK_T": 0, "BLOCK_V": 1, "BLOCK_H": 2}),
    "head_gradient": ("token_stats", ("_linear_gradient",), {"BLOCK_T": 0, "BLOCK_V": 1, "BLOCK_H": 2}),
    "product": (
        "token_stats",
        ("_product", "_product_described"),
        {"BLOCK_M": 0, "BLOCK_N": 1, "BLOCK_K": 2},
    ),
    "mixed": ("interpolated_linear", ("_mixed",), {"BLOCK_M": 0, "BLOCK_N": 1, "BLOCK_K": 2}),
    "blend": ("interpolation", ("_blend",), {"CHUNK": 0, "BLOCK": 1}),
    "sample": ("sampling", ("_parts",), {"BLOCK": 0}),
}


def not_launched(kernel: str) -> tuple[int, list]:
    """(how many candidates were asked for, those whose example launches the kernel with other blocks)."""
    name, functions, places = PLACES[kernel]
    module = importlib.import_module(f"clp_kernels.triton_kernels.{name}")
    asked, launched = {}, set()

    def watched(tunable, example, *rest):
        if tunable.kernel == kernel:
            for target, family, choice in tunable.possible():
                asked[family, choice] = [choice[place] for place in places.values()]
                with tuning.force(kernel, family, choice):
                    specs = list(recorded("", example(family, choice), (target,)))
                found = [[s.constants[n] for n in places] for s in specs if s.kernel.__name__ in functions]
                if asked[family, choice] in found:
                    launched.add((family, choice))
        return iter(())

    nothing = mock.patch.object(module, "recorded", lambda *_: iter(()))
    with nothing, mock.patch.object(module, "recorded_choices", watched):
        list(module.aot_specs())
    return len(asked), sorted(set(asked) - launched)


def of_an_entry() -> list:
    """What an A100's entry adds to the candidates' compilations."""

    def example(family, choice):
        w = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
        return lambda: base_product.linear(w, w, None, w[:0], None)

    def compiled(devices):
        with tuning.installed(devices):
            specs = list(recorded_choices(base_product.LINEAR, example))
        return {(s.target, s.constants["BLOCK_M"], s.constants["BLOCK_N"], s.num_stages) for s in specs}

    choices = {("linear", "ampere", 2): {(64, 64, 64): (32, 32, 64, 4, 2)}}
    device = {"capability": "sm_80", "source": "a test", "choices": choices}
    return sorted(compiled({"an A100": device}) - compiled({}))


if __name__ == "__main__":
    print(json.dumps({"entry": of_an_entry(), **{kernel: not_launched(kernel) for kernel in PLACES}}))
