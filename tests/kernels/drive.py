"""Runs every call on one back-end, for the memory tests: a process of its own, as it dies where a test should fail.

python drive.py sanitized EXTENSION    with that build of clp_kernels._native, in which ASan and UBSan are compiled in
python drive.py guarded                with every tensor between pages that may not be touched
python drive.py guarded-triton         likewise Triton's interpreter, which reads and writes at the kernels' own addresses
"""

import contextlib
import faulthandler
import importlib.util
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # for bench, which is not installed


def use_extension(path):
    spec = importlib.util.spec_from_file_location("clp_kernels._native", path)
    sys.modules["clp_kernels._native"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def refuses_in_one_piece():
    """C++ exceptions reach Python in this build too."""
    from clp_kernels import _native

    with contextlib.suppress(ValueError):
        _native.select_isa("no such instruction set")
        raise AssertionError("an unknown instruction set was taken")


def run_calls(what, calls, surroundings) -> int:
    count = 0
    for label, call in calls:
        print(f"{what} {label}", file=sys.stderr, flush=True)
        for surrounding in surroundings:
            with surrounding():
                finite = [result.isfinite().all().item() for result in call()]
            assert all(finite), "a result is not finite"
            count += 1
    return count


def drive_native(surroundings, thin) -> int:
    """Each instruction set and dtype takes another share of the calls; together they run each of them or nearly."""
    from clp_kernels import _native, batch_invariant, use_backend

    from bench.calls import every_call

    count = 0
    with use_backend("cpu"):
        for share, (isa, dtype) in enumerate(
            itertools.product(_native.instruction_sets()[::-1], (torch.float32, torch.bfloat16))
        ):
            _native.select_isa(isa)
            count += run_calls(f"{isa} {dtype}", every_call(dtype, thin=thin, first=share), surroundings)
            with batch_invariant():  # no product is left to BLAS
                calls = every_call(dtype, thin=4 * thin, first=share)
                count += run_calls(f"{isa} {dtype} invariant", calls, surroundings)
    return count


def drive_triton(surroundings, thin) -> int:
    from clp_kernels import use_backend

    from bench.calls import every_call

    with use_backend("triton"):
        # prefix_attention is flex_attention there, which no interpreter runs.
        calls = (
            c
            for c in every_call(torch.float32, large=False, thin=thin)
            if not c[0].startswith("prefix_attention")
        )
        return run_calls("triton", calls, surroundings)


def main(kind, *paths):
    faulthandler.enable()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    if kind == "sanitized":
        use_extension(*paths)
        refuses_in_one_piece()
        print(drive_native([contextlib.nullcontext], thin=5))
        return
    from guarded import Pages

    both = [lambda: Pages(at_end=True), lambda: Pages(at_end=False)]
    print(drive_triton(both, thin=7) if kind == "guarded-triton" else drive_native(both, thin=8))


if __name__ == "__main__":
    main(*sys.argv[1:])
