"""bench/gpu/fronts.py: equal fronts agree, a front that moved does not, and the correction is for all comparisons."""

import copy
import json
from pathlib import Path
from statistics import NormalDist

import pytest

from bench.gpu import fronts
from clp_engine.core.statistics import Interval
from clp_engine.evaluation.report import ParetoReport

COMMITTED = Path(__file__).parents[2] / "bench" / "results" / "docsum_demo.json"


@pytest.fixture
def report():
    return json.loads(COMMITTED.read_text(encoding="utf-8"))


def moved(report, objective, by, points=None):
    """The report with that objective's mean and interval moved at some points, all by default."""
    changed = copy.deepcopy(report)
    for number, point in enumerate(changed["points"]):
        if points is None or number in points:
            for end in ("mean", "low", "high"):
                point["rewards"][objective][end] += by
    return changed


def width(report, objective, point):
    """Half the interval."""
    reward = report["points"][point]["rewards"][objective]
    return (reward["high"] - reward["low"]) / 2


@pytest.fixture
def compared(tmp_path, report, capsys):
    def call(other, *arguments):
        path = tmp_path / "other.json"
        path.write_text(json.dumps(other))
        code = fronts.main([str(COMMITTED), str(path), *arguments])
        return code, capsys.readouterr()

    return call


def test_a_front_agrees_with_itself(compared, report):
    code, said = compared(report)
    assert code == 0
    assert "Of 26 comparisons 0 differ" in said.out and "0 pairs of 95% intervals do not overlap" in said.out


def test_one_point_that_moved_far_is_seen_and_named(compared, report):
    code, said = compared(moved(report, "brevity", -4 * width(report, "brevity", 5), points=[5]))
    assert code == 1
    assert "- brevity at coverage 0.5, brevity 0.5:" in said.out and "Of 26 comparisons 1 differ" in said.out


def test_a_difference_within_the_noise_of_26_comparisons_is_none(compared, report):
    # 1.5 half intervals: outside what one comparison would allow (1.96 of sqrt(2) standard errors), inside what 26 do.
    z = 1.5 * 1.96 / 2**0.5
    assert 2 * (1 - NormalDist().cdf(z)) < 0.05 < 26 * 2 * (1 - NormalDist().cdf(z))
    code, said = compared(moved(report, "brevity", 1.5 * width(report, "brevity", 5), points=[5]))
    assert code == 0 and "+2.1 standard errors" in said.out


def test_a_hypervolume_that_fell_is_seen(compared, report):
    changed = copy.deepcopy(report)
    for end in ("mean", "low", "high"):
        changed["hypervolume_interval"][end] -= 0.04
    code, said = compared(changed)
    assert code == 1 and "- hypervolume: 0.0589 and 0.0189" in said.out


@pytest.mark.parametrize("change", ["objectives", "points", "prompts"])
def test_reports_of_something_else_are_not_compared(compared, report, change):
    other = copy.deepcopy(report)
    if change == "objectives":
        other["objectives"] = ["coverage", "faithfulness"]
    elif change == "points":
        other["points"] = other["points"][:-1]
    else:
        other["setup"]["prompts"] = 8
    code, said = compared(other)
    assert code == 2 and "the reports differ in" in said.err and "evaluate both alike" in said.err


def test_a_missing_report_is_an_error(tmp_path, capsys):
    assert fronts.main([str(COMMITTED), str(tmp_path / "none.json")]) == 2
    assert "no report at" in capsys.readouterr().err


def test_results_are_written_beside_each_other(compared, report, tmp_path):
    pytest.importorskip("matplotlib")
    compared(moved(report, "coverage", -0.2), "--out", str(tmp_path / "deep" / "fronts"))
    content = json.loads((tmp_path / "deep" / "fronts.json").read_text())
    assert content["agree"] is False and len(content["comparisons"]) == 26
    assert content["measured"]["seconds"]["train"] == pytest.approx(159.4)
    text = (tmp_path / "deep" / "fronts.md").read_text()
    assert "KL to the base model" in text and "159 and 57 on cpu" in text
    assert (tmp_path / "deep" / "fronts.png").read_bytes().startswith(b"\x89PNG")


def test_holm_is_the_textbook_correction():
    assert fronts.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert fronts.holm([0.5, 0.9]) == [1.0, 1.0]


def test_a_standard_error_is_the_interval_of_a_normal():
    assert fronts.standard_error(Interval(0.0, -1.959964, 1.959964)) == pytest.approx(1.0, rel=1e-6)


def test_equal_fronts_are_rarely_called_different():
    """Of 400 pairs drawn from one front, about 5% at most; independent comparisons, which are the worst case."""
    import numpy as np

    reference = ParetoReport.load(COMMITTED)
    errors = np.array([c.smallest for c in fronts.compare(reference, reference)])
    errors /= NormalDist().inv_cdf(1 - 0.05 / (2 * len(errors)))
    draws = np.random.default_rng(0).standard_normal((400, len(errors)))
    p_values = [[2 * (1 - NormalDist().cdf(abs(z))) for z in row] for row in draws]
    called = sum(min(fronts.holm(row)) < 0.05 for row in p_values)
    assert 5 <= called <= 34  # 20 expected; 34 is 3.2 standard deviations above
