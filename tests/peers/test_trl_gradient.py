"""The same adapters, completions and rewards give the same loss and gradient in TRL's GRPOTrainer and here."""

import pytest
import torch

pytest.importorskip("trl")
from engine.conftest import build_model
from peers.both_trainers import ROWS, our_trainer, trl_trainer

from clp_engine.core.conditions import Conditions
from clp_engine.rollouts.types import Rollout
from clp_engine.training.collecting.batches import TrainingBatch
from clp_engine.training.stepping.update import backward, micro_batches

GROUP = 4
# What TRL does without being asked; its KL follows below.
AS_TRL = {"baseline": "group_mean", "conditioning": "none"}


def spread(completions, **_):
    """Different for different words."""
    return [sum(int(w[1:]) for w in c.split() if w[1:].isdigit()) / 50 for c in completions]


def adapters_of(model):
    """{layer: (A, B)} of a PeftModel."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            layer, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            found.setdefault(layer, {})[rest[0]] = parameter
    return {layer: (parts["A"], parts["B"]) for layer, parts in found.items()}


@pytest.mark.parametrize(
    ("loss_type", "scale_rewards", "corrected"),
    [
        ("dapo", "group", True),
        ("dapo", "group", False),
        ("grpo", "batch", True),
        ("dr_grpo", "none", False),
        ("grpo", "group", False),
        ("dr_grpo", "batch", True),
    ],
)
def test_the_gradient_is_trl_s(tmp_path, loss_type, scale_rewards, corrected):
    """corrected: TRL's use_bias_correction_kl, k3 times the ratio; at ratio 1 its gradient in log pi is
    (1 - e^(q - p)) + (e^(q - p) - (q - p) - 1) = p - q, k2's."""
    settings = {
        "loss_type": loss_type,
        "scale_rewards": scale_rewards,
        "beta": 0.5,
        "temperature": 2.0,
        "max_completion_length": 12,
    }
    model = build_model("llama")
    model.generation_config.eos_token_id = [2, *range(40, 60)]  # so that lengths differ
    theirs = trl_trainer(tmp_path / "trl", spread, model=model, use_bias_correction_kl=corrected, **settings)
    torch.manual_seed(3)
    with torch.no_grad():
        for _, b in adapters_of(theirs.model).values():
            b.normal_(0, 0.2)
    theirs.model.train()
    theirs.current_gradient_accumulation_steps = 1
    seen = {}

    def kept(original, *args):
        seen["rewards"] = original(*args)
        return seen["rewards"]

    original = theirs._calculate_rewards
    theirs._calculate_rewards = lambda *args: kept(original, *args)
    batch = theirs._generate_and_score_completions([dict(row) for row in ROWS[:2] for _ in range(GROUP)])
    loss = theirs._compute_loss(theirs.model, batch)
    loss.backward()
    assert len(set(seen["rewards"].flatten().tolist())) == 2 * GROUP
    assert len(set(batch["completion_mask"].sum(-1).tolist())) > 1  # which is what the loss types differ in

    estimator = "k2" if corrected else "k3"
    ours = our_trainer(tmp_path / "clp", spread, kl_estimator=estimator, **settings, **AS_TRL)
    names = adapters_of(theirs.model)
    assert set(ours.policy.layers) == set(names)
    parameters = ours.policy.adapter_parameters()
    with torch.no_grad():
        for layer, (a, b) in names.items():
            parameters[f"{layer}.lora_a"].copy_(a)
            parameters[f"{layer}.lora_b"].copy_(b)
    mask = batch["completion_mask"].bool()
    rollout = Rollout(
        batch["prompt_ids"][::GROUP],
        batch["prompt_mask"][::GROUP].bool(),
        batch["completion_ids"],
        mask,
        torch.zeros(mask.shape),
        torch.ones(len(mask), dtype=torch.bool),
    )
    rewards = seen["rewards"]
    conditions = Conditions(torch.ones(2, 1), torch.full((2,), settings["beta"]))
    generation = TrainingBatch(rollout, conditions, rewards, rewards[:, 0], {}, 0)
    (_, part), *others = micro_batches(generation, ours.objective, ours.args.micro_batching)
    assert not others
    backward(ours.policy, part, ours.objective)
    gradients = [
        (parameters[f"{layer}.lora_{kind}"].grad, p.grad)
        for layer, pair in names.items()
        for kind, p in zip("ab", pair)
    ]
    largest = max(their.abs().max() for _, their in gradients)
    assert largest > 1e-3
    for our, their in gradients:
        torch.testing.assert_close(
            our, their, rtol=1e-3, atol=1e-4 * largest.item()
        )  # float32 along different paths
