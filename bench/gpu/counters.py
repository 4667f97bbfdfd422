"""What bounds each kernel, by the hardware's counters.

python -m bench.gpu.counters watch --out FILE [--only TITLE ...]            both of the following, `run` under ncu
python -m bench.gpu.counters run --out MANIFEST [--device cuda]             calls each op once at its main shape
python -m bench.gpu.counters read CSV --manifest MANIFEST --out FILE

    ncu --profile-from-start off --clock-control none --metrics $(python -m bench.gpu.counters metrics) --csv --page raw \\
        --log-file counters.csv python -m bench.gpu.counters run --out counters.manifest.json

`run` takes the main case of every kind of the benchmark's kernel groups, calls it twice unwatched (compilation, tuning), and
once between cudaProfilerStart and cudaProfilerStop. Before each goes a marker kernel, whose grid has as many programs as the
case's number: that is how `read` tells the cases apart. Every kernel of a call is counted, torch's own as well.

A kernel is bound by what is used at BOUND percent of its peak or more, the most used of "memory" (DRAM), "tensor cores", "L2"
and "instructions" (any pipe of the multiprocessors). Where nothing is, it is "latency": too little work in flight, or too
little work. Times under a profiler are those of its clocks and cold caches: they say shares, not speed.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

MARKER = "_case_marker"
BOUND = 60.0
GROUPS = ("multi_lora", "decode", "linear_logprob", "logits_logprob", "interpolate", "sampling")
# What a kernel's record has -> ncu's names for it, the first that is there; units as `_SCALE` has them.
METRICS = {
    "seconds": ("gpu__time_duration.sum", "gpu__time_duration.avg"),
    "dram_read_bytes": ("dram__bytes_read.sum",),
    "dram_write_bytes": ("dram__bytes_write.sum",),
    "dram_percent": ("dram__throughput.avg.pct_of_peak_sustained_elapsed",),
    "l2_percent": ("lts__throughput.avg.pct_of_peak_sustained_elapsed",),
    "l2_hit_percent": ("lts__t_sector_hit_rate.pct",),
    "sm_percent": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "tensor_percent": (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    ),
    "occupancy_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
    "shared_bytes": ("launch__shared_mem_per_block",),
    "shared_dynamic_bytes": ("launch__shared_mem_per_block_dynamic",),
}
_SCALE = {
    "ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0,
    "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12,
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """Launches of one name within one call: sums of seconds and bytes, means by time of what is in percent, else the largest.

    A number is None where ncu gave none.
    """

    name: str
    launches: int
    seconds: float
    dram_bytes: float | None
    dram_percent: float | None
    l2_percent: float | None
    l2_hit_percent: float | None
    sm_percent: float | None
    tensor_percent: float | None
    occupancy_percent: float | None
    registers: float | None
    shared_bytes: float | None
    grid: str
    block: str
    bound: str


# --- reading ncu's table -----------------------------------------------------------------------------------


def rows(text: str) -> Iterator[dict[str, str]]:
    """The rows of `--csv --page raw`: names in the first line, units in the second. Raises ValueError where there is no table.

    A row has "Kernel Name", "Grid Size", ..., and under each of METRICS' own names a number in seconds, bytes or percent.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        said = [line for line in lines if "ERROR" in line or "WARNING" in line]
        raise ValueError(f"no table of ncu: {' '.join(said)[:400] or 'it printed nothing of the kind'}")
    table = list(csv.reader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"')))))
    if len(table) < 2 or "Kernel Name" not in table[0]:
        raise ValueError(f"no table of ncu: expected names, units and kernels, got {len(table)} lines")
    names, units = table[0], table[1]
    if "Metric Name" in names:
        raise ValueError("this is ncu's page of details; give it --page raw")
    for values in table[2:]:
        row = dict(zip(names, values))
        for field, candidates in METRICS.items():
            found = next((n for n in candidates if _number(row.get(n)) is not None), None)
            if found is not None:
                unit = units[names.index(found)].partition("/")[0]
                row[field] = _number(row[found]) * _SCALE.get(unit, 1.0)
        yield row


def _number(text: str | None) -> float | None:
    """'1,205.00' is 1205; None for 'n/a', nothing, or a column that is not there."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def read(text: str, manifest: dict) -> dict:
    """The kernels of each case of the manifest. Raises ValueError where the table does not fit the manifest."""
    cases = manifest["cases"]
    by_case: list[list[dict]] = [[] for _ in cases]
    number = None
    for row in rows(text):
        if row["Kernel Name"].partition("(")[0] == MARKER:
            number = int(row["Grid Size"].strip("()").split(",")[0]) - 1
            if not 0 <= number < len(cases):
                raise ValueError(f"the table marks case {number + 1}; the manifest has {len(cases)}")
        elif number is None:
            raise ValueError(
                f"kernel {row['Kernel Name']} comes before the first marker {MARKER}; was `run` watched?"
            )
        else:
            by_case[number].append(row)
    found = []
    for case, launched in zip(cases, by_case):
        kernels = sorted(_kernels(launched), key=lambda k: -k.seconds)
        seconds = sum(k.seconds for k in kernels)
        found.append({**case, "seconds": seconds, "kernels": [asdict(k) for k in kernels]})
    if not any(case["kernels"] for case in found):
        raise ValueError("the table has no kernels beside the markers")
    return {"environment": manifest["environment"], "cases": found}


def _kernels(launched: list[dict]) -> Iterator[Kernel]:
    for name in dict.fromkeys(_short(row["Kernel Name"]) for row in launched):
        same = [row for row in launched if _short(row["Kernel Name"]) == name]
        seconds = sum(row.get("seconds", 0.0) for row in same)

        def mean(field: str, same=same) -> float | None:
            known = [(row[field], row.get("seconds", 0.0)) for row in same if field in row]
            weight = sum(s for _, s in known)
            return sum(v * s for v, s in known) / weight if weight else None

        def largest(*fields: str, same=same) -> float | None:
            return max(
                (sum(row.get(f, 0.0) for f in fields) for row in same if fields[0] in row), default=None
            )

        moved = [
            row["dram_read_bytes"] + row.get("dram_write_bytes", 0.0)
            for row in same
            if "dram_read_bytes" in row
        ]
        percents = {f: mean(f) for f in METRICS if f.endswith("percent")}
        longest = max(same, key=lambda row: row.get("seconds", 0.0))
        yield Kernel(
            name, len(same), seconds, sum(moved) if moved else None, **percents, registers=largest("registers"),
            shared_bytes=largest("shared_bytes") or largest("shared_dynamic_bytes"), grid=longest.get("Grid Size", ""),
            block=longest.get("Block Size", ""), bound=bound(percents),
        )  # fmt: skip


def bound(percents: dict[str, float | None]) -> str:
    """See the module's docstring; "unknown" where the counters are not there."""
    kinds = {
        "memory": "dram_percent",
        "tensor cores": "tensor_percent",
        "L2": "l2_percent",
        "instructions": "sm_percent",
    }
    known = {kind: percents[field] for kind, field in kinds.items() if percents.get(field) is not None}
    if not known:
        return "unknown"
    # The multiprocessors' figure is that of their most used pipe: where that is the tensor cores', it says so.
    if known.get("tensor cores", 0.0) >= BOUND:
        known.pop("instructions", None)
    kind = max(known, key=known.get)
    return kind if known[kind] >= BOUND else "latency"


def _short(name: str) -> str:
    """Without template arguments, parameters, return type and namespaces."""
    return name.partition("<")[0].partition("(")[0].split("::")[-1].split(" ")[-1]


def table(content: dict) -> list[str]:
    from clp_engine.core import tables

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.0f}%"

    lines = []
    for case in content["cases"]:
        for kernel in case["kernels"]:
            share = kernel["seconds"] / case["seconds"] if case["seconds"] else 0.0
            if share < 0.02:
                continue
            registers, shared = kernel["registers"], kernel["shared_bytes"]
            lines.append([
                case["title"], f"`{kernel['name']}` x{kernel['launches']}", percent(100 * share), kernel["bound"],
                percent(kernel["dram_percent"]), percent(kernel["tensor_percent"]), percent(kernel["l2_hit_percent"]),
                percent(kernel["occupancy_percent"]), "" if registers is None else f"{registers:.0f}",
                "" if shared is None else f"{shared / 1024:.0f} KiB",
            ])  # fmt: skip
    names = [
        "call",
        "kernel",
        "of its time",
        "bound by",
        "DRAM",
        "tensor cores",
        "L2 hits",
        "occupancy",
        "registers",
    ]
    return tables.compact([*names, "shared memory"], lines)


# --- what ncu watches --------------------------------------------------------------------------------------


def main_cases(device: str, sizes: str, only: Sequence[str] = ()) -> list:
    """The first case of each kind of each kernel group. only: those of these titles, "GROUP: TITLE"; all must exist."""
    from bench import cases

    found = {}
    for group in GROUPS:
        for case in cases.group(group).cases(device, sizes):
            found.setdefault((group, case.op, case.title), case)
    if only:
        found = {f"{group}: {title}": case for (group, _, title), case in found.items()}
        if unknown := [title for title in only if title not in found]:
            raise SystemExit(f"no case is called {', '.join(unknown)}; known: {', '.join(found)}")
        found = {title: found[title] for title in only}
    return list(found.values())


def watch(device: str, sizes: str, out: Path, only: Sequence[str]) -> None:
    """`run` under ncu, then `read`, into `out`. Where the tool is missing or refuses, the same calls must work without it.

    Raises CalledProcessError where they do not.
    """
    manifest, log = out.with_suffix(".manifest.json"), out.with_suffix(".csv")
    command = [sys.executable, "-m", "bench.gpu.counters", "run", "--device", device, "--sizes", sizes]
    command += ["--out", str(manifest), *(("--only", *only) if only else ())]
    tool = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if device != "cuda" or tool is None:
        print("ncu is not on this machine; the calls it would watch:", flush=True)
        subprocess.run(command, check=True)
        return
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
    # The second way is for a version of ncu that does not know one of the metrics.
    for how in (["--metrics", _metrics()], [word for name in sections for word in ("--section", name)]):
        options = ["--profile-from-start", "off", "--clock-control", "none", *how, "--csv", "--page", "raw"]
        subprocess.run([tool, *options, "--log-file", str(log), *command])
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        try:
            content = read(text, json.loads(manifest.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            reason = error
            continue
        _write(content, out)
        return
    subprocess.run(command, check=True)  # it was the tool that refused
    print(f"ncu gave no counters: {reason}")


def run(device: str, sizes: str, out: Path, only: Sequence[str] = ()) -> None:
    """Raises whatever a kernel raises: counters of a call that did not end would say nothing."""
    import torch

    from bench.core import environment
    from bench.peers import clp

    chosen = main_cases(device, sizes, only)
    listed = [
        {"id": case.id, "group": case.group, "op": case.op, "title": f"{case.group}: {case.title}"}
        for case in chosen
    ]
    manifest = {"environment": environment.describe(device), "cases": listed}
    out.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    mark = _marker() if device == "cuda" else None
    for number, case in enumerate(chosen, 1):
        inputs = case.make(torch.Generator(device).manual_seed(0))
        call = getattr(clp, case.op)(case)[clp.NAME](case, inputs).call
        call()
        call()
        if mark is not None:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            mark(number)
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        print(f"{number}/{len(chosen)} {case.id}", flush=True)
        del inputs, call
        if device == "cuda":
            torch.cuda.empty_cache()


def _marker():
    """mark(n) launches the marker with n programs."""
    import torch

    from bench.gpu.counter_marker import _case_marker

    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    _case_marker[(1,)](out)
    return lambda number: _case_marker[(number,)](out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.counters", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="call each op once at its main shape")
    watches = commands.add_parser("watch", help="that under ncu, and what it counted as JSON")
    for command in (runs, watches):
        command.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
        command.add_argument("--sizes", help="default: by the device; tiny is for tests")
        command.add_argument(
            "--only", nargs="+", default=(), metavar="TITLE", help="cases of these titles: 'GROUP: TITLE'"
        )
    reads = commands.add_parser("read", help="ncu's table as JSON")
    reads.add_argument("csv", type=Path)
    reads.add_argument("--manifest", type=Path, required=True, help="what `run` wrote")
    for command in (runs, watches, reads):
        command.add_argument("--out", type=Path, required=True)
    commands.add_parser("metrics", help="the metrics to ask ncu for, comma-separated")
    options = parser.parse_args(arguments)
    if options.command == "metrics":
        print(_metrics())
    elif options.command != "read":
        sizes = options.sizes or ("gpu" if options.device == "cuda" else "cpu")
        {"run": run, "watch": watch}[options.command](options.device, sizes, options.out, options.only)
    else:
        manifest = json.loads(options.manifest.read_text(encoding="utf-8"))
        try:
            content = read(options.csv.read_text(encoding="utf-8", errors="replace"), manifest)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        _write(content, options.out)
    return 0


def _metrics() -> str:
    return ",".join(candidates[0] for candidates in METRICS.values())


def _write(content: dict, out: Path) -> None:
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(content)))


if __name__ == "__main__":
    sys.exit(main())
