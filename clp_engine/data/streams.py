"""Datasets that are read row after row: `datasets.IterableDataset`, other iterables, generators.

    position   0 ... n_0 - 1 | n_0 ... n_0 + n_1 - 1 | ...          epoch e is the e-th iteration over the source

A row is read only when it is needed, and only the last row is kept. A source whose `iter()` starts anew (the source is not its
own iterator) must give the same rows whenever the same epoch is read. A position is then found again by iterating from the
start of its epoch, and a resumed run continues at the right row, to the bit. A checkpoint holds the start positions of the
epochs for that. An iterator or generator can be read once only: training ends where it ends, and cannot be resumed.

A source with `shuffle(seed=)` and `set_epoch()`, such as a `datasets.IterableDataset`, is shuffled on request, in the source's
own buffer and differently in each epoch, as in TRL. Any other source is read in its own order.
"""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from clp_engine.core.errors import ConfigError
from clp_engine.data.prompts import PromptBatch, PromptDataset, Prompts, has_rows

logger = logging.getLogger(__name__)


class EndOfData(Exception):
    """A source that can be read once has no further row. rows: the number of rows it had."""

    def __init__(self, rows: int):
        super().__init__(f"the data ended after {rows} rows")
        self.rows = rows


class PromptStream(Prompts):
    """The rows of an iterable as a stream of epochs (module docstring).

    shuffle_seed: None leaves the order to the source. skip_bad_rows: unusable rows are passed over and have no position.
    """

    def __init__(
        self,
        source: Iterable[Mapping[str, Any]],
        tokenizer,
        max_prompt_length: int | None = None,
        shuffle_seed: int | None = None,
        skip_bad_rows: bool = False,
        check: Callable[[list[int], str], None] | None = None,
    ):
        super().__init__(tokenizer, max_prompt_length, check)
        self._skips = skip_bad_rows
        self.source, self.read_once = source, isinstance(source, Iterator)
        shuffles = hasattr(source, "shuffle") and hasattr(source, "set_epoch")
        self._shuffled = (
            source.shuffle(seed=shuffle_seed) if shuffles and shuffle_seed is not None else source
        )
        self._starts = [0]  # the start position of each epoch that has begun
        self._epoch, self._next = 0, 0  # epoch and position of the iterator's next row
        self._iterator: Iterator | None = None
        self._last: tuple[int, Any] | None = None  # position and content of the row read last
        self._evaluated = False

    def indices(self, start: int, count: int, seed: int, shuffle: bool) -> range:
        return range(start, start + count)

    def in_order(self, size: int) -> Iterator[tuple[int, PromptBatch]]:
        """All rows once, unshuffled, in batches of `size`: pairs of the first row's number and the batch.

        Raises ConfigError for a second pass over a source that can be read once, and for a source without rows.
        """
        if self.read_once and self._evaluated:
            raise ConfigError(
                f"the evaluation set is a {type(self.source).__name__}, which can be read once, and has been; "
                "give a list, or an object whose iter() starts anew"
            )
        self._evaluated = True
        rows, start = self._usable(iter(self.source)), 0
        while part := list(itertools.islice(rows, size)):
            yield start, self._made(part, list(range(start, start + len(part))))
            start += len(part)
        if start == 0:
            raise ConfigError("the evaluation set gave no rows")

    def epoch(self, position: float, share: float) -> float:
        """The number of epochs before `position`. The fraction assumes the length of the epoch before.

        The first epoch has an unknown length, so `share` is returned in it.
        """
        number = self._known_epoch(position)
        start = self._starts[number]
        if number + 1 < len(self._starts):
            length = self._starts[number + 1] - start
        elif number > 0:
            length = start - self._starts[number - 1]
        else:
            return min(share, 1.0)
        return number + min((position - start) / length, 1.0)

    def epoch_number(self, position: int) -> int:
        if position >= self._next:
            self._row(position)  # only reading shows whether an epoch begins at this row
        return self._known_epoch(position)

    def _known_epoch(self, position: float) -> int:
        return bisect.bisect_right(self._starts, position) - 1

    def _row(self, index: int) -> Any:
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        if index < self._next or self._known_epoch(index) != self._epoch:
            self._seek(index)
        while self._next <= index:
            self._read()
        return self._last[1]

    def _seek(self, position: int) -> None:
        """Go back to the start of the latest known epoch that contains the position."""
        if self.read_once:
            raise ConfigError(
                f"row {position} of a {type(self.source).__name__} is asked for again, which can be read once; give a list, or "
                "an object whose iter() starts anew"
            )
        self._epoch = self._known_epoch(position)
        self._next, self._iterator, self._last = self._starts[self._epoch], None, None

    def _read(self) -> None:
        """Read the next row into `_last`, starting a new epoch if the current one has ended. Raises EndOfData."""
        if self._iterator is None:
            if hasattr(self._shuffled, "set_epoch"):
                self._shuffled.set_epoch(self._epoch)
            self._iterator = self._usable(iter(self._shuffled))
        for row in self._iterator:
            self._last = self._next, row
            self._next += 1
            return
        start, known = self._starts[self._epoch], self._starts[self._epoch + 1 :]
        if self.read_once or self._next == start:
            if self._next == 0:
                raise ConfigError("the dataset is empty")
            raise EndOfData(self._next)
        if known and known[0] != self._next:
            raise ConfigError(
                f"epoch {self._epoch} of the dataset has {self._next - start} rows now and had {known[0] - start}; "
                "resume with the same data"
            )
        if not known:
            self._starts.append(self._next)
        self._epoch, self._iterator = self._epoch + 1, None

    def _usable(self, rows: Iterator) -> Iterator:
        if not self._skips:
            return rows
        return (row for number, row in enumerate(rows) if self._is_usable(row, number))

    def _is_usable(self, row: Any, number: int) -> bool:
        fault = self._fault(row, number)
        if fault is not None:
            self.skipped += 1
            if self.skipped == 1:
                logger.warning(
                    "a row is left out, and so are others like it (data/skipped_rows counts them): %s", fault
                )
        return fault is None

    def state_dict(self) -> dict[str, Any]:
        return {"rows_read": self._next, "epoch_starts": list(self._starts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`. Raises ConfigError for a source that can be read once."""
        if self.read_once and state.get("rows_read"):
            raise ConfigError(
                f"train_dataset is a {type(self.source).__name__}, of which {state['rows_read']} rows were read before the "
                "checkpoint; it can be read once, so nothing can tell where it stands now. Give an object whose iter() starts "
                "anew (a list, a class with __iter__, datasets.IterableDataset.from_generator)"
            )
        self._starts = list(state.get("epoch_starts", self._starts))


def prompts_of(
    rows: Any,
    tokenizer,
    max_prompt_length: int | None = None,
    shuffle_seed: int | None = None,
    skip_bad_rows: bool = False,
    check: Callable[[list[int], str], None] | None = None,
) -> Prompts:
    """The rows as a `PromptDataset` if they have indices, otherwise as a `PromptStream`. check: see `Prompts`.

    Raises ConfigError for an object without rows.
    """
    if has_rows(rows):
        return PromptDataset(rows, tokenizer, max_prompt_length, skip_bad_rows, check)
    if isinstance(rows, Mapping):
        raise ConfigError(
            f"a dataset is a sequence of rows; got a mapping with the keys {', '.join(map(str, rows))}; choose one of them, or "
            "make rows of columns with datasets.Dataset.from_dict"
        )
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise ConfigError(
            f"a dataset is a list of dicts, a datasets.Dataset, or an iterable of rows; got {type(rows).__name__}"
        )
    return PromptStream(rows, tokenizer, max_prompt_length, shuffle_seed, skip_bad_rows, check)
