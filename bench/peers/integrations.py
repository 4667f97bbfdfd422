"""What a library's users gain from `clp_kernels.integrations`: its own functions against their replacements, and TRL's trainer.

    python -m bench.peers.integrations [--out FILE.json] [--functions-only | --trainer-only] [--rounds 7]

Functions are called as their library calls them, forward and backward with a frozen head, patched and unpatched by turns. A
training step of TRL's GRPOTrainer with a LoRA is measured the same way: some steps with the patch, some without, in
one process. Everything but the log-probs is the library's own in both: sampling (by transformers), the layers, the optimiser.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from clp_kernels.integrations import liger, openrlhf, patch_trl, trl
from torch import Tensor

from bench.cases.e2e import trl_steps
from bench.core import environment
from bench.core.measure import Rounds, Timed, Timer, interleave, summary
from bench.core.memory import extra_peak
from bench.step.step_case import StepCase

_ROWS, _WIDTH, _VOCABULARY = 1024, 512, 32000
_STEP = StepCase("qwen2-30m", "cpu", batch=16, group=8, prompt=120, new=40)


@dataclass(frozen=True)
class Pair:
    """A library's function and its replacement: each makes outputs of leaves, and gradients of their sum are taken."""

    name: str
    theirs: Callable[..., tuple[Tensor, ...]]
    ours: Callable[..., tuple[Tensor, ...]]
    leaf: Tensor

    def calls(self) -> dict[str, Callable[[], object]]:
        def run(function: Callable[..., tuple[Tensor, ...]]) -> Callable[[], object]:
            def call() -> Tensor:
                leaf = self.leaf.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(sum(output.sum() for output in function(leaf)), leaf)
                return gradient

            return call

        return {"unpatched": run(self.theirs), "patched": run(self.ours)}


def pairs() -> Iterator[Pair]:
    """Those of the libraries that are installed, at 1,024 rows, H = 512 and V = 32,000, float32."""
    hidden = torch.randn(_ROWS, _WIDTH)
    weight = torch.randn(_VOCABULARY, _WIDTH) / math.sqrt(_WIDTH)
    targets = torch.randint(_VOCABULARY, (_ROWS,))
    logits, batched = (hidden @ weight.T).unflatten(0, (8, -1)), targets.unflatten(0, (8, -1))
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.trainer import utils

    def head(function):
        return lambda x: function.apply(x, weight, None, targets, 0.9, 32768, None, 1.0, ("entropy",))[:2]

    def divergence(function):
        reference = hidden + 0.1
        return lambda x: function.apply(x, weight, None, reference, weight, None, 1.0)[:1]

    def over_logits(function):
        return lambda x: function(x, batched)

    yield Pair(
        "trl: chunked log-prob, entropy",
        head(ChunkedLogProbFunction),
        head(trl.ChunkedLogProbFunction),
        hidden,
    )
    yield Pair(
        "trl: chunked divergence",
        divergence(ChunkedDivergenceFunction),
        divergence(trl.ChunkedDivergenceFunction),
        hidden,
    )
    yield Pair("trl: selective_log_softmax_and_entropy", over_logits(utils.selective_log_softmax_and_entropy),
               over_logits(trl.selective_log_softmax_and_entropy), logits)  # fmt: skip
    yield Pair("trl: selective_log_softmax", lambda x: (utils.selective_log_softmax(x, batched),),
               lambda x: (trl.selective_log_softmax(x, batched),), logits)  # fmt: skip
    # OpenRLHF's formula of float32 logits without FlashAttention, which is verl's too.
    yield Pair("logits alone, gather - logsumexp (openrlhf, verl)",
               lambda x: (x.gather(-1, batched[..., None])[..., 0] - x.logsumexp(-1),),
               lambda x: (openrlhf.log_probs_from_logits(x, batched),), logits)  # fmt: skip
    with contextlib.suppress(ImportError):
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

        yield _liger(LigerFusedLinearGRPOFunction, hidden, weight, targets)


def _liger(peer: type, hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
    """Eight sequences, of which half of the positions are padding."""
    batch, length = 8, _ROWS // 8
    ids, mask = targets.view(batch, length), torch.zeros(batch, length)
    mask[:, : length // 2] = 1
    positional = (ids, mask, torch.linspace(-1, 1, batch), None, None, None, None, None, None, 0.0, 0.2, 0.2, "dapo", None,
                  "token", 1.0, 1.05, 0.9, False, False)  # fmt: skip

    def call(function):
        return lambda x: function.apply(x.view(batch, length, -1), weight, *positional)[:1]

    return Pair(
        "liger: fused linear GRPO, half padding", call(peer), call(liger.LigerFusedLinearGRPOFunction), hidden
    )


def functions(rounds: int) -> list[dict]:
    timer = Timer("cpu", environment.last_level_cache())
    found = []
    for pair in pairs():
        calls = pair.calls()
        difference = (calls["patched"]() - calls["unpatched"]()).abs().max().item()
        samples = interleave(
            timer,
            {name: Timed(call, 1, "clock, cold cache") for name, call in calls.items()},
            Rounds(rounds, rounds),
        )
        entry = {"what": pair.name, "largest difference of gradients": difference}
        for name, seconds in samples.items():
            times = summary(seconds)
            entry[name] = {"median": times.median, "q1": times.q1, "q3": times.q3,
                           "extra_peak_bytes": extra_peak(calls[name], "cpu")}  # fmt: skip
        _print(entry)
        found.append(entry)
    return found


def trainer(rounds: int, steps: int = 3) -> dict:
    """Seconds of a step of TRL's GRPOTrainer; the first of every run is left out by the clock."""
    samples: dict[str, list[float]] = {"unpatched": [], "patched": []}
    for number in range(rounds):
        for name in list(samples)[:: 1 if number % 2 == 0 else -1]:
            with patch_trl() if name == "patched" else contextlib.nullcontext():
                run = trl_steps(_STEP, steps, liger=False)
            samples[name] += run.seconds
    shape = f"batch {_STEP.batch}, group {_STEP.group}, prompt {_STEP.prompt}, new {_STEP.new}"
    entry = {"what": f"trl: training step, {_STEP.model}, LoRA, {shape}"}
    for name, seconds in samples.items():
        times = summary(seconds)
        entry[name] = {"median": times.median, "q1": times.q1, "q3": times.q3, "steps": len(seconds)}
    _print(entry)
    return entry


def _print(entry: dict) -> None:
    before, after = entry["unpatched"], entry["patched"]
    memory = ""
    if before.get("extra_peak_bytes") and after.get("extra_peak_bytes"):
        memory = f", extra peak memory {before['extra_peak_bytes'] / 2**20:.0f} to {after['extra_peak_bytes'] / 2**20:.0f} MiB"
    print(
        f"{entry['what']}: {before['median'] * 1e3:.0f} [{before['q1'] * 1e3:.0f}, {before['q3'] * 1e3:.0f}] to "
        f"{after['median'] * 1e3:.0f} [{after['q1'] * 1e3:.0f}, {after['q3'] * 1e3:.0f}] ms, "
        f"{before['median'] / after['median']:.2f} times as fast{memory}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.integrations", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    parser.add_argument("--rounds", type=int, default=7)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--functions-only", action="store_true")
    only.add_argument("--trainer-only", action="store_true")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    result = {"environment": environment.describe("cpu"), "rounds": options.rounds}
    if not options.trainer_only:
        result["functions"] = functions(options.rounds)
    if not options.functions_only:
        result["trainer"] = trainer(max(2, options.rounds // 2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
