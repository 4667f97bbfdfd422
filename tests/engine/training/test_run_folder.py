"""The folder of a run: whose it is, what is removed from it and what never, resuming after a kill, one training at a time."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engine.conftest import build_model, build_tokenizer
from engine.training.test_trainer import build_trainer
from transformers import TrainerCallback

from clp_engine.core import files
from clp_engine.core.errors import ConfigError
from clp_engine.core.locking import exclusive
from clp_engine.training.checkpoints import checkpoint
from clp_engine.training.runs import run_folder

SAVING = {"save_strategy": "steps", "save_steps": 1}


def held(folder):
    """Every file of a folder, with its content."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def names(folder):
    return [path.name for path in checkpoint.checkpoints(folder)]


def mine(folder, *paths):
    """Files that no engine wrote, in the folder of a run."""
    for path in ("notes.txt", "policy/notes.txt", "checkpoint-7/weights.bin", *paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"mine")
    return {path: content for path, content in held(folder).items() if content == b"mine"}


def test_overwriting_removes_what_the_manifest_says_and_nothing_else(tmp_path):
    before = mine(tmp_path)
    first = build_trainer(tmp_path, max_steps=3, log_completions=True, **SAVING)
    first.train()
    before = mine(tmp_path, "checkpoint-3/notes.txt")
    second = build_trainer(tmp_path, max_steps=2, overwrite_output_dir=True, **SAVING)
    second.train()
    now = held(tmp_path)
    assert {path: now[path] for path in before} == before
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"] and "completions.jsonl" not in now
    assert set(now) == set(before) | run_folder.Manifest.read(tmp_path).files | {"clp_manifest.json"}
    assert run_folder.Manifest.read(tmp_path).run == second.run_id != first.run_id
    assert {checkpoint.read_state(tmp_path / name)["run"] for name in names(tmp_path)} == {second.run_id}


@pytest.mark.parametrize("save", ["steps", "no"])
def test_a_second_run_in_the_folder_of_another_is_refused_and_changes_nothing(tmp_path, save):
    build_trainer(tmp_path, max_steps=1, **SAVING | {"save_strategy": save}).train()
    before = held(tmp_path)
    other = build_trainer(tmp_path, max_steps=1)
    for write in (other.train, other.save_model):
        with pytest.raises(ConfigError, match="holds an earlier run; resume it .*overwrite_output_dir=True"):
            write()
    assert held(tmp_path) == before


def test_a_run_that_left_nothing_to_go_on_from_does_not_stand_in_the_way(tmp_path):
    def broken(completions, **_):
        raise ValueError("of the user")

    with pytest.raises(Exception, match="of the user"):
        build_trainer(tmp_path, rewards={"broken": broken}, max_steps=1).train()
    assert build_trainer(tmp_path, max_steps=1).train().global_step == 1


def test_what_is_being_read_is_not_overwritten(tmp_path):
    first = build_trainer(tmp_path / "run", max_steps=1, **SAVING)
    first.train()
    first.policy.merge([1, 0]).save_pretrained(tmp_path / "run" / "policy")
    build_tokenizer().save_pretrained(tmp_path / "run" / "policy")
    before = held(tmp_path)
    with pytest.raises(ConfigError, match="of the run that is to be overwritten, and is being read"):
        build_trainer(
            tmp_path / "run", model=str(tmp_path / "run" / "policy"), overwrite_output_dir=True
        ).train()
    assert held(tmp_path) == before


def test_a_report_of_a_run_whose_policy_is_gone_is_in_the_way_and_a_log_is_not(tmp_path):
    build_trainer(tmp_path, max_steps=1).train()
    shutil.rmtree(tmp_path / "policy")
    run_folder.note(tmp_path, [tmp_path / "report.md"])
    (tmp_path / "report.md").write_text("of the first run")
    with pytest.raises(ConfigError, match="holds an earlier run"):
        build_trainer(tmp_path, max_steps=1).train()
    (tmp_path / "report.md").unlink()
    build_trainer(tmp_path, max_steps=1).train()


def test_a_model_saved_into_the_run_s_folder_goes_with_the_run(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path)
    trainer.save_model(tmp_path / "final")
    build_trainer(tmp_path, max_steps=1, overwrite_output_dir=True).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clp_manifest.json", "log.jsonl", "policy"]


# -- rotation and resuming ---------------------------------------------------------------------------------------------


def earlier_run(folder, steps=6):
    """A folder with the last checkpoint of another run in it, and no manifest."""
    build_trainer(folder, max_steps=steps, save_strategy="steps", save_steps=steps).train()
    shutil.rmtree(folder / "policy")
    (folder / "clp_manifest.json").unlink()
    return held(folder / f"checkpoint-{steps}")


def test_rotation_and_resuming_leave_the_checkpoints_of_an_earlier_run_alone(tmp_path):
    before = earlier_run(tmp_path)
    changes = {"overwrite_output_dir": True, "save_total_limit": 1, **SAVING}
    build_trainer(tmp_path, max_steps=3, **changes).train()
    assert names(tmp_path) == ["checkpoint-3"] and held(tmp_path / "checkpoint-6") == before
    resumed = build_trainer(tmp_path, max_steps=3, **SAVING)
    assert resumed.train(resume_from_checkpoint=True).global_step == 3
    assert resumed.run_id == checkpoint.read_state(tmp_path / "checkpoint-3")["run"]


@pytest.mark.parametrize(("limit", "kept"), [(None, 3), (0, 3), (-1, 3), (-2, 3), (1, 1), (2, 2)])
def test_a_limit_of_none_0_and_less_keeps_all_checkpoints_as_in_transformers(tmp_path, limit, kept):
    build_trainer(tmp_path, max_steps=3, save_total_limit=limit, **SAVING).train()
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (1, 2, 3)][-kept:]


def test_rotation_goes_by_time_and_not_by_step(tmp_path):
    """Steps that were given up, because training went on from before them, are the older ones."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step == 3

    build_trainer(tmp_path, max_steps=5, **SAVING).train()
    again = build_trainer(tmp_path, max_steps=5, save_total_limit=3, callbacks=[Stop], **SAVING)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-2", "checkpoint-3"]
    assert checkpoint.resolve(tmp_path, True) == tmp_path / "checkpoint-3"


def test_what_was_just_written_stays_though_the_clock_went_back(tmp_path, monkeypatch):
    clock = iter(range(10_000, 0, -1))
    monkeypatch.setattr(checkpoint.time, "time", lambda: next(clock))
    seen = []
    original = run_folder.rotate

    def rotate(folder, keep, newest):
        original(folder, keep, newest)
        seen.append((newest / "training.safetensors").is_file())

    monkeypatch.setattr(run_folder, "rotate", rotate)
    build_trainer(tmp_path, max_steps=3, save_total_limit=1, **SAVING).train()
    assert seen == [True] * 3 and names(tmp_path) == ["checkpoint-3"]


def test_of_a_linked_checkpoint_rotation_removes_the_link(tmp_path):
    trainer = build_trainer(tmp_path / "run", max_steps=3, save_total_limit=1, **SAVING)
    (tmp_path / "archive").mkdir()

    class Archive(TrainerCallback):
        def on_save(self, args, state, control, **_):
            if state.global_step == 1:
                kept = tmp_path / "archive" / "kept"
                (tmp_path / "run" / "checkpoint-1").rename(kept)
                (tmp_path / "run" / "checkpoint-1").symlink_to(kept)

    trainer.add_callback(Archive)
    trainer.train()
    assert (
        names(tmp_path / "run") == ["checkpoint-3"] and not (tmp_path / "run" / "checkpoint-1").is_symlink()
    )
    assert (tmp_path / "archive" / "kept" / "training.safetensors").is_file()


def test_a_checkpoint_folder_that_no_engine_wrote_is_none(tmp_path):
    before = mine(tmp_path)
    (tmp_path / "checkpoint-900").mkdir()
    build_trainer(tmp_path, max_steps=2, save_total_limit=1, **SAVING).train()
    assert names(tmp_path) == ["checkpoint-2"]
    assert {path: held(tmp_path)[path] for path in before} == before and (
        tmp_path / "checkpoint-900"
    ).is_dir()


def test_checkpoints_of_transformers_are_neither_replaced_unasked_nor_resumed(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1}')
    before = held(tmp_path)
    for resume, message in (
        (None, "holds an earlier run"),
        (True, "no checkpoint to resume from"),
        (tmp_path / "checkpoint-1", "was not written by this engine"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_trainer(tmp_path, max_steps=1, **SAVING).train(resume_from_checkpoint=resume)
    assert held(tmp_path) == before


def test_a_run_of_an_earlier_version_is_resumed_and_rotated(tmp_path):
    build_trainer(tmp_path, max_steps=4, **SAVING).train()
    shutil.rmtree(tmp_path / "policy")
    (tmp_path / "clp_manifest.json").unlink()
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"):
        state = checkpoint.read_state(tmp_path / name)
        del state["run"], state["written"]
        (tmp_path / name / run_folder.STATE_FILE).write_text(json.dumps(state))
    shutil.rmtree(tmp_path / "checkpoint-4")
    trainer = build_trainer(tmp_path, max_steps=4, save_total_limit=2, **SAVING)
    assert trainer.train(resume_from_checkpoint=True).global_step == 4
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"] and trainer.run_id is None
    assert not (tmp_path / "checkpoint-1").exists()


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_refused_resume_changes_nothing(tmp_path):
    build_trainer(tmp_path, max_steps=2, **SAVING).train()
    before = held(tmp_path)
    with pytest.raises(ConfigError, match="other settings for learning_rate"):
        build_trainer(tmp_path, max_steps=2, learning_rate=1.0).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match=r"checkpoint-9: no trainer_state.json here"):
        build_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=tmp_path / "checkpoint-9")
    assert held(tmp_path) == before


def test_a_checkpoint_of_another_run_is_not_resumed_in_this_one_s_folder(tmp_path):
    for name in ("a", "b"):
        build_trainer(tmp_path / name, max_steps=2, **SAVING).train()
    before = held(tmp_path)
    with pytest.raises(ConfigError, match="holds an earlier run"):
        build_trainer(tmp_path / "a", max_steps=2).train(
            resume_from_checkpoint=tmp_path / "b" / "checkpoint-1"
        )
    assert held(tmp_path) == before


def test_two_trainings_in_one_folder_are_refused_with_the_other_s_process_and_host(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=1)
    with (
        exclusive(tmp_path / ".lock"),
        pytest.raises(ConfigError, match=rf"process {os.getpid()} on \S+ is training in this folder; wait"),
    ):
        trainer.train()
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "of a process that was killed"}')
    assert trainer.train().global_step == 1 and not list(tmp_path.glob(".*"))


def test_the_lock_is_given_back_by_a_training_that_fails(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        build_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["/proc/run", "a-file", "a-file/run"])
def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("mine")
    with pytest.raises(
        ConfigError, match=rf"output_dir='{folder}': cannot write there \(.*\); give a folder"
    ):
        build_trainer(folder, max_steps=1).train()
    assert Path("a-file").read_text() == "mine"


def test_a_read_only_folder_is_refused_before_the_first_step(tmp_path, monkeypatch):
    real = os.open

    def read_only(path, flags, *mode, **options):
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(ConfigError, match=r"cannot be written to \(Read-only file system\)"):
        build_trainer(tmp_path, max_steps=1).train()


def test_a_folder_that_is_deleted_meanwhile_is_made_again(tmp_path):
    class Delete(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                shutil.rmtree(tmp_path / "run")

    build_trainer(tmp_path / "run", max_steps=4, callbacks=[Delete], **SAVING).train()
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert (tmp_path / "run" / "policy" / "clp_config.json").is_file()


# -- after a kill ------------------------------------------------------------------------------------------------------


def test_what_a_killed_training_left_is_gone_or_finished_when_the_next_one_begins(tmp_path):
    build_trainer(tmp_path, max_steps=3, **SAVING).train()
    (tmp_path / "checkpoint-3").rename(tmp_path / ".checkpoint-3.ready-elsewhere-1")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / ".checkpoint-4.new-elsewhere-1")
    (tmp_path / "policy").rename(tmp_path / f".policy.old-{2**30}")
    (tmp_path / ".log.jsonl.new-elsewhere-1").write_text("half")
    report = tmp_path / ".report.json.new-elsewhere-1"  # an evaluation may be writing it now
    report.write_text("half")
    build_trainer(tmp_path, max_steps=3, **SAVING).train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob(".*")] == [report.name]
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_policy_that_was_to_be_moved_into_place_is_found(tmp_path):
    from clp_engine.policy.policy import ConditionedPolicy
    from clp_engine.training import running

    gone = subprocess.Popen(["true"])
    gone.wait()
    build_trainer(tmp_path, max_steps=1).train()
    (tmp_path / "policy").rename(tmp_path / f".policy.ready-{files.socket.gethostname()}-{gone.pid}")
    assert running.is_finished(tmp_path) and running.policy_directory(tmp_path) == tmp_path / "policy"
    (tmp_path / "policy").rename(tmp_path / f".policy.ready-{files.socket.gethostname()}-{gone.pid}")
    ConditionedPolicy.load(tmp_path / "policy", base_model=build_model("qwen2"))


def broken_runs(tmp_path, kind, **environment):
    script = Path(__file__).with_name("broken_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), kind],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2]), **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *faults, trials = done.stdout.splitlines()
    assert not faults, "\n".join(faults)
    return int(trials.split()[0])


@pytest.mark.check
def test_a_run_that_is_killed_at_any_rename_goes_on_to_the_same_policy(tmp_path):
    assert broken_runs(tmp_path, "kill") > 30


@pytest.mark.check
def test_a_run_whose_disk_is_full_at_any_write_goes_on_to_the_same_policy(tmp_path):
    source, library = Path(__file__).with_name("faults.c"), tmp_path / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    assert broken_runs(tmp_path, "full", LD_PRELOAD=str(library)) > 40
