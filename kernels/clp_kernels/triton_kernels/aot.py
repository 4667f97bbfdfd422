"""Which compilations the launchers of a Triton module ask for, found without a GPU.

`recorded(call)` runs a launcher on meta tensors with every kernel launch replaced by a note of what it would
compile, so what is compiled ahead of time is what is launched, tile tables and all. Each module of kernels
here has `aot_specs()`, which yields AotSpec for every configuration of its tables; tests/kernels/test_aot.py
compiles them for GPUs that are not there and looks at errors, shared memory, spills and the matrix
instructions used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from clp_kernels.triton_kernels import launch, tuning

_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class AotSpec:
    """One compilation of one kernel for one GPU generation.

    target      "sm_80", "sm_90", "sm_100" or "gfx942"
    types       argument -> Triton type ("*bf16", "i32", "fp32", "tensordesc<bf16[128, 64]>", ...), with ":16" behind it
                where divisible by 16
    constants   argument -> value: tl.constexpr arguments, pointers that are None, integers that are 1
    matrix      expected to use wgmma on sm_90
    """

    label: str
    kernel: Any
    target: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__} {self.target} {self.label}"

    @property
    def key(self) -> tuple:
        """Equal for specs that compile to the same thing."""
        arguments = (*sorted(self.types.items()), *sorted((k, repr(v)) for k, v in self.constants.items()))
        return self.kernel.__name__, self.target, self.num_warps, self.num_stages, arguments


def recorded(
    label: str,
    call: Callable[[], Any],
    targets: tuple[str, ...] = ("sm_90",),
    matrix: Callable[[str, Mapping[str, Any]], bool] = lambda kernel, constants: False,
) -> Iterator[AotSpec]:
    """What the kernel launches of `call()` compile for each target, each once.

    call    runs launchers on meta tensors, which are taken to be aligned to 16 bytes, as torch's allocations
            are
    matrix  (kernel's name, constants) -> whether wgmma is expected on sm_90
    """
    for target in targets:
        launches = []

        def run(kernel, *args, grid, warmup, launches=launches, **kwargs):
            launches.append((kernel, args, kwargs))

        vendor = mock.patch.object(
            torch.version, "hip", "ahead of time" if target.startswith("gfx") else None
        )
        major = 9 if target.startswith("gfx") else int(target[3:]) // 10
        generation = mock.patch.object(launch, "major", lambda device, major=major: major)
        with mock.patch.object(JITFunction, "run", run), vendor, generation:
            call()
        seen = set()
        for kernel, args, kwargs in launches:
            spec = _spec(label, kernel, target, args, dict(kwargs), matrix)
            if spec.key not in seen:
                seen.add(spec.key)
                yield spec


def recorded_choices(
    tunable: tuning.Tunable,
    example: Callable[[str, Any], Callable[[], Any]],
    matrix: Callable[[str, Mapping[str, Any]], bool] = lambda kernel, constants: False,
) -> Iterator[AotSpec]:
    """`recorded` of example(family, choice) for every candidate and every entry of the table of measured choices."""
    for target, family, choice in tunable.possible():
        with tuning.force(tunable.kernel, family, choice):
            expected = matrix if not family.startswith("plain") else lambda *_: False
            yield from list(
                recorded(f"{family} {tuple(choice)}", example(family, choice), (target,), expected)
            )


def _spec(label, kernel, target, args, kwargs, matrix) -> AotSpec:
    options = {name: kwargs.pop(name, default) for name, default in (("num_warps", 4), ("num_stages", 3))}
    bound = kernel.signature.bind(*args, **kwargs)
    types, constants = {}, {}
    for parameter in kernel.params:
        value = bound.arguments[parameter.name]
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            constants[parameter.name] = value
        elif parameter.do_not_specialize and parameter.annotation_type:
            types[parameter.name] = parameter.annotation_type
        else:
            types[parameter.name] = _type_of(value)
    return AotSpec(
        label, kernel, target, types, constants, matrix=matrix(kernel.__name__, constants), **options
    )


def _type_of(value) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}:16"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64") + (":16" if value % 16 == 0 else "")
    return "fp32"
