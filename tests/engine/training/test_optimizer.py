"""FlatAdamW steps as AdamW behind clipping does, over adapters that stay what they were; the host reads a step once."""

import copy

import pytest
import torch
from engine.conftest import build_policy, build_tokenizer
from engine.training.test_trainer import ROWS, high_words, low_words, settings
from safetensors.torch import load_file
from torch import nn

from clp_engine.core.errors import ConfigError
from clp_engine.models.backbones import packing
from clp_engine.rollouts import scoring
from clp_engine.training import trainer as training
from clp_engine.training.stepping.flat_adamw import FlatAdamW, set_slots_of, slots_of
from clp_engine.training.trainer import CLPTrainer

SHAPES = ((3, 5), (7,), (1, 1), (16, 4), (0, 3))
OPTIONS = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.02}


def parameters(dtypes=(torch.float32,)):
    generator = torch.Generator().manual_seed(3)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)]))
        for i, shape in enumerate(SHAPES)
    ]


def give_gradients(params, step, size=1.0):
    """As two backward passes do, the second adding to the first."""
    generator = torch.Generator().manual_seed(step)
    for _ in range(2):
        loss = sum((p * size * torch.randn(p.shape, generator=generator).to(p)).sum() for p in params)
        loss.backward()


def flat_steps(params, optimizer, steps, size=1.0, max_norm=1.0):
    for step in steps:
        optimizer.bind()
        give_gradients(params, step, size)
        optimizer.clip(max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def assert_views(params, optimizer):
    buffers = [p for group in optimizer.param_groups for p in group["params"]]
    for held, of in (
        ([p.data for p in params], buffers),
        ([p.grad for p in params], [b.grad for b in buffers]),
    ):
        storages = {b.untyped_storage().data_ptr() for b in of}
        assert all(t.untyped_storage().data_ptr() in storages for t in held if t.numel())


@pytest.mark.parametrize("size, max_norm", [(1.0, 1.0), (1e-3, 1.0), (1.0, None)])
def test_steps_are_those_of_adamw_behind_clipping(size, max_norm):
    ours, plain = parameters(), parameters()
    flat, usual = FlatAdamW(ours, **OPTIONS), torch.optim.AdamW(plain, fused=True, **OPTIONS)
    for step in range(4):
        flat_steps(ours, flat, [step], size, max_norm)
        give_gradients(plain, step, size)
        torch.nn.utils.clip_grad_norm_(plain, max_norm or float("inf"))
        usual.step()
        usual.zero_grad()
        for got, want in zip(ours, plain):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert_views(ours, flat)


def test_the_norm_is_that_of_the_gradients_before_clipping():
    ours, plain = parameters((torch.float32, torch.bfloat16)), parameters((torch.float32, torch.bfloat16))
    flat = FlatAdamW(ours, **OPTIONS)
    assert len(flat.param_groups[0]["params"]) == 2  # a buffer for each dtype
    for params in (ours, plain):
        give_gradients(params, 0)
    want = torch.stack([p.grad.double().norm() for p in plain]).norm()
    torch.testing.assert_close(flat.clip(0.1).double(), want, rtol=1e-4, atol=0)
    flat.step()
    assert all((a != b).all() for a, b in zip(ours, plain))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(bad):
    ours = parameters()
    flat = FlatAdamW(ours, **OPTIONS)
    flat_steps(ours, flat, [0])
    before = copy.deepcopy([p.data for p in ours]), copy.deepcopy(list(flat.state.values()))
    give_gradients(ours, 1)
    ours[1].grad[2] = bad
    assert not flat.clip(1.0).isfinite()
    flat.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, before[0]))
    for state, earlier in zip(flat.state.values(), before[1]):
        assert all(torch.equal(state[name], earlier[name]) for name in earlier)
    flat.zero_grad()
    flat_steps(ours, flat, [2])
    assert not any(torch.equal(p, q) for p, q in zip(ours, before[0]) if p.numel())


def test_views_are_made_again_where_something_else_took_their_place():
    ours, moved = parameters(), parameters()
    flats = [FlatAdamW(params, **OPTIONS) for params in (ours, moved)]
    module = nn.ParameterList(moved)
    flat_steps(ours, flats[0], range(4))
    flat_steps(moved, flats[1], range(2))
    module.double().float()  # what policy.to(...) does to .data and .grad
    with pytest.raises(AssertionError):
        assert_views(moved, flats[1])
    flat_steps(moved, flats[1], [2])
    assert_views(moved, flats[1])
    module.zero_grad(set_to_none=True)
    flat_steps(moved, flats[1], [3])
    assert all(torch.equal(p, q) for p, q in zip(ours, moved))
    module.double()
    with pytest.raises(ConfigError, match="float64 on cpu now, and was torch.float32 on cpu"):
        flats[1].bind()


def test_state_is_that_of_each_parameter_and_goes_from_one_optimiser_to_the_other():
    ours, plain = parameters(), parameters()
    flat, usual = FlatAdamW(ours, **OPTIONS), torch.optim.AdamW(plain, fused=True, **OPTIONS)
    flat_steps(ours, flat, range(2), max_norm=None)
    for step in range(2):
        give_gradients(plain, step)
        usual.step()
        usual.zero_grad()
    for p, q in zip(ours, plain):
        assert slots_of(flat, p).keys() == slots_of(usual, q).keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in slots_of(flat, p).items():
            torch.testing.assert_close(value, slots_of(usual, q)[name])
    resumed = [nn.Parameter(p.detach().clone()) for p in ours]
    again = FlatAdamW(resumed, **OPTIONS)
    for p, q in zip(ours, resumed):
        set_slots_of(again, q, copy.deepcopy(slots_of(flat, p)))
    for params, optimizer in ((ours, flat), (resumed, again)):
        flat_steps(params, optimizer, [2])
    assert all(torch.equal(p, q) for p, q in zip(ours, resumed))


# -- in a trainer ------------------------------------------------------------------------------------------------------


def build(tmp_path, optimizer=None, **changes):
    policy = build_policy("qwen2", objectives=("low", "high"), rank=4)
    given = None if optimizer is None else optimizer(list(policy.adapter_parameters().values()))
    return CLPTrainer(
        policy,
        {"low": low_words, "high": high_words},
        settings(tmp_path, **changes),
        ROWS,
        processing_class=build_tokenizer("qwen2"),
        optimizers=(given, None),
    )


@pytest.mark.parametrize("baseline", ["leave_one_out", "value"])
def test_a_run_is_that_of_adamw_given_by_the_user(tmp_path, baseline):
    """With a norm that clips every step; the adapters keep their identity and shape, and a saved policy has them."""
    settings_of = {"max_grad_norm": 0.01, "baseline": baseline, "max_steps": 3}
    usual = build(
        tmp_path / "usual", lambda ps: torch.optim.AdamW(ps, lr=5e-3, weight_decay=0.0), **settings_of
    )
    ours = build(tmp_path / "ours", **settings_of)
    before = ours.policy.adapter_parameters()
    for trainer in (usual, ours):
        trainer.train()
    assert isinstance(ours.optimizer, FlatAdamW) and not isinstance(usual.optimizer, FlatAdamW)
    after = ours.policy.adapter_parameters()
    assert all(after[name] is p for name, p in before.items())
    for name, p in usual.policy.adapter_parameters().items():
        torch.testing.assert_close(after[name], p, rtol=1e-3, atol=2e-6)
    saved = load_file(tmp_path / "ours" / "policy" / "adapters.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in after.items())
    if baseline == "value":
        for p, q in zip(ours.objective.value_head.parameters(), usual.objective.value_head.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-6)


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


@pytest.mark.parametrize("changes", [{}, {"kl_estimator": "mixed"}, {"num_iterations": 2}])
def test_the_host_reads_an_update_once_however_many_micro_batches(tmp_path, changes, monkeypatch):
    """Of numbers found by backward passes: `item`, `tolist` and the like once a step, inside the passes and between them; and
    outside the passes nothing else that would wait for a device either."""
    reads, places = [], []  # "update", "pass"

    def reader(name, original):
        def read(self, *args):
            counts = {"update": READS, "pass": ("item", "tolist", "numpy", "__float__"), "host": ()}
            if places and name in counts[places[-1]]:
                reads.append(name)
            return original(self, *args)

        return read

    def inside(place, function):
        def call(*args, **options):
            places.append(place)
            try:
                return function(*args, **options)
            finally:
                places.pop()

        return call

    cut = training.micro_batches
    monkeypatch.setattr(training, "micro_batches", inside("pass", lambda *args: list(cut(*args))))
    monkeypatch.setattr(training, "backward", inside("pass", training.backward))
    # A layout is numbers that are on the host anyway.
    monkeypatch.setattr(scoring, "pack_rollout", inside("host", scoring.pack_rollout))
    monkeypatch.setattr(packing, "prefix_attention", inside("host", packing.prefix_attention))
    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, reader(name, getattr(torch.Tensor, name)))
    for rows in (16, 4):
        reads.clear()
        trainer = build(
            tmp_path / str(rows),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=16 // rows,
            **changes,
        )
        trainer._update = inside("update", trainer._update)
        trainer.train()
        assert reads == ["tolist"] * 4
