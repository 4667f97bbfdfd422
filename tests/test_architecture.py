"""docs/architecture.md says where a new thing goes: its examples run as they stand there, in their order."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from engine.conftest import build_model, build_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
SMALL = {
    "max_steps": 2,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 4,
    "rank": 2,
    "save_steps": 1,
    "disable_tqdm": True,
}


def even(completion_ids, **_):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def small(completion_ids, **_):
    return [sum(i < 20 for i in ids) / len(ids) for ids in completion_ids]


def test_the_examples_of_the_page_run(tmp_path):
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 7
    names = {
        "MODEL": lambda: build_model("qwen2"),
        "TOKENIZER": build_tokenizer("qwen2"),
        "REWARDS": [even, small],
        "ROWS": [{"prompt": f"w{i} w{i + 1}"} for i in range(6)],
        "OUT": str(tmp_path),
        "SMALL": SMALL,
    }
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)


@pytest.mark.parametrize(
    "line", [line for line in PAGE.read_text(encoding="utf-8").split("\n") if "/" in line]
)
def test_the_files_of_the_page_are_there(line):
    room = re.match(r"\| `([a-z]+)` \|", line)  # whose folders a row of the floors names
    places = [
        PAGE.parents[1] / place
        for place in ("clp_engine", "kernels", f"clp_engine/{room[1] if room else ''}", "")
    ]
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?)`", line):
        assert any((place / name).exists() for place in places), name
