"""N processes are the run of one: completions to the token, rewards, gradients to summation order, logs; over gloo."""

import json
import math
import shutil

import layerwise
import projection
import pytest
import same_bits
import torch
from launch import launched
from safetensors.torch import load_file

# What tells that processes train as one, each kind once; `make check` runs all.
FEW = [
    "form lora",
    "form full",
    "form prompt",
    "model t5",
    "estimator mixed",
    "baseline value",
    "several steps on a rollout",
    "selected rollouts",
    "partial rollouts",
    "evaluations",
]
# Decoders of one stack.
SHARDED = [name for name, (family, _) in same_bits.RUNS.items() if family not in ("t5", "bart")]
FEW_SHARDED = [
    "form lora",
    "form full",
    "form attention+prompt",
    "estimator mixed",
    "baseline value",
    "checkpointing",
    "partial rollouts",
    "best",
]
# Each of a kind of output projection (tied, tied with deltas, low-rank, a whole delta, a softcap) and of backward passes.
FEW_SPLIT = ["form full", "form logit", "form none carried by full", "estimator mixed", "model gemma2"]
SPLIT = {"fsdp": "full_shard", "fsdp_config": {"vocab_parallel": True}}
FEW_LAYERWISE = [
    "form logit",
    "estimator mixed",
    "baseline value",
    "selected rollouts",
    "evaluations",
    "best",
]
LAYERWISE = {"fsdp": "full_shard", "fsdp_config": {"gather_for_generation": False}}
SPLIT_LAYERWISE = {
    "fsdp": "full_shard",
    "fsdp_config": {"vocab_parallel": True, "gather_for_generation": False},
}
# A token's KL is a difference of two numbers of some 4, and wrong by up to 3e-7 in float32; a completion has up to 6 tokens.
KL_ROUNDING = 2e-6
TIMES = ("time", "runtime", "per_second", "logp_difference")  # the last is rounding itself


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def alone(names, folder):
    done = launched(1, "runs.py", str(folder), {}, names, seconds=120 + 15 * len(names))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def together(names, folder, count=2, **extra):
    done = launched(count, "runs.py", str(folder), extra, names, seconds=120 + 15 * len(names))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def assert_same(name, one, several, rounding=1e-7):
    place = name.replace(" ", "_").replace(",", "")
    assert lines(one / place / "completions.jsonl") == lines(several / place / "completions.jsonl"), name
    expected, found = (torch.load((f / place).with_suffix(".pt")) for f in (one, several))
    for key, gradient in expected.items():
        error = (gradient - found[key]).norm() / gradient.norm().clamp_min(1e-9)
        assert error < 2e-5, (name, key, error)
    logs = lines(one / place / "log.jsonl"), lines(several / place / "log.jsonl")
    assert len(logs[0]) == len(logs[1]) > 0
    for plain, dealt in zip(*logs):
        assert plain.keys() == dealt.keys(), (name, plain.keys() ^ dealt.keys())
        for key, value in plain.items():
            if not any(word in key for word in TIMES):
                assert math.isclose(value, dealt[key], rel_tol=1e-4, abs_tol=rounding), (
                    name,
                    key,
                    value,
                    dealt[key],
                )


@pytest.fixture(scope="session")
def one(tmp_path_factory):
    return alone(sorted({*FEW, *FEW_SHARDED, *FEW_SPLIT}), tmp_path_factory.mktemp("one"))


def test_two_processes_are_one_run(one, tmp_path):
    together(FEW, tmp_path)
    for name in FEW:
        assert_same(name, one, tmp_path)


def test_two_processes_with_a_sharded_base_are_one_run(one, tmp_path):
    together(FEW_SHARDED, tmp_path, fsdp="full_shard")
    for name in FEW_SHARDED:
        assert_same(name, one, tmp_path)
    found = json.loads((tmp_path / "form_lora.json").read_text())
    assert found["shards"] > 0
    # Of the deltas of layers and AdamW's two moments half is left, besides half of the layers and the gradients between steps.
    first, second = (json.loads((f / "form_full.json").read_text()) for f in (one, tmp_path))
    assert second["resident"] <= first["resident"] - 0.5 * 3 * second["sharded deltas"]
    assert second["pieces and moments"] == 0.5 * 3 * second["sharded deltas"]
    # Two passes of each process over three groups, each with a sum in float32.
    for step in second["steps"]:
        assert sum(size for name, size in step if name == "reduce_scatter") == 2 * second["sharded deltas"]


@pytest.mark.check
def test_two_processes_that_never_have_the_base_whole_are_one_run(tmp_path):
    """Drawing, scoring, the update, evaluations, checkpoints: at most two of five layers at once. A batch of one group leaves
    the second process without a completion, and it gathers all the same."""
    phases = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    sizes = {"per_device_train_batch_size": 6, "per_device_eval_batch_size": 6}
    partial = {"partial_rollouts": True, "max_completion_length_per_step": 3}
    runs = {
        "deltas": {**phases, **sizes, **partial, "conditioning": "full"},
        "idle": {**phases, **sizes, "per_device_train_batch_size": 2},
    }
    for count, extra in ((1, {}), (2, LAYERWISE)):
        done = launched(count, "layerwise.py", str(tmp_path / str(count)), runs, extra)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in runs:
        one, two = (tmp_path / n / name for n in "12")
        assert lines(one / "completions.jsonl") == lines(two / "completions.jsonl") != []
        first, second = (load_file(place / "policy" / "adapters.safetensors") for place in (one, two))
        for key, tensor in first.items():
            assert (tensor - second[key]).norm() <= 1e-3 * tensor.norm().clamp_min(1e-6), key
        # Sums and norms of the whole base, which nobody had when they were written.
        bases = [(place / "checkpoint-2" / "policy" / "base_model.json").read_bytes() for place in (one, two)]
        assert bases[0] == bases[1]
        alone, *found = (
            json.loads(path.read_text()) for path in (one / "0.json", two / "0.json", two / "1.json")
        )
        texts = [each["texts"][0] for each in (alone, *found)]
        assert texts[0] == texts[1] and texts[2].startswith(texts[0])
        assert [each["most"] for each in found] == [2, 2]
        # The formula of docs/scaling.md. The block that ends is met at, as before an exchange.
        most = sum(max(passes) for passes in zip(*(each["passes"] for each in found), strict=True))
        blocks = 2 + 2 + 1  # of two steps' drawing, two evaluations, the texts
        for each in found:
            assert each["gathered"] == layerwise.LAYERS * most > 0
            assert each["told"] == most + each["exchanges"] + blocks
        if name == "idle":
            assert sum(found[1]["passes"]) < sum(found[0]["passes"])


def test_two_processes_with_a_split_projection_are_one_run(one, tmp_path):
    """Of weight, delta and moments of a projection, the pieces alone stay in each process."""
    name = "form none carried by full"
    together([name], tmp_path / "sharded", fsdp="full_shard")
    together(FEW_SPLIT, tmp_path / "split", **SPLIT)
    for each in FEW_SPLIT:
        assert_same(each, one, tmp_path / "split", KL_ROUNDING)
    whole, split = (
        json.loads((tmp_path / folder / "form_none_carried_by_full.json").read_text())
        for folder in ("sharded", "split")
    )
    # Of the 67 rows of weight, delta and two moments the main process has 34.
    row = 4 * 32
    assert split["shards"] == whole["shards"] + 2 * 34 * row
    assert split["resident"] <= whole["resident"] - 4 * 33 * row


def test_statistics_and_traffic_of_a_split_projection(tmp_path):
    """Three processes with 3, 0 and 5 rows: statistics and gradients of one process with all rows.

    Bytes of each process are those of docs/scaling.md: sizes; hidden states twice, targets and gates of the longest; 7 sums of
    8 bytes for each row of all; then, backward, gradients of three statistics and a float32 term of every row's hidden state.
    """
    done = launched(3, "projection.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    case = projection.Case()
    expected = case.statistics(range(3))
    for name, value in expected["stats"].items():
        torch.testing.assert_close(torch.cat([f["stats"][name] for f in found]), value, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(
        torch.cat([f["hidden"] for f in found]), expected["hidden"], rtol=1e-5, atol=1e-6
    )
    for name in ("lora_a", "lora_b"):  # terms of a sum over processes
        torch.testing.assert_close(sum(f[name] for f in found), expected[name], rtol=1e-5, atol=1e-5)
    longest, rows = max(case.rows), 3 * max(case.rows)
    for each in found:
        assert each["seen"] == [
            ("all_gather", 8),
            *(("all_gather", longest * size) for size in (4 * case.rank, 4 * case.width, 8, 4 * case.width)),
            ("all_gather", rows * 7 * 8),
            ("all_gather", longest * 3 * 4),
            ("reduce_scatter", rows * 4 * case.width),
        ]


def test_collectives_of_a_step(one, tmp_path):
    """Two exchanges before the update, of a size and a content each; the adapters once; metrics, and what callbacks ask for."""
    together(["form lora"], tmp_path)
    found = json.loads((tmp_path / "form_lora.json").read_text())
    for step in found["steps"]:
        reduced = [size for name, size in step if name == "all_reduce"]
        assert [name for name, _ in step].count("all_gather") == 6 and len(reduced) == 1, step
        assert found["adapters"] <= reduced[0] <= found["adapters"] + 64 * 100  # views begin on cache lines


@pytest.fixture(scope="session")
def every(tmp_path_factory):
    return alone(list(same_bits.RUNS), tmp_path_factory.mktemp("every"))


@pytest.mark.check
@pytest.mark.parametrize(
    "names, extra",
    [
        pytest.param(list(same_bits.RUNS), {}, id="whole"),
        pytest.param(SHARDED, {"fsdp": True}, id="sharded"),
        pytest.param(FEW_LAYERWISE, LAYERWISE, id="layer by layer"),
        pytest.param(
            ["evaluations", "form none carried by full"], SPLIT_LAYERWISE, id="split, layer by layer"
        ),
        pytest.param([n for n in SHARDED if n.startswith(("form", "model", "estimator"))], SPLIT, id="split"),
    ],
)
def test_every_kind_of_run_is_the_same_in_two_processes(every, tmp_path, names, extra):
    together(names, tmp_path, **extra)
    for name in names:
        assert_same(name, every, tmp_path, KL_ROUNDING if extra in (SPLIT, SPLIT_LAYERWISE) else 1e-7)


@pytest.mark.check
@pytest.mark.parametrize("extra", [{}, {"fsdp": "shard_grad_op"}, {"fsdp": "full_shard offload"}, SPLIT])
def test_more_processes_than_groups(tmp_path, extra):
    """Three groups a step: the fourth process draws, rewards and trains on nothing."""
    names = ["form lora", "form full", "estimator mixed", "baseline value"]
    first = alone(names, tmp_path / "one")
    second = together(names, tmp_path / "six", 6, **extra)
    for name in names:
        assert_same(name, first, second, KL_ROUNDING if extra is SPLIT else 1e-7)


def test_an_evaluation_is_dealt(tmp_path):
    """Batches are the same, and so is every number, to the bit."""
    reports = []
    for count in (1, 3):
        done = launched(count, "evaluating.py", str(tmp_path / str(count)))
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads((tmp_path / str(count) / "report.json").read_text())
        reports.append({name: value for name, value in found.items() if name != "seconds"})
    assert reports[0] == reports[1]


VALUE = {"kl_estimator": "mixed", "baseline": "value"}
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "eval_reward",
    "load_best_model_at_end": True,
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {"conditioning": "lora+attention", "fsdp": "full_shard", **VALUE}, id="sharded and whole"
        ),
        pytest.param(VALUE, id="whole", marks=pytest.mark.check),
        pytest.param({"conditioning": "full", **SPLIT, **BEST}, id="split, best", marks=pytest.mark.check),
    ],
)
def test_checkpoints_do_not_know_how_many_wrote_them(settings, tmp_path):
    """Two processes go on from a checkpoint of one as one would, to summation order; and two from one of two, to the bit."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, **settings}
    for writers in (1, 2):
        done = launched(writers, "resuming.py", str(tmp_path / f"by{writers}"), settings, None)
        assert done.returncode == 0, done.stderr[-3000:]
    whole = {n: load_file(tmp_path / f"by{n}" / "policy" / "adapters.safetensors") for n in (1, 2)}
    for writers, readers in ((1, 2), (2, 2), (2, 1)):
        place = tmp_path / f"{writers}to{readers}"
        shutil.copytree(tmp_path / f"by{writers}", place)
        done = launched(readers, "resuming.py", str(place), settings, str(place / "checkpoint-1"))
        assert done.returncode == 0, done.stderr[-3000:]
        for name, tensor in load_file(place / "policy" / "adapters.safetensors").items():
            expected = whole[writers][name]
            if writers == readers:
                assert torch.equal(tensor, expected), (writers, readers, name)
            else:
                assert (tensor - expected).norm() <= 1e-3 * expected.norm().clamp_min(1e-6), (
                    writers,
                    readers,
                    name,
                )


def test_a_reward_of_the_main_process_sees_all_completions(tmp_path):
    """Rewards, columns and metrics as in one process, although they depend on every completion of the step."""
    said = []
    for count in (1, 2):
        done = launched(count, "judged.py", str(tmp_path / str(count)))
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(done.stdout)
    assert "rank 0 was asked [6, 6]" in said[1] and "rank 1 was asked []" in said[1]
    first, second = (lines(tmp_path / str(count) / "completions.jsonl") for count in (1, 2))
    assert first == second and all("others" in row for row in first)
    logs = [lines(tmp_path / str(count) / "log.jsonl") for count in (1, 2)]
    assert [entry.get("distinct") for entry in logs[0]] == [entry.get("distinct") for entry in logs[1]]
