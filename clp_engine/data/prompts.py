"""Prompts to train on: rows of a dataset, checked and encoded, in an order that depends on the step number alone."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clp_engine.core import seeds
from clp_engine.core.errors import ConfigError, shown
from clp_engine.data.chat import check_prompt, encode_chat

logger = logging.getLogger(__name__)

_AT_THE_START, _AT_ONCE = 100_000, 1000  # most rows encoded at the start; rows in one call of a tokenizer
# Columns that no reward function receives (as in TRL), and argument names that hold something else than a column.
_WITHHELD = ("prompt", "completion", "completion_ids")
TAKEN = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True)
class PromptBatch:
    """P prompts: in the dataset's form, as token ids, and the dataset's other columns."""

    prompts: list
    token_ids: list[list[int]]
    columns: dict[str, list]

    def taken(self, indices: Sequence[int]) -> PromptBatch:
        """The prompts at these indices, in this order."""
        return PromptBatch(
            [self.prompts[i] for i in indices],
            [self.token_ids[i] for i in indices],
            {name: [values[i] for i in indices] for name, values in self.columns.items()},
        )

    def repeated(self, times: int) -> tuple[list, dict[str, list]]:
        """(prompts, columns) for reward functions, with each row repeated `times` times in succession."""
        return (
            [p for p in self.prompts for _ in range(times)],
            {name: [v for v in values for _ in range(times)] for name, values in self.columns.items()},
        )


def encode_prompts(prompts: Sequence[str | list], tokenizer) -> list[list[int]]:
    """Tokens of each prompt, a text or chat messages. Messages end where the assistant's answer starts.

    Raises ConfigError for any other prompt, and for messages with other content than text.
    """
    for i, prompt in enumerate(prompts):
        if prompt != "":  # an empty text is allowed: a tokenizer may start every text with a token
            check_prompt(prompt, f"prompt {i}")
    return _encoded(prompts, tokenizer)


def _encoded(prompts: Sequence[str | list], tokenizer) -> list[list[int]]:
    """Tokens of each prompt, with all texts in one call of the tokenizer: a call takes 0.5 ms however short the texts are."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    ids = iter(tokenizer(texts)["input_ids"] if texts else ())
    return [next(ids) if isinstance(prompt, str) else encode_chat(prompt, tokenizer) for prompt in prompts]


class Prompts(ABC):
    """An endless stream of epochs over rows with a `prompt` column, text or chat messages. `position` counts its rows.

    check: called with the tokens of each prompt, after truncation, and the name of its row. It raises ConfigError if the model
        cannot read the tokens.
    """

    def __init__(
        self,
        tokenizer,
        max_prompt_length: int | None = None,
        check: Callable[[list[int], str], None] | None = None,
    ):
        self.tokenizer, self.max_prompt_length, self._check = tokenizer, max_prompt_length, check
        self.skipped = 0  # number of unusable rows that were left out

    def encode(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[list[int]]:
        """Tokens of each row's prompt, the last `max_prompt_length` of them. numbers: the rows' numbers, for messages.

        Raises ConfigError naming the row whose prompt cannot be encoded or has no tokens.
        """
        try:
            encoded = _encoded([row["prompt"] for row in rows], self.tokenizer)
        except Exception as error:  # tokenizers and chat templates raise errors of any class
            if len(rows) > 1:
                return [self.encode([row], [number])[0] for row, number in zip(rows, numbers)]
            else:
                raise ConfigError(
                    f"{_named(numbers[0])}: its prompt cannot be encoded ({_first_line(error)}); mend or remove it"
                ) from error
        for ids, number in zip(encoded, numbers):
            if not ids:
                raise ConfigError(f"{_named(number)}: its prompt has no tokens; mend or remove it")
        if self.max_prompt_length:
            encoded = [ids[-self.max_prompt_length :] for ids in encoded]
        if self._check is not None:
            for ids, number in zip(encoded, numbers):
                self._check(ids, _named(number))
        return encoded

    def _fault(self, row: Any, number: int) -> str | None:
        """The reason why the row cannot be used, or None."""
        try:
            check_row(row, _named(number))
            self.encode([row], [number])
        except ConfigError as error:
            return str(error)
        return None

    def batch(self, indices: Sequence[int]) -> PromptBatch:
        """The prompts of these rows. Raises ConfigError for a row that cannot be used."""
        return self._made([self._row(int(i)) for i in indices], list(map(int, indices)))

    @abstractmethod
    def indices(self, start: int, count: int, seed: int, shuffle: bool) -> Sequence[int]:
        """The indices of the rows at positions `start` to `start + count`, as arguments for `batch`."""

    @abstractmethod
    def in_order(self, size: int) -> Iterator[tuple[int, PromptBatch]]:
        """All rows once, unshuffled, in batches of `size`: pairs of the first row's number and the batch."""

    @abstractmethod
    def epoch(self, position: float, share: float) -> float:
        """The number of epochs before `position`, a fraction included.

        share: the share of the run before `position`, which is used while the length of an epoch is unknown.
        """

    @abstractmethod
    def epoch_number(self, position: int) -> int:
        """The number of the epoch that contains `position`."""

    @abstractmethod
    def _row(self, index: int) -> Any: ...

    def state_dict(self) -> dict[str, Any]:
        """The state, as JSON, that a resumed run needs in addition to its step number."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`."""
        return

    def _made(self, rows: list, numbers: list[int]) -> PromptBatch:
        for row, number in zip(rows, numbers):
            check_row(row, _named(number))
        names = dict.fromkeys(name for row in rows for name in row if name not in _WITHHELD)
        columns = {name: [row.get(name) for row in rows] for name in names}
        return PromptBatch([row["prompt"] for row in rows], self._ids(rows, numbers), columns)

    def _ids(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[list[int]]:
        return self.encode(rows, numbers)


class PromptDataset(Prompts):
    """Rows by index: a list of dicts, a `datasets.Dataset`, or any object with a length and with mappings as rows.

    All rows of a list are checked at the start, and its prompts are encoded then if there are at most 100,000. Any other
    dataset has its first row checked at the start, and each row checked and encoded when it is reached.
    skip_bad_rows: leave unusable rows out; every row of any dataset is then checked at the start.
    Raises ConfigError for an object without a length and rows by index, an empty dataset, and a row that cannot be used.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer,
        max_prompt_length: int | None = None,
        skip_bad_rows: bool = False,
        check: Callable[[list[int], str], None] | None = None,
    ):
        super().__init__(tokenizer, max_prompt_length, check)
        if not has_rows(rows):
            raise ConfigError(
                f"a dataset here must have a length and rows by index (a list of dicts, datasets.Dataset); "
                f"got {type(rows).__name__}; list(dataset) makes one of an iterable"
            )
        if len(rows) == 0:
            raise ConfigError("the dataset is empty")
        self._encoded: dict[int, array] = {}  # tokens by row number, for a list
        if skip_bad_rows:
            faults = [self._fault(row, number) for number, row in enumerate(rows)]
            if any(faults):
                rows = [row for row, fault in zip(rows, faults) if fault is None]
                self.skipped = len(faults) - len(rows)
                first = next(filter(None, faults))
                logger.warning("%d of %d rows are left out; the first: %s", self.skipped, len(faults), first)
                if not rows:
                    raise ConfigError(f"no row of the dataset can be used; {first}")
        if isinstance(rows, list | tuple):
            self._encoded = self._encode_all(rows)
        else:
            check_row(rows[0], _named(0))
        self.rows = rows
        self._order: tuple[tuple, list[int]] | None = None

    def _encode_all(self, rows: Sequence[Mapping[str, Any]]) -> dict[int, array]:
        """Every prompt's tokens by row number. Empty if there are too many rows to encode at the start."""
        for number, row in enumerate(rows):
            check_row(row, _named(number))
        numbers = range(len(rows) if len(rows) <= _AT_THE_START else 0)
        parts = [numbers[start : start + _AT_ONCE] for start in numbers[::_AT_ONCE]]
        encoded = (zip(part, self.encode([rows[n] for n in part], part)) for part in parts)
        return {n: array("i", ids) for pairs in encoded for n, ids in pairs}

    def _ids(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[list[int]]:
        return [self._encoded[n].tolist() for n in numbers] if self._encoded else super()._ids(rows, numbers)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def _row(self, index: int) -> Mapping[str, Any]:
        return self.rows[index]

    def indices(self, start: int, count: int, seed: int, shuffle: bool) -> list[int]:
        """Row indices at positions `start` to `start + count` of the endless stream. Each epoch has its own order."""
        return [
            self._epoch(position // len(self), seed, shuffle)[position % len(self)]
            for position in range(start, start + count)
        ]

    def in_order(self, size: int) -> Iterator[tuple[int, PromptBatch]]:
        for start in range(0, len(self), size):
            yield start, self.batch(range(start, min(start + size, len(self))))

    def epoch(self, position: float, share: float) -> float:
        return position / len(self)

    def epoch_number(self, position: int) -> int:
        return position // len(self)

    def _epoch(self, epoch: int, seed: int, shuffle: bool) -> Sequence[int]:
        if not shuffle:
            return range(len(self))
        key = (epoch, seed)
        if self._order is None or self._order[0] != key:
            self._order = (
                key,
                torch.randperm(
                    len(self), generator=seeds.generator(seed, seeds.Stream.SHUFFLE, epoch)
                ).tolist(),
            )
        return self._order[1]


def _named(number: int) -> str:
    return f"row {number} of the dataset"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def has_rows(rows: Any) -> bool:
    """Whether `rows` has rows by index: a sequence, but no mapping and no text."""
    return (
        hasattr(rows, "__len__")
        and hasattr(rows, "__getitem__")
        and not isinstance(rows, Mapping | str | bytes)
    )


def check_row(row: Any, where: str) -> None:
    """Raises ConfigError for a row that training cannot use. where: its place, for the message."""
    if not isinstance(row, Mapping) or "prompt" not in row:
        has = f"type {type(row).__name__}"
        if isinstance(row, Mapping):  # a lone surrogate can be neither logged nor printed
            plain = [name if isinstance(name, str) and name.isprintable() else shown(name) for name in row]
            has = f"the columns {', '.join(plain)}"
        raise ConfigError(f"each row of a dataset needs a 'prompt'; {where} has {has}")
    for name in TAKEN:
        if name in row:
            raise ConfigError(
                f"{where} has a column {name!r}, under which a reward function receives something else; rename it"
            )
    for name in ("image", "images"):
        if row.get(name) is not None:
            raise ConfigError(
                f"{where} has a column {name!r}; prompts are text here (train a model for images with TRL, or remove it)"
            )
    check_prompt(row["prompt"], where)


def completion_texts(tokenizer, token_lists: list[list[int]], prompts: list) -> list:
    """Completions as reward functions take them: a text or, for a chat prompt, a list with the assistant's message."""
    texts = tokenizer.batch_decode(token_lists, skip_special_tokens=True)
    return [
        t if isinstance(p, str) else [{"role": "assistant", "content": t}] for t, p in zip(texts, prompts)
    ]
