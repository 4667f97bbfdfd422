"""A run of another person's executes nothing and shows no file unless the user says so."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from engine.cli.test_cli import in_workplace, refused, trained, workplace  # noqa: F401

from clp_engine.cli.main import main
from clp_engine.core.errors import ConfigError
from clp_engine.serving.served import Served
from clp_engine.serving.session import Session
from clp_engine.training.runs import trust
from clp_engine.training.runs.run_spec import RunSpec

EVALUATE = ["evaluate", "--prompts", "2", "--bootstrap", "5", "--grid", "2"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The home of another user, who has signed nothing."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))


@pytest.fixture
def copy(trained, tmp_path):  # noqa: F811
    """A run folder that came from somewhere, and whose rewards leave a trace when they are imported."""
    shutil.copytree(trained, tmp_path / "gift")
    evil = tmp_path / "gift" / "evil.py"
    evil.write_text(
        "open('was-executed', 'w').close()\ndef even(prompts, **_):\n    return [0.0] * len(prompts)\n"
    )
    raw = json.loads((tmp_path / "gift" / "run.json").read_text())
    raw["rewards"] = {"even": f"{evil}:even", "small": f"{evil}:even"}
    (tmp_path / "gift" / "run.json").write_text(json.dumps(raw))
    return tmp_path / "gift"


@pytest.fixture
def traces():
    yield lambda: Path("was-executed").exists()
    Path("was-executed").unlink(missing_ok=True)


@pytest.mark.parametrize("command", ["evaluate", "variance"])
def test_the_rewards_of_an_altered_run_are_named_and_not_executed(command, copy, traces, capsys):
    line = refused([command, str(copy)], capsys)
    assert f"execute even of {copy / 'evil.py'}" in line and "--trust-run" in line and not traces()


def test_a_run_that_is_trusted_is_executed(copy, traces, tmp_path):
    assert main([*EVALUATE, str(copy), "--trust-run", "--out", str(tmp_path / "out")]) == 0
    assert traces()


def test_rewards_by_hand_take_the_place_of_the_runs(copy, traces, tmp_path):
    own = [
        "--rewards",
        "even=toy_rewards.py:even",
        "small=toy_rewards.py:small",
        "--dataset",
        "prompts.jsonl",
    ]
    assert main([*EVALUATE, str(copy), *own, "--out", str(tmp_path / "out")]) == 0
    assert not traces()


def test_a_run_of_another_user_is_not_executed(trained, elsewhere, capsys):  # noqa: F811
    assert "execute even of" in refused(["evaluate", "run"], capsys)


def test_an_own_run_may_move(trained, tmp_path):  # noqa: F811
    shutil.copytree(trained, tmp_path / "moved")
    assert main([*EVALUATE, str(tmp_path / "moved"), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("reward", ["toy_rewards.py:even", "toy_rewards:even", "package.toy:even"])
def test_a_file_of_the_same_name_in_another_folder_is_another(reward, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    for name in ("mine", "theirs"):
        (tmp_path / name / "package").mkdir(parents=True)
        (tmp_path / name / "toy_rewards.py").touch()
        (tmp_path / name / "prompts.jsonl").touch()
    monkeypatch.chdir(tmp_path / "mine")
    spec = RunSpec("base", ("even",), dataset=str(tmp_path / "prompts.jsonl"), rewards={"even": reward})
    spec = dataclasses.replace(spec, signature=trust.sign(spec))
    assert trust.is_own(spec)
    trust.check(spec, "run", False)
    monkeypatch.chdir(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=str(tmp_path / "theirs")):
        trust.check(spec, "run", False)


def test_the_key_is_the_users_alone_and_made_once(elsewhere):
    spec = RunSpec("base", ("even",), rewards={"even": "toy_rewards.py:even"})
    assert not trust.is_own(dataclasses.replace(spec, signature="0" * 64))
    first = trust.sign(spec)
    key = Path(os.environ["XDG_STATE_HOME"]) / "clp-engine" / "key"
    assert (
        trust.sign(spec) == first
        and key.stat().st_mode & 0o777 == 0o600
        and os.listdir(key.parent) == ["key"]
    )
    for damaged in (b"", b"short"):  # an empty key would be one that everybody knows
        key.write_bytes(damaged)
        assert trust.sign(spec) is None and not trust.is_own(dataclasses.replace(spec, signature=first))


def test_training_goes_on_where_no_key_can_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert trust.sign(RunSpec("base", ("even",), rewards={"even": "toy_rewards.py:even"})) is None


def test_an_embedded_task_executes_nothing_of_the_runs():
    trust.check(RunSpec("docsum", ("coverage",), task="docsum"), "run", False)


# --- the steering page ---------------------------------------------------------------------------------------------------


def test_the_page_shows_files_of_the_run_or_given_by_hand_only(trained, elsewhere, tmp_path):  # noqa: F811
    assert Session(Served(trained, "cpu")).describe()["examples"] == []
    by_hand = Session(Served(trained, "cpu"), examples="prompts.txt").describe()["examples"]
    assert [example["text"] for example in by_hand] == ["w1 w2", "w3"]
    shutil.copytree(trained, tmp_path / "run")
    raw = json.loads((tmp_path / "run" / "run.json").read_text())
    for name, shown in (
        ("run/prompts.jsonl", True),
        ("run/../secret.jsonl", False),
        ("run/link.jsonl", False),
    ):
        (tmp_path / "secret.jsonl").write_text('{"prompt": "secret"}\n')
        (tmp_path / "run" / "prompts.jsonl").write_text('{"prompt": "w1"}\n')
        if not (tmp_path / "run" / "link.jsonl").exists():
            (tmp_path / "run" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
        (tmp_path / "run" / "run.json").write_text(json.dumps({**raw, "eval_dataset": str(tmp_path / name)}))
        assert bool(Session(Served(tmp_path / "run", "cpu")).describe()["examples"]) is shown, name


def test_examples_that_cannot_be_read_are_refused(trained):  # noqa: F811
    with pytest.raises(ConfigError, match="cannot read nowhere"):
        Session(Served(trained, "cpu"), examples="nowhere.jsonl")
