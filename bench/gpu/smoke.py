"""The first minute on a GPU: does every family of kernels compute what plain torch does, at sizes that models have?

    python -m bench.gpu.smoke FAMILY --out FILE [--device cuda]

multi_lora_*    1937 rows of layers of 4096 and 896, ranks 27 and 48, every strategy, with all gradients
token_stats_*   vocabularies of 50257 and 151936: scoring with a reference; gradients with a frozen and with a trained head
decode          1, 8 and 64 rows by CUDA C++, and the kernels between a fused step's products: eager and in a CUDA graph
attention*      flex_attention plain, with a softcap, with a window and with both, with gradients, in short and long heads
logits_and_sampling, weight_space   checks of bench.calls
rollout         tiny models: steps must be captured, and draw what transformers' modules draw; packed scoring must agree

Results are compared with float64 on the same device. FILE has each check with its complaint; the exit code is 1 where there is
one. --device cpu runs a check or two of each family, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if "cpu" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import clp_kernels
import torch

from bench import calls
from bench.calls import attention, multi_lora, token_stats
from bench.calls.call import HALF, SINGLE, Call, Tensors, normal
from bench.gpu.sanitize import complaint

DTYPES = (HALF,)


def layer(rows: int, n: int, k: int, rank: int) -> Tensors:
    return {
        "x": normal(rows, k),
        "weight": normal(n, k, scale=k**-0.5),
        "lora_a": normal(rank, k, scale=k**-0.5),
        "lora_b": normal(n, rank, scale=0.1),
        "gate": torch.rand(rows, rank),
    }


def multi_lora_calls(rank: int, small: bool) -> Iterator[Call]:
    from clp_kernels.triton_kernels.multi_lora_strategy import force

    every, rows = ("x", "lora_a", "lora_b", "gate"), 37 if small else 1937
    for n, k in ((48, 32),) if small else ((4096, 4096), (896, 896)):
        tensors = layer(rows, n, k, rank)
        for product, dy in itertools.product(("fused", "blas"), ("once", "twice")):
            forced = functools.partial(force, product=product, dy=dy)
            label = f"{rows} x {k} to {n}, rank {rank}, {product}, dY {dy}"
            yield Call(label, tensors, multi_lora.call, every, forced, dtypes=DTYPES)


def token_stats_calls(vocabulary: int, small: bool) -> Iterator[Call]:
    rows, width, vocabulary = (9, 32, 301) if small else (1937, 896, vocabulary)
    hidden = normal(rows, width)
    tensors = {
        "hidden": hidden,
        "weight": normal(vocabulary, width, scale=width**-0.5),
        "targets": token_stats.targets_for(rows, vocabulary),
        "ref_hidden": hidden + normal(rows, width, scale=0.1),
    }
    scored = ("logprob", "ref_logprob", "entropy", "kl")
    trained = token_stats.statistics(("logprob", "entropy", "kl"))
    yield Call(f"{vocabulary}, scoring", tensors, token_stats.statistics(scored), dtypes=DTYPES)
    yield Call(f"{vocabulary}, frozen head", tensors, trained, ("hidden",), dtypes=DTYPES)
    plain = {name: tensors[name] for name in ("hidden", "weight", "targets")}
    alone = token_stats.statistics(("logprob",))
    yield Call(f"{vocabulary}, log-prob, trained head", plain, alone, ("hidden", "weight"), dtypes=DTYPES)


def decode_calls(small: bool) -> Iterator[Call]:
    if not small:
        for rows, (n, k), rank in itertools.product(
            (1, 8, 64), ((4096, 4096), (896, 896), (4864, 896)), (27, 48)
        ):
            for backend in ("cuda", "triton"):
                label = f"{rows} rows of {k} to {n}, rank {rank}"
                yield Call(
                    label,
                    layer(rows, n, k, rank),
                    multi_lora.call,
                    backend=backend,
                    dtypes=DTYPES,
                    graph=True,
                )
    yield from catalogued(("decode_step",), small)


def attention_calls(sizes: tuple, choices: tuple, small: bool) -> Iterator[Call]:
    """sizes: (query heads, key heads, size of a head, dtype)."""
    if small:
        return  # no CPU compiles its kernels
    lengths, parents = [300, 70, 64, 0, 129, 257, 33], [-1, 0, 0, 0, 0, -1, 5]
    for (heads, kv_heads, size, dtype), options in itertools.product(sizes, choices):
        q, k, v = (normal(sum(lengths), h, size) for h in (heads, kv_heads, kv_heads))
        called = attention.attended(lengths, parents, **options)
        label = f"heads {heads} {kv_heads} of {size}, {options or 'plain'}"
        yield Call(label, {"q": q, "k": k, "v": v}, called, ("q", "k", "v"), dtypes=(dtype,))


def catalogued(ops: tuple[str, ...], small: bool) -> Iterator[Call]:
    for op in ops:
        for call in itertools.islice(calls.CHECKS[op](), 0, 1 if small else None, 3):
            yield dataclasses.replace(call, dtypes=call.dtypes[:1])


_BOTH = {"softcap": 20.0, "window": 100}
# Processes of their own: most of their time is compiling.
FAMILIES = {
    **{f"multi_lora_{rank}": functools.partial(multi_lora_calls, rank) for rank in (27, 48)},
    **{f"token_stats_{v}": functools.partial(token_stats_calls, v) for v in (50257, 151936)},
    "decode": decode_calls,
    "attention": functools.partial(
        attention_calls, ((4, 2, 64, HALF),), ({}, {"softcap": 20.0}, {"window": 100}, _BOTH)
    ),
    "attention_heads": functools.partial(
        attention_calls, ((2, 2, 8, SINGLE), (2, 1, 128, HALF)), ({}, _BOTH)
    ),
    "logits_and_sampling": functools.partial(catalogued, ("logits_logprob", "sample_tokens")),
    "weight_space": functools.partial(
        catalogued, ("interpolate", "slerp", "ema_", "sparsify", "interpolated_linear")
    ),
}


def checked(family: str, device: str) -> Iterator[tuple[str, str | None]]:
    """(label, what is wrong) of each check that can run here. Raises RuntimeError on a GPU without one of the back-ends."""
    status, small = clp_kernels.backends(), device == "cpu"
    for call in FAMILIES[family](small):
        if not status[call.backend].available:
            if not small:
                raise RuntimeError(f"{call.label}: {status[call.backend].reason}")
            continue
        for dtype in (
            torch.float16 if small and d is HALF else d for d in call.dtypes[: 1 if small else None]
        ):
            try:
                wrong = complaint(call, dtype, device, truth=device)
            except Exception as error:  # one kernel's failure is not to hide the others'
                if not small:
                    torch.cuda.synchronize()  # where the device is gone, nothing after this would mean anything: let it raise
                wrong = f"raised {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
            yield f"{call.label}, {str(dtype)[6:]} [{call.backend}]", wrong


def rollouts(device: str) -> Iterator[tuple[str, str | None]]:
    from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2Config

    shared = {
        "vocab_size": 997, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2,
    }  # fmt: skip
    capped = {
        "sliding_window": 40,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 5.0,
        "head_dim": 16,
    }
    configs = {
        "qwen2, heads of 8": Qwen2Config(**shared, num_attention_heads=8),
        "gemma2, window and softcap": Gemma2Config(**shared, **capped, num_attention_heads=4),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        yield name, rollout_complaint(AutoModelForCausalLM.from_config(config), device)


def rollout_complaint(model, device: str) -> str | None:
    """On a GPU every step has to be captured, by the fused step; see `CLP_ENGINE_DECODING`."""
    from clp_engine import ConditionedPolicy, rollout, score
    from clp_engine.core.conditions import Conditions
    from clp_engine.rollouts.engines import cuda_graphs
    from clp_engine.rollouts.types import SamplingParams

    policy = ConditionedPolicy.from_pretrained(model, ["one", "other"], rank=4)
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters().items():
            if name.endswith("lora_b"):
                parameter.normal_(0, 0.05)
    policy.to(device)
    if fault := policy.backbone.packing_fault:
        return fault
    prompts = [[5 + i for i in range(length)] for length in (60, 3, 131, 17)]
    conditions = Conditions(torch.rand(4, 2).softmax(-1).to(device), torch.full((4,), 0.1, device=device))
    options = {"num_generations": 4, "sampling": SamplingParams(max_new_tokens=48), "seed": 3}
    drawn = {}
    for way in ("native", "torch"):
        os.environ["CLP_ENGINE_DECODING"] = way
        drawn[way] = rollout(policy, prompts, conditions, **options)
        if device == "cuda" and not cuda_graphs._SLOTS[policy].graphs:
            return f"no step was captured ({way})"
    if drawn["native"].token_lists() != drawn["torch"].token_lists():
        return "this project's step and transformers' modules drew different tokens"
    found, mask = drawn["native"], drawn["native"].completion_mask
    gap = (score(policy, found, conditions).logprob - found.logprobs)[mask].abs().max().item()
    return None if gap < 1e-3 else f"log-probs of packed scoring differ from those of decoding by {gap:.2g}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=(*FAMILIES, "rollout"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.manual_seed(1)
    if options.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    results, start = [], time.monotonic()
    found = (
        rollouts(options.device) if options.family == "rollout" else checked(options.family, options.device)
    )
    try:
        for label, wrong in found:
            results.append({"label": label, "wrong": wrong, "seconds": round(time.monotonic() - start, 1)})
            print(f"{results[-1]['seconds']:6.1f} s  {label}: {wrong or 'right'}", flush=True)
    finally:
        options.out.write_text(
            json.dumps({"family": options.family, "checks": results}, indent=1) + "\n", encoding="utf-8"
        )
    wrong = [one for one in results if one["wrong"]]
    print(f"{options.family}: {len(results)} checks, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
