"""The rows of a rollout: what each has said so far, how its next token is drawn, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from clp_kernels import sample_tokens
from transformers import StopStringCriteria

from clp_engine.errors import ConfigError
from clp_engine.seeds import derive

if TYPE_CHECKING:
    from clp_engine.policy import ConditionedPolicy
    from clp_engine.rollout import SamplingParams


class Drawing:
    """Completions of B rows, at most `sampling.max_new_tokens` tokens each.

    tokens (B, T) int64, logprobs (B, T) float32 and lengths (B,) int64 grow with every draw; terminated (B,) bool: ended by an
    end token or a stop string, which are part of the completion. row_seeds (B,) int64: token t of a row is drawn from
    derive(row_seed, t), whatever else is drawn beside it. begun: tokens that rows said before, which are counted in t and read
    for stop strings, and not part of `tokens`.
    """

    def __init__(
        self,
        policy: ConditionedPolicy,
        sampling: SamplingParams,
        row_seeds: torch.Tensor,
        begun: Sequence[Sequence[int]] | None = None,
    ):
        rows, device = len(row_seeds), row_seeds.device
        self.limit, self._sampling, self._pad = sampling.max_new_tokens, sampling, policy.pad_token_id
        self.tokens = torch.full((rows, self.limit), self._pad, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, self.limit, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.terminated = torch.zeros(rows, dtype=torch.bool, device=device)
        self._stop_ids = torch.tensor(policy.stop_token_ids, dtype=torch.long, device=device)
        self._stop_strings = None
        if sampling.stop_strings:
            if policy.tokenizer is None:
                raise ConfigError(
                    "stop_strings needs a tokenizer; give one to from_pretrained(tokenizer=...)"
                )
            try:
                self._stop_strings = StopStringCriteria(policy.tokenizer, list(sampling.stop_strings))
            except ValueError as error:
                raise ConfigError(
                    f"stop_strings: what the tokens of {type(policy.tokenizer).__name__} spell cannot be told ({error}); "
                    "use end tokens instead"
                ) from error
        begun = [()] * rows if begun is None else begun
        offset = torch.tensor([len(tokens) for tokens in begun], device=device).unsqueeze(1)
        # Of all tokens at once: some thirty small operations, which a token of its own would take as well.
        steps = torch.arange(self.limit, device=device)
        self._seeds = derive(row_seeds.unsqueeze(1), offset + steps).flatten()
        if self._stop_strings is not None:
            window = self._stop_strings.maximum_token_len
            before = [[*[self._pad] * window, *tokens][-window:] for tokens in begun]
            self._before = torch.tensor(before, dtype=torch.long, device=device)

    def draw(
        self, logits: torch.Tensor, rows: torch.Tensor, live: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Draw the next token of `rows` (n,) from logits (n, V) -> tokens (n,).

        live: (n,) bool, which rows go on; the others are left as they are and get padding. None where none has finished.
        """
        at, sampling = self.lengths.index_select(0, rows), self._sampling
        # A row that has finished may be full: its last place is written back as it was.
        place = rows * self.limit + (at if live is None else at.clamp_max(self.limit - 1))
        drawn, logprob = sample_tokens(
            logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seeds=self._seeds.index_select(0, place),
        )
        tokens, logprobs = self.tokens.view(-1), self.logprobs.view(-1)
        if live is None:
            tokens.index_copy_(0, place, drawn)
            logprobs.index_copy_(0, place, logprob)
            self.lengths.index_copy_(0, rows, at + 1)
            self.terminated.index_copy_(0, rows, self._ends(drawn, rows))
            return drawn
        drawn = torch.where(live, drawn, self._pad)
        tokens.index_copy_(0, place, torch.where(live, drawn, tokens[place]))
        logprobs.index_copy_(0, place, torch.where(live, logprob, logprobs[place]))
        self.lengths.index_copy_(0, rows, at + live)
        self.terminated[rows] |= live & self._ends(drawn, rows)
        return drawn

    def finished(self, rows: torch.Tensor) -> torch.Tensor:
        """(n,) bool: nothing more is drawn for these rows."""
        return self.terminated.index_select(0, rows) | (self.lengths.index_select(0, rows) >= self.limit)

    def _ends(self, drawn: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ended = (drawn.unsqueeze(1) == self._stop_ids).any(1)
        if self._stop_strings is None:
            return ended
        # The criteria read the end of each row; before its first token there is padding, which spells no text.
        whole = torch.cat([self._before[rows], self.tokens[rows]], 1)
        window = self._before.shape[1]
        places = self.lengths[rows].unsqueeze(1) + torch.arange(window, device=rows.device)
        return ended | self._stop_strings(whole.gather(1, places), None)
