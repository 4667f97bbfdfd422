"""Diversity, calibration and judges: values by hand, and what evaluate() reports of them."""

import asyncio
import json

import numpy as np
import pytest
from engine.conftest import build_policy

from clp_engine.core.errors import ConfigError
from clp_engine.data.rewards import RewardSet
from clp_engine.evaluation import completion_metrics as metrics
from clp_engine.evaluation.evaluate import evaluate
from clp_engine.evaluation.report import ParetoReport, texts_table
from clp_engine.rollouts.types import SamplingParams

PROMPTS = [f"w{i} " * (1 + i % 3) for i in range(5)]


def length(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def even(completion_ids, **_):
    return [float(np.mean([i % 2 == 0 for i in ids])) for ids in completion_ids]


def run(policy=None, **options):
    options = {
        "sampling": SamplingParams(max_new_tokens=6),
        "bootstrap": 50,
        "progress": False,
        "grid": 3,
        **options,
    }
    return evaluate(policy or build_policy(), {"a": even, "b": length}, PROMPTS, **options)


def test_distinct_ngrams_by_all_ngrams():
    assert metrics.distinct([[1, 2, 1, 2]]) == pytest.approx(2 / 3)  # 12 21 12
    assert metrics.distinct([[1, 2], [1, 2], [2, 3]]) == pytest.approx(2 / 3)
    assert metrics.distinct([[1, 2], [1, 2]], n=1) == 0.5
    assert np.isnan(metrics.distinct([[1], []]))


def test_self_similarity_is_the_mean_overlap_of_pairs():
    same, other, half = [1, 2, 3], [7, 8, 9], [1, 2, 9]  # 12 23 | 78 89 | 12 29
    assert metrics.self_similarity([same, same]) == 1.0
    assert metrics.self_similarity([same, other]) == 0.0
    assert metrics.self_similarity([same, other, half]) == pytest.approx((0 + 1 / 3 + 0) / 3)
    assert np.isnan(metrics.self_similarity([same])) and np.isnan(metrics.self_similarity([same, [4]]))


def test_calibration_error_by_hand():
    assert metrics.calibration_error([0.95, 0.95], [1, 1]) == pytest.approx(0.05)
    assert metrics.calibration_error([0.95, 0.95], [1, 0]) == pytest.approx(0.45)
    # Two bins, of one and three completions: |1 - 0.15| / 4 + 3 |1/3 - 0.85| / 4.
    assert metrics.calibration_error([0.15, 0.85, 0.85, 0.85], [1, 1, 0, 0]) == pytest.approx(0.6)
    assert metrics.calibration_error([1.0, 0.5], [1, np.nan]) == 0.0
    assert np.isnan(metrics.calibration_error([0.5], [2.0])) and np.isnan(
        metrics.calibration_error([0.5], [np.nan])
    )


@pytest.mark.parametrize("kind", ["reward", "pair", "async"])
def test_a_judge_prefers_the_higher_score_in_both_orders(kind):
    def reward(completions, **_):
        return [len(text) for text in completions]

    def pair(completions, others, **_):
        return [None if "?" in a + b else float(len(a) > len(b)) for a, b in zip(completions, others)]

    async def later(completions, others, **_):
        await asyncio.sleep(0)
        return pair(completions, others)

    judge = RewardSet({"reward": reward, "pair": pair, "async": later}[kind])
    mine, theirs = ["long", "a", "even", "?"], ["b", "longer", "four", "longest"]
    found = metrics.preferences(judge, ["p"] * 4, [mine, theirs], [[[1]] * 4] * 2, {})
    np.testing.assert_array_equal(found, [1, 0, 0.5, 0 if kind == "reward" else np.nan])


def test_a_judge_that_favours_the_first_place_decides_nothing():
    first = RewardSet(lambda completions, **_: [1.0] * len(completions))
    found = metrics.preferences(first, ["p"] * 2, [["a", "b"], ["c", "d"]], [[[1]] * 2] * 2, {})
    assert found.tolist() == [0.5, 0.5]


def test_the_report_has_diversity_and_calibration_for_every_point_and_the_base(tmp_path):
    report = run(num_generations=2, output_dir=tmp_path)
    for point in [*report.points, report.base]:
        assert 0 < point.distinct_2 <= 1 and 0 <= point.self_similarity <= 1
        assert (
            0 <= point.calibration_error["a"] <= 1 and point.calibration_error["b"] is None
        )  # lengths exceed 1
    assert all(point.win_rate is None for point in report.points)
    assert ParetoReport.load(tmp_path) == report
    text = (tmp_path / "report.md").read_text()
    assert texts_table(report) in text and "distinct 2-grams" in text and "wins" not in texts_table(report)
    assert run().points[0].self_similarity is None  # one completion of each prompt


def test_wins_are_against_the_base_model_or_another_policy():
    def judge(completions, others, topic, **_):
        assert len(topic) == len(completions) == len(others)
        return [float(len(a)) for a in completions]

    rows = [{"prompt": p, "topic": str(i)} for i, p in enumerate(PROMPTS)]
    policy, options = (
        build_policy(),
        {"sampling": SamplingParams(max_new_tokens=6), "progress": False, "grid": 2},
    )
    rewards = {"a": even, "b": length}
    report = evaluate(policy, rewards, rows, judge=judge, num_generations=2, **options)
    assert {w.mean for w in (p.win_rate for p in report.points)} != {0.5}
    assert all(0 <= w.low <= w.mean <= w.high <= 1 for w in (p.win_rate for p in report.points))
    assert "wins" in texts_table(report)
    itself = evaluate(policy, rewards, rows, judge=judge, against=policy, **options)
    assert [p.win_rate.mean for p in itself.points] == [0.5, 0.5]
    base = evaluate(
        policy, rewards, rows, judge=judge, against=build_policy(trained=False), num_generations=2, **options
    )
    assert [p.win_rate.mean for p in base.points] == [p.win_rate.mean for p in report.points]


def test_an_opponent_without_a_judge_or_with_other_objectives_is_refused():
    with pytest.raises(ConfigError, match="expected a judge.*got no judge"):
        run(against=build_policy())
    with pytest.raises(ConfigError, match="got objectives c, d"):
        run(judge=even, against=build_policy(objectives=("c", "d")))
    with pytest.raises(ConfigError, match="judge: it returned None for every pair"):
        run(judge=lambda completions, **_: [None] * len(completions))


def test_a_report_from_before_there_were_these_can_be_read(tmp_path):
    report = run(output_dir=tmp_path)
    raw = json.loads((tmp_path / "report.json").read_text())
    for point in [*raw["points"], raw["base"]]:
        for name in ("distinct_2", "self_similarity", "calibration_error"):
            del point[name]
    for name in ("kendall_tau", "sparsity"):
        del raw[name]
    old = ParetoReport.from_dict(raw)
    assert texts_table(old) == "" and old.points[0].rewards == report.points[0].rewards
