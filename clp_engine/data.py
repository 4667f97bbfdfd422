"""Training prompts: rows of a dataset, encoded, in an order that a step number alone determines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clp_engine import seeds
from clp_engine.errors import ConfigError

_SHUFFLE = 1  # counter that keeps this use of the seed apart from others


@dataclass(frozen=True)
class PromptBatch:
    """P prompts: as the dataset has them, as token ids, and the dataset's other columns."""

    prompts: list
    token_ids: list[list[int]]
    columns: dict[str, list]

    def taken(self, indices: Sequence[int]) -> PromptBatch:
        """These prompts, in this order."""
        return PromptBatch(
            [self.prompts[i] for i in indices],
            [self.token_ids[i] for i in indices],
            {name: [values[i] for i in indices] for name, values in self.columns.items()},
        )

    def repeated(self, times: int) -> tuple[list, dict[str, list]]:
        """(prompts, columns) with each row `times` times in a row, as reward functions take them."""
        return (
            [p for p in self.prompts for _ in range(times)],
            {name: [v for v in values for _ in range(times)] for name, values in self.columns.items()},
        )


def encode_prompt(prompt: str | list, tokenizer) -> list[int]:
    """Tokens of a text, or of chat messages in the tokenizer's chat template, up to where the assistant answers."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


class PromptDataset:
    """A sequence of rows with a `prompt` column: text, or a list of chat messages for the tokenizer's chat template."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], tokenizer, max_prompt_length: int | None = None):
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise ConfigError(
                f"a dataset must have a length and rows by index (a list of dicts, datasets.Dataset); "
                f"got {type(rows).__name__}; list(dataset) makes one of an iterable"
            )
        if len(rows) == 0:
            raise ConfigError("the dataset is empty")
        if not isinstance(rows[0], Mapping) or "prompt" not in rows[0]:
            raise ConfigError(
                f"each row of a dataset needs a 'prompt'; the first one has {_described(rows[0])}"
            )
        self.rows, self.tokenizer, self.max_prompt_length = rows, tokenizer, max_prompt_length
        self._order: tuple[tuple, list[int]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def encode(self, prompt: str | list) -> list[int]:
        ids = encode_prompt(prompt, self.tokenizer)
        return ids[-self.max_prompt_length :] if self.max_prompt_length else ids

    def batch(self, indices: Sequence[int]) -> PromptBatch:
        rows = [self.rows[int(i)] for i in indices]
        columns = {
            name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")
        }
        prompts = [row["prompt"] for row in rows]
        return PromptBatch(prompts, [self.encode(p) for p in prompts], columns)

    def indices(self, start: int, count: int, seed: int, shuffle: bool) -> list[int]:
        """Rows `start` to `start + count` of the endless stream of epochs, each epoch in an order of its own."""
        return [
            self._epoch(position // len(self), seed, shuffle)[position % len(self)]
            for position in range(start, start + count)
        ]

    def _epoch(self, epoch: int, seed: int, shuffle: bool) -> Sequence[int]:
        if not shuffle:
            return range(len(self))
        key = (epoch, seed)
        if self._order is None or self._order[0] != key:
            self._order = (
                key,
                torch.randperm(len(self), generator=seeds.generator(seed, _SHUFFLE, epoch)).tolist(),
            )
        return self._order[1]


def _described(row: Any) -> str:
    return (
        f"the columns {', '.join(map(str, row))}"
        if isinstance(row, Mapping)
        else f"type {type(row).__name__}"
    )


def completion_texts(tokenizer, token_lists: list[list[int]], prompts: list) -> list:
    """Completions as reward functions take them: text, or a list with the assistant's message for a chat prompt."""
    texts = tokenizer.batch_decode(token_lists, skip_special_tokens=True)
    return [
        t if isinstance(p, str) else [{"role": "assistant", "content": t}] for t, p in zip(texts, prompts)
    ]
