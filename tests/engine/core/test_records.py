"""Every file of JSON that the engine reads, damaged or another's: one line that names the file and what to do."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from engine.conftest import build_model
from engine.training.test_trainer import build_trainer

from clp_engine import ParetoReport
from clp_engine.core import records
from clp_engine.core.errors import ConfigError
from clp_engine.data.sources import read_rows
from clp_engine.evaluation.compare.work import Training
from clp_engine.models import fingerprint
from clp_engine.training.checkpoints import checkpoint as checkpoints
from clp_engine.training.runs import run_folder
from clp_engine.training.runs.run_spec import RunSpec

REMEDY = r"(again|another checkpoint|remove it|expected a checkpoint)"


class Pair(NamedTuple):
    name: str
    size: float


@dataclasses.dataclass(frozen=True)
class Inner:
    kinds: dict[str, list[int]]
    pair: Pair | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    names: tuple[str, ...]
    share: float
    flag: bool = False
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def test_what_was_written_is_read_with_the_types_it_had(tmp_path):
    value = Outer(Inner({"a": [1, 2]}, Pair("b", 1.5)), ("c",), 2.0, True, {"d": [None, {}]})
    (tmp_path / "x.json").write_text(json.dumps({**dataclasses.asdict(value), "later": 1}))
    assert records.read(tmp_path / "x.json", Outer) == value


@pytest.mark.parametrize(
    "change, said",
    [
        ({"inner": None}, "expected object, got null - at inner"),
        ({"inner": {"pair": None}}, "object missing required field kinds - at inner"),
        ({"inner": {"kinds": {"a b": [1, True]}}}, r"expected int, got bool - at inner\.kinds"),
        ({"inner": {"kinds": {}, "pair": ["a"]}}, r"expected array of length 2, got 1 - at inner\.pair"),
        ({"names": "abc"}, "expected array, got str - at names"),
        ({"share": "1"}, "expected float, got str - at share"),
        ({"share": 10**400}, "a number of 401 digits"),
        ({"inner": {"kinds": {"a": [-(10**400)]}}}, "a number of 402 digits"),
        ({"flag": 1}, "expected bool, got int - at flag"),
        ({"extra": []}, "expected object, got array - at extra"),
        ({"extra": "\ud800"}, "'utf-8' codec can't encode"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_named_with_its_file(tmp_path, change, said):
    path, value = tmp_path / "x.json", Outer(Inner({}), ("c",), 2.0)
    path.write_text(json.dumps({**dataclasses.asdict(value), **change}))
    with pytest.raises(
        ConfigError, match=rf"x\.json is damaged or (another's|no JSON) \({said}.*; write or copy it again"
    ):
        records.read(path, Outer)


# -- every reader ---------------------------------------------------------------------------------------------------------

STATE = {"config": {"rank": 4}, "step": 1, "run": "x", "written": 1.5, "random": {"python": [3, [1], None]}}
INTERVAL = {"mean": 1.0, "low": 0.5, "high": 1.5}
BASE = {
    "rewards": {"a": INTERVAL},
    "hypervolume": 0.0,
    "hypervolume_interval": INTERVAL,
    "length": 2,
    "truncated": 0,
}
REPORT = {
    "task": None, "model": "a", "objectives": ["a"], "reference_point": {"a": 0.0}, "hypervolume": 1.0, "regret": {"a": 0.1},
    "points": [], "base": BASE, "hypervolume_interval": INTERVAL, "hypervolume_gain": INTERVAL, "hypervolume_chance": 0.1,
    "expected_utility": 1.0, "realised_utility": 1.0, "realised_utility_interval": INTERVAL, "steerability": {"a": None},
    "seconds": {}, "setup": {}, "versions": {}, "commit": None,
}  # fmt: skip
RUN = {
    "model": "a",
    "objectives": ["a"],
    "dataset": "b",
    "rewards": {"a": "c"},
    "config": {"temperature": 0.7},
}
TRAINING = {
    "seconds": 1.0, "steps": 2, "completions": 3, "generated_tokens": 4, "trained_parameters": 5, "threads": 1, "device": "cpu",
    "versions": {}, "commit": None,
}  # fmt: skip


def check_base_model(folder):
    fingerprint.check(folder, build_model("llama"))


READERS = {  # file: (its content, how it is read from its folder, changes of one key that are refused)
    "run.json": (RUN, RunSpec.load, [("model", 5), ("objectives", "ab"), ("rewards", ["a"]), ("config", None),
                                     ("config", {"temperature": "hot"}), ("config", {"max_completion_length": -1}),
                                     ("train_seconds", math.nan), ("train_seconds", math.inf)]),
    "clp_manifest.json": ({"run": None, "files": ["log.jsonl"]}, run_folder.Manifest.read,
                          [("run", 1), ("files", "log.jsonl"), ("files", [1]), ("files", ["a\0b"]), ("files", ["\ud800"]),
                           ("files", ["a" * 300])]),
    "trainer_state.json": (STATE, checkpoints.read_state, [("config", 1), ("sha256", []), ("mix_controller", {"dot": "x"}),
                                                          ("written", None), ("random", {"python": 5})]),
    "report.json": (REPORT, ParetoReport.load, [("points", {}), ("points", [{}]), ("base", None), ("objectives", "a"),
                                                ("hypervolume", None), ("regret", {"a": "b"}), ("setup", [])]),
    "training.json": (TRAINING, lambda folder: Training.load(folder / "training.json"), [("seconds", "1"), ("steps", 1.5)]),
    "base_model.json": ({"w": [[1], "float32", 1.0, 1.0]}, check_base_model,
                        [("w", 1), ("w", [1]), ("w", [[1], "float32", "x", 1.0])]),
}  # fmt: skip


NEEDED = {"run.json": ("model", "objectives"), "trainer_state.json": ("config",)}  # of the others, every key


def contents(whole, changes):
    text = json.dumps(whole)
    yield from (text[: len(text) // 2], text[:-2], "", "[1, 2]", "null", '"text"', "5", "[" * 10**5)
    yield '{"a": 1' + "0" * 5000 + "}"
    yield from (b"\xff" * 64, text.replace('"', "'"), text.encode("utf-16"))
    yield from (json.dumps({**whole, name: value}) for name, value in changes)


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_one_line_with_its_name_and_the_remedy(name, tmp_path):
    whole, read, changes = READERS[name]
    if name != "base_model.json":  # which would have to be of that model
        (tmp_path / name).write_text(json.dumps(whole))
        assert read(tmp_path) is not None
    for content in contents(whole, changes):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ConfigError, match=rf"(?s){name[:4]}.*{REMEDY}") as caught:
            read(tmp_path)
        assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 700, content[:100]
    for key in NEEDED.get(name, whole):
        (tmp_path / name).write_text(json.dumps({n: v for n, v in whole.items() if n != key}))
        with pytest.raises(
            ConfigError, match=rf"missing required field {key}|was not written by this engine|differ, first"
        ):
            read(tmp_path)


@pytest.mark.parametrize(
    "line", ["{", "[" * 10**5, '{"prompt": 1' + "0" * 5000 + "}", "5", '{"text": "a"}'], ids=lambda s: s[:20]
)
def test_a_damaged_line_of_a_dataset_is_named(line, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 2: "):
        read_rows(tmp_path / "rows.jsonl")


def test_a_checkpoint_that_cannot_be_read_is_no_checkpoint_of_the_run(tmp_path, caplog):
    for number, content in enumerate(
        ["5", "{", '{"step": "x"}', '{"step": 1, "written": "now"}', "[" * 10**5]
    ):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(content)
    assert run_folder.checkpoints(tmp_path) == []
    assert len(caplog.records) == 5 and all("left alone" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "change",
    [{"scheduler": {}}, {"sampler": {"a": 1}}, {"mix_controller": {"dot": 0.0}}, {"random": {}}, {"trainer": {"odd": 1}},
     {"random": {"python": [1, 2], "numpy": [0, 0, 0, 0]}}],
    ids=str,
)  # fmt: skip
def test_a_state_that_cannot_be_restored_is_one_line(change, tmp_path):
    build_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    path = tmp_path / "checkpoint-1" / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(
        ConfigError, match=r"trainer_state\.json is damaged or another's .*; resume from another checkpoint"
    ):
        build_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=path.parent)


@pytest.mark.parametrize("place, value", [(3, 1e30), (3, math.inf), (2, 1e30), (1, "int8"), (1, "nothing")])
def test_a_fingerprint_whose_numbers_were_changed_does_not_pass(place, value, tmp_path):
    """A norm of 1e30 once excused every difference."""
    model = build_model("llama")
    fingerprint.write(Path(tmp_path), model)
    saved = json.loads((tmp_path / fingerprint.FILE).read_text())
    fingerprint.check(tmp_path, model)
    saved[next(iter(saved))][place] = value
    (tmp_path / fingerprint.FILE).write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="1 of .* tensors differ"):
        fingerprint.check(tmp_path, model)
