"""Runs every kernel once at small, awkward shapes, for compute-sanitizer to watch: python -m bench.sanitize [--device cuda]

The results are compared with float64, so that a run that finds nothing has also computed something.
"""

from __future__ import annotations

import argparse
import sys

import torch

from bench import accuracy, cases
from bench.case import Refused
from bench.peers import clp


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    device = parser.parse_args(arguments).device
    failed = 0
    for name in cases.GROUPS:
        if name == "e2e":
            continue
        for case in cases.group(name).cases(device, "tiny"):
            failed += not _right(case)
    return 1 if failed else 0


def _right(case) -> bool:
    generator = torch.Generator(case.device).manual_seed(1)
    inputs = case.make(generator)
    # The truth is computed on the CPU: torch's own kernels need no watching, and being watched takes them long.
    on_cpu = {k: v.cpu() for k, v in inputs.items()}
    try:
        variants = getattr(clp, case.op)(case)
    except Refused as reason:
        print(f"{case.id}: {reason}")
        return True
    for name, prepare in variants.items():
        prepared = prepare(case, inputs)
        outputs = {k: v.cpu() for k, v in prepared.outputs(prepared.call()).items()}
        if case.judge is not None:
            plain, exact = case.judge(on_cpu, outputs)
        else:
            exact, plain = case.exact(on_cpu, torch.float64), case.exact(on_cpu, case.dtype)
        complaint = accuracy.complaint(accuracy.errors(outputs, plain, exact), ())
        print(f"{case.id}: {name}: {complaint or 'right'}")
        if complaint:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
