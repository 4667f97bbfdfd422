"""Rollout and scoring say what the plain model says, with shared prompts, padding, sliding windows and dropped rows."""

import dataclasses

import pytest
import torch
from engine.conftest import ENCODER_DECODER, build_policy, plain_logits
from later import later
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, MambaConfig

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.models.backbones.whole_sequences import WholeSequenceBackbone
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.engines import trials
from clp_engine.rollouts.engines.modules import ModulesDecoder
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.scoring import completion_stats, score, unpacked
from clp_engine.rollouts.types import SamplingParams, pad_left

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32, 33]]
MIXED = Conditions(torch.tensor([[0.0, 0.0], [0.4, 0.6], [1.0, 0.0], [0.2, 0.8]]), torch.full((4,), 0.1))


def plain_log_softmax(policy, prompt, completion, condition, temperature=1.0):
    """(T, V) by one unpadded pass of the transformers model over one sequence."""
    with torch.no_grad():
        logits = plain_logits(policy, prompt, completion, conditions=condition)
    return (logits.float() / temperature).log_softmax(-1)


def test_log_probs_of_rollout_and_scoring_are_those_of_the_plain_model(family):
    policy = build_policy(family)
    drawn = rollout(
        policy, PROMPTS, MIXED, num_generations=3, sampling=SamplingParams(12, temperature=0.8), seed=5
    )
    stats = score(policy, drawn, MIXED, temperature=0.8, max_tokens=40)
    assert drawn.terminated.any() or drawn.completion_mask.all()
    for row, completion in enumerate(drawn.token_lists()):
        prompt, condition = row // 3, MIXED[row // 3 : row // 3 + 1]
        expected = plain_log_softmax(policy, PROMPTS[prompt], completion, condition, 0.8)
        reference = plain_log_softmax(policy, PROMPTS[prompt], completion, Conditions.reference(1, 2), 0.8)
        picked = torch.arange(len(completion)), torch.tensor(completion)
        n = len(completion)
        for name, value in (("sampled", drawn.logprobs[row, :n]), ("scored", stats.logprob[row, :n])):
            torch.testing.assert_close(
                value, expected[picked], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )
        torch.testing.assert_close(stats.ref_logprob[row, :n], reference[picked], rtol=1e-4, atol=1e-4)
        kl = (expected.exp() * (expected - reference)).sum(-1)
        torch.testing.assert_close(stats.kl[row, :n], kl, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            stats.entropy[row, :n], -(expected.exp() * expected).sum(-1), rtol=1e-4, atol=1e-4
        )
        assert not stats.logprob[row, n:].any() and not stats.kl[row, n:].any()


def test_rows_of_the_reference_have_no_kl():
    policy = build_policy("llama")
    drawn = rollout(policy, PROMPTS, MIXED, num_generations=2, sampling=SamplingParams(6))
    kl = score(policy, drawn, MIXED).kl
    assert kl[:2].abs().max() < 1e-6 and kl[2:].sum() > 1e-3


def test_gradients_with_a_shared_prompt_are_those_of_whole_sequences(family):
    policy = build_policy(family)
    drawn = rollout(policy, PROMPTS, MIXED, num_generations=3, sampling=SamplingParams(8), seed=2)
    weights = torch.randn(drawn.completion_ids.shape, generator=torch.Generator().manual_seed(0))
    _, stats = completion_stats(policy, drawn, MIXED, outputs=("logprob", "entropy"))
    mask = drawn.completion_mask
    (
        unpacked(stats.logprob, mask) * weights + unpacked(stats.entropy, mask) * weights.flip(0)
    ).sum().backward()
    ours = {n: p.grad.clone() for n, p in policy.adapter_parameters().items()}
    for p in policy.adapter_parameters().values():
        p.grad = None
    for row, completion in enumerate(drawn.token_lists()):
        prompt = PROMPTS[row // 3]
        if row // 3 == 0:
            continue  # the reference has no gradient
        log_probs = plain_logits(
            policy, prompt, completion, conditions=MIXED[row // 3 : row // 3 + 1]
        ).log_softmax(-1)
        n = len(completion)
        picked = log_probs[torch.arange(n), torch.tensor(completion)]
        (
            picked * weights[row, :n] - (log_probs.exp() * log_probs).sum(-1) * weights.flip(0)[row, :n]
        ).sum().backward()
    for name, parameter in policy.adapter_parameters().items():
        scale = parameter.grad.abs().max().clamp_min(1e-3)
        assert (ours[name] - parameter.grad).abs().max() < 2e-4 * scale, name


def test_a_conditioned_output_projection_is_scored_and_trained_as_it_is_sampled():
    policy = build_policy("llama", target_modules=["lm_head", "v_proj"])
    drawn = rollout(policy, PROMPTS, MIXED, num_generations=2, sampling=SamplingParams(6), seed=4)
    _, stats = completion_stats(policy, drawn, MIXED)
    torch.testing.assert_close(
        unpacked(stats.logprob, drawn.completion_mask).detach(), drawn.logprobs, rtol=1e-4, atol=1e-4
    )
    stats.logprob.sum().backward()
    assert policy.layers["lm_head"].lora_b.grad.abs().sum() > 0


def test_a_completion_does_not_depend_on_what_else_is_in_the_batch(family):
    policy = build_policy(family)
    together = rollout(
        policy, PROMPTS, MIXED, num_generations=2, sampling=SamplingParams(10), row_seeds=torch.arange(8)
    )
    for p, prompt in enumerate(PROMPTS):
        alone = rollout(
            policy,
            [prompt],
            MIXED[p : p + 1],
            num_generations=2,
            sampling=SamplingParams(10),
            row_seeds=torch.arange(2 * p, 2 * p + 2),
        )
        assert alone.token_lists() == together.token_lists()[2 * p : 2 * p + 2]


@pytest.mark.parametrize("name", ["llama", "t5", *later("mistral", "gpt2")])
@pytest.mark.parametrize("max_rows", [2, *later(5)])
@pytest.mark.parametrize("path", ["torch", "auto"])
def test_prompts_that_wait_for_a_place_say_what_they_would_have_said_at_once(
    name, max_rows, path, monkeypatch
):
    monkeypatch.setenv(trials.SWITCH, path)
    policy = build_policy(name)
    prompts, conditions = PROMPTS * 3, Conditions.cat([MIXED] * 3)
    sampling = SamplingParams(24, temperature=2.0)  # rows end early, whatever the random weights
    at_once, waiting = (
        rollout(policy, prompts, conditions, num_generations=2, sampling=sampling, seed=9, max_rows=rows)
        for rows in (None, max_rows)
    )
    assert waiting.token_lists() == at_once.token_lists()
    assert len(set(at_once.lengths.tolist())) > 3  # places are given back at different times
    torch.testing.assert_close(waiting.logprobs, at_once.logprobs, rtol=1e-4, atol=1e-4)


def test_places_are_taken_as_they_come_free(monkeypatch):
    policy, sizes = build_policy("qwen2"), []
    monkeypatch.setenv(trials.SWITCH, "torch")
    step = ModulesDecoder.step

    def counted(self, tokens):
        sizes.append(len(tokens))
        return step(self, tokens)

    monkeypatch.setattr(ModulesDecoder, "step", counted)
    drawn = rollout(
        policy, PROMPTS * 4, Conditions.cat([MIXED] * 4), sampling=SamplingParams(40), seed=1, max_rows=4
    )
    assert max(sizes) == 4
    # Waves of four would take as many steps as the longest of each.
    waves = (drawn.lengths.view(4, 4).amax(-1) - 1).sum()
    assert len(sizes) < waves


def test_stop_strings_end_a_completion_where_they_are_complete():
    policy = ConditionedPolicy.from_pretrained("docsum", ["a", "b"])
    prompts = [policy.tokenizer(t).input_ids for t in ("Return the number of", "Read a file and")]
    options = {"num_generations": 8, "seed": 1, "conditions": MIXED[:2]}
    free = rollout(policy, prompts, sampling=SamplingParams(24), **options)
    text = policy.tokenizer.decode(free.token_lists()[9])
    stop = text[
        len(text) // 2 : len(text) // 2 + 4
    ]  # said somewhere, from the middle of a token to that of another
    sampling = SamplingParams(24, stop_strings=(stop, "never said"))
    drawn = rollout(policy, prompts, sampling=sampling, **options)
    ended = 0
    for tokens, whole, terminated in zip(drawn.token_lists(), free.token_lists(), drawn.terminated.tolist()):
        assert tokens == whole[: len(tokens)]
        said = [stop in policy.tokenizer.decode(tokens[:n]) for n in range(1, len(tokens) + 1)]
        assert not any(said[:-1])
        if said[-1]:
            ended += 1
            assert terminated
        else:
            assert len(tokens) == len(whole)
    assert ended
    with pytest.raises(ConfigError, match="stop_strings"):
        SamplingParams(4, stop_strings="one text")
    with pytest.raises(ConfigError, match="cannot be told"):
        rollout(build_policy("qwen2"), PROMPTS, MIXED, sampling=SamplingParams(4, stop_strings=("w1",)))


@pytest.mark.parametrize("kind", ["bloom", "mamba", "gpt2"])
def test_models_that_go_their_own_way_are_rolled_out_by_transformers_and_scored_whole(kind):
    torch.manual_seed(0)
    small = {"vocab_size": 67, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = {
        "bloom": lambda: BloomConfig(**small, hidden_size=32, n_layer=2, n_head=4),
        "mamba": lambda: MambaConfig(**small, hidden_size=32, num_hidden_layers=2, state_size=8),
        "gpt2": lambda: GPT2Config(**small, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    }[kind]()
    policy = ConditionedPolicy.from_pretrained(AutoModelForCausalLM.from_config(config), ["a", "b"], rank=4)
    for parameter in policy.adapter_parameters().values():
        torch.nn.init.normal_(parameter, std=0.2)
    options = {"num_generations": 3, "sampling": SamplingParams(12), "seed": 4}
    if kind == "gpt2":  # takes the fast path: the slow one must say the same
        fast = rollout(policy, PROMPTS, MIXED, **options)
        policy.backbone = WholeSequenceBackbone(policy.model, "the test says so")
    assert not policy.shares_prompts
    drawn = rollout(policy, PROMPTS, MIXED, **options)
    if kind == "gpt2":
        assert drawn.token_lists() == fast.token_lists()
    stats = score(policy, drawn, MIXED)
    torch.testing.assert_close(stats.logprob, drawn.logprobs, rtol=1e-4, atol=1e-4)
    row = 7
    completion = drawn.token_lists()[row]
    ids = torch.tensor([PROMPTS[2] + completion])
    with torch.no_grad(), policy.blended(MIXED[2:3]):
        expected = policy.model(ids).logits.log_softmax(-1)[0, len(PROMPTS[2]) - 1 : -1]
    torch.testing.assert_close(
        drawn.logprobs[row, : len(completion)],
        expected[torch.arange(len(completion)), torch.tensor(completion)],
        rtol=1e-4,
        atol=1e-4,
    )


def test_completions_end_at_an_end_token_and_say_so():
    policy = build_policy("qwen2")
    drawn = rollout(policy, PROMPTS, MIXED, num_generations=16, sampling=SamplingParams(40), seed=1)
    ends = [tokens[-1] in policy.stop_token_ids for tokens in drawn.token_lists()]
    assert drawn.terminated.tolist() == ends and any(ends)
    assert not any(t in policy.stop_token_ids for tokens in drawn.token_lists() for t in tokens[:-1])
    assert (drawn.completion_ids[~drawn.completion_mask] == policy.pad_token_id).all()


def test_greedy_is_the_argmax_and_the_same_every_time():
    policy = build_policy("gpt2")
    greedy = SamplingParams(8, temperature=0.0)
    first, second = (rollout(policy, PROMPTS, MIXED, sampling=greedy, seed=s) for s in (0, 1))
    assert first.token_lists() == second.token_lists()
    for p, completion in enumerate(first.token_lists()):
        assert (
            plain_log_softmax(policy, PROMPTS[p], completion, MIXED[p : p + 1]).argmax(-1).tolist()
            == completion
        )


def test_generate_agrees_with_transformers_generate_on_the_merged_model(family):
    policy = build_policy(family)
    merged, text = policy.merge({"a": 0.5, "b": 0.5}), "w1 w2 w3 w4"
    encoded = policy.tokenizer(text, return_tensors="pt")
    theirs = merged.generate(
        encoded.input_ids, attention_mask=encoded.attention_mask, do_sample=False, max_new_tokens=8
    )
    skip = 1 if family in ENCODER_DECODER else encoded.input_ids.shape[1]
    expected = policy.tokenizer.decode(theirs[0, skip:], skip_special_tokens=True)
    assert policy.generate(text, {"a": 0.5, "b": 0.5}, temperature=0, max_new_tokens=8) == [expected]


def test_generate_takes_one_weighting_per_prompt_and_several_samples():
    policy = build_policy("llama")
    texts = policy.generate(["w1 w2", "w1 w2"], [{"a": 1.0}, {"b": 1.0}], temperature=0, max_new_tokens=10)
    assert texts[0] != texts[1]
    several = policy.generate(["w1 w2", "w3"], num_return_sequences=3, max_new_tokens=5)
    assert len(several) == 2 and all(len(s) == 3 for s in several)


def test_parts_of_a_rollout_are_trimmed_and_whole():
    policy = build_policy("qwen2")
    drawn = rollout(policy, PROMPTS, MIXED, num_generations=2, sampling=SamplingParams(10), seed=3)
    part = drawn.prompts(2, 4)
    assert part.token_lists() == drawn.token_lists()[4:] and part.prompt_ids.shape[1] == 4
    assert {f.name for f in dataclasses.fields(part)} == {f.name for f in dataclasses.fields(drawn)}


def test_bad_input_is_refused():
    policy = build_policy("qwen2")
    with pytest.raises(ConfigError, match="prompt 1 has no tokens"):
        pad_left([[1], []], 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="conditions has 4 rows for 1 prompts"):
        rollout(policy, [[1]], MIXED)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        SamplingParams(0)
