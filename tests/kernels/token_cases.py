"""Inputs for the tests of linear_logprob and logits_logprob, and the comparison of a back-end with the reference."""

import pytest
import torch
from clp_kernels import HeadLoRA, linear_logprob, logits_logprob, use_backend

OUTPUTS = ("logprob", "entropy", "ref_logprob", "kl", "reverse_kl", "lse", "top1")
CONSTANT = ("ref_logprob", "top1")
DIFFERENTIABLE = tuple(name for name in OUTPUTS if name not in CONSTANT)
FUSED = pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)


def targets_for(rows, vocabulary, ignored=True):
    """Random targets; every fifth row is ignored."""
    targets = torch.randint(0, vocabulary, (rows,))
    if ignored:
        targets[1::5] = -100
    return targets


def head_tensors(rows, width, vocabulary, *, bias=False, lora=0, spread=1.0, apart=0.1, dtype=torch.float32):
    """Leaves of a linear_logprob call by name; the reference's hidden states are `apart` from the policy's."""
    t = {
        "hidden": torch.randn(rows, width),
        "weight": torch.randn(vocabulary, width) * (spread / width**0.5),
        "bias": torch.randn(vocabulary) if bias else None,
        "a": torch.randn(lora, width) / width**0.5 if lora else None,
        "b": torch.randn(vocabulary, lora) * 0.3 if lora else None,
        "gate": torch.rand(rows, lora) if lora else None,
    }
    t["ref_hidden"] = t["hidden"] + apart * torch.randn(rows, width)
    return {name: None if value is None else value.to(dtype) for name, value in t.items()}


def call_linear(leaves, targets, outputs, **options):
    options = dict(options)
    if leaves.get("a") is not None:
        options["lora"] = HeadLoRA(leaves["a"], leaves["b"], leaves["gate"])
    return linear_logprob(
        leaves["hidden"],
        leaves["weight"],
        targets,
        bias=leaves.get("bias"),
        ref_hidden=leaves.get("ref_hidden"),
        ref_weight=leaves.get("ref_weight"),
        outputs=outputs,
        **options,
    )


def call_logits(leaves, targets, outputs, **options):
    return logits_logprob(
        leaves["logits"], targets, ref_logits=leaves.get("ref_logits"), outputs=outputs, **options
    )


def assert_as_accurate(got, plain, exact, what):
    """Root-mean-square error <= 1.5 times, largest error <= 3 times that of plain torch in the same dtype, for many values.

    (The largest of a few hundred rounding errors varies by a factor of two from seed to seed. The mean square of n errors
    varies by 1 / sqrt(n), and with it how lucky torch is on a processor: a few values get that much more.)
    One rounding is allowed on top, for where torch happens to be exact: of the largest value, and for a statistic of 1,
    the sum that the probabilities have.
    """
    assert got.shape == exact.shape and got.dtype is plain.dtype, f"{what}: {tuple(got.shape)} {got.dtype}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{what}: not finite"
    error, torchs = (got.double() - exact).abs(), (plain.double() - exact).abs()
    scale = exact.abs().max() if what.startswith("d_") else exact.abs().max().clamp(min=1)
    rounding, few = torch.finfo(got.dtype).eps * scale, 1 + 1 / exact.numel() ** 0.5
    for kind, mine, limit in (
        ("root-mean-square", error.square().mean().sqrt(), 1.5 * few * torchs.square().mean().sqrt()),
        ("largest", error.max(), 3 * few * torchs.max()),
    ):
        assert mine <= limit + rounding, f"{what}: {kind} error {mine:.3g}, allowed {limit + rounding:.3g}"


def run(call, tensors, targets, outputs, wanted, incoming, **options):
    """Outputs by name and gradients as "d_" + name, from the gradient `incoming` of each differentiable output."""
    leaves = {
        name: None if t is None else t.detach().clone().requires_grad_(name in wanted)
        for name, t in tensors.items()
    }
    stats = call(leaves, targets, outputs, **options)
    results = {name: getattr(stats, name) for name in outputs}
    differentiated = [name for name in outputs if name in incoming]
    if wanted and differentiated:
        torch.autograd.backward(
            [results[name] for name in differentiated],
            [incoming[name].to(results[name]).reshape(results[name].shape) for name in differentiated],
        )
        results.update({f"d_{name}": leaves[name].grad for name in wanted})
    return {name: value.detach() for name, value in results.items()}


def incoming_gradients(tensors, outputs):
    """One number per row and differentiable output, the same for the same call."""
    rows = next(iter(tensors.values())).shape[:-1]
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return {
        name: torch.randn(rows, dtype=torch.float64, generator=generator)
        for name in outputs
        if name not in CONSTANT
    }


def run_all(call, tensors, targets, outputs, wanted=(), **options):
    return run(call, tensors, targets, outputs, wanted, incoming_gradients(tensors, outputs), **options)


def assert_right(call, tensors, targets, outputs=OUTPUTS, wanted=("hidden",), **options):
    """Every output and gradient of the back-end in force is as accurate as plain torch in the same dtype."""
    got = run_all(call, tensors, targets, outputs, wanted, **options)
    with use_backend("reference"):
        plain = run_all(call, tensors, targets, outputs, wanted, **options)
        wide = {name: None if t is None else t.double() for name, t in tensors.items()}
        exact = run_all(call, wide, targets, outputs, wanted, **options)
    for name in got:
        if name == "top1":
            assert torch.equal(got[name], exact[name]), "top1"
        else:
            assert_as_accurate(got[name], plain[name], exact[name], name)
    return got
