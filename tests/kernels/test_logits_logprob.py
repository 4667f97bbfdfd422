"""logits_logprob: the statistics of linear_logprob for stacks that hold the logits."""

import pytest
import torch
from token_cases import DIFFERENTIABLE, OUTPUTS, assert_right, call_logits

FUSED = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


def logit_tensors(rows, vocabulary, *, spread=2.0, apart=0.1, dtype=torch.float32):
    logits = torch.randn(rows, vocabulary) * spread
    return {"logits": logits.to(dtype), "ref_logits": (logits + apart * torch.randn(rows, vocabulary)).to(dtype)}


def targets_for(rows, vocabulary, ignored=True):
    targets = torch.randint(0, vocabulary, (rows,))
    if ignored:
        targets[1::5] = -100
    return targets


@FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 1.3}, {"temperature": 0.7}], ids=str)
def test_outputs_and_gradients_are_as_accurate_as_torch(backend, dtype, options):
    assert_right(call_logits, logit_tensors(40, 1500, dtype=dtype), targets_for(40, 1500), wanted=("logits",), **options)


@FUSED
@pytest.mark.parametrize("output", DIFFERENTIABLE)
def test_each_output_alone(backend, output):
    assert_right(call_logits, logit_tensors(30, 300), targets_for(30, 300), outputs=(output,), wanted=("logits",))


@FUSED
@pytest.mark.parametrize("rows, vocabulary", [(3, 50257), (2, 129920), (1937, 1500), (1, 700), (1, 1)])
def test_sizes_that_no_block_divides(backend, rows, vocabulary):
    assert_right(call_logits, logit_tensors(rows, vocabulary), targets_for(rows, vocabulary, ignored=rows > 5), OUTPUTS,
                 wanted=("logits",))
