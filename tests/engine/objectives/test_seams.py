"""What a new weighting, reference or objective may rely on: it is told what happened, and its state is in the checkpoints."""

import dataclasses
import math

import pytest
import torch
from engine.training.test_trainer import build_trainer

from clp_engine.core.conditions import Conditions
from clp_engine.objectives.policy_gradient import LossSettings, PolicyGradient
from clp_engine.objectives.weightings import ConditionSampler, FixedKL, UniformSimplex
from clp_engine.rollouts.engines.choice import engine_of
from clp_engine.training.checkpoints import checkpoint
from clp_engine.training.collecting.reference_states import joined, reference_hidden
from clp_engine.training.stepping.update import backward, micro_batches


class Leaning(ConditionSampler):
    """Weightings lean towards the objective that was rewarded least so far."""

    def __init__(self):
        super().__init__(UniformSimplex(2), FixedKL(0.1))
        self.total, self.observed = [0.0, 0.0], 0

    def sample(self, rows, generator):
        drawn = super().sample(rows, generator)
        least = 0 if self.total[0] <= self.total[1] else 1
        return Conditions((drawn.weights + torch.eye(2)[least]) / 2, drawn.kl)

    def observe(self, conditions, rewards):
        assert conditions.weights.shape == (rewards.shape[0], 2) and rewards.shape[2] == 2
        self.total = [t + r for t, r in zip(self.total, rewards.nanmean((0, 1)).tolist())]
        self.observed += 1

    def state_dict(self):
        return {"total": self.total, "observed": self.observed}

    def load_state_dict(self, state):
        self.total, self.observed = state["total"], state["observed"]


def test_a_weighting_observes_every_rollout_once_and_goes_on_from_a_checkpoint_to_the_bit(tmp_path):
    changes = {"max_steps": 6, "num_iterations": 2, "save_strategy": "steps", "save_steps": 4}
    whole = build_trainer(tmp_path / "whole", condition_sampler=Leaning(), **changes)
    whole.train()
    assert whole.sampler.observed == 3
    parts = build_trainer(tmp_path / "parts", condition_sampler=Leaning(), **changes)
    parts.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-4")
    assert parts.sampler.state_dict() == whole.sampler.state_dict()
    before, after = (t.policy.adapter_parameters() for t in (whole, parts))
    assert all(torch.equal(after[name], p) for name, p in before.items())


class Itself:
    """The policy as it is, as its own reference."""

    def hidden(self, policy, batch, conditions):
        return policy.completion_hidden(batch, conditions)


def test_a_reference_is_what_its_hidden_states_say(tmp_path):
    """The policy's own log-probs: a ratio of one and no KL, whether the states were computed ahead or in the update."""
    trainer = build_trainer(tmp_path, max_steps=3, learning_rate=3e-2, alpha=0.3)
    trainer.train()
    batch = trainer.collector.training_batch(trainer.train_dataset, 7, trainer.state)
    batching = trainer.args.micro_batching
    frozen = [
        backward(trainer.policy, part, trainer.objective).kl.sum()
        for _, part in micro_batches(batch, trainer.objective, batching)
    ]
    assert min(frozen) > 1e-3
    ahead = reference_hidden(trainer.policy, batch.rollout, batch.conditions, Itself(), batching)
    for states in (ahead, None):
        batch.reference = states
        for _, part in micro_batches(batch, trainer.objective, batching):
            found = backward(trainer.policy, part, trainer.objective, reference=Itself())
            torch.testing.assert_close(found.logprob, found.ref_logprob, rtol=0, atol=1e-5)
            assert found.kl.abs().max() < 1e-5
    assert joined(ahead).shape[0] == batch.rollout.tokens


def test_an_objective_says_what_it_needs():
    needs = {
        name: PolicyGradient(LossSettings(name)).needs for name in ("return", "exact", "mixed", "k2", "k3")
    }
    differentiated = {name: n.differentiated for name, n in needs.items()}
    assert differentiated["exact"] == differentiated["mixed"] == ("logprob", "kl")
    assert differentiated["return"] == differentiated["k2"] == differentiated["k3"] == ("logprob",)
    assert [name for name, n in needs.items() if n.hidden_gradient] == ["mixed"]
    assert PolicyGradient().needs.group and not PolicyGradient(LossSettings(baseline="none")).needs.group


def test_the_state_of_an_objective_is_restored_from_a_checkpoint_alone(tmp_path):
    changes = {"baseline": "value", "kl_estimator": "mixed", "save_strategy": "steps", "save_steps": 2}
    trainer = build_trainer(tmp_path, max_steps=2, **changes)
    trainer.train()
    other = build_trainer(tmp_path / "other", **changes).objective
    assert other.mix != trainer.objective.mix
    checkpoint.load_objective(tmp_path / "checkpoint-2", other)
    ours, theirs = trainer.objective.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and ours.pop("mix_controller") == theirs.pop("mix_controller")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


class Average:
    """The average of the deltas that the policy had so far."""

    def __init__(self, policy):
        self.own = {name: p.detach().clone() for name, p in policy.adapter_parameters().items()}

    def hidden(self, policy, batch, conditions):
        parameters = policy.adapter_parameters()
        trained = {name: p.data for name, p in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.own[name]
            return policy.completion_hidden(batch, conditions)
        finally:
            for name, parameter in parameters.items():
                parameter.data = trained[name]

    def after_step(self, policy, step):
        for name, parameter in policy.adapter_parameters().items():
            self.own[name].lerp_(parameter.detach(), 1 / (step + 1))

    def state_dict(self):
        return {**self.own, "kind": "average"}

    def load_state_dict(self, state):
        assert state["kind"] == "average"
        self.own = {name: state[name].clone() for name in self.own}


def test_a_reference_that_moves_is_in_checkpoints_and_resumes_to_the_bit(tmp_path):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "alpha": 0.2, "learning_rate": 3e-2}

    def build(folder):
        model = build_trainer(tmp_path / "unused").policy
        return build_trainer(folder, model=model, reference=Average(model), **changes)

    whole = build(tmp_path / "whole")
    whole.train()
    assert any(bool(p.any()) for n, p in whole.reference.own.items() if n.endswith("lora_b"))
    parts = build(tmp_path / "parts")
    parts.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    ours, theirs = (t.policy.adapter_parameters() for t in (whole, parts))
    assert all(torch.equal(theirs[name], p) for name, p in ours.items())
    assert all(torch.equal(parts.reference.own[name], t) for name, t in whole.reference.own.items())
    frozen = build_trainer(tmp_path / "frozen", model=build_trainer(tmp_path / "unused").policy, **changes)
    frozen.train()
    moved = frozen.policy.adapter_parameters()
    assert any(not torch.equal(moved[name], p) for name, p in ours.items())


def test_the_log_probs_of_another_engine_are_corrected_for_from_the_first_step_on(tmp_path):
    """An engine that says it sampled each token with half its probability: the ratio is two, and truncated at 1.5."""

    class Halved:
        def run(self, request):
            drawn = engine_of(Plain(request.source)).run(request)
            return dataclasses.replace(drawn, logprobs=drawn.logprobs - math.log(2), engine="halved")

    class Plain:
        """The policy as it is drawn from where no engine was given."""

        engine = None

        def __init__(self, source):
            self.conditioned = source.conditioned

    def gradients(folder, engine, **more):
        trainer = build_trainer(tmp_path / folder, max_steps=1, logging_steps=1, max_grad_norm=0.0, **more)
        trainer.policy.engine = engine
        trainer.train()
        return next(e for e in trainer.state.log_history if "grad_norm" in e)

    ratio = "sampling/importance_sampling_ratio"
    ordinary = gradients("ordinary", None)
    assert f"{ratio}/mean" not in ordinary and ordinary["clip_ratio/high_mean"] == 0
    corrected = gradients("corrected", Halved())
    assert corrected[f"{ratio}/min"] == pytest.approx(2, rel=1e-3)
    assert corrected["grad_norm"] == pytest.approx(2 * ordinary["grad_norm"], rel=1e-3)
    assert corrected["sampling/sampling_logp_difference/mean"] == pytest.approx(math.log(2), rel=1e-3)
    truncated = gradients("truncated", Halved(), vllm_importance_sampling_clip_max=1.5)
    assert truncated["grad_norm"] == pytest.approx(1.5 * ordinary["grad_norm"], rel=1e-3)
    masked = gradients("masked", Halved(), vllm_importance_sampling_mode="sequence_mask")
    assert masked[f"{ratio}/max"] == 0 == masked["grad_norm"]
    biased = gradients("biased", Halved(), vllm_importance_sampling_correction=False)
    assert f"{ratio}/mean" not in biased and biased["grad_norm"] == pytest.approx(
        ordinary["grad_norm"], rel=1e-6
    )
