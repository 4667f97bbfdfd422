"""float16 and bfloat16 on a CPU: sums in float32, one rounding of the result, and ignored rows that may hold anything.

A result is held to float64 on the same inputs. It may be off by one rounding of its own dtype, of the largest value, and by
what float32 rounds in its sum; a product rounded to 16 bits before the sum is off by tens of times as much.
"""

import pytest
import torch
import torch.distributed as dist
from accuracy import TRITON_HALVES
from clp_kernels import (
    HeadLoRA,
    PrefixLayout,
    interpolate,
    interpolated_linear,
    linear_logprob,
    logits_logprob,
    merge_sign_consensus,
    merged_weight,
    multi_lora_linear,
    prefix_attention,
    sample_tokens,
    slerp,
    vocab_parallel_linear_logprob,
)
from token_cases import OUTPUTS

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
REFERENCE = pytest.mark.parametrize("backend", ["reference"], indirect=True)
# The interpreter's numpy warns of -inf - -inf in columns beyond the vocabulary, whose result is selected away.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")


def results(call, tensors, wanted):
    """Outputs and the gradient of each wanted tensor, of the sum of the outputs with fixed weights."""
    leaves = {name: t.detach().clone().requires_grad_(name in wanted) for name, t in tensors.items()}
    outputs = call(**leaves)
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if wanted:
        outputs = [output for output in outputs if output.requires_grad]
        incoming = [
            torch.linspace(-1, 1.5, o.numel(), dtype=torch.float64).view(o.shape).bfloat16() for o in outputs
        ]
        grads = torch.autograd.grad(
            outputs, [leaves[n] for n in wanted], [i.to(o.dtype) for i, o in zip(incoming, outputs)]
        )
        found |= {f"d_{name}": grad for name, grad in zip(wanted, grads)}
    return found


def assert_rounded_once(call, tensors, wanted=(), roundings=1.0, relative=3e-6, at_least=0.0):
    """Each result is float64's but for one rounding to its own dtype, and `relative` of the largest, float32's sums; or for
    `roundings` of the largest (to a precision of at_least, where that is coarser)."""
    got = results(call, tensors, wanted)
    exact = results(call, {name: t.double() for name, t in tensors.items()}, wanted)
    for name, value in got.items():
        if not value.dtype.is_floating_point:
            assert torch.equal(value, exact[name]), name
            continue
        assert value.isfinite().all(), f"{name}: not finite"
        size = exact[name].abs()
        error = (value.double() - exact[name]).abs()
        kind = torch.finfo(value.dtype)
        eps = max(kind.eps, at_least)
        allowed = (size if roundings == 1.0 else size.max()) * roundings * eps / 2 + relative * size.max()
        allowed += kind.smallest_normal * kind.eps / 2  # of a subnormal number
        worst = (error - allowed).argmax()
        assert (error <= allowed).all(), (
            f"{name}: error {error.flatten()[worst]:.3g} of {size.flatten()[worst]:.3g}"
        )


def randn(*shape, dtype, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


def head(dtype, rows=9, width=40, vocabulary=83, scale=1.0):
    return {
        "hidden": randn(rows, width, dtype=dtype, scale=scale), "weight": randn(vocabulary, width, dtype=dtype, scale=scale),
        "a": randn(5, width, dtype=dtype), "b": randn(vocabulary, 5, dtype=dtype, scale=0.1),
        "gate": randn(rows, 5, dtype=dtype), "ref": randn(rows, width, dtype=dtype, scale=scale),
    }  # fmt: skip


TARGETS = torch.tensor([0, 3, -100, 82, 7, -100, 40, 41, 5])


def statistics_of(function, outputs=OUTPUTS, **options):
    def call(hidden, weight, a, b, gate, ref):
        stats = function(
            hidden, weight, TARGETS, lora=HeadLoRA(a, b, gate), ref_hidden=ref, outputs=outputs, **options
        )
        return [getattr(stats, name) for name in outputs]

    return call


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch has no gloo back-end")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@REFERENCE
@HALVES
def test_statistics_of_a_projection(backend, dtype):
    # KL and its gradient are small differences of large logits: what a rounded logit shows in first.
    assert_rounded_once(statistics_of(linear_logprob), head(dtype), ("hidden", "weight", "a", "b", "gate"))


@REFERENCE
@HALVES
def test_statistics_of_a_projection_in_shards(backend, dtype, alone):
    assert_rounded_once(
        statistics_of(vocab_parallel_linear_logprob), head(dtype), ("hidden", "weight", "a", "b", "gate")
    )


@REFERENCE
@HALVES
def test_statistics_of_logits(backend, dtype):
    def call(logits, ref):
        stats = logits_logprob(logits, TARGETS, ref_logits=ref, outputs=OUTPUTS, temperature=0.7)
        return [getattr(stats, name) for name in OUTPUTS]

    tensors = {"logits": randn(9, 83, dtype=dtype, scale=5), "ref": randn(9, 83, dtype=dtype, scale=5)}
    assert_rounded_once(call, tensors, ("logits",))


@pytest.mark.parametrize("function", [linear_logprob, vocab_parallel_linear_logprob])
def test_logits_beyond_float16_are_statistics_like_any_other(function, alone):
    """Products of up to 300,000, where float16 ends at 65504, whose differences a scale of 1e-5 brings into range."""
    tensors = head(torch.float16, scale=100.0)
    assert (tensors["hidden"].double() @ tensors["weight"].double().t()).abs().max() > 2 * 65504
    assert_rounded_once(
        statistics_of(function, logit_scale=1e-5),
        tensors,
        ("hidden", "weight", "a", "b", "gate"),
        relative=1e-5,
    )


LORA = ("x", "weight", "lora_a", "lora_b", "gate", "bias")


def multi_lora(x, weight, lora_a, lora_b, gate, bias):
    return (multi_lora_linear(x, weight, lora_a, lora_b, gate, bias=bias),)


def layer(dtype, rows=11, k=64, n=33, rank=6):
    shapes = ((rows, k), (n, k), (rank, k), (n, rank), (rows, rank), (n,))
    return {name: randn(*shape, dtype=dtype) for name, shape in zip(LORA, shapes)} | {
        "gate": torch.randn(rows, rank)
    }


@REFERENCE
@HALVES
def test_multi_lora_linear(backend, dtype):
    # h * g and dS * g are operands, and h is kept: one rounding of each, and that of the result.
    assert_rounded_once(multi_lora, layer(dtype), LORA, roundings=3, at_least=torch.finfo(dtype).eps)
    # With operands that need no rounding, and a change as large as the base, the result is rounded once.
    tensors = layer(dtype) | {"gate": torch.ones(11, 6)}
    tensors["lora_a"] = torch.eye(6, 64, dtype=dtype)
    tensors["lora_b"] = (8 * tensors["lora_b"].float()).sign().to(dtype) * 8
    assert_rounded_once(multi_lora, tensors)
    tensors["lora_b"] = torch.eye(33, 6, dtype=dtype)
    assert_rounded_once(multi_lora, tensors, ("x", "weight", "lora_a"))


@REFERENCE
def test_multi_lora_linear_where_one_product_alone_is_beyond_float16(backend):
    """Base and change cancel, forward and backward; and a gate of zero, or a small one, takes h back into range."""
    tensors = layer(torch.float16, k=128, rank=128)
    tensors |= {"x": tensors["x"] * 40, "weight": tensors["weight"] * 100, "bias": tensors["bias"] * 0}
    tensors["lora_a"], tensors["gate"] = torch.eye(128).half() * 50, torch.full((11, 128), 1 / 50)
    tensors["lora_b"] = -tensors["weight"] + tensors["lora_b"]
    base = tensors["x"].double() @ tensors["weight"].double().t()
    assert base.abs().max() > 65504
    (y,) = multi_lora(**tensors)
    exact = multi_lora(**{name: t.double() for name, t in tensors.items()})[0]
    error = (y.double() - exact).abs().max()  # of the rounded operands of the second product
    assert error < 2**-10 * base.abs().max(), error

    tensors = layer(torch.float16)
    tensors |= {"x": tensors["x"] * 300, "lora_a": tensors["lora_a"] * 300, "gate": torch.zeros(11, 6)}
    assert (tensors["x"].double() @ tensors["lora_a"].double().t()).abs().max() > 65504
    frozen = multi_lora(**tensors | {"lora_a": tensors["lora_a"] * 0})[0]
    assert torch.equal(multi_lora(**tensors)[0], frozen)
    tensors["gate"] += 1e-4
    assert_rounded_once(multi_lora, tensors, roundings=3)


FULL = ("x", "stack", "blend", "base", "bias")


def full_weight(x, stack, blend, base, bias):
    return (interpolated_linear(x, stack, blend, base=base, bias=bias),)


def stacked(dtype, rows=11, k=64, n=33, models=4):
    shapes = ((rows, k), (models, n, k), (rows, models), (n, k), (n,))
    return {name: randn(*shape, dtype=dtype) for name, shape in zip(FULL, shapes)} | {
        "blend": torch.randn(rows, models)
    }


@REFERENCE
@HALVES
def test_interpolated_linear(backend, dtype):
    assert_rounded_once(full_weight, stacked(dtype), ("x", "stack", "blend", "bias"))


@REFERENCE
def test_interpolated_linear_where_a_product_or_a_scaled_row_is_beyond_float16(backend):
    tensors = stacked(torch.float16)
    tensors |= {"x": tensors["x"] * 200, "stack": tensors["stack"] * 100, "blend": tensors["blend"] / 1000}
    assert (tensors["x"].double() @ tensors["stack"][0].double().t()).abs().max() > 65504
    assert_rounded_once(full_weight, tensors, ("x", "blend", "bias"))
    tensors = stacked(torch.float16)
    tensors |= {"x": tensors["x"] / 1e4, "blend": tensors["blend"] * 1e5}
    assert_rounded_once(full_weight, tensors, ("stack",))


@HALVES
def test_the_other_ops(dtype):
    """Where the CPU takes float16 and bfloat16 otherwise, by whatever back-end serves it."""
    layout = PrefixLayout.from_lengths([5, 4, 3], [-1, 0, 0])
    qkv = {
        "q": randn(12, 4, 16, dtype=dtype),
        "k": randn(12, 2, 16, dtype=dtype),
        "v": randn(12, 2, 16, dtype=dtype),
    }
    # out, which backward takes in q's dtype, was rounded: a rounding of each gradient beside its own.
    assert_rounded_once(
        lambda q, k, v: (prefix_attention(q, k, v, layout),), qkv, ("q", "k", "v"), roundings=3
    )
    stack, weights = randn(3, 40, 7, dtype=dtype, scale=100), torch.tensor([0.5, -0.2, 0.7])
    assert_rounded_once(lambda stack: (interpolate(stack, weights),), {"stack": stack}, ("stack",))
    assert_rounded_once(lambda stack: (merge_sign_consensus(stack, weights),), {"stack": stack})
    ends = {"a": randn(40, 7, dtype=dtype, scale=100), "b": randn(40, 7, dtype=dtype, scale=100)}
    assert_rounded_once(lambda a, b: (slerp(a, b, 0.3),), ends, ("a", "b"), roundings=3)
    tensors = layer(dtype)
    arguments = {name: tensors[name] for name in ("weight", "lora_a", "lora_b")}
    assert_rounded_once(lambda **t: (merged_weight(**t, gate_row=tensors["gate"][0]),), arguments)
    logits = {"logits": randn(9, 83, dtype=dtype, scale=5)}
    assert_rounded_once(lambda logits: sample_tokens(logits, seeds=torch.arange(9), top_p=0.9), logits)


BACKENDS = pytest.mark.parametrize(
    "backend, dtype",
    [("reference", torch.float64), *(("reference", d) for d in (torch.float32, torch.float16, torch.bfloat16)),
     ("cpu", torch.float32), ("cpu", torch.bfloat16), ("triton", torch.float32), *(("triton", d) for d in TRITON_HALVES)],
    indirect=["backend"],
)  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("softcap", [None, 20.0], ids=["", "softcap"])
@pytest.mark.parametrize("op", ["linear", "shards", "logits", "directions"])
def test_ignored_rows_pass_no_gradient_whatever_they_hold(backend, dtype, value, op, softcap, request):
    """Their outputs and gradients are exact zeros, and what sums over the rows is what it is without them."""
    if op == "shards":
        request.getfixturevalue("alone")
    ignored = TARGETS == -100
    outputs = ("logprob",) if op == "directions" else OUTPUTS
    wanted = {"logits": ("hidden",), "directions": ("hidden", "a", "gate")}.get(
        op, ("hidden", "weight", "a", "b", "gate")
    )

    def call(hidden, weight, a, b, gate, ref):
        if op == "logits":
            stats = logits_logprob(hidden, TARGETS, ref_logits=ref, outputs=outputs, softcap=softcap)
            return [getattr(stats, name) for name in outputs]
        function = vocab_parallel_linear_logprob if op == "shards" else linear_logprob
        return statistics_of(function, outputs, softcap=softcap)(hidden, weight, a, b, gate, ref)

    tensors = {
        name: t.to(dtype) for name, t in head(torch.float32, width=83 if op == "logits" else 40).items()
    }
    clean, rowwise = results(call, tensors, wanted), ("hidden", "ref", "gate")
    for name in rowwise:
        tensors[name] = tensors[name].masked_fill(ignored[:, None], value)
    broken = results(call, tensors, wanted)
    for name, got in broken.items():
        if name.startswith("output") or name.removeprefix("d_") in rowwise:
            assert (got[ignored] == 0).all(), name
        torch.testing.assert_close(
            got, clean[name], rtol=0, atol=0, msg=lambda message, name=name: f"{name}: {message}"
        )
