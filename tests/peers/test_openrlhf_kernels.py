"""clp_kernels.integrations.openrlhf beside the functions of the installed OpenRLHF, of which single modules are imported."""

import importlib
import importlib.util
import inspect
import types

import pytest
import torch

if importlib.util.find_spec("openrlhf") is None:
    pytest.skip("openrlhf is not installed", allow_module_level=True)
pytest.importorskip("peft")  # before flash_attn is stood in for, which it would look for

from clp_kernels.integrations import openrlhf as ours  # noqa: E402
from clp_kernels.integrations import patch_openrlhf  # noqa: E402
from kernel_calls import DTYPES, assert_as_good_as_peer, entropy64, logprob64  # noqa: E402
from single_modules import packages  # noqa: E402


@pytest.fixture(scope="module")
def openrlhf():
    missing = {
        "deepspeed": [],
        "flash_attn": [],
        "flash_attn.bert_padding": ["index_first_axis", "pad_input", "rearrange", "unpad_input"],
        "flash_attn.utils": [],
        "flash_attn.utils.distributed": ["all_gather"],
    }
    with packages("openrlhf", "openrlhf.models", missing=missing):
        utils = importlib.import_module("openrlhf.models.utils")
        yield types.SimpleNamespace(utils=utils, actor=importlib.import_module("openrlhf.models.actor"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape, vocabulary", [((2, 7), 1500), ((1, 5), 50257)])
def test_log_probs_from_logits_is_as_accurate_as_openrlhfs(openrlhf, dtype, temperature, shape, vocabulary):
    labels = torch.randint(vocabulary, shape)
    assert_as_good_as_peer(
        lambda logits: ours.log_probs_from_logits(logits, labels, temperature),
        # A copy, as OpenRLHF divides what it is given in place, which autograd allows for no leaf.
        lambda logits: openrlhf.utils.log_probs_from_logits(logits.clone(), labels, temperature),
        lambda logits: logprob64(logits / temperature, labels),
        {"logits": (torch.randn(*shape, vocabulary) * 3).to(dtype)},
    )


def test_the_logits_are_left_as_they_are(openrlhf):
    logits, labels = torch.randn(2, 3, 30), torch.randint(30, (2, 3))
    before = logits.clone()
    got = ours.log_probs_from_logits(logits, labels, 0.5)
    assert torch.equal(logits, before)
    theirs = openrlhf.utils.log_probs_from_logits(logits, labels, 0.5)
    torch.testing.assert_close(got, theirs)
    assert torch.equal(logits, before / 0.5)  # what the docstring says of the peer


@pytest.mark.parametrize("dtype", DTYPES)
def test_compute_entropy_is_as_accurate_as_openrlhfs(openrlhf, dtype):
    assert_as_good_as_peer(
        ours.compute_entropy,
        openrlhf.utils.compute_entropy._torchdynamo_orig_callable,  # the formula without the compilation
        lambda logits: entropy64(logits),
        {"logits": (torch.randn(2, 7, 1500) * 3).to(dtype)},
    )


@pytest.mark.parametrize("replacement", ours.REPLACEMENTS, ids=lambda r: r.name)
def test_the_patch_is_in_the_actor_too_and_takes_openrlhfs_arguments(openrlhf, replacement):
    modules = (openrlhf.utils, openrlhf.actor)
    original = getattr(openrlhf.utils, replacement.name)
    with pytest.raises(KeyError), patch_openrlhf():
        assert all(getattr(module, replacement.name) is replacement.new for module in modules)
        raise KeyError("whatever goes wrong in the block")
    assert all(getattr(module, replacement.name) is original for module in modules)
    assert [
        [(p.name, p.default) for p in inspect.signature(f).parameters.values()] for f in (replacement.new,)
    ] == [[(p.name, p.default) for p in inspect.signature(original).parameters.values()]]


class _Model(torch.nn.Module):
    """A language model as the Actor holds it: token ids to logits, in a mapping that takes attributes."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50)

    def forward(self, sequences, attention_mask=None, position_ids=None):
        class Output(dict):
            pass

        return Output(logits=self.head(self.embed(sequences)))


def test_the_actors_forward_is_the_same_patched(openrlhf, monkeypatch):
    actor = openrlhf.actor.Actor.__new__(openrlhf.actor.Actor)
    torch.nn.Module.__init__(actor)
    actor.model, actor.packing_samples, actor.temperature = _Model(), False, 0.8
    sequences = torch.randint(50, (2, 9))
    action_mask = torch.ones(2, 4)

    def step():
        actor.zero_grad()
        log_probs, output = actor.forward(
            sequences, action_mask, torch.ones_like(sequences), return_output=True, return_entropy=True
        )
        (log_probs.sum() - 0.1 * output.entropy.mean()).backward()
        return log_probs.detach(), output.entropy.detach(), *(p.grad.clone() for p in actor.parameters())

    plain = openrlhf.utils.compute_entropy._torchdynamo_orig_callable  # the formula without the compilation
    for module in (openrlhf.utils, openrlhf.actor):
        monkeypatch.setattr(module, "compute_entropy", plain)
    theirs = step()
    with patch_openrlhf():
        mine = step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
