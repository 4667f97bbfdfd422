"""python -m clp_engine.evaluation.compare.worker CONFIG.json PIECE: do one piece of a comparison in this process."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from clp_engine.evaluation.compare import work
from clp_engine.evaluation.compare.plan import make_plan
from clp_engine.evaluation.compare.schedule import BUSY, INTERRUPTED, describe_error, pieces
from clp_engine.training import running


def _interrupt_when_alone() -> None:
    """Interrupt this process when its parent ends. Standard input is a pipe from the parent, which closes at that moment."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGINT)


def main(config: str, key: str) -> int:
    """Do the piece `key` of the plan that the file `config` holds. Returns the exit code."""
    # SIGINT stops this process, even if the parent inherited that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_interrupt_when_alone, daemon=True).start()
    plan = make_plan(json.loads(Path(config).read_text(encoding="utf-8")))
    piece = next(p for p in pieces(plan) if p.key == key)
    try:
        piece.do(plan, progress=False)
        return 0
    except work.Busy:
        return BUSY
    except (KeyboardInterrupt, running.Interrupted):
        return INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        print(describe_error(error), flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
