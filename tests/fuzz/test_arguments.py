"""Settings, rows and conditions that hypothesis chooses: taken with finite numbers, or refused with a ConfigError, never else.

The numeric ops have their suite in tests/kernels/test_properties.py. The examples are the same in every run; CLP_EXPLORE=20
takes new ones instead, twenty times as many.
"""

import dataclasses
import math
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

sys.path.append(str(Path(__file__).parents[1]))
from engine.conftest import build_model, build_tokenizer  # noqa: E402

from clp_engine.core import ranges  # noqa: E402
from clp_engine.core.errors import ConfigError  # noqa: E402
from clp_engine.data.positions import Room  # noqa: E402
from clp_engine.data.prompts import PromptDataset  # noqa: E402
from clp_engine.policy.policy import ConditionedPolicy  # noqa: E402
from clp_engine.rollouts.types import SamplingParams  # noqa: E402
from clp_engine.serving.requests import GenerateRequest  # noqa: E402
from clp_engine.training.settings.config import CLPConfig  # noqa: E402

pytestmark = pytest.mark.check
EXPLORE = int(os.environ.get("CLP_EXPLORE", "0"))


def examples(count, *strategies):
    """The test over `count` examples of the strategies; a failure is told in ASCII, as pytest-xdist sends no surrogate."""
    chosen = settings(max_examples=count * max(EXPLORE, 1), derandomize=not EXPLORE, database=None, deadline=None,
                      suppress_health_check=list(HealthCheck))  # fmt: skip

    def decorate(test):
        run = chosen(given(*strategies)(test))

        def told():
            try:
                run()
            except Exception as error:
                text = "".join(traceback.format_exception(error))
                pytest.fail(text.encode("ascii", "backslashreplace").decode(), pytrace=False)

        told.__name__ = test.__name__
        return told

    return decorate


ODD_NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 10**30, -(10**400), 0.0, -0.0, 0.5, 1e-300, 1e308, math.nan, math.inf, -math.inf]
)
TEXTS = st.one_of(
    st.sampled_from(["", "a", "nan", "1e999", "1e-4", "none", "{}", "[", "\x00", "\ud800"]),
    st.text(max_size=5),
)
PLAIN = st.one_of(st.none(), st.booleans(), ODD_NUMBERS, st.integers(), st.floats(), TEXTS)
ANYTHING = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
FIELDS = [f.name for f in dataclasses.fields(CLPConfig)]


def finite(value):
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@examples(1500, st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=1, max_size=2))
def test_settings(values):
    try:
        config = CLPConfig(**values)
    except ConfigError as error:
        assert str(error) and len(str(error)) < 2000
        return
    taken = config.to_dict()
    assert all(finite(taken[name]) for name in FIELDS if name in ranges.TRAINING)
    assert finite([config.default_kl, config.reward_scale, config.batch_size])


OPTIONS = {f.name: ANYTHING for f in dataclasses.fields(GenerateRequest) if f.name != "text"}
REQUESTS = st.fixed_dictionaries({"text": TEXTS | ANYTHING}, optional=OPTIONS)


@examples(
    300, st.fixed_dictionaries({}, optional={f.name: ANYTHING for f in dataclasses.fields(SamplingParams)})
)
def test_sampling(values):
    try:
        taken = SamplingParams(**values)
    except ConfigError:
        return
    assert finite(list(dataclasses.asdict(taken).values()))


@examples(500, ANYTHING | REQUESTS)
def test_requests(raw):
    try:
        taken = GenerateRequest.parse(raw)
    except ConfigError:
        return
    assert finite(dataclasses.asdict(taken))


MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": TEXTS, "content": TEXTS | ANYTHING}), max_size=2
)
ROW = st.fixed_dictionaries({"prompt": st.one_of(TEXTS, MESSAGES, ANYTHING)}, optional={"x": ANYTHING})
ROWS = st.lists(ROW | ANYTHING, max_size=3)
TOKENIZER = build_tokenizer()


@examples(500, ROWS, st.sampled_from([None, 1, 4]), st.booleans())
def test_rows(rows, longest, skip):
    try:
        data = PromptDataset(rows, TOKENIZER, longest, skip)
        batch = data.batch(range(len(data)))
    except ConfigError as error:
        assert str(error).encode() and len(str(error)) < 2000
        return
    assert len(batch.token_ids) == len(data) > 0
    assert all(ids and (longest is None or len(ids) <= longest) for ids in batch.token_ids)


@examples(200, st.integers(1, 9), st.integers(0, 10**6), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_positions_name_every_row_once_an_epoch(rows, start, count, seed):
    """The stream of positions, in any pieces, is one order of all rows after another."""
    data = PromptDataset([{"prompt": f"w{i}"} for i in range(rows)], TOKENIZER)
    first = start // rows * rows
    whole = data.indices(first, start - first + count + rows, seed, True)
    assert whole[start - first :][:count] == data.indices(start, count, seed, True)
    assert all(
        sorted(whole[at : at + rows]) == list(range(rows)) for at in range(0, len(whole) - rows + 1, rows)
    )


@examples(200, st.none() | st.integers(1, 50), st.integers(0, 60), st.integers(1, 60), st.booleans())
def test_room_for_a_prompt_and_its_completion(tokens, prompt, new, apart):
    fits = tokens is None or (max(prompt, new) if apart else prompt + new) <= tokens
    try:
        Room(tokens, "a table", apart).check(prompt, new)
    except ConfigError:
        assert not fits
    else:
        assert fits


POLICIES = [
    ConditionedPolicy.from_pretrained(build_model("llama"), ["a", "b"], **options)
    for options in ({}, {"kl_is_beta": True}, {"kl_conditioning": "odds", "min_kl": 0.1})
]
WEIGHTS = st.one_of(
    ANYTHING, st.lists(st.floats(0, 1), min_size=2, max_size=2), st.dictionaries(st.sampled_from("abc"), PLAIN, max_size=2),
    st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=2), max_size=3),
)  # fmt: skip


KLS = st.one_of(st.none(), PLAIN, st.lists(PLAIN, max_size=3))


@examples(1000, st.sampled_from(POLICIES), WEIGHTS, KLS, st.sampled_from([1, 2]))
def test_conditions(policy, weights, kl, rows):
    try:
        taken = policy.conditions(weights, kl, rows)
    except ConfigError as error:
        assert str(error) and len(str(error)) < 2000
        return
    assert taken.weights.shape == (rows, 2) and taken.kl.shape == (rows,)
    assert taken.kl.isfinite().all() and (taken.weights >= 0).all()
    torch.testing.assert_close(taken.weights.sum(-1), torch.ones(rows))
