"""The stages of a round on a GPU: which processes each starts.

A stage is a list of steps, a step a list of jobs that run beside each other. `Setting` says on what device, with which
interpreter, into which folder; on the device "cpu" the same stages are rehearsed with tiny shapes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.cases import GROUPS

# The families of bench.gpu.smoke, and how many processes compile beforehand what `figures` measures.
FAMILIES = (
    "multi_lora_27", "multi_lora_48", "token_stats_50257", "token_stats_151936", "decode", "attention", "attention_heads",
    "logits_and_sampling", "weight_space", "rollout",
)  # fmt: skip
WARMING = 4
# What the short round reads counters of.
COUNTED = (
    "multi_lora: forward+backward",
    "decode: multi-LoRA",
    "linear_logprob: logprob, scoring",
    "linear_logprob: logprob, fwd+bwd, frozen head",
    "interpolate: interpolate",
)


@dataclass(frozen=True)
class Setting:
    device: str
    python: str
    out: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def tiny(self) -> tuple[str, ...]:
        return () if self.on_gpu else ("--sizes", "tiny")

    def module(self, name: str, *arguments: object) -> list[str]:
        return [self.python, "-m", name, *map(str, arguments)]

    def bench(self, *arguments: object) -> list[str]:
        return self.module("bench", *arguments)

    def says(self, words: str) -> list[str]:
        return [self.python, "-c", f"print({words!r})"]

    def path(self, name: str) -> Path:
        return self.out / name


@dataclass(frozen=True)
class Job:
    """argv, and variables of its own; right: the exit codes that are no failure."""

    name: str
    argv: list[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    right: tuple[int, ...] = (0,)


Steps = list[list[Job]]
# Steps of a stage, given the seconds that it may measure.
Stage = Callable[[Setting, float], Steps]


def _one(argv: list[str], **options) -> Steps:
    return [[Job("", argv, **options)]]


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def setup(s: Setting, seconds: float) -> Steps:
    """What is there. Without the CUDA kernels nothing after it would measure what it says."""
    steps = [[Job("info", s.module("clp_engine", "info"))]]
    if s.on_gpu:
        check = "import clp_kernels; cuda = clp_kernels.backends()['cuda']; print(cuda); raise SystemExit(not cuda.available)"
        steps = [[Job("card", ["nvidia-smi"])], *steps, [Job("cuda", [s.python, "-c", check])]]
    return [*steps, [Job("list", s.bench("list", "decode", "--device", s.device))]]


def smoke(s: Setting, seconds: float) -> Steps:
    """Every family of kernels against plain torch; beside it, what the figures need is compiled."""
    alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # there are as many processes as cores

    def job(name: str, module: str, *arguments: object) -> Job:
        return Job(name, s.module(f"bench.gpu.{module}", *arguments, "--device", s.device), alone)

    each = [job(name, "smoke", name, "--out", s.path(f"smoke.{name}.json")) for name in FAMILIES]
    warming = [job(f"warm{n}", "figures", "kernels", "--warm", f"{n}/{WARMING}") for n in range(WARMING)]
    warming += [job(f"warm_{part}", "figures", part, "--warm", "0/1") for part in ("rollout", "step")]
    return [each + (warming if s.on_gpu else [])]


def _figures(part: str) -> Stage:
    def stage(s: Setting, seconds: float) -> Steps:
        out = s.path("figures.json")
        return _one(
            s.module(
                "bench.gpu.figures", part, "--device", s.device, "--out", out, "--seconds", f"{seconds:.0f}"
            )
        )

    return stage


def memcheck(s: Setting, seconds: float) -> Steps:
    """The decode kernel's accesses."""
    return _sanitized(s, "memcheck", ["multi_lora_linear"], "--backend", "cuda", "--thin", "5")


def tests(s: Setting, seconds: float) -> Steps:
    """What a kernel's user meets first: graphs, streams, the same bits again, decoding."""
    files = [f"tests/kernels/test_{name}.py" for name in ("gpu_kernels", "cuda_decode", "decode_step")]
    return _pytest(s, "gpu and not traced", *files)


def kernel_tests(s: Setting, seconds: float) -> Steps:
    return _pytest(s, "gpu and not traced", "tests/kernels")


def engine_tests(s: Setting, seconds: float) -> Steps:
    return _pytest(s, "gpu and not traced", "tests/engine")


def traced_tests(s: Setting, seconds: float) -> Steps:
    """torch.compile, which takes seconds for each."""
    return _pytest(s, "gpu and traced")


def _pytest(s: Setting, marks: str, *files: str) -> Steps:
    if not s.on_gpu:
        return _one(s.module("pytest", "-q", "tests/kernels/test_backends.py"))
    processes = ("-n", _processes(), "--dist", "loadfile") if importlib.util.find_spec("xdist") else ()
    # 5: no test is marked so.
    argv = s.module("pytest", "-q", "-m", marks, "-p", "no:cacheprovider", *processes, *files)
    return _one(argv, right=(0, 5))


def _processes() -> int:
    return max(1, (os.cpu_count() or 1) // 2)


def ceilings(s: Setting, seconds: float) -> Steps:
    return _one(s.bench("ceilings", *_flags(s), "--out", s.path("ceilings.json"), "--resume"))


def _flags(s: Setting) -> tuple[str, ...]:
    small = ("--quick", "--flush", "4", "--peers", "plain")
    return ("--device", s.device, *s.tiny, *(() if s.on_gpu else small))


def _group(name: str) -> Stage:
    def stage(s: Setting, seconds: float) -> Steps:
        options = ("--out", s.path(f"{name}.json"), "--resume", "--budget", f"{seconds:.0f}")
        return _one(s.bench("run", name, *_flags(s), *options))

    return stage


def docsum(s: Setting, seconds: float) -> Steps:
    """The demo's training, and whether its front is the CPU's. An interrupted run goes on at its last checkpoint."""
    found = s.path("docsum") / "report.json"
    reference = "bench/results/docsum_demo.json" if s.on_gpu else found
    small = () if s.on_gpu else ("--steps", "2", "--prompts", "4")
    train = s.module("clp_engine", "demo", "--out", s.path("docsum"), "--seed", "0", *small)
    fronts = s.module("bench.gpu.fronts", reference, found, "--out", s.path("fronts"))
    copy = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
    kept = [s.python, "-c", copy, str(found), str(s.path("docsum_demo.json"))]
    return [[Job("train", train)], [Job("fronts", fronts), Job("report", kept)]]


def _counted(*only: str) -> Stage:
    def stage(s: Setting, seconds: float) -> Steps:
        chosen = ("--only", *only) if only else ()
        watch = ("watch", "--device", s.device, *s.tiny, "--out", s.path("counters.json"), *chosen)
        return _one(s.module("bench.gpu.counters", *watch))

    return stage


def sanitizer(s: Setting, seconds: float) -> Steps:
    return _every_op(s, "memcheck", 1)


def racecheck(s: Setting, seconds: float) -> Steps:
    """Slower, and looks at shared memory alone: every other check."""
    return _every_op(s, "racecheck", 2)


def _every_op(s: Setting, tool: str, thin: int) -> Steps:
    if not s.on_gpu:
        return _sanitized(s, tool, ["sample_tokens", "slerp", "ema_", "sparsify"], "--thin", "25")
    from bench.calls import CHECKS

    jobs = [
        _sanitized(s, tool, [what], "--thin", str(thin)) for what in (*CHECKS, "--graphs", "--candidates")
    ]
    records = [s.path(f"{tool}.{_short(what)}.record.json") for what in (*CHECKS, "--graphs", "--candidates")]
    judge = s.module("bench.gpu.sanitize", "--judge", *records, "--thin", thin)
    return [[job for steps in jobs for step in steps for job in step], [Job("judge", judge)]]


def _short(what: str) -> str:
    return what.lstrip("-")


def _sanitized(s: Setting, tool: str, ops: list[str], *options: str) -> Steps:
    """One process. Most of its time is compiling, on the host."""
    name = _short(ops[0]) if len(ops) == 1 else "all"
    record = ("--record", s.path(f"{tool}.{name}.record.json"))
    argv = s.module("bench.gpu.sanitize", *ops, "--device", s.device, *options, *record)
    if s.on_gpu:
        program = _tool("compute-sanitizer")
        if program is None:
            return _one(s.says("compute-sanitizer is not on this machine"))
        argv = [program, "--tool", tool, "--error-exitcode", "9", *argv]
    # torch's caching allocator would hide an access past the end of a tensor inside its pool; graphs cannot do without it.
    uncached = {} if ops == ["--graphs"] else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [[Job(name, argv, {"TORCHINDUCTOR_COMPILE_THREADS": "1", **uncached})]]


def tune(s: Setting, seconds: float) -> Steps:
    if not s.on_gpu:
        return _one(s.says("tuning needs a GPU"))
    return _one(s.bench("tune", "--out", s.path("tune.json"), "--resume"))


def profile(s: Setting, seconds: float) -> Steps:
    models = ("qwen2.5-0.5b", "qwen2.5-7b") if s.on_gpu else ("tiny",)

    def command(model: str) -> list[str]:
        options = ("--device", s.device, "--model", model, "--steps", "3")
        return s.bench("profile-step", *options, "--out", s.path(f"{model}.profile.json"))

    return [[Job(model, command(model))] for model in models]


STAGES: dict[str, Stage] = {
    "setup": setup, "smoke": smoke, "figures": _figures("kernels"), "decoding": _figures("rollout"), "step": _figures("step"),
    "counted": _counted(*COUNTED), "memcheck": memcheck,
    "tests": tests, "kernel_tests": kernel_tests, "engine_tests": engine_tests, "traced_tests": traced_tests,
    "ceilings": ceilings, **{name: _group(name) for name in GROUPS}, "docsum": docsum, "counters": _counted(),
    "sanitizer": sanitizer, "racecheck": racecheck, "tune": tune, "profile": profile,
}  # fmt: skip
