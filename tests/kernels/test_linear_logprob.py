"""linear_logprob: statistics of softmax(hidden W^T) are right, and so is every gradient, without the logits."""

import pytest
import torch
from token_cases import CONSTANT, DIFFERENTIABLE, OUTPUTS, assert_right, call_linear, head_tensors, run

from clp_kernels import HeadLoRA, linear_logprob, use_backend

ALL = ("hidden", "weight", "bias", "a", "b", "gate")
FUSED = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


def targets_for(rows, vocabulary, ignored=True):
    targets = torch.randint(0, vocabulary, (rows,))
    if ignored:
        targets[1::5] = -100
    return targets


@FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 1.3}, {"temperature": 0.7}], ids=str)
def test_outputs_and_gradients_are_as_accurate_as_torch(backend, dtype, options):
    tensors = head_tensors(40, 24, 1500, bias=True, lora=6, dtype=dtype)
    assert_right(call_linear, tensors, targets_for(40, 1500), wanted=ALL, **options)


@FUSED
@pytest.mark.parametrize("output", DIFFERENTIABLE)
def test_each_output_alone(backend, output):
    assert_right(call_linear, head_tensors(30, 16, 300), targets_for(30, 300), outputs=(output,))


@FUSED
@pytest.mark.parametrize("rows, vocabulary, width", [(3, 50257, 8), (2, 129920, 4), (1937, 1500, 16), (1, 700, 16), (1, 1, 4)])
def test_sizes_that_no_tile_divides(backend, rows, vocabulary, width):
    assert_right(call_linear, head_tensors(rows, width, vocabulary), targets_for(rows, vocabulary, ignored=rows > 5))


def test_the_reference_is_differentiated_rightly():
    """gradcheck in float64: each output alone, and all together with an incoming gradient per token."""
    tensors = head_tensors(4, 5, 7, bias=True, lora=2, dtype=torch.float64)
    targets = targets_for(4, 7)
    leaves = [tensors[name].requires_grad_() for name in ALL]
    temperature = torch.tensor([0.7, 1.0, 1.3, 2.0])
    ref_weight, ref_bias = tensors["weight"].detach() + 0.1, torch.randn(7, dtype=torch.float64)

    def function(outputs):
        def inner(hidden, weight, bias, a, b, gate):
            stats = linear_logprob(hidden, weight, targets, bias=bias, ref_hidden=tensors["ref_hidden"],
                                   ref_weight=ref_weight, ref_bias=ref_bias,
                                   lora=HeadLoRA(a, b, gate), softcap=4.0, logit_scale=0.9, temperature=temperature,
                                   outputs=outputs)
            return tuple(getattr(stats, name) for name in outputs)

        return inner

    for outputs in [*((name,) for name in DIFFERENTIABLE), DIFFERENTIABLE]:
        assert torch.autograd.gradcheck(function(outputs), leaves)
