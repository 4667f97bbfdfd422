"""The prediction for several processes: its counts are those of real models and real exchanges, its limits are right."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from bench.step import scaling
from bench.step.scaling import GROUP, LARGE, MOST, SMALL, Machine
from clp_engine.rollouts.types import Rollout
from clp_engine.training.collecting.dealt import _on_host

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
QWEN = {"num_attention_heads": 28, "num_key_value_heads": 4}
LLAMA = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}


@pytest.mark.parametrize("shape, config", [(SMALL, Qwen2Config(**QWEN)), (LARGE, LlamaConfig(**LLAMA))])
def test_a_shape_has_the_weights_of_its_model(shape, config):
    """All but norms and biases."""
    config.hidden_size, config.intermediate_size = shape.width, shape.inner
    config.num_hidden_layers, config.vocab_size, config.tie_word_embeddings = 2, shape.vocabulary, False
    config.layer_types = ["full_attention"] * 2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert sum(p.numel() for p in matrices) == dataclasses.replace(shape, layers=2).weights
    projections = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    rank = scaling.OBJECTIVES * scaling.RANK
    adapters = rank * sum(m.in_features + m.out_features for m in projections)
    assert adapters == dataclasses.replace(shape, layers=2).adapters


def test_a_completion_is_exchanged_in_nine_bytes_a_place():
    rows, longest = 4, 50
    ids, mask = torch.ones(rows, longest, dtype=torch.long), torch.ones(rows, longest, dtype=torch.bool)
    prompt = torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    moved = _on_host(Rollout(*prompt, ids, mask, torch.zeros(rows, longest), mask[:, 0]))
    sizes = [
        t.numel() * t.element_size()
        for t in vars(moved).values()
        if isinstance(t, torch.Tensor) and t.shape == ids.shape
    ]
    assert sum(sizes) == 9 * rows * longest


def test_collectives_by_hand():
    machine = Machine(inside=100, between=10, hop_inside=1, hop_between=2, host=1000)
    assert machine.all_reduce(800, 1) == machine.all_gather(800, 1) == 0
    assert machine.all_reduce(800, 8) == 2 * (7 + 700 / 100)
    # Two nodes: the tree's one hop carries all of an eighth, the ring's one hop half of it.
    assert machine.all_reduce(800, 16) == 2 * (7 + 7 + min(2 + 50 / 10, 2 + 100 / 10))
    assert machine.all_gather(800, 16) == 7 + 7 + 2 + 400 / (8 * 10)
    assert machine.all_reduce(0, 512) == 2 * (7 + 6 * 2)  # 64 nodes: a tree


def test_decoding_reads_the_weights_for_each_token_and_what_was_read_before():
    machine = Machine(flops=1e30, hbm=1.0)
    read = 2 * SMALL.weights + 4 * SMALL.adapters
    assert scaling.decode([(0, 10)], SMALL, machine) == pytest.approx(10 * read + 50 * SMALL.cached)
    # The shorter row lengthens nothing; its keys and values are read, those of its prompt at each of its tokens.
    both = scaling.decode([(7, 4), (0, 10)], SMALL, machine)
    assert both == pytest.approx(10 * read + (50 + 4 * (7 + 2)) * SMALL.cached)


def test_a_phase_without_a_limit_is_a_whole_rollout():
    plain, cut = scaling.whole(4, 16), scaling.partial(4, 16, MOST)
    assert cut.phases == 1 and cut.stale == 0
    assert cut.rollout == pytest.approx(plain.rollout, rel=0.25)  # other draws
    short = scaling.partial(4, 16, 256)
    assert short.phases > 1 and 0 < short.stale < 1


def test_one_process_waits_for_nobody():
    step = scaling.whole(1, 4)
    assert step.idle == pytest.approx(0) and step.imbalance == 1 and step.tokens > 4 * GROUP


def test_more_processes_than_groups_wait():
    assert scaling.whole(8, 4).idle >= 0.5


def test_the_page_has_the_tables():
    assert scaling.report() in PAGE.read_text(encoding="utf-8")
