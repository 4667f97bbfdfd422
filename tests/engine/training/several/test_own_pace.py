"""A process that makes no pass takes part in those of others, before each exchange and at the end; and what `Lost` is."""

import threading

import pytest
import torch
from torch import nn

from clp_engine.core.errors import ConfigError
from clp_engine.training.parallel.own_pace import own_pace
from clp_engine.training.parallel.processes import Lost, Parallel
from clp_engine.training.parallel.sharding import check_fits


class Layer:
    def __init__(self, name, said):
        self.unshard, self.reshard = (lambda: said.append(f"+{name}")), (lambda: said.append(f"-{name}"))


class Answers(Parallel):
    """Hears from others that they run, as often as `others` says, once for each time that it is asked."""

    def __init__(self, *others):
        super().__init__()
        self.others, self.told = list(others), 0

    def tell_runs(self):
        self.told += 1

    def others_run(self):
        return self.others.pop(0)


@pytest.fixture
def stack():
    return nn.Linear(1, 1)


def test_company_is_kept_before_an_exchange_and_at_the_end(stack):
    said, parallel = [], Answers(True, True, False, True, False)
    with own_pace(stack, [Layer("a", said), Layer("b", said)], parallel):
        stack(torch.zeros(1))
        assert parallel.told == 1 and not said
        parallel.meet()
        assert said == ["+a", "-a", "+b", "-b"] * 2
    assert said == ["+a", "-a", "+b", "-b"] * 3 and not parallel.others
    stack(torch.zeros(1))
    parallel.meet()
    assert parallel.told == 1 and parallel.before_exchange is None


def test_a_process_that_fails_keeps_no_company(stack):
    parallel = Answers()
    with pytest.raises(ZeroDivisionError), own_pace(stack, [], parallel):
        stack(torch.zeros(1) / (1 // 0))
    assert parallel.before_exchange is None


def test_a_pass_in_another_thread_is_refused(stack):
    caught = []

    def judge():
        try:
            stack(torch.zeros(1))
        except ConfigError as error:
            caught.append(str(error))

    with own_pace(stack, [], Answers(False)):
        thread = threading.Thread(target=judge)
        thread.start()
        thread.join()
    assert "gather_for_generation: true" in caught[0]


def test_a_base_that_is_larger_than_a_gpu_is_refused_where_it_is_to_be_whole(stack):
    stack.conditioned = stack
    check_fits(stack, 8)
    with pytest.raises(ConfigError, match="gather_for_generation: false"):
        check_fits(stack, 7)


def test_errors_of_collectives_alone_are_those_of_a_lost_process():
    """Of a library's collective as of our own; what a layer or a full memory raises is nobody's loss."""
    parallel = Parallel(timeout=8)
    code = "def all_gather():\n    raise error"
    for module, error, lost in (
        (
            "torch.distributed.distributed_c10d",
            RuntimeError("Timed out waiting 8000ms"),
            "ddp_timeout = 8 seconds",
        ),
        (
            "torch.distributed.distributed_c10d",
            RuntimeError("Connection closed by peer"),
            "Connection closed by peer",
        ),
        ("elsewhere", torch.distributed.DistBackendError("NCCL timeout"), "ddp_timeout"),
        ("torch.distributed.distributed_c10d", torch.OutOfMemoryError("out of memory"), None),
        ("clp_engine.models.layer", RuntimeError("shapes differ"), None),
    ):
        names = {"__name__": module, "error": error}
        exec(code, names)
        with pytest.raises(RuntimeError) as caught, parallel.waiting():
            names["all_gather"]()
        assert isinstance(caught.value, Lost) == (lost is not None), error
        assert (lost or str(error)) in str(caught.value)
