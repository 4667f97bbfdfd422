"""Start a script of this folder, or a command, in several processes, as a user's torchrun does."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[3]


def launched(count, script, *arguments, seconds=300, options=()):
    """The finished processes of HERE/script; arguments are passed as JSON."""
    return torchrun(count, [str(HERE / script), *map(json.dumps, arguments)], seconds, options)


def torchrun(count, command, seconds=300, options=()):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    paths = os.pathsep.join([str(ROOT / "tools"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*launcher, *options, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
