"""Passes through a sharded stack of which every process makes its own number: while it draws, scores, evaluates.

A layer is gathered before it runs and dropped after it, and gathering is a collective of all processes. A process with no pass
to make keeps the others company: it gathers and drops the layers, and computes nothing.

    a pass                 a one is all-reduced; then the all-gathers of the L layers, in their order
    before an exchange     a zero is all-reduced; if the maximum is one, the all-gathers of the L layers, and again a zero

Let P be the most passes of any process between two exchanges of `Parallel`. There are P + 1 all-reduces of one number and P L
all-gathers. Only a process that waits reads the maximum, so that a GPU that runs does not wait for its host.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from clp_engine.core.errors import ConfigError
from clp_engine.training.parallel.processes import Parallel

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


@contextlib.contextmanager
def own_pace(stack: nn.Module, layers: Sequence[FSDPModule], parallel: Parallel) -> Iterator[None]:
    """Inside the block a process passes through `stack` as often as it likes. It leaves when no process passes any more.

    stack: runs each of `layers` once in a pass, in this order, without gradients. Every process must enter the block, and none
    may exchange anything in it but by `parallel`.
    Raises ConfigError for a pass in a thread other than the one that entered: the order of two threads' collectives differs
    between processes.
    """
    owner = threading.get_ident()

    def announce(*_) -> None:
        if threading.get_ident() != owner:
            raise ConfigError(
                "a thread beside training runs the policy (a reward function?), and fsdp gathers the layers of each pass from "
                "all processes; set fsdp_config: {gather_for_generation: true}, or reward_workers=0"
            )
        parallel.tell_runs()

    def keep_company() -> None:
        while parallel.others_run():
            for layer in layers:
                layer.unshard()
                layer.reshard()

    hook = stack.register_forward_pre_hook(announce, prepend=True)
    parallel.before_exchange = keep_company
    try:
        yield
        keep_company()
    finally:
        parallel.before_exchange = None
        hook.remove()
