"""profile-step and the counted step: what they see of a real step, and that they leave nothing behind."""

import time

import pytest
import torch
from clp_kernels import _native
from clp_kernels.cpu import token_stats

from bench.step import profile, step_case
from bench.step.timeline import ENGINE, REWARDS


@pytest.fixture(scope="module")
def case():
    return step_case.case_of("tiny", "cpu")


def shares(segments):
    whole = sum(s.seconds for s in segments)
    return {
        scope: sum(s.seconds for s in segments if s.scope == scope) / whole
        for scope in {s.scope for s in segments}
    }


def slow_reward(completions, **_):
    time.sleep(0.3)
    return [float(len(c)) for c in completions]


@pytest.mark.check
def test_a_clock_sees_model_kernels_rewards_and_the_rest_of_a_step(case):
    owners = torch, torch.autograd, _native, _native.TokenStatsChunk, token_stats
    before = [dict(vars(owner)) for owner in owners]
    steps = profile.clocked(case, [slow_reward], 2)
    for owner, names in zip(owners, before):
        assert all(vars(owner)[name] is value for name, value in names.items()), owner
    assert len(steps) == 2
    for segments in steps:
        found = shares(segments)
        assert {"forward", "backward", "kernels", "optimiser", REWARDS, ENGINE} == found.keys()
        rewarded = sum(s.seconds for s in segments if s.scope == REWARDS)
        # Not all of the 0.3 s: the worker may begin to sleep before the step gets round to waiting for it.
        assert rewarded >= 0.25 and found[ENGINE] < 1 - found[REWARDS]
        assert {"rollout", "reference", "update", "optimizer", "rest"} == {s.phase for s in segments}
        # The step is looked at as it is: its rollout is still the C++ decoder's, and that is the model.
        decoding = {(s.phase, s.scope) for s in segments if s.kind == "native decoding"}
        assert ("rollout", "forward") in decoding


def test_a_profile_says_what_every_part_of_a_step_computes(case, tmp_path, capsys):
    from bench.__main__ import main

    arguments = [
        "--model",
        "tiny",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "p.json"),
    ]
    threads = torch.get_num_threads()
    try:
        assert main(["profile-step", *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    import json

    found = json.loads((tmp_path / "p.json").read_text())
    assert sum(row["seconds"] for row in found["table"]) == pytest.approx(found["traced_step"])
    assert sum(row["share"] for row in found["table"]) == pytest.approx(1)
    kinds = {(row["scope"], row["kind"]) for row in found["table"]}
    assert {
        ("forward", "products"),
        ("forward", "attention"),
        ("backward", "products"),
        ("kernels", "token statistics"),
        ("forward", "native decoding"),
        ("optimiser", "optimiser"),
        (ENGINE, "python"),
    } <= kinds
    assert 0 < found["engine_share"] < 1 and 0 < found["python_share"] < 1
    assert "The engine's own:" in capsys.readouterr().out


def test_an_unknown_model_is_refused():
    from bench.__main__ import main

    with pytest.raises(SystemExit, match="unknown model 'nonesuch'; known: tiny"):
        main(["profile-step", "--model", "nonesuch", "--device", "cpu"])
