"""Parallel: the processes of a run, one of which this is. Nothing outside this folder imports torch.distributed.

A launcher starts the processes (`torchrun`, `accelerate launch`), and accelerate joins them. What they do is one run:

    every process plans the whole of a step from (seed, step, prompt), so that no draw knows of ranks
    each draws, rewards and scores whole groups of its own (`dealing`)
    after drawing and after rewarding they exchange results (`gather`), and every process holds the batch that one would have
    the gradient is the sum of theirs (`sum_`), in one collective

Decisions are taken from what all of them hold, and so are the same everywhere. Files are written by the main process alone.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from clp_engine.core.errors import ConfigError, DrawingFailed

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

# Where transformers and TRL set it: torch's own limit for NCCL is 10 minutes, shorter than a slow reward function's step.
TIMEOUT = 1800
TRUE = ("1", "true", "yes")
# Modules whose functions call a process group.
_COLLECTIVES = ("torch.distributed.distributed_c10d", "torch.distributed._functional_collectives")


def world_size() -> int:
    """How many processes the launcher has started, by the environment; they need not have met yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Lost(RuntimeError):
    """A collective did not end: another process has gone, or was waited for beyond the limit."""


class Parallel:
    """The processes of a run. `Parallel()` is a single one; `Parallel.joined` meets those that a launcher started.

    rank, count: 0 <= rank < count. is_main: rank 0, which writes files and speaks. in_step: the base model is sharded, so that
        all processes have to run as many passes in the update. before_exchange: called before each exchange, where processes
        pass through sharded layers at their own pace (`own_pace`).
    """

    def __init__(self, accelerator: Accelerator | None = None, timeout: float = TIMEOUT):
        self.accelerator, self._timeout = accelerator, timeout
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.is_main = self.rank == 0
        self.in_step = False
        self.before_exchange: Callable[[], None] | None = None

    @classmethod
    def joined(cls, use_cpu: bool = False, timeout: float = TIMEOUT, backend: str | None = None) -> Parallel:
        """Meet the other processes; every one of them must come here. timeout: seconds that a collective may take.

        Raises ConfigError under DeepSpeed, and where the processes do not meet.
        """
        if asked("ACCELERATE_USE_DEEPSPEED"):
            raise ConfigError(
                "DeepSpeed: ZeRO partitions parameters and optimiser behind hooks of its own, and the blended layers, the "
                "decoder and the one-pass loss read weights themselves; use FSDP2 (fsdp='full_shard'), which shards the base "
                "as ZeRO-3 does"
            )
        if world_size() == 1:
            return cls()
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        use_cpu = use_cpu or not torch.accelerator.is_available()
        backend, seconds = backend or ("gloo" if use_cpu else "nccl"), datetime.timedelta(seconds=timeout)
        limit = InitProcessGroupKwargs(backend=backend, timeout=seconds)
        try:
            if _started_again() and not torch.distributed.is_initialized():
                store, rank, size = next(torch.distributed.rendezvous("env://", timeout=seconds))
                own = torch.distributed.PrefixStore(f"start {_started_again()}", store)
                torch.distributed.init_process_group(
                    backend, timeout=seconds, store=own, rank=rank, world_size=size
                )
            with _without_fsdp():
                accelerator = Accelerator(cpu=use_cpu, kwargs_handlers=[limit])
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the {world_size()} processes of this run did not meet ({str(error).splitlines()[0]}); look at "
                "MASTER_ADDR, MASTER_PORT and the launcher's own messages"
            ) from error
        # A thread of gloo's that lets go of a tensor while Python ends aborts the process ("terminate called without an active
        # exception"); it must have ended before.
        atexit.register(_left)
        found = cls(accelerator, timeout)
        if not found.is_main:  # what is said is said once
            for name in ("clp_engine", "transformers", "py.warnings"):
                logging.getLogger(name).setLevel(logging.ERROR)
        return found

    def gather(self, value: T) -> list[T]:
        """Every process's `value`, in the order of ranks; any object that can be pickled, tensors on the host. Two collectives:
        sizes, then contents."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        self.meet()
        with self.waiting():
            return gather_object([value])

    def by_main(self, act: Callable[[], None]) -> None:
        """Let the main process act, while the others wait. Raises DrawingFailed everywhere where it does there."""
        failed = None
        if self.is_main:
            try:
                act()
            except DrawingFailed as error:
                failed = str(error)
        if (reason := self.gather(failed)[0]) is not None:
            raise DrawingFailed(reason)

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by the sum of all processes', one collective for each; all processes give the same shapes."""
        if self.count > 1:
            self.meet()
            with self.waiting():
                for tensor in tensors:
                    torch.distributed.all_reduce(tensor)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Whether each flag is set in any process; one collective."""
        if self.accelerator is None:
            return list(flags)
        self.meet()
        with self.waiting():
            return [bool(one) for one in self._most(flags).tolist()]

    def meet(self) -> None:
        """Let all processes come here, where they pass through sharded layers at their own pace. Every exchange begins so."""
        if self.before_exchange is not None:
            self.before_exchange()

    def tell_runs(self) -> None:
        """Say that a pass through sharded layers begins; the answer to `others_run` of those that make none."""
        with self.waiting():
            self._most([True])

    def others_run(self) -> bool:
        """Whether a pass begins in any process, while none begins in this one; one collective."""
        with self.waiting():
            return bool(self._most([False]).item())

    def _most(self, flags: Sequence[bool]) -> torch.Tensor:
        """Of each flag the maximum of all processes; not waited for on a GPU."""
        assert self.accelerator is not None
        found = torch.tensor(flags, dtype=torch.int32, device=self.accelerator.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return found

    def check_same(self, what: str, value: Any) -> None:
        """Raises ConfigError where a process has another value than the main one: they would not be one run."""
        values = self.gather(value)
        other = next((rank for rank, one in enumerate(values) if one != values[0]), None)
        if other is not None:
            raise ConfigError(
                f"process {other} of {self.count} has {what} {values[other]!r:.200}, and process 0 {values[0]!r:.200}; every "
                "process must be given the same"
            )

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside the block a collective that does not end raises `Lost`, whichever library began it (torch's FSDP, DTensor)."""
        try:
            yield
        except Lost:
            raise
        except RuntimeError as error:
            if not _of_a_collective(error):
                raise
            reason = str(error).strip().splitlines()[0]
            if "timed out" in reason.lower() or "timeout" in reason.lower():
                reason = (
                    f"the others were waited for longer than ddp_timeout = {self._timeout:g} seconds; a reward function may "
                    "hang, or the processes read different data"
                )
            raise Lost(reason) from error


def _of_a_collective(error: RuntimeError) -> bool:
    """Whether a collective raised it. NCCL's errors have a class; gloo's are known by the function that raised them."""
    if isinstance(error, torch.distributed.DistError):
        return True
    names, place = [], error.__traceback__
    while place is not None:
        names.append(place.tb_frame.f_globals.get("__name__", ""))
        place = place.tb_next
    while names and names[-1].startswith(
        "torch._"
    ):  # below a functional collective: the operator that it calls
        names.pop()
    return not isinstance(error, torch.OutOfMemoryError) and bool(names) and names[-1] in _COLLECTIVES


def _left() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        # A device mesh (FSDP2) keeps the group and its threads alive. They get the time to let go of the last tensors.
        time.sleep(0.1)


def _started_again() -> int:
    """How many times torchrun has started processes on this one node before: they find the store of those that failed, with
    addresses that nobody answers at."""
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if alone else 0


def asked(variable: str) -> bool:
    """Whether the environment sets a switch of accelerate's."""
    return os.environ.get(variable, "").lower() in TRUE


@contextlib.contextmanager
def _without_fsdp() -> Iterator[None]:
    """accelerate without its own FSDP, which it ignores on CPUs: `sharding` shards, as the same settings say, on any device."""
    before = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["ACCELERATE_USE_FSDP"] = before
