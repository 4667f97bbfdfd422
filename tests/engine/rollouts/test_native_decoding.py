"""The native decoder says what transformers' modules say, for every family built like Llama, and says why where it cannot."""

import copy
import functools
import signal

import pytest
import torch
from engine.conftest import _SMALL, VOCAB, build_model, build_policy
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
)

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.engines import llama_weights, native, trials
from clp_engine.rollouts.engines.base import DecoderRequest
from clp_engine.rollouts.engines.choice import detours, step_decoder
from clp_engine.rollouts.engines.modules import ModulesDecoder
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.rows import Rows
from clp_engine.rollouts.scoring import score
from clp_engine.rollouts.types import SamplingParams, pad_left

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], list(range(30, 60))]
MIXED = Conditions(torch.tensor([[0.0, 0.0], [0.4, 0.6], [1.0, 0.0], [0.2, 0.8]]), torch.full((4,), 0.1))
ROPE = {
    "rope_theta": 1e4,
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
ROPE |= {"original_max_position_embeddings": 32}

FAMILIES = {
    "llama": lambda: LlamaConfig(**_SMALL, tie_word_embeddings=False),
    "llama-biases": lambda: LlamaConfig(**_SMALL, attention_bias=True, mlp_bias=True),
    "llama-rope": lambda: LlamaConfig(**_SMALL, rope_parameters=ROPE),
    "llama-odd-head": lambda: LlamaConfig(**_SMALL | {"head_dim": 20, "num_key_value_heads": 1}),
    "qwen2": lambda: Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "qwen2-windows": lambda: Qwen2Config(
        **_SMALL,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "qwen3": lambda: Qwen3Config(**_SMALL),
    "mistral": lambda: MistralConfig(**_SMALL, sliding_window=6),
    "gemma": lambda: GemmaConfig(**_SMALL),
    "gemma2": lambda: Gemma2Config(
        **_SMALL,
        sliding_window=6,
        query_pre_attn_scalar=8,
        final_logit_softcapping=5.0,
        attn_logit_softcapping=2.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_SMALL, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "olmo2": lambda: Olmo2Config(**{k: v for k, v in _SMALL.items() if k != "head_dim"}),
    "granite": lambda: GraniteConfig(
        **{k: v for k, v in _SMALL.items() if k != "head_dim"},
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
        attention_multiplier=0.3,
        logits_scaling=2.0,
    ),
}


def policy_of(config, base=lambda model: model, **options) -> ConditionedPolicy:
    """Weights large enough to tell one model from another, and adapters with something to say."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    policy = ConditionedPolicy.from_pretrained(base(model.eval()), ("a", "b"), **{"rank": (3, 5), **options})
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters().items():
            if not name.endswith("lora_a"):
                parameter.normal_(0, 0.1)
    return policy


@pytest.fixture(params=sorted(FAMILIES))
def native_family(request):
    return request.param


def both(policy, conditions, group=3, room=24, prompts=PROMPTS):
    made = native.plan(policy)
    assert made.reason is None
    ids, mask = pad_left(prompts, 0, policy.device)
    blend = None if conditions is None else policy.coefficients(conditions)
    request = DecoderRequest(policy, blend is not None, ids.shape[1], group, room, len(prompts))
    decoders = native.NativeDecoder(request, made), ModulesDecoder(request)
    for decoder in decoders:
        decoder.add_all = functools.partial(decoder.add, ids, mask, blend)
    return decoders


@torch.no_grad()
def worst_difference(ours, theirs, steps=24, drop_at=7) -> float:
    """Of the logits over a teacher-forced rollout in which half of the rows leave; relative to the largest."""
    worst, generator = (
        (ours.add_all() - theirs.add_all()).abs().max().item(),
        torch.Generator().manual_seed(1),
    )
    rows = 12
    for step in range(steps):
        tokens = torch.randint(3, VOCAB, (rows,), generator=generator)
        given, expected = ours.step(tokens), theirs.step(tokens)
        worst = max(worst, ((given - expected).abs().max() / expected.abs().max().clamp_min(1)).item())
        if step == drop_at:
            kept = torch.tensor([0, 2, 3, 5, 6, 11])
            ours.keep(kept), theirs.keep(kept)
            rows = len(kept)
    return worst


@pytest.mark.parametrize("conditions", [MIXED, None], ids=["blends", "base"])
def test_logits_are_those_of_the_modules(native_family, conditions):
    assert worst_difference(*both(policy_of(FAMILIES[native_family]()), conditions)) < 1e-5


@pytest.mark.parametrize("conditioning", ["logit", "lora+logit", "none"])
@pytest.mark.parametrize("rank", [4, 40])
def test_other_ways_of_conditioning(conditioning, rank):
    policy = policy_of(LlamaConfig(**_SMALL, tie_word_embeddings=True), conditioning=conditioning, rank=rank)
    assert worst_difference(*both(policy, MIXED)) < 1e-5


def test_a_bfloat16_model_is_decoded_no_less_exactly_than_by_its_modules(native_family):
    """Both against the float32 model of the same numbers, and behind a prompt that transformers reads in bfloat16."""
    half = policy_of(FAMILIES[native_family](), base=lambda model: model.bfloat16())
    whole = policy_of(FAMILIES[native_family](), base=lambda model: model.bfloat16().float())
    assert llama_weights.base_dtype(half) is torch.bfloat16
    ours, modules = both(half, MIXED)
    error, theirs = (worst_difference(each, both(whole, MIXED)[1]) for each in (ours, modules))
    assert 0 < error <= theirs  # equal where the prompt's part is the largest


def test_every_instruction_set(instruction_sets):
    from clp_kernels import _native

    policy = policy_of(FAMILIES["gemma2"]())
    for isa in instruction_sets:
        _native.select_isa(isa)
        assert worst_difference(*both(policy, MIXED)) < 1e-5, isa


def test_log_probs_of_sampling_are_those_of_the_training_pass(native_family):
    policy = policy_of(FAMILIES[native_family]())
    assert native.plan(policy).reason is None
    drawn = rollout(policy, PROMPTS, MIXED, num_generations=3, sampling=SamplingParams(12, 0.8), seed=5)
    scored = score(policy, drawn, MIXED, temperature=0.8, outputs=("logprob",)).logprob
    assert (scored - drawn.logprobs).abs().max() < 1e-5


def test_the_same_seeds_give_the_same_tokens_either_way(monkeypatch):
    policy = policy_of(FAMILIES["qwen2"]())
    drawn = {}
    for way in ("native", "torch"):
        monkeypatch.setenv(trials.SWITCH, way)
        drawn[way] = rollout(policy, PROMPTS, MIXED, num_generations=8, sampling=SamplingParams(20), seed=3)
    assert drawn["native"].token_lists() == drawn["torch"].token_lists()


@pytest.mark.parametrize("max_rows", [None, 16])
@pytest.mark.parametrize("cut", [{}, {"top_k": 9, "top_p": 0.9, "min_p": 0.01}, {"temperature": 0.0}])
def test_what_is_written_without_python_is_what_is_drawn_token_by_token(monkeypatch, max_rows, cut):
    policy, drawn = policy_of(FAMILIES["llama"]()), {}
    for watched in (False, True):
        monkeypatch.setattr(Rows, "reads_text", watched)
        sampling = SamplingParams(16, **{"temperature": 1.3, **cut})
        drawn[watched] = rollout(
            policy, PROMPTS, MIXED, num_generations=8, sampling=sampling, seed=3, max_rows=max_rows
        )
    alone, watched = drawn.values()
    assert cut or alone.lengths.min() < alone.lengths.max() == 16  # some end, at different places
    for name in ("completion_ids", "completion_mask", "logprobs", "terminated"):
        assert torch.equal(getattr(alone, name), getattr(watched, name)), name


def test_logits_that_are_not_finite_are_said_to_be_so():
    policy = policy_of(FAMILIES["llama"]())
    assert native.plan(policy).reason is None
    with torch.no_grad():
        next(p for n, p in policy.adapter_parameters().items() if n.endswith("lora_b")).fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        rollout(policy, PROMPTS, MIXED, num_generations=2, sampling=SamplingParams(16))


def test_an_interrupt_ends_a_rollout_between_two_tokens():
    policy = policy_of(LlamaConfig(**_SMALL | {"max_position_embeddings": 4096}))
    policy.model.generation_config.eos_token_id = policy.model.config.eos_token_id = None
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            rollout(policy, PROMPTS, MIXED, num_generations=64, sampling=SamplingParams(4000))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_row_has_the_same_bits_whatever_else_is_in_the_batch_and_on_any_number_of_threads():
    policy = policy_of(FAMILIES["mistral"]())
    tokens = torch.randint(3, VOCAB, (24, 12), generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()

    @torch.no_grad()
    def steps(rows, threads, group=3, prompts=PROMPTS, conditions=MIXED):
        ours, _ = both(policy, conditions, group, prompts=prompts)
        ours.add_all()
        torch.set_num_threads(threads)
        return torch.stack([ours.step(t[rows].contiguous()).clone() for t in tokens])

    try:
        torch.set_num_threads(1)
        together = steps(slice(0, 12), 1)
        assert torch.equal(steps(slice(0, 12), 2), together)
    finally:
        torch.set_num_threads(before)
    # Rows 9 to 11 alone; prefill, by transformers, is the same for one prompt of this length up to rounding.
    alone = steps(slice(9, 12), 1, prompts=PROMPTS[3:], conditions=MIXED[3:])
    torch.testing.assert_close(alone, together[:, 9:12], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_and_prompts_may_join_later():
    policy = policy_of(FAMILIES["gemma2"]())
    ours, _ = both(policy, MIXED, 2)
    ours.add_all()
    decoding = ours._decoding
    first = torch.tensor([5, 9, 11, 20, 33, 40, 50, 60])
    one = decoding.step(first).clone()
    decoding.keep(torch.tensor([0, 1, 6]))
    decoding.add(torch.tensor([1, 3]))
    assert len(decoding) == 5
    two = decoding.step(torch.tensor([7, 8, 9, first[2], first[6]]))
    # A row that joins says what the first of its prompt said.
    torch.testing.assert_close(two[3:], one[[2, 6]], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="free slots"):
        decoding.add(torch.zeros(4, dtype=torch.long))


def test_plans_are_kept_until_the_weights_change():
    policy = policy_of(FAMILIES["llama"]())
    made = native.plan(policy)
    assert native.plan(policy) is made
    with torch.no_grad():
        policy.model.model.norm.weight.mul_(2.0)
    again = native.plan(policy)
    assert again is not made and again.reason is None
    assert worst_difference(*both(policy, MIXED)) < 1e-5
    copy.deepcopy(policy)


def test_new_factors_are_seen_by_the_next_rollout():
    policy = policy_of(FAMILIES["llama"]())
    native.plan(policy)
    with torch.no_grad():
        for parameter in policy.adapter_parameters().values():
            parameter.data.mul_(-1.5)
    assert worst_difference(*both(policy, MIXED)) < 1e-5


def reason_of(policy) -> str:
    made = native.plan(policy)
    assert made.packed is None
    return made.reason


def test_models_it_cannot_take_are_said_to_be_so():
    assert "Llama" in reason_of(build_policy("gpt2"))
    assert "encoder-decoder" in reason_of(build_policy("t5"))
    assert "InterpolatedLinear" in reason_of(build_policy("llama", conditioning="attention"))
    assert native.plan(build_policy("llama", conditioning="full")).reason
    dynamic = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
    assert "dynamic" in reason_of(policy_of(LlamaConfig(**_SMALL, rope_parameters=dynamic)))
    assert "activation" in reason_of(policy_of(LlamaConfig(**_SMALL, hidden_act="relu")))
    half = ConditionedPolicy.from_pretrained(build_model("llama").half(), ("a", "b"), rank=4)
    assert "float16" in reason_of(half)
    hooked = build_policy("llama")
    assert native.plan(hooked).reason is None
    handle = hooked.model.model.layers[0].register_forward_hook(lambda *_: None)
    assert "hooks" in reason_of(hooked)
    handle.remove()
    assert native.plan(hooked).reason is None


def test_a_model_that_only_looks_like_llama_is_found_out():
    policy = build_policy("llama")

    class Attention(type(policy.model.model.layers[1].self_attn)):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            return output * 1.01, weights

    policy.model.model.layers[1].self_attn.__class__ = Attention
    assert "computes something else" in reason_of(policy)


def test_weights_that_are_gathered_for_a_pass_leave_the_modules_alone(monkeypatch):
    policy = build_policy("llama")
    policy.weights_stay = False
    request = DecoderRequest(policy, blended=False, longest=2, group=1, room=2, at_once=1)
    assert isinstance(step_decoder(request), ModulesDecoder)
    assert "the base model is sharded" in detours(policy)[0]
    monkeypatch.setenv(trials.SWITCH, "native")
    with pytest.raises(ConfigError, match="native: .*sharded"):
        step_decoder(request)


def test_the_switch_and_what_a_policy_says_of_it(monkeypatch):
    plain = build_policy("gpt2")
    assert native.choose(plain) is None
    assert "goes through transformers' modules" in detours(plain)[0]
    assert not detours(build_policy("llama"))
    monkeypatch.setenv(trials.SWITCH, "native")
    with pytest.raises(ConfigError, match="native"):
        native.choose(plain)
    monkeypatch.setenv(trials.SWITCH, "torch")
    assert native.choose(build_policy("llama")) is None
    monkeypatch.setenv(trials.SWITCH, "fast")
    with pytest.raises(ConfigError, match="expected torch, native or auto"):
        native.choose(plain)
