"""The shipped model: small, loadable by transformers alone, and better than the document's beginning."""

import json

import pytest
import torch
from test_docsum_corpus import few_sources, stdlib_only  # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM, AutoTokenizer

from clp_engine.tasks import docsum
from clp_engine.tasks.docsum import corpus
from clp_engine.tasks.docsum.corpus import words

PATH = docsum.checkpoint_path()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PATH)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32).eval()


def test_it_fits_eight_megabytes():
    sizes = {p.name: p.stat().st_size for p in PATH.iterdir()}
    assert sum(sizes.values()) <= 8_000_000, sizes
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "recipe.json",
    }


def test_tokenizer(tokenizer, model):
    assert tokenizer.is_fast and tokenizer.padding_side == "left"
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == 0
    assert tokenizer.pad_token_id == model.config.pad_token_id == 1
    text = "Return x_1[:, 2] ,  \u00e9t\u00e9?\n\n\tok . 'tis <|summary|>Yes."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("<|summary|>")["input_ids"]) == 1


def test_weights_are_bfloat16():
    assert AutoModelForCausalLM.from_pretrained(PATH, dtype="auto").dtype == torch.bfloat16


def test_greedy_summaries_beat_the_beginning_of_the_document(stdlib_only, model, tokenizer):  # noqa: F811
    rows = docsum.load_dataset("test") + docsum.load_dataset("validation")
    assert len(rows) > 20
    batch = tokenizer([r["prompt"] for r in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model.generate(**batch, do_sample=False, max_new_tokens=docsum.MAX_COMPLETION_TOKENS)
    summaries = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    references = [r["reference"] for r in rows]
    assert all(len(words(s)) >= 2 for s in summaries)
    assert len(set(summaries)) > 0.8 * len(rows)
    mean = {
        "model": sum(docsum.coverage(completions=summaries, reference=references)) / len(rows),
        "beginning": sum(
            docsum.coverage(
                completions=[" ".join(r["document"].split()[:10]) for r in rows], reference=references
            )
        )
        / len(rows),
    }
    assert mean["model"] > mean["beginning"] + 0.03, mean


def test_recipe_names_what_it_was_trained_on():
    recipe = json.loads((PATH / "recipe.json").read_text())
    assert recipe["pairs"]["train"] > 5000 and recipe["validation_summary_loss"] < 4
    assert corpus.SPLITS == tuple(recipe["pairs"])
