"""clp_kernels.integrations.liger beside Liger's own fused linear GRPO loss, in plain torch on the CPU."""

import importlib
import inspect
import itertools

import pytest
import torch

pytest.importorskip("liger_kernel")

from clp_kernels.integrations import liger as ours  # noqa: E402
from clp_kernels.integrations import patch_liger  # noqa: E402
from clp_kernels.integrations.grpo_objective import CLIPPED, LOSSES  # noqa: E402
from kernel_calls import assert_as_good_as_peer  # noqa: E402
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # noqa: E402
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction as Peer  # noqa: E402

B, T, H, V = 4, 9, 32, 501
COMBINATIONS = [
    (loss, level)
    for loss, level in itertools.product(LOSSES, ("token", "sequence"))
    if level == "token" or loss in CLIPPED
]


def batch(dtype=torch.float32):
    """A ragged batch whose old log-probs are far enough from the policy's that clipping happens on both sides."""
    tensors = {"hidden": torch.randn(B, T, H), "weight": torch.randn(V, H) * 0.5, "bias": torch.randn(V)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    ids = torch.randint(V, (B, T))
    logits = (tensors["hidden"] @ tensors["weight"].T + tensors["bias"]).float() / 0.9
    logprob = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return tensors, {
        "ids": ids,
        "mask": (torch.arange(T) < torch.tensor([[9], [4], [7], [1]])).float(),
        "advantages": torch.tensor([1.0, -0.7, 0.4, -1.3]),
        "old": logprob + 0.3 * torch.randn(B, T),
        "ref": logprob + 0.2 * torch.randn(B, T),
        "vllm": torch.rand(B, T) + 0.5,
    }


def call(function, rest, given, **options):
    def run(hidden, weight, bias=None):
        loss, metrics = function.apply(
            hidden, weight, rest["ids"], rest["mask"], rest["advantages"], bias,
            temperature=0.9, compiled=False, **given, **options)  # fmt: skip
        assert not any(metric.requires_grad for metric in metrics)
        return loss, *metrics

    return run


class KeywordPeer:
    """autograd.Function.apply takes no keywords: Liger's arguments by name, in its order."""

    @staticmethod
    def apply(*arguments, **options):
        parameters = list(inspect.signature(Peer.forward).parameters.values())[1:]
        rest = parameters[len(arguments) :]
        assert not set(options) - {p.name for p in rest}
        return Peer.apply(*arguments, *(options.get(p.name, p.default) for p in rest))


@pytest.mark.parametrize("loss_type, level", COMBINATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.0, "epsilon_high": 1.1},  # of cispo, the bound itself
        {"delta": 1.1, "use_bias_correction_kl": True, "chunk_size": 3},
    ],
    ids=["defaults", "no KL", "delta, corrected KL"],
)
def test_every_loss_and_its_gradients_are_ligers(loss_type, level, options):
    """Liger's loss is a sum of float32 terms as ours is: they agree to the rounding of two orders of summation."""
    tensors, rest = batch()
    given = {
        "old_per_token_logps": rest["old"],
        "ref_per_token_logps": rest["ref"],
        "vllm_is_ratio": rest["vllm"],
    }
    options = {**options, "loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 20,
               "num_items_in_batch": 30}  # fmt: skip

    def run(function):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors.values()]
        outputs = call(function, rest, given, **options)(*leaves)
        return outputs, torch.autograd.grad(1.5 * outputs[0], leaves)

    mine, theirs = run(ours.LigerFusedLinearGRPOFunction), run(KeywordPeer)
    for i, (a, b) in enumerate(zip(mine[0], theirs[0], strict=True)):
        assert (a - b).abs() <= 1e-6 + 1e-5 * b.abs(), f"output {i}"
    for name, a, b in zip(tensors, mine[1], theirs[1], strict=True):
        assert (a - b).abs().max() <= 5e-6 * b.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_reference", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_with_the_reference_in_the_same_pass_it_is_as_accurate_as_ligers(dtype, own_reference, with_bias):
    tensors, rest = batch(dtype)
    if not with_bias:
        del tensors["bias"]
    reference = {
        "ref_input": (tensors["hidden"] + 0.1 * torch.randn(B, T, H)).to(dtype),
        "ref_weight": (torch.randn(V, H) * 0.5).to(dtype) if own_reference else tensors["weight"],
        "ref_bias": torch.randn(V).to(dtype) if own_reference and with_bias else None,
    }

    def exact(hidden, weight, bias=None):
        def logprob(hidden, weight, bias):
            z = (hidden @ weight.T + (0 if bias is None else bias)) / 0.9
            return z.log_softmax(-1).gather(-1, rest["ids"][..., None])[..., 0]

        policy = logprob(hidden, weight, bias)
        old, ref = (
            rest["old"].double(),
            logprob(*(None if t is None else t.double() for t in reference.values())),
        )
        ratio, advantages = (policy - old).exp(), rest["advantages"].double()[:, None]
        kl = (ref - policy).exp() - (ref - policy) - 1
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) + 0.04 * kl
        clipped = ((ratio < 0.8) & (advantages < 0)) | ((ratio > 1.2) & (advantages > 0))
        tokens = rest["mask"].sum()
        return tuple((x * rest["mask"]).sum() / tokens for x in (loss, kl.detach(), clipped.double()))

    given = {"old_per_token_logps": rest["old"], **reference}
    # Scalars: Liger's error may be zero by luck, hence a slack of a few roundings of float32.
    assert_as_good_as_peer(
        call(ours.LigerFusedLinearGRPOFunction, rest, given),
        call(KeywordPeer, rest, given),
        exact,
        tensors,
        slack=2e-6,
    )


def test_masked_positions_may_hold_anything():
    tensors, rest = batch()
    given = {"old_per_token_logps": rest["old"], "ref_per_token_logps": rest["ref"]}
    clean = call(ours.LigerFusedLinearGRPOFunction, rest, given)(**tensors)
    padding = rest["mask"] == 0
    tensors["hidden"] = tensors["hidden"].masked_fill(padding[..., None], float("nan"))
    rest["ids"] = rest["ids"].masked_fill(padding, V + 5)
    given = {name: value.masked_fill(padding, -1e4) for name, value in given.items()}
    dirty = call(ours.LigerFusedLinearGRPOFunction, rest, given)(**tensors)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


def test_a_frozen_head_gets_no_gradient_and_no_gradients_means_no_backward(monkeypatch):
    tensors, rest = batch()
    hidden = tensors["hidden"].requires_grad_()
    loss, *_ = call(ours.LigerFusedLinearGRPOFunction, rest, {}, beta=0.0)(**tensors)
    loss.backward()
    assert hidden.grad.any() and tensors["weight"].grad is None
    with torch.no_grad():
        assert not call(ours.LigerFusedLinearGRPOFunction, rest, {}, beta=0.0)(**tensors)[0].requires_grad


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "ppo"}, "loss_type is 'ppo'; expected one of grpo"),
        (
            {"importance_sampling_level": "batch"},
            "importance_sampling_level is 'batch'; expected token or sequence",
        ),
        (
            {"loss_type": "cispo", "importance_sampling_level": "sequence"},
            "'sequence'; expected token for cispo",
        ),
        ({"loss_type": "dr_grpo"}, "max_completion_length is None; expected a number of tokens"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg is 0.0; expected a positive number"),
        ({"delta": -1.0}, "delta is -1.0; expected a positive number, or None"),
        (
            {},
            "neither ref_per_token_logps nor ref_input is given; expected one of them, or use_ref_model=False",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    tensors, rest = batch()
    with pytest.raises(ValueError, match=message):
        call(ours.LigerFusedLinearGRPOFunction, rest, {}, **options)(**tensors)


def test_a_loss_module_made_before_the_patch_uses_it_in_the_block_alone():
    tensors, rest = batch()
    module = importlib.import_module("liger_kernel.chunked_loss.grpo_loss")
    functional = importlib.import_module("liger_kernel.chunked_loss.functional")
    original = functional.liger_fused_linear_grpo
    loss = LigerFusedLinearGRPOLoss(compiled=False, beta=0.1, temperature=0.9)
    arguments = (tensors["hidden"], tensors["weight"], rest["ids"], rest["mask"], rest["advantages"], tensors["bias"],
                 rest["ref"], rest["old"])  # fmt: skip
    theirs = loss(*arguments)
    with pytest.raises(KeyError), patch_liger():
        assert module.LigerFusedLinearGRPOFunction is ours.LigerFusedLinearGRPOFunction
        assert functional.liger_fused_linear_grpo is ours.liger_fused_linear_grpo
        mine = loss(*arguments)
        raise KeyError("whatever goes wrong in the block")
    assert module.LigerFusedLinearGRPOFunction is Peer and functional.liger_fused_linear_grpo is original
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_it_takes_ligers_arguments_in_ligers_order():
    theirs = list(inspect.signature(Peer.forward).parameters.values())[1:]
    mine = inspect.signature(ours.LigerFusedLinearGRPOFunction.apply).parameters.values()
    assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in theirs]
