"""Result files have the documented form: what is committed does, and what does not fit is named."""

import json
from pathlib import Path

import pytest

from bench.core import schema

RESULTS = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*.json"))


def result(**variant):
    """A result of one case with one variant, as plain data."""
    times = {"median": 2.0, "q1": 1.5, "q3": 2.5, "min": 1.0, "max": 4.0, "runs": 7}
    given = {"name": "clp-engine", "status": "ok", "times": times, **variant}
    case = {
        "id": "g / t", "group": "g", "op": "o", "title": "t", "shape": {"T": 8}, "dtype": "float32", "variants": [given],
    }  # fmt: skip
    return {
        "version": 1, "environment": {}, "settings": {}, "ceilings": {}, "peers": [], "cases": [case],
    }  # fmt: skip


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_every_committed_result_has_the_form(path):
    if "hypervolume" in json.loads(path.read_text(encoding="utf-8")):
        pytest.skip("a Pareto report, which clp_engine.evaluation.report defines")
    found = schema.load(path)
    assert found.cases and found.environment["device"] and found.environment["commit"]


def test_the_first_training_step_is_a_result_like_any_other():
    (case,) = schema.load(RESULTS[0].parent / "trl_step.json").cases
    assert case.group == "e2e" and case.shape == {"batch": 32, "group": 8, "prompt": 120, "new": 40}
    assert case.median("trl + peft") == pytest.approx(2.19158, rel=1e-5)
    assert case.variant("clp-engine, one objective").times.runs == 15


def test_saving_and_loading_changes_nothing(tmp_path):
    path = tmp_path / "deep" / "r.json"
    before = schema.read(result(errors={"y": {"own": 1e-7, "torch": 2e-7, "allowed": 3e-7}}))
    schema.save(before, path)
    assert schema.load(path) == before
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]  # no temporary file is left


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"status": "fine"}, "status 'fine'"),
        ({"status": "wrong"}, "wrong without a reason"),
        ({"times": None}, "ok without times"),
        ({"speed": 3}, "unknown field 'speed'"),
        ({"extra_peak_bytes": 1.5}, "got `float` - at"),
        ({"times": {"median": 2.0, "q1": 2.1, "q3": 2.5, "min": 1.0, "max": 4.0, "runs": 7}}, "not in order"),
        (
            {"times": {"median": 0.0, "q1": None, "q3": None, "min": 0.0, "max": 0.0, "runs": 1}},
            "not in order",
        ),
        (
            {"times": {"median": float("nan"), "q1": None, "q3": None, "min": 1.0, "max": 1.0, "runs": 1}},
            "not finite",
        ),
        ({"times": {"median": 1.0, "q1": None, "q3": None, "min": 1.0, "max": 1.0}}, "'runs' is missing"),
        ({"errors": {"y": {"own": 4e-7, "torch": 2e-7, "allowed": 3e-7}}}, "not marked wrong"),
        ({"errors": {"y": {"own": None, "torch": 2e-7, "allowed": 3e-7}}}, "not marked wrong"),
    ],
)
def test_what_does_not_fit_is_named(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        schema.read(result(**change))


def test_a_repeated_case_and_another_version_are_refused():
    data = result()
    data["cases"] *= 2
    with pytest.raises(ValueError, match="more than once"):
        schema.read(data)
    with pytest.raises(ValueError, match="version 2"):
        schema.read({**result(), "version": 2})
