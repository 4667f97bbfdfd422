"""Several processes beside one: the command runs, and what it counts is the gradient once and small exchanges."""

import json

import pytest

from bench.__main__ import main


@pytest.mark.check
def test_two_processes_are_measured_beside_one(tmp_path, capsys):
    out = tmp_path / "processes.json"
    assert main(["processes", "--model", "tiny", "--steps", "2", "--rounds", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found["times"]) == {
        "one process, one core",
        "two processes, one core each",
        "one process, two cores",
    }
    assert all(times["runs"] == 2 and times["median"] > 0 for times in found["times"].values())
    reduced = found["collectives"]["all_reduce"]
    assert len(reduced) == 2 and found["adapter_bytes"] <= max(reduced) <= found["adapter_bytes"] + 64 * 50
    assert "collectives of a step" in capsys.readouterr().out
