"""The text of a completion while its tokens arrive: what is certain already, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"  # what a tokenizer makes of a character whose bytes are not all there


class StreamText:
    """The text of tokens that are pushed one by one, up to the first of the stop strings.

    The pieces that `push` and `rest` return, joined, are `tokenizer.decode(tokens, skip_special_tokens=True)`, cut off before
    the first stop string. Text is held back while a character is half there, and while it may be the beginning of a stop
    string. A token is decoded together with the tokens of the piece before it, because tokenizers write a space in front of
    a token or not, depending on what precedes it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._before = self._read = (
            0  # the piece before is tokens[before:read]; later tokens have no text yet
        )
        self._held = ""  # text that may be the beginning of a stop string
        self._stopped = False

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token. Returns (the text that is certain now, whether a stop string is complete)."""
        self._tokens.append(token)
        more = self._unread()
        if not more or more.endswith(_HALF):
            return "", False
        self._before, self._read = self._read, len(self._tokens)
        text = self._until_stop(more)
        return (self._without_beginnings(), False) if text is None else (text, True)

    def rest(self) -> str:
        """The text that was held back, at the end of the completion."""
        if self._stopped:
            return ""
        text = self._until_stop(self._unread())
        return self._held if text is None else text

    def _unread(self) -> str:
        """The text of the tokens from `read` on."""
        whole, known = (
            self._tokenizer.decode(self._tokens[self._before : end], skip_special_tokens=True)
            for end in (None, self._read)
        )
        return whole[len(known) :]

    def _until_stop(self, more: str) -> str | None:
        """The held text with `more`, up to the first stop string in it. None if it has none; all of it is held then."""
        self._held += more
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        self._stopped = bool(found)
        return self._held[: min(found)] if found else None

    def _without_beginnings(self) -> str:
        """The held text without its longest end that begins a stop string, which stays held."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._held))
        begins = (
            length
            for length in range(longest, 0, -1)
            if any(stop.startswith(self._held[-length:]) for stop in self._stop)
        )
        at = len(self._held) - next(begins, 0)
        text, self._held = self._held[:at], self._held[at:]
        return text
