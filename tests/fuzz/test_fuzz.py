"""Nothing that a reader is given ends in anything but a value or a ConfigError: atheris for a minute, over all of targets.py.

Every run takes the same seed and as many inputs, nearly the same ones therefore. CLP_EXPLORE=20 looks for others: another seed,
20 minutes.
"""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = Path(__file__).with_name("targets.py")
# Each reader, and how many inputs are some six seconds' work.
INPUTS = {
    "settings": 400,
    "flag": 800,
    "run_json": 3_000,
    "run_files": 700,
    "policy_files": 5_000,
    "adapter": 3_000,
    "tensors": 6_000,
    "reports": 6_000,
    "rows": 8_000,
    "request": 6_000,
}
EXPLORE = int(os.environ.get("CLP_EXPLORE", "0"))


def test_every_target_is_run():
    defined = re.findall(r"^def (\w+)\(source, folder\):", TARGETS.read_text(), re.MULTILINE)
    assert tuple(defined) == tuple(INPUTS)


@pytest.mark.check
@pytest.mark.parametrize("name", INPUTS)
def test_what_a_reader_cannot_use_it_refuses_in_words(name, tmp_path):
    pytest.importorskip(
        "atheris", reason="atheris, which has wheels for Linux on x86-64 alone, is not installed"
    )
    work, corpus = tmp_path / "work", tmp_path / "corpus"
    work.mkdir()
    corpus.mkdir()
    seed = random.randrange(1, 2**31) if EXPLORE else 1
    generator = random.Random(seed)
    for number, size in enumerate((0, 1, 8, 20, 20, 60, 60, 200, 200, 400, 800, 800)):
        (corpus / str(number)).write_bytes(generator.randbytes(size))
    end = f"-max_total_time={60 * EXPLORE // len(INPUTS)}" if EXPLORE else f"-runs={INPUTS[name]}"
    flags = ["-max_len=1000", "-len_control=0", "-timeout=20", "-rss_limit_mb=4096", f"-artifact_prefix={tmp_path}/",
             f"-seed={seed}", end]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(TARGETS), name, str(work), str(corpus), *flags],
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=60 * EXPLORE + 240,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    found = sorted(path for path in tmp_path.iterdir() if path.is_file())
    said = [line for line in done.stderr.splitlines() if not line.startswith(("#", "INFO"))]
    assert done.returncode == 0 and not found, "\n".join(
        [*(f"{path.name}: {path.read_bytes()!r}" for path in found), *said[-80:]]
    )
    assert re.search(r"cov: [1-9]", done.stderr), "no branch was counted\n" + "\n".join(said[-20:])
