"""The cases of test_vocab_parallel.py, and one of three processes that run them all: python vocab_ranks.py PROCESS FOLDER.

The processes meet through a file in FOLDER, and each leaves there what it got, PROCESS.pt. All three are the ranks of the
cases on 3 ranks; the last two, as a group of their own, are those of the cases on 2.
"""

import contextlib
import os
import sys
from datetime import timedelta

import clp_kernels
import torch
import torch.distributed as dist
from clp_kernels import HeadLoRA, linear_logprob, use_backend, vocab_parallel_linear_logprob
from token_cases import DIFFERENTIABLE, OUTPUTS, head_tensors, run_all, targets_for

ALL = ("hidden", "weight", "bias", "a", "b", "gate")
SHARDED = ("weight", "bias", "b", "ref_weight", "ref_bias")
VOCABULARY = 1009
SPLITS = {"unequal": (300, 709), "one": (1, 1008), "three": (300, 300, 409), "empty": (1, 0, 1008)}


def call(leaves, targets, outputs, function=linear_logprob, **options):
    lora = HeadLoRA(leaves["a"], leaves["b"], leaves["gate"]) if leaves.get("a") is not None else None
    names = ("bias", "ref_hidden", "ref_weight", "ref_bias")
    return function(leaves["hidden"], leaves["weight"], targets, lora=lora, outputs=outputs,
                    **{name: leaves.get(name) for name in names}, **options)  # fmt: skip


def parallel(leaves, targets, outputs, **options):
    return call(leaves, targets, outputs, vocab_parallel_linear_logprob, **options)


def case(backend, split="three", *, rows=40, width=24, options=None, outputs=OUTPUTS, wanted=ALL, **tensors):
    """A case by its arguments: tensors for head_tensors, options for the call."""
    return {"backend": backend, "split": split, "rows": rows, "width": width, "options": options or {},
            "outputs": outputs, "wanted": wanted, "tensors": {"bias": True, "lora": 6} | tensors}  # fmt: skip


CASES = {}
for backend in ("reference", "cpu", "triton"):
    size = {"rows": 12, "width": 16} if backend == "triton" else {}
    for split in SPLITS:
        CASES[f"{backend}-{split}"] = case(backend, split, **size)
    CASES[f"{backend}-softcap"] = case(backend, options={"softcap": 5.0, "logit_scale": 1.3}, **size)
    CASES[f"{backend}-no reference"] = case(
        backend, outputs=("logprob", "entropy", "top1"), wanted=("hidden",), reference=False, **size
    )
for backend in ("reference", "cpu"):
    for name in DIFFERENTIABLE:
        CASES[f"{backend}-{name} alone"] = case(backend, outputs=(name,), wanted=("hidden", "weight", "gate"))
    CASES |= {
        f"{backend}-temperature per row": case(
            backend, options={"temperature": torch.linspace(0.5, 1.5, 40)}
        ),
        f"{backend}-a reference apart": case(backend, own_head=12),
        f"{backend}-bfloat16": case(backend, width=64, options={"softcap": 20.0}, dtype=torch.bfloat16),
        f"{backend}-an ignore_index that is a token": case(backend, options={"ignore_index": 0}),
        f"{backend}-promised": case(backend, "empty", options={"promised": True}),
        f"{backend}-backwards": case(backend, "unequal", options={"backwards": True}),
        f"{backend}-not reduced": case(backend, options={"reduce_gradients": False}),
        f"{backend}-a masked shard": case(backend, "unequal", masked=True),
        f"{backend}-a masked and an empty shard": case(backend, "empty", masked=True),
        f"{backend}-hidden only": case(backend, wanted=("hidden",)),
        f"{backend}-adapters only": case(backend, wanted=("a", "b", "gate")),
        f"{backend}-frozen": case(backend, wanted=()),
        f"{backend}-zero rows": case(backend, rows=0),
        f"{backend}-ties": case(backend, ties=True, lora=0, wanted=("hidden",)),
        f"{backend}-no targets": case(backend, outputs=("entropy", "kl", "lse", "top1"), targets=False),
        f"{backend}-autocast": case(backend, width=64, autocast=True, lora=0, wanted=("hidden", "weight")),
    }
CASES["reference-float64"] = case("reference", dtype=torch.float64)


def problem(spec):
    """The whole vocabulary's tensors and targets of a case, the same wherever they are made."""
    torch.manual_seed(2)
    how = dict(spec["tensors"])
    reference, own_head, masked, ties, with_targets = (
        how.pop(name, usual)
        for name, usual in (
            ("reference", True),
            ("own_head", 0),
            ("masked", False),
            ("ties", False),
            ("targets", True),
        )
    )
    how.pop("autocast", None)
    tensors = head_tensors(spec["rows"], spec["width"], VOCABULARY, **how)
    dtype = tensors["hidden"].dtype
    if not reference:
        tensors["ref_hidden"] = None
    if own_head:
        tensors["ref_hidden"] = torch.randn(spec["rows"], own_head).to(dtype)
        tensors["ref_weight"] = torch.randn(VOCABULARY, own_head).to(dtype)
        tensors["ref_bias"] = torch.randn(VOCABULARY).to(dtype)
    targets = targets_for(spec["rows"], VOCABULARY)
    if masked:
        tensors["bias"][:300] = -torch.inf
        targets = targets.where(targets < 0, targets.clamp(min=300))
    if ties:
        tensors["weight"][500:900] = tensors["weight"][:400]
        tensors["bias"] = None
    if spec["options"].get("ignore_index") == 0:
        targets = targets.masked_fill(targets == -100, 0)
    return tensors, targets if with_targets else None


def shard_bounds(spec):
    """start and end of every rank's shard."""
    sizes = SPLITS[spec["split"]]
    ranks = len(sizes)
    if spec["options"].get("backwards"):
        ends = [VOCABULARY - sum(sizes[:rank]) for rank in range(ranks)]
        return [(end - size, end) for end, size in zip(ends, sizes)]
    return [(sum(sizes[:rank]), sum(sizes[: rank + 1])) for rank in range(ranks)]


def shard(tensors, start, end):
    return {n: t[start:end].contiguous() if n in SHARDED and t is not None else t for n, t in tensors.items()}


def autocast(spec):
    wanted = spec["tensors"].get("autocast")
    return torch.autocast("cpu", dtype=torch.bfloat16) if wanted else contextlib.nullcontext()


def run_case(spec, rank, group):
    (start, end), (tensors, targets) = shard_bounds(spec)[rank], problem(spec)
    options = dict(spec["options"]) | {"group": group}
    if options.pop("promised", False):
        options |= {"vocab_start": start, "vocab_size": VOCABULARY}
    if options.pop("backwards", False):
        options |= {"vocab_start": start}
    with use_backend(spec["backend"]), autocast(spec):
        return run_all(
            parallel, shard(tensors, start, end), targets, spec["outputs"], spec["wanted"], **options
        )


def _wrong(rank, group, **change):
    """A call that is in order but for `change`; values that are functions are called with the rank."""
    arguments = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(10, 8),
        "targets": torch.tensor([0, 11, 19, -100]),
    }
    arguments |= {name: value(rank) if callable(value) else value for name, value in change.items()}
    return vocab_parallel_linear_logprob(
        arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), group=group, **arguments
    )


ERRORS = {  # on two ranks: what is wrong -> the calls' changes, and the error of each rank
    "a bias on rank 1": (
        {"bias": lambda rank: torch.zeros(10 - rank)},
        (("RuntimeError", "rank 1 of the group refused"), ("ValueError", "bias is (9,)")),
    ),
    "rows": (
        {"hidden": lambda rank: torch.zeros(4 - rank, 8), "targets": None, "outputs": ("lse",)},
        (("ValueError", "the number of rows differs between the ranks: 4, 3"),) * 2,
    ),
    "width": (
        {"hidden": lambda rank: torch.zeros(4, 8 + rank), "weight": lambda rank: torch.zeros(10, 8 + rank)},
        (("ValueError", "hidden's width differs between the ranks: 8, 9"),) * 2,
    ),
    "dtype": (
        {"hidden": lambda rank: torch.zeros(4, 8).to((torch.float32, torch.bfloat16)[rank]),
         "weight": lambda rank: torch.zeros(10, 8).to((torch.float32, torch.bfloat16)[rank])},
        (("ValueError", "dtype differs between the ranks: torch.float32, torch.bfloat16"),) * 2,
    ),
    "outputs": (
        {"outputs": lambda rank: (("logprob", "lse"), ("logprob",))[rank]},
        (("ValueError", "outputs differs between the ranks: logprob+lse, logprob"),) * 2,
    ),
    "gradients": (
        {"hidden": lambda rank: torch.zeros(4, 8, requires_grad=rank == 0)},
        (("ValueError", "what requires a gradient differs between the ranks: hidden+reduced, reduced"),) * 2,
    ),
    "target": (
        {"targets": torch.tensor([0, 11, 20, -100])},
        (("IndexError", "targets[2] (rows flattened) is 20; expected 0 to 19"),) * 2,
    ),
    "target of rank 0": (
        {"targets": lambda rank: torch.tensor([0, 11, 3, (-1, -100)[rank]])},
        (("IndexError", "targets[3] (rows flattened) is -1"), ("IndexError", "the targets of rank 0 run from -1 to 11")),
    ),
    "a target where the sizes are promised": (
        {"targets": torch.tensor([0, 11, 20, -100]), "vocab_start": lambda rank: 10 * rank, "vocab_size": 20},
        (("IndexError", "targets[2]"),) * 2,
    ),
    "temperature": (
        {"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])},
        (("ValueError", "temperature has an entry"),) * 2,
    ),
    "overlap": (
        {"vocab_start": lambda rank: 9 * rank},
        (("ValueError", "the shards start at [0, 9] and hold [10, 10] tokens; expected them to tile"),) * 2,
    ),
    "vocab_size": ({"vocab_size": 21}, (("ValueError", "hold [10, 10] tokens; expected vocab_size=21"),) * 2),
    "one vocab_start": (
        {"vocab_start": lambda rank: (None, 10)[rank]},
        (("ValueError", "whether vocab_start is None differs between the ranks: True, False"),) * 2,
    ),
    "beyond vocab_size": (
        {"vocab_start": lambda rank: 11 * (1 + rank), "vocab_size": 20},
        (("ValueError", "expected a part of vocab_size=20"),) * 2,
    ),
    "no token at all": ({"weight": torch.zeros(0, 8)}, (("ValueError", "expected at least one token"),) * 2),
}  # fmt: skip


def run_errors(rank, group):
    errors = {}
    for name, (change, _) in ERRORS.items():
        try:
            _wrong(rank, group, **change)
            errors[name] = ("none", "")
        except Exception as error:
            errors[name] = (type(error).__name__, str(error))
    return errors


def main(process, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=process, world_size=3, timeout=timedelta(seconds=60)
    )
    pair = dist.new_group([1, 2])
    if clp_kernels.backends()["triton"].available:
        # Several splits in a shard; few and wide tiles, as the interpreter takes its time for each.
        from clp_kernels.triton_kernels import head_logits, launch, products, token_sums

        wide = launch.Tile(16, 128, 32, 4, 2)
        head_logits._TILES["plain"] = {"single": wide, "pair": wide}
        products._TILES["plain"] = launch.Tile(512, 16, 512, 4, 2)
        token_sums.SPLIT, token_sums.NARROW = 256, 128
    results = {}
    for name, spec in CASES.items():
        absent = 3 - len(shard_bounds(spec))
        if process >= absent and clp_kernels.backends()[spec["backend"]].available:
            results[name] = run_case(spec, process - absent, pair if absent else None)
    if process > 0:
        results["errors"] = run_errors(process - 1, pair)
    else:
        try:
            _wrong(0, pair)
        except ValueError as error:
            results["outside"] = str(error)
    torch.save(results, os.path.join(folder, f"{process}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
