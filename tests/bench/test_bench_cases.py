"""Every case's variants compute what they say: this project's, and those of the peers that are installed."""

import pytest
import torch

from bench import cases, peers
from bench.cases import formulas
from bench.core import accuracy, runner, targets
from bench.core.case import Refused

SMALL = [
    (group, number)
    for group in cases.GROUPS
    if group not in ("e2e", "rollout")  # which measure themselves
    for number in range(len(cases.group(group).cases("cpu", "tiny")))
]


@pytest.mark.parametrize("group, number", SMALL, ids=lambda value: str(value))
def test_the_variants_that_run_are_right(group, number):
    case = cases.group(group).cases("cpu", "tiny")[number]
    inputs = case.make(torch.Generator().manual_seed(0))
    assert all(t.count_nonzero() > 0.3 * t.numel() for name, t in inputs.items() if name != "targets")
    chosen = peers.chosen(["peft", "torch_lce", "transformers"])
    ran = []
    for name, prepare in runner.offers(case, chosen):
        if isinstance(prepare, str) or name == runner.BARE:
            continue
        try:
            prepared = prepare(case, inputs)
            outputs = prepared.outputs(prepared.call())
        except Refused:
            continue
        if case.judge is not None:
            plain, exact = case.judge(inputs, outputs)
        else:
            exact, plain = case.exact(inputs, torch.float64), case.exact(inputs, case.dtype)
        wanted = () if prepared.partial else (*case.outputs, *(f"d_{n}" for n in case.wanted))
        found = accuracy.errors(outputs, plain, exact)
        if name.startswith(targets.OURS):
            assert accuracy.complaint(found, wanted) is None, name
        else:  # how exact a peer is depends on the processor, and a run reports it; that it is the same quantity does not
            assert found.keys() >= set(wanted), name
            assert all(
                e.own is not None and e.own < torch.finfo(case.dtype).eps ** 0.5 for e in found.values()
            ), name
        ran.append(name)
    assert len(ran) >= 1


@pytest.mark.parametrize("blend, backward", [("shared", True), ("shared", False), ("one-hot", False)])
def test_peft_does_a_shared_blend_and_rows_of_one_adapter_each(blend, backward):
    pytest.importorskip("peft")
    from bench.cases import multi_lora
    from bench.peers import peft

    wanted = multi_lora.WANTED if backward else ()
    case = multi_lora._case("cpu", {"T": 64, "N": 24, "K": 16}, torch.float32, (4, 8), blend, wanted)
    inputs = case.make(torch.Generator().manual_seed(0))
    prepared = peft.multi_lora_linear(case)["peft"](case, inputs)
    outputs = prepared.outputs(prepared.call())
    found = accuracy.errors(outputs, case.exact(inputs, torch.float32), case.exact(inputs, torch.float64))
    assert accuracy.complaint(found, ("y", *(f"d_{name}" for name in wanted))) is None


@pytest.mark.parametrize("blend, wanted", [("dirichlet", ()), ("one-hot", ("x",))])
def test_peft_refuses_what_it_cannot_do(blend, wanted):
    from bench.cases import multi_lora
    from bench.peers import peft

    case = multi_lora._case("cpu", {"T": 64, "N": 24, "K": 16}, torch.float32, (4,), blend, wanted)
    with pytest.raises(Refused):
        peft.multi_lora_linear(case)


def test_the_float64_truth_is_the_same_in_chunks(monkeypatch):
    case = cases.group("linear_logprob").cases("cpu", "tiny")[1]
    assert case.wanted == ("hidden", "weight")
    inputs = case.make(torch.Generator().manual_seed(0))
    whole = case.exact(inputs, torch.float32)
    monkeypatch.setattr(formulas, "LOGITS", 7 * case.shape["V"])
    chunked = case.exact(inputs, torch.float32)
    assert whole.keys() == chunked.keys() == {"logprob", "entropy", "kl", "d_hidden", "d_weight"}
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value, rtol=1e-4, atol=1e-6)


def test_a_token_that_truncation_leaves_out_is_an_error():
    from bench.cases import sampling

    case = sampling.case("cpu", 3, 50, torch.float32, options={"temperature": 1.0, "top_k": 5})
    inputs = case.make(torch.Generator().manual_seed(0))
    worst = {"tokens": inputs["logits"].argmin(-1), "logprob": torch.zeros(3)}
    worst["logprob"] = inputs["logits"].log_softmax(-1).amin(-1)
    plain, exact = case.judge(inputs, worst)
    assert accuracy.complaint(accuracy.errors(worst, plain, exact), ("logprob",))


def test_every_shape_of_every_size_is_a_case_of_its_own():
    for group in cases.GROUPS:
        for sizes in cases.SIZES:
            ids = [case.id for case in cases.group(group).cases("cpu", sizes)]
            assert len(ids) == len(set(ids)) > 0


def test_the_exponentials_kernel_computes_exponentials():
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.importorskip("triton.runtime.interpreter")
    from bench.core.exp_rate import launch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.rand(256, device=device)
    expected = x.clone()
    for _ in range(3):
        expected = torch.exp(-expected)
    launch(x, 3, block=128)
    torch.testing.assert_close(x, expected)
