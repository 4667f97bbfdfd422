"""Nothing that a reader is given ends in anything but a value or a ConfigError: atheris for a minute, over all of targets.py.

Every run takes the same seed; how far it gets in its time differs. CLP_EXPLORE=20 takes another seed and 20 minutes.
"""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = Path(__file__).with_name("targets.py")
NAMES = (
    "settings",
    "flag",
    "run_json",
    "run_files",
    "policy_files",
    "adapter",
    "tensors",
    "reports",
    "rows",
    "request",
)
EXPLORE = int(os.environ.get("CLP_EXPLORE", "0"))
SECONDS = 60 * max(EXPLORE, 1)


def test_every_target_is_run():
    defined = re.findall(r"^def (\w+)\(source, folder\):", TARGETS.read_text(), re.MULTILINE)
    assert tuple(defined) == NAMES


@pytest.mark.check
@pytest.mark.parametrize("name", NAMES)
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
    flags = ["-max_len=1000", "-len_control=0", "-timeout=20", "-rss_limit_mb=4096", f"-artifact_prefix={tmp_path}/",
             f"-seed={seed}", f"-max_total_time={SECONDS // len(NAMES)}"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(TARGETS), name, str(work), str(corpus), *flags],
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=SECONDS + 240,
    )
    found = sorted(path for path in tmp_path.iterdir() if path.is_file())
    said = [line for line in done.stderr.splitlines() if not line.startswith(("#", "INFO"))]
    assert done.returncode == 0 and not found, "\n".join(
        [*(f"{path.name}: {path.read_bytes()!r}" for path in found), *said[-80:]]
    )
    assert re.search(r"cov: [1-9]", done.stderr), "no branch was counted\n" + "\n".join(said[-20:])
