"""evaluate(): what it measures, what it writes, and what it refuses; on a random two-layer model."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from engine.conftest import build_policy

from clp_engine.core import provenance
from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.core.provenance import source_commit
from clp_engine.core.seeds import derive
from clp_engine.data.rewards import RewardSet
from clp_engine.evaluation import pareto
from clp_engine.evaluation.evaluate import evaluate
from clp_engine.evaluation.front import default_grid
from clp_engine.evaluation.plots import draw
from clp_engine.evaluation.report import ParetoReport, summary, table
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.scoring import score
from clp_engine.rollouts.types import SamplingParams

SAMPLING = SamplingParams(max_new_tokens=6)
PROMPTS = [f"w{i} " * (1 + i % 4) for i in range(7)]


def even(completion_ids, **_):
    return [float(np.mean([i % 2 == 0 for i in ids])) for ids in completion_ids]


def small(completion_ids, **_):
    return [float(np.mean([i < 20 for i in ids])) for ids in completion_ids]


def run(policy=None, rewards=None, prompts=PROMPTS, **options):
    options = {"sampling": SAMPLING, "bootstrap": 50, "progress": False, **options}
    return evaluate(policy or build_policy(), rewards or {"a": even, "b": small}, prompts, **options)


@pytest.fixture(scope="module")
def report():
    return run(task="toy", train_seconds=12.5)


# --- report.json -------------------------------------------------------------------------------------------


def test_report_has_the_published_keys(report):
    raw = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    published = {
        "task",
        "model",
        "objectives",
        "reference_point",
        "points",
        "base",
        "hypervolume",
        "expected_utility",
        "realised_utility",
        "steerability",
        "seconds",
        "versions",
        "commit",
    }
    additions = {
        "hypervolume_interval",
        "hypervolume_gain",
        "hypervolume_chance",
        "realised_utility_interval",
        "regret",
        "setup",
        "kl_steerability",
        "kl_hypervolume",
        "kl_limit",
        "kendall_tau",
        "sparsity",
    }
    assert set(raw) == published | additions
    assert raw["task"] == "toy" and raw["objectives"] == ["a", "b"]
    assert set(raw["reference_point"]) == set(raw["steerability"]) == {"a", "b"}
    texts = {"distinct_2", "self_similarity", "calibration_error"}
    for point in raw["points"]:
        assert set(point) == {
            "weights",
            "kl_coef",
            "rewards",
            "kl",
            "length",
            "truncated",
            "non_dominated",
        } | texts | {"win_rate"}
        assert set(point["weights"]) == {"a", "b"} and sum(point["weights"].values()) == pytest.approx(1)
        assert all(set(value) == {"mean", "low", "high"} for value in point["rewards"].values())
        assert isinstance(point["kl_coef"], float) and isinstance(point["kl"], float)
    assert (
        set(raw["base"])
        == {"rewards", "hypervolume"} | {"hypervolume_interval", "length", "truncated"} | texts
    )
    assert set(raw["seconds"]) == {"train", "evaluate"} and raw["seconds"]["train"] == 12.5
    assert {"python", "torch", "transformers", "clp_engine"} <= set(raw["versions"])
    for name in ("hypervolume", "expected_utility", "realised_utility"):
        assert isinstance(raw[name], float)


def test_saving_and_loading_gives_the_same_report(report, tmp_path):
    written = report.save(tmp_path / "run")
    assert [path.name for path in written] == ["report.json", "report.md", "pareto.png"]
    assert ParetoReport.load(tmp_path / "run") == ParetoReport.load(written[0]) == report
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["pareto.png", "report.json", "report.md"]
    assert written[2].read_bytes().startswith(b"\x89PNG")
    markdown = written[1].read_text()
    assert table(report) in markdown and "](pareto.png)" in markdown and "toy" in markdown


def test_an_undefined_rank_correlation_is_null_in_the_file(tmp_path):
    report = run(build_policy(objectives=("a",)), {"a": even}, output_dir=tmp_path)
    assert report.steerability == {"a": None} and len(report.points) == 1
    assert json.loads((tmp_path / "report.json").read_text())["steerability"] == {"a": None}


def test_three_objectives_have_66_points_and_a_panel_per_pair(tmp_path):
    def long(completion_ids, **_):
        return [len(ids) / 6 for ids in completion_ids]

    policy = build_policy(objectives=("a", "b", "c"))
    report = run(
        policy,
        [even, small, long],
        PROMPTS[:3],
        output_dir=tmp_path,
        sampling=SamplingParams(max_new_tokens=2),
    )
    assert len(report.points) == 66 and len(default_grid(3)) == 66 and len(default_grid(2)) == 11
    assert (tmp_path / "pareto.png").stat().st_size > 0


def test_without_matplotlib_the_rest_is_written_and_a_line_says_so(tmp_path, report, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = report.save(tmp_path)
    assert [p.name for p in written] == ["report.json", "report.md"]
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "pip install 'clp-engine[plot]'" in message
    assert "pareto.png" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "content, complaint", [("{}", "missing required field.*; write it again"), ("{", "no JSON")]
)
def test_loading_what_is_not_a_report_says_so(tmp_path, content, complaint):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        ParetoReport.load(tmp_path)


def test_loading_from_a_folder_without_a_report_names_the_command_that_writes_one(tmp_path):
    with pytest.raises(ConfigError, match="clp-engine evaluate"):
        ParetoReport.load(tmp_path)


# --- what is measured --------------------------------------------------------------------------------------


def test_each_point_is_what_a_rollout_at_that_weighting_alone_gives():
    policy = build_policy()
    report = run(policy, num_generations=2, grid=3, kl=0.3, seed=5)
    encoded = [policy.tokenizer(p).input_ids for p in PROMPTS]
    seeds = derive(5, torch.arange(len(PROMPTS)).unsqueeze(-1), torch.arange(2)).flatten()
    weightings = [*default_grid(2)[[0, 5, 10]], np.zeros(2)]  # (0, 1), (1/2, 1/2), (1, 0) and the base
    for w, point in zip(weightings, [*report.points, report.base]):
        rows = len(PROMPTS)
        conditions = Conditions(torch.tensor(w).float().expand(rows, -1), torch.full((rows,), 0.3))
        drawn = rollout(policy, encoded, conditions, num_generations=2, sampling=SAMPLING, row_seeds=seeds)
        ids = drawn.token_lists()
        # Logits depend on padding and batch in the last bits only, which no draw here is close to; rewards
        # are float32.
        assert point.rewards["a"].mean == pytest.approx(np.mean(even(completion_ids=ids)), abs=1e-6)
        assert point.rewards["b"].mean == pytest.approx(np.mean(small(completion_ids=ids)), abs=1e-6)
        assert point.length == pytest.approx(np.mean([len(i) for i in ids]))
        assert point.truncated == pytest.approx((~drawn.terminated).float().mean().item())
        if any(w):
            exact = score(policy, drawn, conditions, outputs=("kl",)).kl.sum(-1).mean().item()
            assert point.kl == pytest.approx(exact, rel=1e-4) and point.kl > 0 and point.kl_coef == 0.3


def test_an_untrained_policy_is_the_base_at_every_weighting():
    # Common random numbers: not equal on average only, but draw for draw.
    report = run(build_policy(trained=False), grid=4)
    for point in report.points:
        assert point.rewards == report.base.rewards and point.length == report.base.length
        assert point.kl == pytest.approx(0, abs=1e-5)
    assert report.hypervolume == pytest.approx(report.base.hypervolume) == pytest.approx(0.1 * 0.1)
    assert report.hypervolume_gain.low == report.hypervolume_gain.high == pytest.approx(0, abs=1e-12)
    assert report.steerability == {"a": None, "b": None}


def test_how_rows_are_batched_does_not_change_the_result():
    whole = run(grid=2, num_generations=2, batch_rows=1000)
    for rows in (3, 10):
        parts = run(grid=2, num_generations=2, batch_rows=rows)
        for one, other in zip([*whole.points, whole.base], [*parts.points, parts.base]):
            assert one.rewards["b"] == other.rewards["b"] and one.length == other.length


def test_metrics_of_the_report_are_those_of_its_points(report):
    means = np.array([[p.rewards[n].mean for n in report.objectives] for p in report.points])
    weights = np.array([[p.weights[n] for n in report.objectives] for p in report.points])
    reference = [report.reference_point[n] for n in report.objectives]
    base = np.array([[report.base.rewards[n].mean for n in report.objectives]])
    np.testing.assert_allclose(reference, base[0] - 0.1)
    assert report.hypervolume == pytest.approx(pareto.hypervolume(means, reference))
    assert report.base.hypervolume == pytest.approx(pareto.hypervolume(base, reference))
    assert report.hypervolume_gain.mean == pytest.approx(report.hypervolume - report.base.hypervolume)
    assert report.expected_utility == pytest.approx(pareto.expected_utility(means, default_grid(2)))
    # Weights in the report are rounded to six digits.
    assert report.realised_utility == pytest.approx(pareto.realised_utility(means, weights), abs=1e-5)
    assert [p.non_dominated for p in report.points] == pareto.non_dominated(means).tolist()
    assert list(report.steerability.values()) == pytest.approx(pareto.steerability(means, weights).tolist())
    assert list(report.kendall_tau.values()) == pytest.approx(pareto.kendall_tau(means, weights).tolist())
    assert report.sparsity == pytest.approx(pareto.sparsity(means))


def test_a_reference_point_that_is_given_is_used_and_the_margin_is_then_none():
    report = run(grid=2, reference_point={"b": -1.0, "a": -0.5})
    assert report.reference_point == {"a": -0.5, "b": -1.0} and report.setup["margin"] is None


def test_dataset_columns_reach_the_reward_functions_with_their_own_rows():
    seen = []

    def spy(prompts, completions, topic, **_):
        seen.extend(zip(prompts, topic))
        return [0.0] * len(completions)

    rows = [{"prompt": p, "topic": f"topic {i}"} for i, p in enumerate(PROMPTS)]
    run(rewards={"a": spy, "b": small}, prompts=rows, grid=2, num_generations=2)
    assert set(seen) == {(row["prompt"], row["topic"]) for row in rows}
    assert len(seen) == len(rows) * 3 * 2  # two points and the base, two completions each


def test_none_leaves_a_completion_out_of_its_objective():
    def half(prompts, **_):
        return [None if len(p.split()) % 2 else 0.75 for p in prompts]

    report = run(rewards={"a": half, "b": small}, grid=2)
    assert report.base.rewards["a"].mean == 0.75


# --- several KL coefficients -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several():
    """Three coefficients, of which 1 is the reference, for a policy that heeds them."""
    return run(build_policy(kl_conditioning="linear"), grid=3, kl=[1.0, 0.5, 0.0], num_generations=2)


def test_a_list_of_kl_coefficients_has_a_point_for_each_pair(several):
    asked = [(p.weights["a"], p.kl_coef) for p in several.points]
    assert asked == [(w, kl) for kl in (1.0, 0.5, 0.0) for w in (0.0, 0.5, 1.0)]
    assert several.kl_coefs == [1.0, 0.5, 0.0] and several.kl_name == "alpha"
    for point in several.points[:3]:  # alpha = 1: the base model, draw for draw
        assert point.rewards == several.base.rewards and point.kl == pytest.approx(0, abs=1e-6)
    alone = run(build_policy(kl_conditioning="linear"), grid=3, kl=0.5, num_generations=2)
    for one, other in zip(several.points[3:6], alone.points):
        # How rows are batched changes the last bits.
        assert one.rewards["a"].mean == pytest.approx(other.rewards["a"].mean, abs=1e-6)
        assert one.kl == pytest.approx(other.kl, rel=1e-4)
    assert alone.kl_steerability is None and alone.kl_hypervolume is None and alone.kl_limit is None


def test_metrics_of_the_kl_coefficient_are_those_of_the_points(several):
    kl = np.array([p.kl for p in several.points]).reshape(3, 3).T  # (weightings, coefficients)
    assert several.kl_steerability == pytest.approx(pareto.kl_steerability(kl, [1.0, 0.5, 0.0]))
    assert several.kl_steerability == pytest.approx(-1.0)  # a smaller alpha blends more in
    assert several.kl_limit == kl.max()
    utility = (
        np.array([sum(p.weights[n] * p.rewards[n].mean for n in p.weights) for p in several.points])
        .reshape(3, 3)
        .T
    )
    base = np.array(
        [sum(p.weights[n] * several.base.rewards[n].mean for n in p.weights) for p in several.points]
    )
    expected = pareto.kl_hypervolume(utility, kl, base[:3], several.kl_limit)
    assert several.kl_hypervolume.mean == pytest.approx(expected, abs=1e-5)
    assert several.kl_hypervolume.low <= several.kl_hypervolume.mean <= several.kl_hypervolume.high + 1e-9
    given = run(build_policy(kl_conditioning="linear"), grid=2, kl=[0.1, 0.6], kl_limit=0.5)
    assert given.kl_limit == 0.5


def test_the_kl_coefficient_is_in_table_summary_and_picture_where_it_varies(several, report, tmp_path):
    header, _, first = table(several).splitlines()[:3]
    assert "| alpha |" in " ".join(header.split()) and "alpha" not in table(report)
    assert "| 0.00 | 1.00 | 1 |" in " ".join(first.split())
    assert "KL steerability" in summary(several) and "reward against KL" in summary(several)
    assert "reward against KL" not in summary(report)
    several.save(tmp_path)
    assert ParetoReport.load(tmp_path) == several
    assert "3 weightings at each of 3 values of alpha" in (tmp_path / "report.md").read_text()
    (axis, _) = draw(several).axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert {"alpha 1", "alpha 0.5", "alpha 0"} <= set(labels)  # a line for each


def test_one_objective_and_several_kl_coefficients_are_a_front_of_reward_against_kl(tmp_path):
    policy = build_policy(objectives=("a",), kl_conditioning="odds", min_kl=0.1, kl_is_beta=True)
    report = run(policy, {"a": even}, kl=[0.1, 0.5, 2.0], output_dir=tmp_path)
    assert len(report.points) == 3 and report.kl_name == "beta"
    axis, bar = draw(report).axes
    (line,) = axis.lines
    across = line.get_xdata()
    assert list(across) == [0.0, *sorted(p.kl for p in report.points)] and bar.get_ylabel() == "beta"
    assert report.steerability == {"a": None} and report.kl_steerability == pytest.approx(-1.0)


def test_a_report_from_before_there_were_kl_fronts_can_be_read(report):
    raw = json.loads(json.dumps(report.to_dict()))
    for name in ("kl_steerability", "kl_hypervolume", "kl_limit"):
        del raw[name]
    del raw["setup"]["kl_name"]
    old = ParetoReport.from_dict(raw)
    assert old.kl_hypervolume is None and old.kl_name == "alpha" and old.points == report.points
    assert table(old) == table(report)


# --- what it refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"rewards": {"a": even, "c": small}}, "differ in b, c"),
        ({"rewards": [even]}, "1 reward functions for 2 objectives"),
        ({"rewards": RewardSet({"b": even, "a": small})}, "b, a are not the objectives"),
        ({"prompts": []}, "empty"),
        ({"prompts": [{"text": "w1"}]}, "needs a 'prompt'"),
        ({"grid": []}, "grid is empty"),
        ({"grid": 1}, "grid=1: expected a whole number, at least 2"),
        ({"grid": [{"a": 0.5, "z": 0.5}]}, "unknown objective 'z'"),
        ({"grid": [[0.7, 0.7]]}, "must sum to 1"),
        ({"kl": 2.0}, "alpha between 0 and 1"),
        ({"kl": [0.1, 2.0]}, "alpha between 0 and 1"),
        ({"kl": []}, "at least one KL coefficient"),
        ({"kl": [0.1, 0.1]}, "none of them twice"),
        ({"kl": [0.1, 0.2], "kl_limit": 0.0}, "kl_limit=0.0: expected a number above 0"),
        ({"reference_point": {"a": 0.0}}, "reference_point is for a; expected a, b"),
        ({"num_generations": 0}, "num_generations=0: expected a whole number, at least 1"),
        (
            {"rewards": {"a": even, "b": lambda prompts, **_: [None] * len(prompts)}},
            "'b': the reward function",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        run(**options)


def test_the_commit_is_that_of_a_tracked_source_tree_only(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
            check=True,
            capture_output=True,
        )

    installed = tmp_path / "venv" / "clp_engine"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))
    assert source_commit() is None
    git("init")
    git("commit", "--allow-empty", "-m", "somebody else's repository")
    assert source_commit() is None  # the package lies in it, but is not part of it
    git("add", ".")
    git("commit", "-m", "tracked")
    clean = source_commit()
    assert len(clean) == 40
    (installed / "__init__.py").write_text("changed")
    assert source_commit() == clean + "-dirty"


def test_the_package_offers_the_function_however_it_was_imported_before():
    import clp_engine

    assert clp_engine.evaluate is evaluate and clp_engine.ParetoReport is ParetoReport
