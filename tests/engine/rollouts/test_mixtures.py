"""A logit mixture is the specialists' logits mixed by hand, in what is sampled, scored and reported."""

import pytest
import torch
from clp_kernels import sample_tokens
from engine.conftest import VOCAB, build_model, build_policy, plain_logits

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.core.seeds import derive
from clp_engine.evaluation.evaluate import evaluate
from clp_engine.policy.logit_mixture import LogitMixture
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.scoring import score
from clp_engine.rollouts.types import SamplingParams

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32, 33], [40, 41]]
# The reference, a mixture, a corner, a mixture of all three; coefficients that neither sum to one nor are positive.
WEIGHTS = torch.tensor([[0, 0, 0], [0.4, 0.6, 0], [1, 0, 0], [0.2, 0.5, 0.3], [1.5, -0.25, 0]])
MIXED = Conditions(WEIGHTS, torch.full((5,), 0.1))
OBJECTIVES = ("a", "b", "c")


@pytest.fixture(params=["llama", "gemma2", "gpt2", "t5", "t5-v1.1", "bart"])
def family(request):
    return request.param


def build_stopping_policy(family):
    """A policy for which many tokens end a completion, so that rows leave the batch early."""
    policy = build_policy(family, OBJECTIVES)
    policy.model.generation_config.eos_token_id = list(range(2, VOCAB, 4))
    return policy


def specialists(policy):
    """Ordinary transformers models: the merged corners, and the base."""
    return [policy.merge(row.tolist()) for row in torch.eye(len(policy.objectives))]


def uncapped(policy, logits):
    cap = policy.backbone.head.softcap
    return logits if cap is None else torch.atanh(logits.double() / cap) * cap


def capped(policy, logits):
    cap = policy.backbone.head.softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap


def by_hand(policy, models, base, prompt, completion, weights, scale=1.0):
    """(T, V): z_ref + scale * sum_i w_i (z_i - z_ref), from the models' own forward passes; before the cap."""
    with torch.no_grad():
        z_ref = uncapped(policy, plain_logits(base, prompt, completion))
        mixed = z_ref + sum(
            scale * float(w) * (uncapped(policy, plain_logits(m, prompt, completion)) - z_ref)
            for m, w in zip(models, weights)
        )
    return capped(policy, mixed).float()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_tokens_log_probs_and_kl_are_those_of_logits_mixed_by_hand(family, scale):
    policy = build_stopping_policy(family)
    models, base = specialists(policy), build_model(family)
    mixture = LogitMixture(policy, scale=scale)
    seeds = torch.arange(100, 115)
    drawn = rollout(
        mixture,
        PROMPTS,
        MIXED,
        num_generations=3,
        sampling=SamplingParams(12, temperature=0.8),
        row_seeds=seeds,
    )
    stats = score(mixture, drawn, MIXED, temperature=0.8, max_tokens=60)
    assert drawn.lengths.float().quantile(0.3) < drawn.lengths.max()  # rows left the batch before others
    for row, completion in enumerate(drawn.token_lists()):
        prompt, weights, n = PROMPTS[row // 3], WEIGHTS[row // 3], len(completion)
        logits = by_hand(policy, models, base, prompt, completion, weights, scale) / 0.8
        with torch.no_grad():
            reference = (plain_logits(base, prompt, completion) / 0.8).log_softmax(-1)
        expected, picked = logits.log_softmax(-1), (torch.arange(n), torch.tensor(completion))
        for name, value in (("sampled", drawn.logprobs), ("scored", stats.logprob)):
            torch.testing.assert_close(
                value[row, :n],
                expected[picked],
                rtol=1e-3,
                atol=1e-3,
                msg=lambda m, name=name: f"{name}: {m}",
            )
        torch.testing.assert_close(stats.ref_logprob[row, :n], reference[picked], rtol=1e-3, atol=1e-3)
        kl = (expected.exp() * (expected - reference)).sum(-1)
        torch.testing.assert_close(stats.kl[row, :n], kl, rtol=2e-3, atol=1e-3)
        tokens, _ = sample_tokens(
            logits, temperature=1.0, seeds=torch.cat([derive(seeds[row : row + 1], t) for t in range(n)])
        )
        assert tokens.tolist() == completion


def test_corners_are_the_specialists_and_weight_zero_is_the_base(family):
    policy = build_policy(family, OBJECTIVES)
    corners = Conditions(
        torch.cat([torch.eye(3), torch.zeros(2, 3)]), torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1])
    )
    options = {"num_generations": 2, "sampling": SamplingParams(8), "seed": 3}
    ours, theirs = (rollout(p, PROMPTS, corners, **options) for p in (LogitMixture(policy), policy))
    assert ours.token_lists() == theirs.token_lists()
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-5, atol=1e-5)
    assert score(LogitMixture(policy), ours, corners).kl[6:].abs().max() < 1e-6


def test_a_mixture_is_not_the_blend_of_the_parameters():
    policy = build_policy("llama", OBJECTIVES)
    drawn = rollout(policy, PROMPTS, MIXED, num_generations=2, sampling=SamplingParams(8))
    ours, blended = (score(p, drawn, MIXED).logprob for p in (LogitMixture(policy), policy))
    assert (ours - blended)[2:4].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["qwen2", "t5"])
def test_a_row_does_not_depend_on_what_else_is_in_the_batch(family):
    mixture = LogitMixture(build_stopping_policy(family))
    together = rollout(
        mixture, PROMPTS, MIXED, num_generations=2, sampling=SamplingParams(20), row_seeds=torch.arange(10)
    )
    for p, prompt in enumerate(PROMPTS):
        alone = rollout(
            mixture,
            [prompt],
            MIXED[p : p + 1],
            num_generations=2,
            sampling=SamplingParams(20),
            row_seeds=torch.arange(2 * p, 2 * p + 2),
        )
        assert alone.token_lists() == together.token_lists()[2 * p : 2 * p + 2]


def test_scale_zero_is_the_base_and_a_scale_is_a_factor_of_the_weights():
    policy = build_policy("qwen2", OBJECTIVES)
    drawn = rollout(policy, PROMPTS, MIXED, num_generations=2, sampling=SamplingParams(6))
    assert score(LogitMixture(policy, scale=0.0), drawn, MIXED).kl.abs().max() < 1e-6
    doubled = Conditions(2 * MIXED.weights, MIXED.kl)
    torch.testing.assert_close(
        score(LogitMixture(policy, scale=2.0), drawn, MIXED).logprob,
        score(LogitMixture(policy), drawn, doubled).logprob,
    )


@pytest.mark.parametrize("family", ["qwen2", "t5"])
def test_evaluate_and_generate_take_a_mixture_for_a_policy(family):
    policy = build_policy(family, ("a", "b"))
    mixture = LogitMixture(policy)

    def share(parity):
        return lambda completion_ids, **_: [sum(i % 2 == parity for i in c) / len(c) for c in completion_ids]

    rewards = {"a": share(0), "b": share(1)}
    ours, theirs = (
        evaluate(
            p,
            rewards,
            ["w1 w2", "w3", "w4 w5 w6"],
            grid=3,
            sampling=SamplingParams(6),
            bootstrap=20,
            progress=False,
        )
        for p in (mixture, policy)
    )
    assert ours.base == theirs.base  # the same base, the same random numbers
    ends = {point.weights["a"]: point for point in theirs.points}
    for point in ours.points:
        assert point.kl > 0
        if point.weights["a"] in (0.0, 1.0):
            assert point.rewards == ends[point.weights["a"]].rewards
            assert point.kl == pytest.approx(ends[point.weights["a"]].kl, rel=1e-4)
        else:
            assert point.kl != pytest.approx(ends[point.weights["a"]].kl, rel=1e-4)
    for weights in ({"a": 1.0}, {"b": 1.0}):
        assert mixture.generate("w1 w2", weights, max_new_tokens=5) == policy.generate(
            "w1 w2", weights, max_new_tokens=5
        )
    several = mixture.generate(["w1 w2", "w3"], num_return_sequences=3, max_new_tokens=5)
    assert len(several) == 2 and all(len(s) == 3 for s in several)


def test_a_conditioned_output_projection_is_refused():
    with pytest.raises(ConfigError, match="output projection is conditioned"):
        LogitMixture(build_policy("llama", target_modules=["lm_head", "v_proj"]))
    with pytest.raises(ConfigError, match="scale=nan"):
        LogitMixture(build_policy("llama"), scale=float("nan"))
