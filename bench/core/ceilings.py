"""What the machine can do, measured before anything is compared with it.

matmul      FLOP/s of a large square matrix product, per dtype (the library's, on random data)
copy        bytes per second of a copy between two buffers larger than the cache, read plus written; read: of a sum over one
exp         exponentials per second in float32, from registers or a core's own cache

    floor of a case = max(FLOPs / matmul, bytes / copy, exponentials / exp)

Each is the best of several runs, before and after the cases, as a ceiling should be. On a CPU `exp` is torch's vectorised one:
a better one is possible, and a case that is bound by it may come out above 100%.
"""

from __future__ import annotations

import torch

from bench.core import schema, targets
from bench.core.case import Work
from bench.core.measure import Timer


def measure(device: str, dtypes: list[torch.dtype], cache: int, small: bool = False) -> dict:
    timer = Timer(device, min(cache, 32 << 20))
    runs = 3 if small else 7
    side = 512 if small else (8192 if device == "cuda" else 3072)
    buffer = (16 << 20) if small else (4 << 30 if device == "cuda" else min(max(cache, 64 << 20), 512 << 20))
    copied, read = _bandwidth(timer, buffer, runs)
    return {
        "matmul_flops": {
            str(dtype).removeprefix("torch."): _matmul(timer, side, dtype, runs) for dtype in dtypes
        },
        "matmul_side": side,
        "copy_bytes": copied,
        "read_bytes": read,
        "copy_buffer": buffer,
        "exp_rate": _exp(timer, runs),
    }


def floor(work: Work, dtype: str, ceilings: dict) -> schema.Floor | None:
    """None where the ceiling of this dtype was not measured."""
    rate = ceilings.get("matmul_flops", {}).get(dtype)
    if rate is None:
        return None
    terms = {
        "compute": work.flops / rate,
        "memory": work.bytes / ceilings["copy_bytes"],
        "exp": work.exps / ceilings["exp_rate"],
    }
    bound = max(terms, key=terms.get)
    return schema.Floor(work.flops, work.bytes, work.exps, terms[bound], bound)


def best_of(one: dict, other: dict) -> dict:
    """The higher of each ceiling: what a busy moment took away is not the machine's."""
    rates = {
        dtype: max(rate, other["matmul_flops"].get(dtype, 0.0)) for dtype, rate in one["matmul_flops"].items()
    }
    higher = {name: max(one[name], other[name]) for name in ("copy_bytes", "read_bytes", "exp_rate")}
    return {**one, **higher, "matmul_flops": rates}


def apply(result: schema.Result) -> None:
    """Bring every case's floor and verdicts in line with the result's ceilings."""
    for case in result.cases:
        if case.floor is None:
            continue
        case.floor = _again(case.floor, case.dtype, result.ceilings)
        for variant in case.variants:
            variant.floor = _again(variant.floor, case.dtype, result.ceilings)
        names = tuple(
            name
            for name, target in targets.TARGETS.items()
            if any(v.target == target.what for v in case.verdicts)
        )
        case.verdicts = targets.verdicts(names, case, result.ceilings, result.environment)


def _again(found: schema.Floor | None, dtype: str, ceilings: dict) -> schema.Floor | None:
    return None if found is None else floor(Work(found.flops, found.bytes, found.exps), dtype, ceilings)


def _best(timer: Timer, call, runs: int) -> float:
    for _ in range(2):
        call()
    return min(timer.seconds(call) for _ in range(runs))


def _matmul(timer: Timer, side: int, dtype: torch.dtype, runs: int) -> float:
    a, b = (torch.randn(side, side, device=timer.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _best(timer, lambda: torch.mm(a, b, out=out), runs)


def _bandwidth(timer: Timer, size: int, runs: int) -> tuple[float, float]:
    source = torch.randn(size // 4, device=timer.device)
    out = torch.empty_like(source)
    copied = 2 * size / _best(timer, lambda: out.copy_(source), runs)
    return copied, size / _best(timer, source.sum, runs)


def _exp(timer: Timer, runs: int) -> float:
    if timer.device == "cuda":
        from bench.core.exp_rate import exponentials_per_second

        return exponentials_per_second(timer, runs)
    x = -torch.rand(
        torch.get_num_threads() << 15
    )  # 128 KiB a thread: its second cache, and long enough for two threads to pay
    out, repeats = torch.empty_like(x), 200

    def call():
        for _ in range(repeats):
            torch.exp(x, out=out)

    return repeats * x.numel() / _best(timer, call, runs)
