"""Decoding over fixed slots says what decoding over caches says: the step that is captured on a GPU, run as it is."""

import pytest
import torch
from clp_kernels import use_backend
from engine.conftest import CAUSAL, COMPOSITE, build_model, build_policy, build_tokenizer
from later import later

from clp_engine.core.conditions import Conditions
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.engines import choice, cuda_graphs, fused_step, slots
from clp_engine.rollouts.engines.base import DecoderRequest
from clp_engine.rollouts.engines.cuda_graphs import GraphDecoder
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.rows import Rows
from clp_engine.rollouts.types import SamplingParams, pad_left

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32, 33], [40, 41]]
MIXED = Conditions(
    torch.tensor([[0.0, 0.0], [0.4, 0.6], [1.0, 0.0], [0.2, 0.8], [0.5, 0.5]]), torch.full((5,), 0.1)
)


@pytest.fixture
def with_slots(monkeypatch):
    """Rollouts decode over slots, as on a GPU."""

    def use():
        monkeypatch.setattr(choice, "step_decoder", GraphDecoder)

    return use


@pytest.fixture
def fused(monkeypatch):
    """Steps of slots are fused, as on a GPU, where the policy's can be."""

    def decoder(request):
        return GraphDecoder(request, cuda_graphs.choose(request.model))

    monkeypatch.setattr(choice, "step_decoder", decoder)


FUSED = sorted({*CAUSAL, *COMPOSITE} - {"gpt2"})


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")
@pytest.mark.parametrize("name", ["qwen2", *later(*sorted(set(FUSED) - {"qwen2"}))])
def test_a_fused_step_says_what_transformers_modules_say(name, request):
    pytest.importorskip("triton")
    policy = build_policy(name)
    # A window of 6 and completions that outgrow it; prompts that leave at different times.
    options = {"num_generations": 2, "sampling": SamplingParams(9), "seed": 3, "max_rows": 6}
    expected = rollout(policy, PROMPTS, MIXED, **options)
    request.getfixturevalue("fused")
    calls, logits = [], fused_step.logits
    request.getfixturevalue("monkeypatch").setattr(
        fused_step, "logits", lambda *arguments: calls.append(1) or logits(*arguments)
    )
    drawn = rollout(policy, PROMPTS, MIXED, **options)
    assert cuda_graphs.plan(policy).reason is None and calls
    assert drawn.token_lists() == expected.token_lists()
    torch.testing.assert_close(drawn.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)


def test_what_a_fused_step_cannot_serve_says_why(monkeypatch):
    pytest.importorskip("triton")
    assert "embed_tokens" in cuda_graphs.plan(build_policy("gpt2")).reason
    policy = build_policy("qwen2")
    policy.backbone.decoder.layers[0].register_forward_hook(lambda *_: None)
    assert "forward hooks" in cuda_graphs.plan(policy).reason and cuda_graphs.choose(policy) is None
    for switch in ("use_backend", "environment"):
        policy = build_policy("qwen2")
        if switch == "environment":
            monkeypatch.setenv("CLP_ENGINE_DECODING", "torch")
        with use_backend("reference" if switch == "use_backend" else "auto"):
            assert cuda_graphs.choose(policy) is None


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")
def test_a_fused_step_that_computes_something_else_is_not_used(monkeypatch):
    pytest.importorskip("triton")
    gated = pytest.importorskip("clp_kernels.triton_kernels.decode_step").gated
    monkeypatch.setattr(
        "clp_kernels.triton_kernels.decode_step.gated",
        lambda gate, up, activation: gated(gate, up, "gelu_tanh"),
    )
    assert "computes something else" in cuda_graphs.plan(build_policy("qwen2")).reason


def test_a_fused_step_whose_kernels_do_not_fit_is_not_used(monkeypatch):
    errors = pytest.importorskip("triton.runtime.errors")

    def read(*_):
        raise errors.OutOfResources(300_000, 232_448, "shared memory")  # no RuntimeError

    monkeypatch.setattr(fused_step, "read", read)
    assert "shared memory" in cuda_graphs.plan(build_policy("qwen2")).reason


@pytest.mark.parametrize("name", [*sorted(CAUSAL), *later(*sorted(COMPOSITE))])
@pytest.mark.parametrize("max_rows", [None, 6])
def test_slots_say_what_caches_say(name, max_rows, with_slots):
    policy = build_policy(name)
    assert cuda_graphs.serves(policy)
    options = {"num_generations": 3, "sampling": SamplingParams(30), "seed": 3, "max_rows": max_rows}
    expected = rollout(policy, PROMPTS, MIXED, **options)
    with_slots()
    drawn = rollout(policy, PROMPTS, MIXED, **options)
    assert drawn.token_lists() == expected.token_lists()
    torch.testing.assert_close(drawn.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
    assert len(set(expected.lengths.tolist())) > 1  # rows have left at different times


SAMPLINGS = [
    SamplingParams(12, temperature=0.0),
    SamplingParams(12, temperature=0.7, top_k=5),
    SamplingParams(12, top_p=0.8),
    SamplingParams(12, temperature=1.3, top_k=40, top_p=0.9, min_p=0.01),
]


def test_slots_draw_with_every_option(with_slots, monkeypatch):
    policy, begun = build_policy("qwen2"), [[7], [], [9, 3], [1, 2, 3], []]

    def drawn(sampling):
        options = {"sampling": sampling, "seed": 5}
        return [
            rollout(policy, PROMPTS, MIXED, num_generations=2, max_rows=4, **options),
            rollout(policy, PROMPTS, MIXED, begun=begun, **options),
        ]

    expected = [drawn(sampling) for sampling in SAMPLINGS]
    with_slots()
    monkeypatch.setattr(Rows, "draw", None)  # the decoder draws
    for sampling, of_caches in zip(SAMPLINGS, expected):
        for e, d in zip(of_caches, drawn(sampling), strict=True):
            assert d.token_lists() == e.token_lists()
            assert torch.equal(d.terminated, e.terminated) and torch.equal(
                d.completion_mask, e.completion_mask
            )
            torch.testing.assert_close(d.logprobs, e.logprobs, rtol=1e-4, atol=1e-4)


def test_slots_step_where_a_text_ends_a_row(with_slots):
    policy = ConditionedPolicy.from_pretrained("docsum", ["a", "b"])
    prompts = [policy.tokenizer(t).input_ids for t in ("Return the number of", "Read a file and")]
    options = {"num_generations": 4, "seed": 1, "conditions": MIXED[:2]}
    options["sampling"] = SamplingParams(16, stop_strings=("the", "a "))
    expected = rollout(policy, prompts, **options)
    with_slots()
    drawn = rollout(policy, prompts, **options)
    assert drawn.token_lists() == expected.token_lists() and 0 < expected.terminated.sum() < 8


def test_each_kind_of_step_has_graphs_of_its_own(with_slots):
    policy = build_policy("qwen2")
    with_slots()
    for sampling in SAMPLINGS[1:3]:
        rollout(policy, PROMPTS, MIXED, sampling=sampling)
        cuda_graphs._SLOTS[policy].graphs["of"] = sampling
    for sampling, kept in (
        (SAMPLINGS[1], True),
        (SamplingParams(9, temperature=2.0, top_k=3), True),
        (SAMPLINGS[3], False),
    ):
        rollout(policy, PROMPTS, MIXED, sampling=sampling)
        # Another temperature or k is another number in the same buffers.
        assert (cuda_graphs._SLOTS[policy].graphs.get("of") == SAMPLINGS[1]) == kept


def test_a_conditioned_output_projection_and_the_base_model_decode_over_slots(with_slots):
    policy = build_policy("llama", conditioning="lora+logit")
    reference = Conditions.reference(5, 2)
    expected = [rollout(policy, PROMPTS, c, sampling=SamplingParams(8), seed=1) for c in (MIXED, reference)]
    with_slots()
    for conditions, e in zip((MIXED, reference), expected, strict=True):
        assert rollout(policy, PROMPTS, conditions, sampling=SamplingParams(8), seed=1).token_lists() == (
            e.token_lists()
        )


def test_groups_move_together_when_others_leave(with_slots, monkeypatch):
    policy, counts = build_policy("qwen2"), []
    run = GraphDecoder._run

    def counted(self, count):
        counts.append(count)
        return run(self, count)

    monkeypatch.setattr(GraphDecoder, "_run", counted)
    with_slots()
    rollout(policy, PROMPTS, MIXED, num_generations=2, sampling=SamplingParams(60), seed=1)
    assert counts[0] == 5 and counts[-1] < 5 and counts == sorted(counts, reverse=True)


def test_slots_are_kept_for_the_next_rollout_and_graphs_for_the_same_parameters(with_slots):
    policy = build_policy("qwen2")
    with_slots()
    rollout(policy, PROMPTS, MIXED, sampling=SamplingParams(4))
    kept = cuda_graphs._SLOTS[policy]
    kept.graphs["kept"] = None
    rollout(policy, PROMPTS[:3], MIXED[:3], sampling=SamplingParams(9))
    assert cuda_graphs._SLOTS[policy] is kept and "kept" in kept.graphs
    parameter = next(iter(policy.adapter_parameters().values()))
    parameter.data = parameter.data.clone()
    rollout(policy, PROMPTS, MIXED, sampling=SamplingParams(4))
    assert cuda_graphs._SLOTS[policy] is kept and not kept.graphs
    rollout(policy, PROMPTS, MIXED, sampling=SamplingParams(slots.ROUND + 1))
    assert cuda_graphs._SLOTS[policy] is not kept


def test_factors_are_converted_once_for_a_rollout_and_anew_for_the_next(with_slots):
    policy = ConditionedPolicy.from_pretrained(
        build_model("qwen2").bfloat16(), ["a", "b"], tokenizer=build_tokenizer("qwen2"), rank=4
    )
    parameters = [p for n, p in policy.adapter_parameters().items() if n.endswith("lora_b")]
    assert {p.dtype for p in parameters} == {torch.float32}

    def scale(by):
        with torch.no_grad():
            for p in parameters:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(1)).mul_(by)

    def logits(meanwhile=None):
        ids, mask = pad_left(PROMPTS, 0, policy.device)
        decoding = GraphDecoder(DecoderRequest(policy, True, ids.shape[1], 1, 4, 5))
        decoding.add(ids, mask, policy.coefficients(MIXED))
        if meanwhile is not None:
            scale(meanwhile)
        return decoding.step(torch.arange(5))

    scale(1)
    before = logits()
    assert torch.equal(logits(meanwhile=3), before)  # the step reads the copies, not the parameters
    after = logits()
    assert not torch.equal(after, before)
    del cuda_graphs._SLOTS[policy]
    assert torch.equal(after, logits())


def test_whole_weights_and_models_with_attention_of_their_own_are_not_served():
    assert not cuda_graphs.serves(build_policy("qwen2", conditioning="full"))
    assert not cuda_graphs.serves(build_policy("t5"))
