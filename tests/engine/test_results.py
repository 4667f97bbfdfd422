"""The committed comparisons are what `clp-engine compare` makes of the committed records and reports."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from clp_engine.compare import compare, make_plan

RESULTS = Path(__file__).parents[2] / "docs" / "results"
COMPARED = sorted(
    path.stem for path in RESULTS.glob("*.yaml") if (RESULTS / path.stem / "comparison.json").is_file()
)


@pytest.mark.parametrize("config", sorted(RESULTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_configuration_makes_a_plan(config):
    plan = make_plan(yaml.safe_load(config.read_text(encoding="utf-8")))
    assert len(plan.seeds) >= 3 and plan.output_dir == Path("docs/results") / config.stem


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
