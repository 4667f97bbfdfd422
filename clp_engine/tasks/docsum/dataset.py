"""DocSum's prompts and datasets. A prompt is the object's short name, its document, and the separator:

    chain.from_iterable\\n<document, cut at a word><|summary|>

The model continues with the summary and `<|endoftext|>`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from clp_engine.tasks.docsum.corpus import SPLITS, build

END_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
SUMMARY_TOKEN = "<|summary|>"
MAX_PROMPT_TOKENS = 128
MAX_COMPLETION_TOKENS = 40


def checkpoint_path() -> Path:
    """The transformers directory of the shipped model and tokenizer."""
    return Path(__file__).with_name("checkpoint")


def title(name: str) -> str:
    """The last two parts of a dotted name: "Class.method" or "module.function"."""
    return ".".join(name.split(".")[-2:])


def format_prompt(name: str, document: str) -> str:
    return f"{title(name)}\n{document}{SUMMARY_TOKEN}"


def make_prompt(name: str, document: str, tokenizer: Any, max_prompt_tokens: int = MAX_PROMPT_TOKENS) -> str:
    """`format_prompt` with the document cut before the first word that would exceed `max_prompt_tokens`."""
    budget = max_prompt_tokens - len(
        tokenizer(format_prompt(name, ""), add_special_tokens=False)["input_ids"]
    )
    if budget <= 0:
        raise ValueError(f"max_prompt_tokens={max_prompt_tokens} leaves no room for the document of {name!r}")
    encoded = tokenizer(
        document,
        add_special_tokens=False,
        return_offsets_mapping=True,
        truncation=True,
        max_length=budget + 1,
    )
    if len(encoded["input_ids"]) > budget:
        end = encoded["offset_mapping"][budget][0]
        # A cut inside a word would change the tokens when the text is tokenised again.
        while end > 0 and not document[end].isspace():
            end -= 1
        document = document[:end]
    return format_prompt(name, document)


def load_dataset(
    split: str,
    limit: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    max_prompt_tokens: int = MAX_PROMPT_TOKENS,
) -> list[dict[str, str]]:
    """Rows `{"prompt", "document", "reference", "name"}` of a split, in an order given by `seed`.

    Rows are sorted by sha256 of (seed, name), and `limit` keeps the first of them. `tokenizer` (default: the shipped one)
    counts the prompt's tokens, at most `max_prompt_tokens`. Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: DocSum has {', '.join(SPLITS)}")
    if tokenizer is None:
        from transformers import AutoTokenizer  # takes seconds to import; not needed if a tokenizer is given

        tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    pairs = [p for p in build() if p.split == split]
    pairs.sort(key=lambda p: hashlib.sha256(f"{seed}:{p.name}".encode()).digest())
    return [
        {
            "prompt": make_prompt(p.name, p.document, tokenizer, max_prompt_tokens),
            "document": p.document,
            "reference": p.reference,
            "name": p.name,
        }
        for p in pairs[:limit]
    ]


def as_prompt(text: str, tokenizer) -> str:
    """Any text as a DocSum prompt: unchanged if it has the separator, otherwise with the text as the document."""
    return text if SUMMARY_TOKEN in text else make_prompt("document", text.strip(), tokenizer)
