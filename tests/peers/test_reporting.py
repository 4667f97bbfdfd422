"""report_to: what transformers' own callbacks write for TensorBoard and W&B holds the run's metrics, step by step."""

import json
import math
import struct
import time

import pytest

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")
from peers.both_trainers import ROWS, our_trainer

from clp_engine.core.errors import ConfigError


def reward(completions, **_):
    return [float(len(set(c.split()))) for c in completions]


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))


def run(tmp_path, report_to):
    trainer = our_trainer(
        tmp_path / "run",
        reward,
        report_to=report_to,
        run_name="a run",
        eval_dataset=ROWS[:2],
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
    )
    trainer.train()
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    return [e for e in entries if "reward" in e], [e for e in entries if "eval_reward" in e]


def written_for_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def wandb_records(path):
    """The records of an offline run: a header of 7 bytes, then LevelDB's log format, blocks of 32 KiB of (checksum, length,
    kind) and data, where a record is whole (1) or has a first, middle and last part (2, 3, 4)."""
    data, block, place, parts = path.read_bytes(), 1 << 15, 7, []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if block - place % block < 7:  # too little room for a header: padding
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def written_for_wandb(folder):
    """(history rows, config) of the one offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows, config = [], {}
    for data in wandb_records(path):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            rows.append(
                {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            )
        for item in (*record.config.update, *record.run.config.update):
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return rows, config


def check_tensorboard(folder, steps, evaluations):
    scalars = written_for_tensorboard(folder)
    for entry in steps:
        for name, value in entry.items():
            if name != "step":
                assert math.isclose(
                    scalars[f"train/{name}"][entry["step"]], value, rel_tol=1e-5, abs_tol=1e-6
                ), name
    for entry in evaluations:
        assert math.isclose(scalars["eval/reward"][entry["step"]], entry["eval_reward"], rel_tol=1e-5)
    assert "train/train_runtime" in scalars


def check_wandb(folder, steps, evaluations):
    # On a busy machine its writer may be behind finish().
    for _ in range(100):
        rows, config = written_for_wandb(folder)
        if sum("train/reward" in row for row in rows) >= len(steps) and any("eval/reward" in r for r in rows):
            break
        time.sleep(0.1)
    for entry in steps:
        (row,) = [r for r in rows if r.get("train/global_step") == entry["step"] and "train/reward" in r]
        for name, value in entry.items():
            if name != "step":
                assert math.isclose(row[f"train/{name}"], value, rel_tol=1e-9, abs_tol=1e-12), name
    (row,) = [r for r in rows if "eval/reward" in r]
    assert row["eval/reward"] == evaluations[0]["eval_reward"]
    assert config["learning_rate"] == 1e-3 and config["beta"] == 0.04


def test_tensorboard(tmp_path):
    check_tensorboard(tmp_path / "board", *run(tmp_path, "tensorboard"))


def test_wandb_offline_and_both_from_a_list(tmp_path):
    import wandb

    found = run(tmp_path, ["tensorboard", "wandb"])
    assert wandb.run is not None and wandb.run.name == "a run"
    wandb.finish()
    check_tensorboard(tmp_path / "board", *found)
    check_wandb(tmp_path, *found)


def test_none_writes_nothing_and_unknown_names_are_refused(tmp_path):
    run(tmp_path, "none")
    assert not (tmp_path / "board").exists() and not list(tmp_path.glob("wandb"))
    with pytest.raises(ConfigError, match="report_to='tensorbord'.*tensorboard"):
        run(tmp_path, "tensorbord")
