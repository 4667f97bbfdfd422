"""A replacement and the peer's own function on the same inputs, both against float64."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent / "kernels"))  # accuracy.py: one criterion for all kernels
from accuracy import assert_as_accurate  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]


def head(rows=(37,), width=64, vocabulary=1500, dtype=torch.float32, bias=True):
    """hidden, weight, bias of logits some 4 wide, rounded to dtype: every computation starts from the same numbers."""
    tensors = {"hidden": torch.randn(*rows, width), "weight": torch.randn(vocabulary, width) * 0.5}
    if bias:
        tensors["bias"] = torch.randn(vocabulary)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def z64(hidden, weight, bias=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """The logits after scale, softcap and temperature."""
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * logit_scale
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature


def logprob64(z, targets):
    return z.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def entropy64(z):
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _run(call, tensors, frozen, incoming):
    leaves = {name: t.clone().requires_grad_(name not in frozen) for name, t in tensors.items()}
    outputs = call(**leaves)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    given = [
        (o, g) for o, g in zip(outputs, incoming or (torch.randn_like(o) for o in outputs)) if o.requires_grad
    ]
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    grads = torch.autograd.grad([o for o, _ in given], wanted, [g.to(o.dtype) for o, g in given])
    return [o.detach() for o in outputs], dict(zip((n for n in leaves if n not in frozen), grads))


def assert_as_good_as_peer(ours, peer, exact, tensors, *, frozen=(), slack=0.0):
    """Every output, and the gradient of all of them with their own incoming gradients: error at most 1.5 times the peer's.

    ours, peer, exact: functions of `tensors` by name; exact gets them in float64, as leaves.
    """
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    with torch.no_grad():
        shapes = exact(**wide)
    incoming = [torch.randn_like(o) for o in (shapes if isinstance(shapes, (tuple, list)) else (shapes,))]
    got, found, right = (
        _run(call, t, frozen, incoming) for call, t in ((ours, tensors), (peer, tensors), (exact, wide))
    )
    for i, (a, b, c) in enumerate(zip(got[0], found[0], right[0], strict=True)):
        assert_as_accurate(a, b, c, f"output {i}", slack=slack)
    for name, gradient in got[1].items():
        assert gradient.dtype is tensors[name].dtype
        assert_as_accurate(gradient, found[1][name], right[1][name], f"gradient of {name}", slack=slack)


def assert_as_good_as_peer_in_the_median(ours, peer, exact, draw, *, count=7, frozen=()):
    """As above with the median over `count` draws of the tensors: the largest error of a draw is one token's, and chance.

    draw() makes the tensors; ours, peer and exact must not depend on anything else that is random.
    """
    found = {}
    for _ in range(count):
        tensors = draw()
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        with torch.no_grad():
            incoming = [torch.randn_like(output) for output in exact(**wide)]
        got, theirs, right = (
            _run(call, t, frozen, incoming) for call, t in ((ours, tensors), (peer, tensors), (exact, wide))
        )
        for kind in (0, 1):
            names = got[kind] if kind else range(len(got[kind]))
            for name in names:
                a, b, c = got[kind][name], theirs[kind][name], right[kind][name]
                assert torch.isfinite(a).all() and a.shape == c.shape
                rounding = torch.finfo(a.dtype).eps * c.abs().max()
                errors = [(a.double() - c).abs().max(), (b.double() - c).abs().max(), rounding]
                found.setdefault(f"gradient of {name}" if kind else f"output {name}", []).append(
                    torch.stack(errors).double()
                )
    for what, errors in found.items():
        mine, theirs, rounding = torch.stack(errors).median(0).values.tolist()
        assert mine <= 1.5 * theirs + rounding, f"{what}: error {mine:.3g}, the peer's {theirs:.3g}"
