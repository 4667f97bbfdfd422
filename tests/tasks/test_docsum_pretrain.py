"""The recipe of DocSum's checkpoint, on a model of a few thousand parameters."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from clp_engine.tasks.docsum.corpus import Docstring, make_pairs, training_docstrings
from tools import docsum_pretrain as pretrain

RECIPE = pretrain.Recipe(
    vocab_size=400,
    hidden_size=32,
    intermediate_size=48,
    layers=1,
    heads=4,
    kv_heads=2,
    lm_steps=3,
    sft_steps=4,
    batch_tokens=512,
    warmup_steps=2,
    eval_every=2,
)


@pytest.fixture(scope="module")
def corpus():
    docs = [
        Docstring(
            f"m.get_{a}_{b}",
            f"Return the {a} of the {b} thing.",
            f"The {a} is what a {b} thing has. It is computed when it is asked for, never before.\n"
            f"{b} things are many, and each one of them was given its {a} by somebody.",
        )
        for a in ("size", "name", "colour", "weight", "age", "owner", "shape")
        for b in ("alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta", "lambda")
    ]
    pairs = make_pairs(docs)
    assert any(p.split == "validation" for p in pairs)
    return training_docstrings(docs, pairs), pairs


def test_loss_and_gradients_are_those_of_cross_entropy():
    torch.manual_seed(0)
    n = 2 * pretrain._WeightedLoss.CHUNK + 77
    hidden, matrix = torch.randn(n, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets, weights = torch.randint(0, 50, (n,)), torch.rand(n)
    loss = 3 * pretrain._WeightedLoss.apply(hidden, matrix, targets, weights, pretrain.loss_chunk)
    got = torch.autograd.grad(loss, (hidden, matrix))
    expected = (
        3 * (torch.nn.functional.cross_entropy(hidden @ matrix.T, targets, reduction="none") * weights).sum()
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, torch.autograd.grad(expected, (hidden, matrix)), rtol=1e-4, atol=1e-4)


def test_fast_hidden_states_are_those_of_the_library(corpus):
    tokenizer = pretrain.train_tokenizer(corpus[0], RECIPE.vocab_size)
    model = pretrain.make_model(dataclasses.replace(RECIPE, layers=2), tokenizer)
    for p in model.parameters():  # the initial weights are so small that a layer hardly matters
        p.data.mul_(4 if p.ndim > 1 else 1.5)
    tokens = torch.randint(0, len(tokenizer), (3, 70))
    exact = model.model(tokens)[0]
    error = (pretrain.hidden_states(model, tokens).float() - exact).norm()
    error_of_torch = (model.to(torch.bfloat16).model(tokens)[0].float() - exact).norm()
    assert error <= 1.5 * error_of_torch and error_of_torch < 0.05 * exact.norm()


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    rates = [pretrain.learning_rate(RECIPE, s) / RECIPE.learning_rate for s in range(RECIPE.steps + 1)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_examples(corpus):
    docs, pairs = corpus
    tokenizer = pretrain.train_tokenizer(docs, RECIPE.vocab_size)
    data = pretrain.Data(RECIPE, tokenizer, docs, pairs)
    item = data.pairs[0]
    example = data.summary_example(item, item.paragraphs, 0.0)
    text = tokenizer.decode(example.tokens)
    doc = next(d for d in docs if d.name.endswith(text.partition("\n")[0].split(".")[1]))
    assert text == f"{doc.name}\n{doc.document}<|summary|>{doc.summary}<|endoftext|>"
    weighed = [t for t, w in zip(example.tokens, example.weights, strict=True) if w]
    assert tokenizer.decode(weighed) == doc.summary + "<|endoftext|>"
    # the rows of a batch fit its budget, and no word of a held-out document is trained on
    held_out = {p.reference for p in pairs if p.split != "train"}
    for _, batch in data.batches(0):
        tokens, weights = data.tensors(batch)
        assert tokens.numel() <= RECIPE.batch_tokens and weights.shape == tokens.shape
        assert not (weights[tokens == data.pad]).any()
        assert not any(h in tokenizer.decode(row) for row in tokens for h in held_out)
    # the same stream from any position on
    tail = [(s, b) for s, b in data.batches(0) if s >= 5]
    assert tail == list(data.batches(5))


def test_an_interrupted_run_ends_bit_for_bit_as_an_undisturbed_one(corpus, tmp_path, monkeypatch):
    docs, pairs = corpus
    whole = pretrain.train(RECIPE, tmp_path / "whole", docs, pairs, resume=False)
    assert whole["step"] == RECIPE.steps

    evaluate, calls = pretrain.validation_loss, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt  # at step 6; the last saved state is that of step 4
        return evaluate(*arguments)

    monkeypatch.setattr(pretrain, "validation_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(RECIPE, tmp_path / "parts", docs, pairs, resume=True)
    monkeypatch.setattr(pretrain, "validation_loss", evaluate)
    parts = pretrain.train(RECIPE, tmp_path / "parts", docs, pairs, resume=True)

    for key in ("step", "best", "best_step", "tokens"):
        assert parts[key] == whole[key]
    for file in ("model.safetensors", "run/latest/model.safetensors", "run/latest/optimizer.safetensors"):
        a, b = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts/run/log.jsonl").open()]
    assert steps == [2, 4, 6, 7]


def test_a_kill_between_the_renamings_loses_nothing(tmp_path):
    folder = tmp_path / "latest"
    assert pretrain.saved_state(folder) is None
    (tmp_path / "latest.new").mkdir()
    assert pretrain.saved_state(folder) == tmp_path / "latest.new"
    folder.mkdir()
    assert pretrain.saved_state(folder) == folder


def test_training_lowers_the_loss(corpus, tmp_path):
    docs, pairs = corpus
    recipe = dataclasses.replace(RECIPE, lm_steps=15, sft_steps=15, eval_every=10, learning_rate=1e-2)
    pretrain.train(recipe, tmp_path, docs, pairs, resume=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").open()]
    assert losses[-1] < 0.6 * losses[0]
