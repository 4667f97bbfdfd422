"""Several processes beside one: the command runs, and what it counts is the gradient once and small exchanges."""

import pytest

from bench.__main__ import main
from bench.core import schema
from bench.step import processes


@pytest.mark.check
def test_two_processes_are_measured_beside_one(tmp_path, capsys):
    out = tmp_path / "processes.json"
    assert main(["processes", "--model", "tiny", "--steps", "2", "--rounds", "1", "--out", str(out)]) == 0
    (case,) = schema.load(out).cases
    assert [v.name for v in case.variants] == [*processes.VARIANTS, processes.APART]
    assert [v.times.runs for v in case.variants] == [2, 2, 2, 4] and all(
        v.times.median > 0 for v in case.variants
    )
    one, two, *_ = (v.measures for v in case.variants)
    assert not one and two["all_reduce_calls"] == 2
    assert two["adapter_bytes"] <= two["all_reduce_bytes"] <= two["adapter_bytes"] + 2 * 64 * 50
    said = capsys.readouterr().out
    assert "two processes over one of one core" in said and "two runs apart over one" in said
