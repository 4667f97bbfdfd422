"""vocab_parallel_linear_logprob: what several ranks compute of their shards is what one process computes of the whole."""

import os
import subprocess
import sys
from pathlib import Path

import clp_kernels
import pytest
import torch
import torch.distributed as dist
import vocab_ranks
from clp_kernels import use_backend, vocab_parallel, vocab_parallel_linear_logprob
from clp_kernels.token_stats import Sums, merge, merge_top1, statistics
from token_cases import OUTPUTS, assert_as_accurate, run_all, targets_for
from vocab_ranks import CASES, ERRORS, SHARDED

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo back-end"
    ),
    # The interpreter's numpy warns of -inf - -inf in columns beyond the vocabulary, whose result is selected away.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton"),
]


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    """What each of the three processes got that ran all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine calls itself
    script = Path(vocab_ranks.__file__)
    logs = [open(folder / f"{process}.log", "w+") for process in range(3)]
    processes = [
        subprocess.Popen([sys.executable, "-W", "ignore", script.name, str(number), str(folder)], cwd=script.parent,
                         env=environment, stdout=log, stderr=subprocess.STDOUT)
        for number, log in enumerate(logs)
    ]  # fmt: skip
    try:
        for process in processes:
            process.wait(timeout=180)
    finally:
        for process, log in zip(processes, logs):
            process.kill()
            if process.wait():
                log.seek(0)
                print(log.read())
            log.close()
    assert not any(process.returncode for process in processes), "a rank failed; its output is above"
    return [torch.load(folder / f"{process}.pt", weights_only=True) for process in range(3)]


def _of_all_ranks(spec, got):
    """The whole problem's results out of the ranks'; what should be alike is, to the bit."""
    whole = {}
    for name in got[0]:
        values = [g[name] for g in got]
        if name.removeprefix("d_") in SHARDED:
            bounds = vocab_ranks.shard_bounds(spec)
            order = sorted(range(len(bounds)), key=lambda rank: bounds[rank])
            whole[name] = torch.cat([values[rank] for rank in order])
        elif name.startswith("d_") and not spec["options"].get("reduce_gradients", True):
            whole[name] = sum(v.double() for v in values).to(values[0].dtype)
        else:
            assert all(torch.equal(v, values[0]) for v in values[1:]), f"{name} differs between the ranks"
            whole[name] = values[0]
    return whole


def _in_one_process(spec):
    """-> the plain-torch results in the case's dtype and in float64."""
    tensors, targets = vocab_ranks.problem(spec)
    apart = ("promised", "backwards", "reduce_gradients")
    options = {name: value for name, value in spec["options"].items() if name not in apart}
    rounded = tensors
    with use_backend("reference"), vocab_ranks.autocast(spec):
        plain = run_all(vocab_ranks.call, tensors, targets, spec["outputs"], spec["wanted"], **options)
    if spec["tensors"].get("autocast"):
        rounded = {name: None if t is None else t.bfloat16() for name, t in tensors.items()}
    wide = {name: None if t is None else t.double() for name, t in rounded.items()}
    with use_backend("reference"):
        exact = run_all(vocab_ranks.call, wide, targets, spec["outputs"], spec["wanted"], **options)
    return plain, exact


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_does(met, name):
    """Outputs and gradients, each with its own gradient per token, are as accurate as plain torch in one process; what
    every rank has is the same on all of them to the bit."""
    spec = CASES[name]
    if not clp_kernels.backends()[spec["backend"]].available:
        pytest.skip(clp_kernels.backends()[spec["backend"]].reason)
    got = _of_all_ranks(spec, [process[name] for process in met if name in process])
    plain, exact = _in_one_process(spec)
    assert got.keys() == exact.keys()
    for what, value in got.items():
        if what == "top1":
            assert torch.equal(value, exact[what]), "top1"
        elif value.dtype is torch.float64:  # plain and exact are one computation
            torch.testing.assert_close(value, exact[what], rtol=1e-12, atol=1e-13, msg=what)
        else:
            assert_as_accurate(value, plain[what], exact[what], what)


@pytest.mark.parametrize("name", ERRORS)
def test_all_ranks_refuse_or_none(met, name):
    """No rank is left waiting: the next case of the same processes finds all of them."""
    for rank, (kind, message) in enumerate(ERRORS[name][1]):
        got, text = met[1 + rank]["errors"][name]
        assert got == kind and message in text, f"rank {rank}: {got}: {text}"


def test_a_process_outside_the_group_is_refused(met):
    assert "this process is not in the group" in met[0]["outside"]


def _sums(z_p, z_q, targets, first):
    """`Sums` of the columns of z from `first`, by their definition."""
    m_p, m_q = z_p.amax(-1), z_q.amax(-1)
    e, f = (torch.exp(z - m.clamp(min=-1e300)[:, None]) for z, m in ((z_p, m_p), (z_q, m_q)))
    here = torch.arange(first, first + z_p.shape[1]) == targets[:, None]

    def total(weight, value):
        return torch.where(weight > 0, weight * value, 0).sum(-1)

    return Sums(
        m_p, e.sum(-1), total(e, z_p - m_p[:, None]), total(e, z_p - z_q), m_q, f.sum(-1), total(f, z_q - z_p),
        torch.where(here, z_p, 0).sum(-1), torch.where(here, z_q, 0).sum(-1))  # fmt: skip


@pytest.mark.parametrize("cuts", [(0, 90), (0, 1, 90), (0, 30, 31, 70, 90), (0, 20, 40, 60, 90)], ids=str)
@pytest.mark.parametrize("masked", [0, 20, 45], ids=lambda count: f"{count} masked")
def test_sums_of_pieces_merge_into_those_of_the_whole(cuts, masked):
    """In float64, with pieces masked in part or throughout, and again when merged results are merged."""
    z_p, z_q = 30 * torch.randn(2, 7, 90, dtype=torch.float64)
    z_p[:, :masked] = z_q[:, :masked] = -torch.inf
    targets = torch.randint(masked, 90, (7,))
    pieces = [_sums(z_p[:, i:j], z_q[:, i:j], targets, i) for i, j in zip(cuts, cuts[1:])]
    everything, no_top1 = frozenset(OUTPUTS) - {"top1"}, torch.zeros(7, dtype=torch.int64)

    def stacked(pieces):
        return merge(Sums(*map(torch.stack, zip(*pieces))))

    def outputs(sums):
        return statistics(sums, no_top1, everything, None, torch.float64)[0]

    want = outputs(_sums(z_p, z_q, targets, 0))
    for merged in (
        stacked(pieces),
        stacked([stacked(pieces[:-1]), pieces[-1]]) if len(pieces) > 1 else pieces[0],
    ):
        for name, got, value in zip(OUTPUTS, outputs(merged), want):
            torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12, msg=name)


def test_the_lowest_column_wins_a_tie_between_pieces_in_any_order():
    inf, nan = torch.inf, torch.nan
    m = torch.tensor([[3.0, 1.0, -inf, 1.0, inf], [3.0, 2.0, -inf, 0.0, 5.0], [-inf, 2.0, -inf, 0.0, nan]])
    s = torch.tensor([[1.0, 1.0, 0.0, nan, inf], [1.0, 1.0, 0.0, 1.0, nan], [0.0, 1.0, 0.0, nan, nan]])
    top1 = torch.tensor(
        [[70, 71, 70, 70, 2], [12, 13, 10, 10, 40], [2**31 - 1, 3, 2**31 - 1, 2**31 - 1, 30]],
        dtype=torch.int32,
    )
    assert merge_top1(m, s, top1).tolist() == [12, 3, 10, 70, 30]


@pytest.fixture
def alone():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_must_exist():
    with pytest.raises(RuntimeError, match="torch.distributed is not initialised.*linear_logprob"):
        vocab_parallel_linear_logprob(torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_one_rank_is_linear_logprob(alone, backend):
    tensors, targets = vocab_ranks.problem(CASES["cpu-unequal"])
    got, want = (
        run_all(function, tensors, targets, OUTPUTS, vocab_ranks.ALL)
        for function in (vocab_ranks.parallel, vocab_ranks.call)
    )
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=2e-6, msg=name)


def test_only_what_the_outputs_need_is_sent(alone, monkeypatch):
    """3 numbers per row for the log-prob, 10 for everything."""
    sent = []
    gather = dist.all_gather
    monkeypatch.setattr(
        dist, "all_gather", lambda out, mine, group: (sent.append(mine), gather(out, mine, group))
    )
    hidden, weight, targets = torch.randn(5, 4), torch.randn(9, 4), targets_for(5, 9)
    for outputs, numbers in ((("logprob",), 3), (("logprob", "entropy"), 4), (OUTPUTS, 10)):
        sent.clear()
        vocab_parallel_linear_logprob(
            hidden, weight, targets, ref_hidden=hidden, outputs=outputs, vocab_start=0, vocab_size=9
        )
        assert [t.numel() for t in sent] == [5 * numbers]


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"], indirect=True)
def test_a_target_outside_the_vocabulary_is_nan_where_nobody_looked(alone, backend, monkeypatch):
    """On a GPU nobody does. A sum of the shards' z at the target would be a plausible 0."""
    monkeypatch.setattr(vocab_parallel, "_check_targets", lambda *_: None)
    hidden, targets = torch.randn(4, 8), torch.tensor([3, 9, -1, -100])
    stats = vocab_parallel_linear_logprob(
        hidden, torch.randn(9, 8), targets, ref_hidden=hidden, outputs=OUTPUTS, vocab_start=0, vocab_size=9
    )
    for value in (stats.logprob, stats.ref_logprob):
        assert value.isnan().tolist() == [False, True, True, False]
    assert stats.entropy.isfinite().all() and stats.kl.isfinite().all()


def test_torch_compile_leaves_the_call_as_it_is(alone):
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(30, 8)
    targets = torch.randint(0, 30, (4,))

    def loss(hidden):
        return vocab_parallel_linear_logprob(hidden * 2, weight, targets).logprob.sum()

    (compiled,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(hidden), hidden)
    (eager,) = torch.autograd.grad(loss(hidden), hidden)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_second_derivatives_are_refused(alone, backend):
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = vocab_parallel_linear_logprob(hidden, torch.randn(9, 4), torch.tensor([1, 2, 3])).logprob.sum()
    with pytest.raises(NotImplementedError, match="second derivatives.*create_graph=False"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_constant_outputs_do_not_require_grad(alone):
    hidden = torch.randn(3, 4, requires_grad=True)
    for backend in ("reference", "cpu"):
        if not clp_kernels.backends()[backend].available:
            continue
        with use_backend(backend):
            stats = vocab_parallel_linear_logprob(
                hidden, torch.randn(9, 4), torch.tensor([1, 2, 3]), ref_hidden=hidden, outputs=OUTPUTS
            )
        assert all(
            getattr(stats, name).requires_grad == (name not in ("ref_logprob", "top1")) for name in OUTPUTS
        )
