"""clp_kernels.integrations.verl beside the functions of the installed verl, of which single modules are imported."""

import contextlib
import importlib
import importlib.util
import inspect
import re
import types
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed", allow_module_level=True)

from clp_kernels.integrations import patch_verl  # noqa: E402
from clp_kernels.integrations import verl as ours  # noqa: E402
from kernel_calls import DTYPES, assert_as_good_as_peer, entropy64, head, logprob64, z64  # noqa: E402
from single_modules import packages  # noqa: E402


@pytest.fixture(scope="module")
def verl():
    """The modules that hold what is replaced, and one that imported a name from them."""
    with packages("verl", "verl.utils", "verl.utils.kernel", "verl.trainer", "verl.trainer.ppo",
                  missing={"tensordict": ["TensorDict"], "prefix_grouper": ["PrefixGrouper"]}):  # fmt: skip
        yield types.SimpleNamespace(
            functional=importlib.import_module("verl.utils.torch_functional"),
            experimental=importlib.import_module("verl.utils.experimental.torch_functional"),
            fused=importlib.import_module("verl.utils.kernel.linear_cross_entropy"),
            importer=importlib.import_module("verl.trainer.ppo.prefix_grouper_utils"),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "rows, vocabulary, chunk", [((37,), 1500, 16), ((2, 11), 1500, 512), ((1, 5), 50257, 512)]
)
def test_the_fused_head_is_as_accurate_as_verls(verl, dtype, temperature, rows, vocabulary, chunk):
    tensors, labels = (
        head(rows, vocabulary=vocabulary, dtype=dtype, bias=False),
        torch.randint(vocabulary, rows),
    )

    def peer(hidden, weight):
        return verl.experimental.FusedLinearForPPOFunction.apply(hidden, weight, labels, temperature, chunk)

    def exact(hidden, weight):
        z = z64(hidden, weight, temperature=temperature)
        return logprob64(z, labels), entropy64(z)

    def flat(outputs):
        return [output.reshape(-1) for output in outputs]

    # linear_cross_entropy gives its numbers flat and the entropy unrounded; verl's own torch code is what it is held against.
    assert_as_good_as_peer(
        lambda hidden, weight: ours.linear_cross_entropy(hidden, weight, labels, temperature),
        lambda hidden, weight: flat(peer(hidden, weight)),
        lambda hidden, weight: flat(exact(hidden, weight)),
        tensors,
    )
    assert_as_good_as_peer(
        lambda hidden, weight: ours.FusedLinearForPPOFunction.apply(
            hidden, weight, labels, temperature, chunk
        ),
        peer,
        exact,
        tensors,
    )
    got, theirs = ours.FusedLinearForPPOFunction.apply(*tensors.values(), labels), peer(*tensors.values())
    assert [(o.shape, o.dtype) for o in got] == [(o.shape, o.dtype) for o in theirs]


@pytest.fixture
def interpreted(verl, monkeypatch):
    """verl's Triton kernels in Triton's interpreter: the same source, but for the place where the tensors must be."""
    if not importlib.import_module("triton").knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1 from the start")
    path = Path(verl.fused.__file__).with_name("kernels.py")
    kernels = types.ModuleType("verl.utils.kernel.kernels")
    kernels.__file__ = str(path)
    exec(compile(re.sub(r"\.is_cuda\b", ".is_cpu", path.read_text()), path, "exec"),
         kernels.__dict__)  # fmt: skip
    monkeypatch.setitem(importlib.sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr(importlib.import_module("verl.utils.kernel"), "kernels", kernels, raising=False)
    # The interpreter takes masks of bool alone, and the kernels make some of int32 (a comparison and a number).
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        monkeypatch.setattr(builder, name, _with_bool_mask(getattr(builder, name), place))
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda *_: contextlib.nullcontext())
    return verl.fused.linear_cross_entropy


def _with_bool_mask(method, place):
    def call(self, *arguments):
        mask = arguments[place]
        mask.data = mask.data.astype(bool)
        return method(self, *arguments)

    return call


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_linear_cross_entropy_is_as_accurate_as_verls_triton_kernels(interpreted, reduction):
    tensors, labels = head((2, 5), 128, 300, bias=False), torch.randint(300, (2, 5))

    def exact(hidden, weight):
        z = z64(hidden, weight, temperature=0.8).flatten(0, 1)
        logprob = logprob64(z, labels.flatten())
        return {"none": logprob, "sum": logprob.sum(), "mean": logprob.mean()}[reduction], entropy64(z)

    def call(function):
        return lambda hidden, weight: function(hidden, weight, labels, 0.8, reduction)

    # One number of ten is summed: a lucky rounding of verl's is no measure, hence the slack of two units of the sum.
    slack = 2e-5 if reduction == "sum" else 2e-6
    assert_as_good_as_peer(call(ours.linear_cross_entropy), call(interpreted), exact, tensors, slack=slack)


def test_another_reduction_is_refused():
    tensors = head((3,), bias=False)
    with pytest.raises(ValueError, match="reduction is 'batchmean'; expected one of none, sum, mean"):
        ours.linear_cross_entropy(*tensors.values(), torch.zeros(3, dtype=torch.int64), 1.0, "batchmean")


FORMS = [
    "logprobs_from_logits",
    "logprobs_from_logits_v2",
    "logprobs_from_logits_naive",
    "logprobs_from_logits_flash_attn",
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape, vocabulary", [((2, 7), 1500), ((5,), 50257)])
def test_every_form_of_logprobs_from_logits_is_as_accurate_as_verls(verl, dtype, form, shape, vocabulary):
    if form.endswith("flash_attn") and len(shape) > 1:
        pytest.skip("verl flattens before it calls this one")
    labels, logits = torch.randint(vocabulary, shape), (torch.randn(*shape, vocabulary) * 3).to(dtype)
    # Without FlashAttention verl's own dispatch ends at its torch code.
    peer = (
        verl.functional.logprobs_from_logits
        if form.endswith("flash_attn")
        else getattr(verl.functional, form)
    )
    for extra in ((), (False,)) if form in (FORMS[0], FORMS[3]) else ((),):
        assert_as_good_as_peer(
            lambda logits: getattr(ours, form)(logits, labels, *extra),  # noqa: B023
            lambda logits: peer(logits, labels),
            lambda logits: logprob64(logits, labels),
            {"logits": logits},
        )


@pytest.mark.parametrize("inplace_backward", [True, False])
def test_the_logits_survive_a_backward_pass(inplace_backward):
    logits = torch.randn(4, 30, requires_grad=True)
    before = logits.detach().clone()
    ours.logprobs_from_logits(logits, torch.arange(4), inplace_backward).sum().backward()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_entropy_from_logits_is_as_accurate_as_verls(verl, dtype, chunk_size):
    name = "entropy_from_logits" + ("" if chunk_size is None else "_with_chunking")
    arguments = () if chunk_size is None else (chunk_size,)
    assert_as_good_as_peer(
        lambda logits: getattr(ours, name)(logits, *arguments),
        lambda logits: getattr(verl.functional, name)(logits, *arguments),
        lambda logits: entropy64(logits),
        {"logits": (torch.randn(10, 1500) * 3).to(dtype)},
    )


def test_entropy_compiles_as_verls_engines_compile_it():
    compiled = torch.compile(ours.entropy_from_logits, dynamic=True, fullgraph=True, backend="aot_eager")
    for rows in (3, 8, 5):
        logits = torch.randn(rows, 100, requires_grad=True)
        got, expected = compiled(logits), ours.entropy_from_logits(logits)
        assert torch.equal(got, expected)
        assert torch.equal(*(torch.autograd.grad(entropy.sum(), logits)[0] for entropy in (got, expected)))


@pytest.mark.parametrize("replacement", ours.REPLACEMENTS, ids=lambda r: r.name)
def test_the_patch_is_in_place_in_the_block_and_takes_verls_arguments(verl, replacement):
    module = importlib.import_module(replacement.module)
    original = getattr(module, replacement.name)
    with pytest.raises(KeyError), patch_verl():
        assert getattr(module, replacement.name) is replacement.new
        raise KeyError("whatever goes wrong in the block")
    assert getattr(module, replacement.name) is original
    if replacement.name == "linear_cross_entropy":
        original = verl.fused.LinearCrossEntropy
    new = replacement.new.apply if inspect.isclass(replacement.new) else replacement.new
    theirs = inspect.signature(original.forward if inspect.isclass(original) else original).parameters
    assert [(p.name, p.default) for p in inspect.signature(new).parameters.values()] == [
        (p.name, p.default) for p in theirs.values() if p.name != "ctx"
    ]


def test_a_module_that_imported_the_name_has_the_replacement(verl):
    original = verl.functional.logprobs_from_logits
    assert verl.importer.logprobs_from_logits is original
    with patch_verl():
        assert verl.importer.logprobs_from_logits is ours.logprobs_from_logits
    assert verl.importer.logprobs_from_logits is original
