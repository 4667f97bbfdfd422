"""The committed comparisons and pages are what their commands make of the committed records and reports."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import yaml

from clp_engine.evaluation.compare import compare, make_plan

RESULTS = Path(__file__).parents[3] / "docs" / "results"
COMPARED = sorted(
    path.stem for path in RESULTS.glob("*.yaml") if (RESULTS / path.stem / "comparison.json").is_file()
)


@pytest.mark.parametrize("config", sorted(RESULTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_configuration_makes_a_plan(config):
    plan = make_plan(yaml.safe_load(config.read_text(encoding="utf-8")))
    assert len(plan.seeds) >= 3 and plan.output_dir == Path("docs/results") / config.stem


@pytest.mark.check
@pytest.mark.parametrize("name", COMPARED)
def test_a_committed_comparison_is_made_of_the_committed_reports(name, tmp_path):
    config = yaml.safe_load((RESULTS / f"{name}.yaml").read_text(encoding="utf-8"))
    for part in ("trainings", "evaluations"):
        shutil.copytree(RESULTS / name / part, tmp_path / part)
    compare({**config, "output_dir": str(tmp_path)}, report_only=True)
    ours, committed = (
        json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        for folder in (tmp_path, RESULTS / name)
    )
    for field in (
        "objectives",
        "seeds",
        "reference_point",
        "base",
        "methods",
        "contrasts",
        "missing",
    ):
        assert ours[field] == committed[field], field


def test_the_learning_curves_beside_trl_s_are_made_of_the_committed_runs():
    spec = importlib.util.spec_from_file_location("trl_curves", RESULTS / "trl_curves.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = RESULTS / "trl_curves"
    runs = script.load_runs(folder)
    assert len({run["seed"] for run in runs}) >= 4 and len(runs) == 2 * len({run["seed"] for run in runs})
    result = script.summarise(runs)
    assert script.as_json(result) == (folder / "curves.json").read_text(encoding="utf-8")
    assert script.page(result) == (folder / "README.md").read_text(encoding="utf-8")
    # The verdict is computed: curves that are a little higher in every seed do not agree.
    for run in runs:
        if run["library"] == "clp":
            run["curves"]["reward"] = [reward + 0.1 for reward in run["curves"]["reward"]]
    page = script.page(script.summarise(runs))
    assert page.count("**not** within seed noise") == 2
