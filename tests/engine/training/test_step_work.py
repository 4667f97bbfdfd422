"""What a training step does, counted, stays within ceilings: the line is held on any machine, however busy.

`python -m bench work` prints the present counts in this form (and with --operators what they consist of). Where the engine does
less, lower the ceiling; raise one only with a reason that stands beside it. bench/step/work.py says what is counted.
"""

import pytest
import torch
from clp_kernels import linear_logprob, multi_lora_linear, use_backend

from bench.cases import formulas
from bench.step import work

# products: times the least; attention: MFLOP; bytes: MB; the rest are numbers. Each is today's count and a little.
_SCORING = {
    "reference/products": 1.01,
    "reference/attention": 2.0,
    "reference/launches": 325,
    "reference/bytes": 3.4,
    # Counts that are on the host anyway, which a CPU cannot tell from others.
    "reference/host reads": 14,
}
_UPDATE = {
    "update/products": 1.01,
    "update/attention": 7.0,
    "update/launches": 800,
    "update/bytes": 9.1,
    "update/host reads": 14,
    # One fused step, the norm, the scale; two more operators with more than one thread.
    "optimizer/launches": 22,
    "optimizer/bytes": 0.01,
    # All metrics, the gradient's norm among them.
    "optimizer/host reads": 1,
    # Metrics of rewards and completions, whose numbers are on the host.
    "rest/launches": 255,
    "rest/bytes": 0.02,
    "rest/host reads": 46,
}
_MODULES = {
    # Prompts padded to the longest of the rollout.
    "rollout/products": 1.54,
    "rollout/attention": 7.2,
    # 15 decode steps of two layers.
    "rollout/launches": 1910,
    "rollout/bytes": 7.7,
    # One for each decode step: have rows finished?
    "rollout/host reads": 26,
}
CEILINGS = {
    "KL": _MODULES | _SCORING | _UPDATE,
    # No KL in the objective: no reference.
    "no KL": _MODULES | _UPDATE,
    # Prefill; what the decoder does inside, drawing included, is not seen.
    "native decoding": _SCORING
    | _UPDATE
    | {
        "rollout/products": 0.87,
        "rollout/attention": 3.9,
        "rollout/launches": 290,
        "rollout/bytes": 4.0,
        "rollout/host reads": 23,
    },
}


@pytest.mark.parametrize("scenario", list(work.SCENARIOS))
def test_a_step_does_no_more_than_it_did(scenario):
    counted = work.counted(scenario)
    # Where other tokens were drawn, the figures below are of another step.
    assert sum(counted.prompts) == 110 and sum(counted.completions) == 189, "sampling changed: count anew"
    figures = counted.figures()
    ceilings = CEILINGS[scenario]
    above = {n: (v, ceilings.get(n)) for n, v in figures.items() if n not in ceilings or v > ceilings[n]}
    assert not above, f"(counted, ceiling): {above}"


def test_no_product_of_the_update_goes_uncounted():
    """Less than the least means that something computes products without a formula in bench/step/work.py."""
    figures = work.counted("KL").figures()
    assert figures["update/products"] >= 1 and figures["reference/products"] >= 1


def products(compute) -> int:
    with work.WorkCounter() as counter:
        compute()
    return sum(work.products for work in counter.work.values())


def test_the_formula_of_multi_lora_linear_is_what_plain_torch_does():
    tokens, width, out, rank = 10, 12, 14, 6
    x, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(out, width)
    a, b = torch.randn(rank, width, requires_grad=True), torch.randn(out, rank, requires_grad=True)
    gate = torch.rand(tokens, rank)
    inputs = {"x": x, "weight": weight, "lora_a": a, "lora_b": b, "gate": gate}
    ours = products(lambda: multi_lora_linear(x, weight, a, b, gate).sum().backward())
    assert ours == products(lambda: formulas.multi_lora(inputs)["y"].sum().backward())
    assert ours == 4 * tokens * width * out + 6 * tokens * rank * (width + out)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_formula_of_linear_logprob_is_what_the_reference_does(frozen):
    hidden, ref_hidden = torch.randn(9, 16, requires_grad=True), torch.randn(9, 16)
    weight, targets = torch.randn(50, 16, requires_grad=not frozen), torch.randint(50, (9,))

    def compute():
        stats = linear_logprob(
            hidden, weight, targets, ref_hidden=ref_hidden, outputs=("logprob", "kl", "entropy")
        )
        (stats.logprob + stats.kl).sum().backward()

    ours = products(compute)
    with use_backend("reference"):
        assert products(compute) == ours == 2 * 9 * 50 * 16 * (3 if frozen else 4)


def test_the_counter_sees_launches_bytes_and_host_reads_by_phase():
    x = torch.ones(100)
    with work.WorkCounter() as counter:
        y = x + 1  # 400 bytes
        with counter.phase("rollout"):
            y.view(10, 10).t()  # nothing
            y.mul_(2)
            torch.empty(7)  # 28 bytes, no launch
            assert y.max().item() == 4.0  # 4 bytes
            y.tolist(), x[x > 0], bool(y.any())
    assert counter.work["rest"] == work.Work(launches=1, bytes=400)
    rollout = counter.work["rollout"]
    assert rollout.host_reads == 4  # item, tolist, the mask, bool
    assert rollout.launches >= 4 and 28 + 4 + 400 <= rollout.bytes <= 28 + 4 + 400 + 1000


def test_an_op_of_clp_kernels_without_a_formula_is_refused(monkeypatch):
    monkeypatch.delitem(work.PRODUCTS, "multi_lora_linear")
    with pytest.raises(NotImplementedError, match="no formula for its FLOPs"):
        products(
            lambda: multi_lora_linear(
                torch.randn(2, 3), torch.randn(4, 3), torch.randn(1, 3), torch.randn(4, 1), torch.rand(2, 1)
            )
        )
