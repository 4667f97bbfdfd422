"""python broken_runs.py FOLDER kill|full: trainings that end at each of their renames, or on a disk that is full at each write.

Every one is followed by another that goes on from its newest checkpoint, or begins anew where it left none. Prints a line for
each that did not end like the run that nothing happened to, then the number of trials. `full` needs faults.c preloaded.
"""

import ctypes
import functools
import shutil
import sys
import traceback
from pathlib import Path

import torch
from engine.conftest import build_model, build_tokenizer
from engine.core.test_files import forked, kill_at
from engine.training.test_trainer import ROWS, high_words, low_words, settings
from safetensors.torch import load_file

from clp_engine.core.errors import ConfigError
from clp_engine.training.runs import run_folder
from clp_engine.training.trainer import CLPTrainer

torch.set_num_threads(1)  # its threads would not be in a forked process

SETTINGS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}


def train(folder):
    config = settings(folder, per_device_train_batch_size=4, max_completion_length=2, rank=2, **SETTINGS)
    rewards = {"low": low_words, "high": high_words}
    trainer = CLPTrainer(build_model("qwen2"), rewards, config, ROWS, processing_class=build_tokenizer())
    trainer.train(resume_from_checkpoint=bool(run_folder.checkpoints(folder)))


def full_at(number):
    ctypes.CDLL(None).faults_after(ctypes.c_long(number))


def faults_of(folder, whole):
    """What is wrong with the folder after a trial and a training that followed; () for nothing."""

    def after():
        try:
            train(folder)
        except BaseException:
            (folder.parent / "error").write_text(traceback.format_exc())
            raise

    before = run_folder.checkpoints(folder)
    for path in before:
        load_file(path / "training.safetensors")
        load_file(path / "policy" / "adapters.safetensors")
    if forked(after):
        yield f"the next run failed: {(folder.parent / 'error').read_text().splitlines()[-1]}"
        return
    policy = (folder / "policy" / "adapters.safetensors").read_bytes()
    if policy != (whole / "policy" / "adapters.safetensors").read_bytes():
        yield "another policy"
    if (folder / "notes.txt").read_text() != "mine" or (folder / "policy/notes.txt").read_text() != "mine":
        yield "notes were changed"
    # A checkpoint too many is removed when the next one has been written.
    names, expected = ({p.name for p in f.iterdir()} for f in (folder, whole))
    if not expected <= names or any("checkpoint" not in name for name in names - expected):
        yield f"left {sorted(names)}"


def prepare(folder):
    (folder / "policy").mkdir(parents=True)
    for name in ("notes.txt", "policy/notes.txt"):
        (folder / name).write_text("mine")


def broken(folder, end_at, number):
    end_at(number)
    try:
        train(folder)
    except Exception as error:
        # What the command line says in one line; see `cli.main.main`.
        if not isinstance(error, ConfigError) and not (isinstance(error, OSError) and error.filename):
            print(f"full at {number}: no line for the user: {error!r}", flush=True)
        raise


def main(place, kind):
    place, end_at = Path(place), {"kill": kill_at, "full": full_at}[kind]
    whole = place / "whole"
    prepare(whole)
    assert forked(lambda: train(whole)) == 0
    folder, number = place / "trial", {"kill": 2, "full": 0}[kind]
    while True:
        prepare(folder)
        status = forked(functools.partial(broken, folder, end_at, number))
        for fault in faults_of(folder, whole):
            print(f"{kind} at {number}: {fault}", flush=True)
        shutil.rmtree(folder)
        if status == 0:
            break
        number += 1
    print(f"{number} trials")


if __name__ == "__main__":
    main(*sys.argv[1:])
