"""The running batch: a row's tokens are those it gets alone, whoever joins and leaves, and no row is lost."""

import contextlib
import gc
import random
import threading
import weakref

import pytest
import torch
from engine.conftest import build_policy, build_tokenizer
from later import later

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.core.seeds import derive
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.engines import choice
from clp_engine.rollouts.engines.cuda_graphs import GraphDecoder
from clp_engine.rollouts.engines.modules import ApartDecoder
from clp_engine.rollouts.engines.native import NativeDecoder
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.types import SamplingParams
from clp_engine.serving import batching
from clp_engine.serving.batching import Full, Row, RunningBatch
from clp_engine.serving.stream_text import StreamText

SAMPLINGS = [
    SamplingParams(7, temperature=0.0),
    SamplingParams(12, temperature=0.7, top_k=5),
    SamplingParams(3, top_p=0.8),
    SamplingParams(20, temperature=1.3, top_k=40, top_p=0.9, min_p=0.01),
    SamplingParams(16),
]


def running(policy, **options):
    return RunningBatch(policy, **{"max_rows": 5, "queue": 100, "longest": 40, "room": 24, **options})


def row(policy, ids, weights, sampling, seed=0, top=0, stop=()):
    """A row, and the list of its events."""
    conditions = (
        Conditions.reference(1, len(policy.objectives)) if weights is None else policy.conditions(weights)
    )
    blend, events = policy.coefficients(conditions), []
    blend = torch.zeros(policy.deltas) if blend is None else blend[0]
    text = StreamText(policy.tokenizer, stop)
    return Row(ids, blend, sampling, int(derive(seed, 0)), text, events.append, top), events


def orders(policy, count, seed=0):
    """Rows of many weightings, lengths and samplings, some of the base model's."""
    draw = random.Random(seed)
    for i in range(count):
        ids = [draw.randrange(3, 60) for _ in range(draw.randrange(1, 40))]
        share = draw.random()
        yield ids, None if i % 5 == 0 else [share, 1 - share], SAMPLINGS[i % len(SAMPLINGS)], i


def run(batch):
    batch.stop()
    batch.work()


@pytest.mark.parametrize(
    ("name", "decoder", "options"),
    [
        ("llama", NativeDecoder, {}),
        ("gpt2", ApartDecoder, {}),
        ("llama", GraphDecoder, {}),
        *later(("gemma2", NativeDecoder, {}), ("t5", ApartDecoder, {})),
        *later(("qwen2", ApartDecoder, {"conditioning": "full"})),
    ],
)
def test_each_row_gets_the_bits_it_gets_alone(name, decoder, options, monkeypatch):
    policy = build_policy(name, **options)
    if decoder is GraphDecoder:
        monkeypatch.setattr(batching, "step_decoder", GraphDecoder)
    batch = running(policy)
    together = [row(policy, *order) for order in orders(policy, 24)]
    batch.submit([r for r, _ in together])
    run(batch)
    assert type(batch._decoder) is decoder
    for order, (_, events) in zip(orders(policy, 24), together):
        ids, weights, sampling, seed = order
        alone = running(policy)
        one, expected = row(policy, *order)
        alone.submit([one])
        run(alone)
        assert [(e.token, e.text) for e in events] == [(e.token, e.text) for e in expected]
        if decoder is not GraphDecoder:  # its place in a CPU's matrix product decides how a row is summed
            assert [e.logprob for e in events] == [e.logprob for e in expected]
        conditions = (
            Conditions.reference(1, len(policy.objectives)) if weights is None else policy.conditions(weights)
        )
        drawn = rollout(policy, [ids], conditions, sampling=sampling, seed=seed)
        assert drawn.token_lists() == [[e.token for e in events]]
        assert (events[-1].finish == "stop") == bool(drawn.terminated[0])
        torch.testing.assert_close(
            torch.tensor([e.logprob for e in events]), drawn.logprobs[0], rtol=1e-4, atol=1e-4
        )


def test_the_weightings_of_that_test_say_different_things():
    policy = build_policy("llama")
    said = {
        tuple(map(tuple, rollout(policy, [[5, 6, 7]], policy.conditions(w), seed=3).token_lists()))
        for w in ([1, 0], [0.5, 0.5], [0, 1])
    }
    assert len(said) == 3


def test_a_row_that_comes_later_joins_at_the_next_token_and_leaves_alone():
    policy = build_policy("llama")
    batch, long = running(policy), SamplingParams(20, temperature=0.0)
    policy.model.generation_config.eos_token_id = None
    first, events = row(policy, [5, 6, 7], [1, 0], long)
    late, late_events = row(policy, [8], [0, 1], SamplingParams(2, temperature=0.0))
    deliver = first.deliver
    first.deliver = lambda event: (deliver(event), len(events) == 3 and batch.submit([late]))
    batch.submit([first])
    seen = []
    late.deliver = lambda event: (late_events.append(event), seen.append(len(events)))
    threading.Timer(0.5, batch.stop).start()
    batch.work()
    assert len(events) == 20 and len(late_events) == 2
    assert seen == [4, 5]


def test_prompts_leave_no_memory_behind():
    policy = build_policy("llama")
    batch = running(policy, queue=300)
    batch.submit([row(policy, *order)[0] for order in orders(policy, 200)])
    run(batch)
    decoding = batch._decoder._decoding
    assert len(decoding._prompts) <= 5 and all(prompt is None for prompt in decoding._prompts)


def test_a_cancelled_row_frees_its_place_and_hears_nothing_more():
    policy = build_policy("llama")
    policy.model.generation_config.eos_token_id = None
    batch = running(policy, max_rows=1)
    gone, events = row(policy, [5], [1, 0], SamplingParams(24))
    never, no_events = row(policy, [5], [1, 0], SamplingParams(24))
    after, later_events = row(policy, [6], [1, 0], SamplingParams(3))
    deliver = gone.deliver
    gone.deliver = lambda event: (deliver(event), len(events) == 2 and batch.cancel([gone, never]))
    batch.submit([gone, never, after])
    run(batch)
    assert len(events) == 2 and not no_events and later_events[-1].finish
    assert batch.running == batch.waiting == 0


def test_a_full_queue_takes_none_of_a_request():
    policy = build_policy("llama")
    batch = running(policy, queue=3)
    batch.submit([row(policy, *order)[0] for order in orders(policy, 2)])
    with pytest.raises(Full, match="2 completions are waiting already; the queue holds 3"):
        batch.submit([row(policy, *order)[0] for order in orders(policy, 2)])
    assert batch.waiting == 2
    batch.stop()
    with pytest.raises(Full, match="stopping"):
        batch.submit([])


def test_an_error_ends_the_rows_it_met_and_the_batch_goes_on():
    policy = build_policy("llama")
    batch = running(policy)
    wrong, events = row(policy, [5], [1, 0], SamplingParams(3))
    wrong.blend = torch.zeros(7)  # no blend of this policy
    right, right_events = row(policy, [5], [1, 0], SamplingParams(3))
    batch.submit([wrong, right])
    run(batch)
    assert len(events) == 1 and "7 columns" in events[0].error and right_events[-1].finish
    batch = running(policy)
    broken, events = row(policy, [5], [1, 0], SamplingParams(9))
    after, right_events = row(policy, [5], [1, 0], SamplingParams(3))
    step = batching.sample_tokens

    def fail_once(*arguments, **options):
        if broken.drawn == 2:
            broken.drawn = 0
            batch.submit([after])
            raise RuntimeError("out of something")
        return step(*arguments, **options)

    batch.submit([broken])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batching, "sample_tokens", fail_once)
        threading.Timer(0.5, batch.stop).start()
        batch.work()
    assert (
        events[-1].error == "RuntimeError: out of something" and len(events) == 3 and right_events[-1].finish
    )


@contextlib.contextmanager
def working(batch):
    """The batch decodes in a thread, which ends with the block."""
    thread = threading.Thread(target=batch.work, daemon=True)
    thread.start()
    yield
    batch.stop()
    thread.join(20)
    assert not thread.is_alive()


def heard(events, count=1):
    """Wait for so many events."""
    for _ in range(2000):
        if len(events) >= count:
            return events
        threading.Event().wait(0.005)
    raise AssertionError(f"{len(events)} events came")


def test_a_prompt_that_is_no_tokens_ends_its_own_row_alone():
    policy = build_policy("llama")
    batch = running(policy)
    wrong, events = row(policy, [1, float("nan")], [1, 0], SamplingParams(3))
    right, right_events = row(policy, [5], [1, 0], SamplingParams(3))
    batch.submit([right, wrong])
    run(batch)
    assert len(events) == 1 and events[0].error and right_events[-1].finish


@pytest.mark.parametrize("fault", ["in the decoder", "behind it"])
def test_a_fault_with_half_a_row_in_the_decoder_ends_all_rows_that_run_and_no_later_one(fault):
    policy = build_policy("llama")
    policy.model.generation_config.eos_token_id = None
    batch = running(policy)
    first, first_events = row(policy, [5], [1, 0], SamplingParams(20))
    second, second_events = row(policy, [6], [1, 0], SamplingParams(20))
    third, third_events = row(policy, [7], [1, 0], SamplingParams(3))
    decoder, add = batch._decoder, batch._decoder.add

    def broken(ids, *arguments):
        logits = add(ids, *arguments)
        if ids[0, 0] != 6:
            return logits
        if fault == "behind it":
            return logits[:, :-1]  # cannot be put beside those of the others
        raise RuntimeError("out of something")

    decoder.add = broken
    batch.submit([first, second, third])
    run(batch)
    assert len(first_events) == len(second_events) == 1
    assert first_events[0].error and second_events[0].error
    assert batch._decoder is not decoder and third_events[-1].finish


def test_a_decoder_that_cannot_be_made_ends_the_start_or_the_rows_that_wait(monkeypatch):
    policy, made = build_policy("llama"), batching.step_decoder

    def broken(request):
        raise RuntimeError("no memory for buffers")

    monkeypatch.setattr(batching, "step_decoder", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        running(policy)
    monkeypatch.setattr(batching, "step_decoder", made)
    batch = running(policy)
    rows = [row(policy, [5], [1, 0], SamplingParams(3)) for _ in range(3)]
    batch._decoder = None  # as an error of a step leaves it
    monkeypatch.setattr(batching, "step_decoder", broken)
    with working(batch):
        batch.submit([one for one, _ in rows])
        assert [heard(events)[0].error for _, events in rows] == ["RuntimeError: no memory for buffers"] * 3
        monkeypatch.setattr(batching, "step_decoder", made)
        late, late_events = row(policy, [5], [1, 0], SamplingParams(3))
        batch.submit([late])
        assert heard(late_events)[0].error is None


def test_an_error_leaves_nothing_of_the_decoder_that_it_met(monkeypatch):
    policy = build_policy("llama")
    batch = running(policy)
    one, events = row(policy, [5], [1, 0], SamplingParams(3))
    old = weakref.ref(batch._decoder)

    def broken(self, tokens):
        raise RuntimeError("out of something")

    monkeypatch.setattr(type(batch._decoder), "step", broken)
    with working(batch):
        batch.submit([one])
        assert heard(events, 2)[1].error == "RuntimeError: out of something"
        while batch.running:
            threading.Event().wait(0.005)
        gc.collect()
        assert old() is None


def test_rows_that_wait_leave_the_queue_as_soon_as_they_are_cancelled():
    policy = build_policy("llama")
    batch = running(policy, queue=4)
    gone, stays = ([row(policy, [5], [1, 0], SamplingParams(3)) for _ in range(2)] for _ in range(2))
    batch.submit([one for one, _ in gone + stays])
    batch.cancel([one for one, _ in gone])
    assert batch.waiting == 2
    batch.submit([row(policy, [5], [1, 0], SamplingParams(3))[0] for _ in range(2)])
    run(batch)
    assert all(not events for _, events in gone) and all(events[-1].finish for _, events in stays)


def test_the_likeliest_tokens_are_those_of_the_distribution_that_is_drawn_from():
    policy = build_policy("llama")
    asked, events = row(policy, [5, 6], [0.3, 0.7], SamplingParams(4, temperature=0.5), top=5)
    batch = running(policy)
    batch.submit([asked])
    run(batch)
    for event in events:
        assert len(event.top) == 5 and [p for _, p in event.top] == sorted(
            (p for _, p in event.top), reverse=True
        )
        if event.token in dict(event.top):
            assert dict(event.top)[event.token] == pytest.approx(event.logprob, abs=1e-5)
    assert any(event.token in dict(event.top) for event in events)


def test_a_model_without_steps_is_refused():
    policy = build_policy("llama")
    assert choice.detours(policy) == []
    policy.backbone.shares_prompts = False
    policy.backbone.packing_fault = "why"
    with pytest.raises(ConfigError, match="cannot be served"):
        running(policy)


# --- text ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers():
    return [build_tokenizer(), ConditionedPolicy.from_pretrained("docsum", ["a", "b"], rank=2).tokenizer]


def streamed(tokenizer, tokens, stop=()):
    text, pieces = StreamText(tokenizer, stop), []
    for token in tokens:
        piece, stopped = text.push(token)
        pieces.append(piece)
        if stopped:
            break
    return [*pieces, text.rest()]


def test_the_pieces_of_a_text_are_the_text(tokenizers):
    draw = random.Random(0)
    for tokenizer in tokenizers:
        for _ in range(40):
            tokens = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(1, 30))]
            assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)
        tokens = tokenizer("Zürich 東京 \U0001f600 w1 w2").input_ids
        assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_text_ends_before_the_first_stop_string(tokenizers):
    draw, tokenizer, cut = random.Random(1), tokenizers[1], 0
    for _ in range(60):
        tokens = [draw.randrange(3, len(tokenizer)) for _ in range(20)]
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        at = draw.randrange(len(whole) - 3)
        stop = [whole[at : at + draw.randrange(1, 4)], "never"]
        expected = whole[: whole.find(stop[0])]
        pieces = streamed(tokenizer, tokens, stop)
        if "\ufffd" not in whole:
            assert "".join(pieces) == expected
            cut += 1
        assert stop[0] not in "".join(pieces)
    assert cut > 5


def test_the_beginning_of_a_stop_string_waits_for_its_end(tokenizers):
    tokenizer = tokenizers[0]
    tokens = tokenizer("w1 w2 w3").input_ids
    assert streamed(tokenizer, tokens, ["w2 w4"]) == ["w1", " ", "w2 w3", ""]
    assert streamed(tokenizer, tokens, ["w2 w3"]) == ["w1", " ", "", ""]
    assert streamed(tokenizer, tokens[:2], ["w2 w3"]) == ["w1", " ", "w2"]
