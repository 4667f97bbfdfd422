"""Every op under torch.compile, autocast and activation checkpointing; what it refuses; with parameters that FSDP2 shards."""

import os
import subprocess
import sys
from pathlib import Path

import fsdp_ranks
import pytest
import torch
import torch.distributed as dist
from clp_kernels import merged_weight
from later import later
from torch.utils.checkpoint import checkpoint

from bench.calls.small import ALL, DIFFERENTIABLE, outputs_and_gradients

EACH = pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
EACH_DIFFERENTIABLE = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)


def assert_same(got, expected):
    """To the bit: these ways of calling an op do not change what is computed."""
    for a, b in zip(got[0], expected[0], strict=True):
        assert torch.equal(a, b)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(got[1][name], gradient), name


@pytest.mark.parametrize("case", [*ALL[:2], *later(*ALL[2:])], ids=lambda case: case.name)
def test_compiles_without_graph_breaks_for_any_number_of_rows(case):
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 9, 5):
        tensors = case.tensors(rows)
        assert_same(outputs_and_gradients(compiled, tensors), outputs_and_gradients(case.call, tensors))


def test_several_ops_in_one_graph_compile_as_inductor_partitions_it():
    """Its decompositions, and its choice of what forward keeps for backward and what is computed again; no C++ is generated."""
    torch.compiler.reset()
    lora, score = (
        next(case for case in DIFFERENTIABLE if case.name == name)
        for name in ("multi_lora_linear", "linear_logprob")
    )
    tensors = {**lora.tensors(), **{f"head_{name}": tensor for name, tensor in score.tensors().items()}}
    tensors["head_weight"] = torch.randn(30, 12, requires_grad=True)
    tensors["head_ref_hidden"] = torch.randn(6, 12)
    del tensors["head_hidden"]

    def layer(head_weight, head_bias, head_ref_hidden, **tensors):
        (y,) = lora.call(**tensors)
        hidden = torch.nn.functional.gelu(y) * 2
        return score.call(hidden=hidden, weight=head_weight, bias=head_bias, ref_hidden=head_ref_hidden)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    got, expected = outputs_and_gradients(compiled, tensors), outputs_and_gradients(layer, tensors)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@EACH
def test_under_autocast_operands_are_cast_and_gradients_come_in_the_leaves_dtype(case):
    tensors = case.tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs_and_gradients(case.call, tensors)
    assert tuple(output.dtype for output in got[0]) == case.autocast
    assert all(gradient.dtype is torch.float32 for gradient in got[1].values())
    if not case.rounds:  # what has no product is as it is without autocast
        assert_same(got, outputs_and_gradients(case.call, tensors))
        return
    apart = ("gate", "blend")  # coefficients stay in float32
    rounded = {
        n: (t if n in apart else t.detach().bfloat16()).detach().requires_grad_(t.requires_grad)
        for n, t in tensors.items()
    }
    expected = outputs_and_gradients(case.call, rounded)
    assert_same(got, (expected[0], {name: gradient.float() for name, gradient in expected[1].items()}))


@pytest.mark.parametrize("use_reentrant", [False, True])
@EACH_DIFFERENTIABLE
def test_activation_checkpointing_changes_no_bit(case, use_reentrant):
    tensors = case.tensors()

    def checkpointed(**tensors):
        run = lambda *values: case.call(**dict(zip(tensors, values)))  # noqa: E731
        return checkpoint(run, *tensors.values(), use_reentrant=use_reentrant)

    got = checkpointed(**tensors)
    expected = outputs_and_gradients(case.call, tensors)
    incoming = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).reshape(o.shape) for o in got]
    torch.autograd.backward(got, incoming)  # a reentrant checkpoint takes no torch.autograd.grad
    gradients = {name: tensor.grad for name, tensor in tensors.items() if tensor.requires_grad}
    assert_same(([output.detach() for output in got], gradients), expected)


@EACH
def test_vmap_is_refused(case):
    tensors = case.tensors(requires_grad=False)
    name, first = next(iter(tensors.items()))

    def one(value):
        return case.call(**{**tensors, name: value})

    message = rf"{case.name}: called inside a torch.func transform .*expected a call outside: pass a batch as leading dim"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.vmap(one)(torch.stack([first, first]))


@EACH_DIFFERENTIABLE
def test_functional_gradients_are_refused(case):
    tensors = case.tensors(requires_grad=False)
    name, first = next(iter(tensors.items()))
    with pytest.raises(
        NotImplementedError, match=f"{case.name}: called inside.*take gradients with torch.autograd"
    ):
        torch.func.grad(lambda value: case.call(**{**tensors, name: value})[0].sum())(first)


def test_merging_a_weight_under_vmap_is_refused():
    with pytest.raises(NotImplementedError, match="merged_weight: called inside a torch.func transform"):
        torch.func.vmap(
            lambda gate: merged_weight(torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 2), gate)
        )(torch.ones(5, 2))


@pytest.fixture(scope="module", params=[1, 2], ids=lambda count: f"{count} ranks")
def ranks(request, tmp_path_factory):
    """What each process of a group of that size saw (fsdp_ranks.py)."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch has no gloo back-end")
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine calls itself
    script = Path(fsdp_ranks.__file__)
    command = [sys.executable, "-W", "ignore", script.name, str(folder), str(request.param)]
    processes = [
        subprocess.Popen([*command, str(rank)], cwd=script.parent, env=environment, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
        for rank in range(request.param)
    ]  # fmt: skip
    try:
        logs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(logs)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.check
def test_in_an_fsdp2_modules_forward_the_ops_train_what_one_process_trains(ranks):
    """There parameters are gathered; gradients are scattered back, the mean over the ranks' equal batches."""
    alone = fsdp_ranks.train(fsdp_ranks.Scored())
    for got in ranks:
        assert got["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, parameter in alone["parameters"].items():
            torch.testing.assert_close(got["parameters"][name], parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.check
def test_a_sharded_parameter_outside_is_refused_and_its_full_tensor_taken(ranks):
    for got in ranks:
        for op, message in got["refused"].items():
            assert (
                f"{op}: " in message
                and "is a DTensor (" in message
                and "full_tensor() (gradients flow" in message
            )
        assert got["full_gradient"]


@pytest.mark.check
def test_elementwise_ops_take_each_ranks_shard(ranks):
    for got in ranks:
        torch.testing.assert_close(got["averaged"], got["expected_average"], rtol=1e-6, atol=1e-7)


@pytest.mark.check
def test_verls_linear_cross_entropy_of_a_split_head_sums_to_that_of_the_whole(ranks):
    """Log-prob and entropy are whole on every rank, d_weight is the shard's, and d_hidden a term that the caller sums."""
    whole, got = fsdp_ranks.split_head(1, 0), [each["split"] for each in ranks]
    for each in got:
        for name in ("logprob", "entropy"):
            torch.testing.assert_close(each[name], whole[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sum(each["d_hidden"] for each in got), whole["d_hidden"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        torch.cat([each["d_weight"] for each in got]), whole["d_weight"], rtol=1e-4, atol=1e-6
    )
