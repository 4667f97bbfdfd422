"""The rows of a rollout: the tokens of each so far, drawing the next token, and the row's end.

A decode step of a small model takes 1 ms, and each tensor operation 10 us. Drawing therefore uses few of them: the seeds of all
tokens are derived at once, and drawn tokens are written to their places at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from clp_kernels import sample_tokens
from clp_kernels.decoder import Draws
from transformers import StopStringCriteria

from clp_engine.core.errors import ConfigError
from clp_engine.core.seeds import derive
from clp_engine.rollouts.types import RolloutRequest


def stop_criteria(tokenizer, strings: Sequence[str]) -> StopStringCriteria | None:
    """Tells which rows of ids end with one of the texts. None for no texts. Raises ConfigError without a fitting tokenizer."""
    if not strings:
        return None
    if tokenizer is None:
        raise ConfigError("stop_strings needs a tokenizer; give one to from_pretrained(tokenizer=...)")
    try:
        return StopStringCriteria(tokenizer, list(strings))
    except ValueError as error:
        raise ConfigError(
            f"stop_strings: what the tokens of {type(tokenizer).__name__} spell cannot be told ({error}); "
            "use end tokens instead"
        ) from error


class Rows:
    """Completions of B rows, at most `sampling.max_new_tokens` = T tokens each. Rows join, draw together, and leave.

    running: (n,), the rows that draw. done: (n,), which of them have finished, by an end token or a stop string (both are part
        of the completion) or by their length.

    Token t of a row is drawn with the seed derive(row_seed, t), independently of all other rows. The tokens that a row had
    before (`begun`) count in t and may be part of a stop string. They are not part of the completion.
    """

    def __init__(self, request: RolloutRequest):
        sampling, profile = request.sampling, request.source.profile
        row_seeds, begun = request.row_seeds.to(request.prompt_ids.device), request.begun
        self._rows, device = len(row_seeds), row_seeds.device
        self.limit, self._sampling, self._pad = sampling.max_new_tokens, sampling, profile.pad_token_id
        self._stop_ids = torch.tensor(profile.stop_token_ids, dtype=torch.long, device=device)
        begun = [()] * self._rows if begun is None else begun
        offset = torch.tensor([len(tokens) for tokens in begun], device=device).unsqueeze(1)
        steps = torch.arange(self.limit, device=device)
        seeds = derive(row_seeds.unsqueeze(1), offset + steps).flatten()
        # Token t of row b is stored at b * T + t. Tokens drawn after a row's end go to one extra place, which is never read.
        self._nowhere = len(seeds)
        self._seeds = torch.cat([seeds, seeds.new_zeros(1)])
        self.running = torch.empty(0, dtype=torch.long, device=device)
        self.done = torch.empty(0, dtype=torch.bool, device=device)
        self._place, self._last = self.running, self.running
        self._drawn: list[tuple[torch.Tensor, ...]] = []
        self._tokens = torch.full((self._nowhere + 1,), self._pad, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(self._nowhere + 1, device=device)
        self._valid = torch.zeros(self._nowhere + 1, dtype=torch.bool, device=device)
        self._ended = self._valid.clone()
        self._stop_strings = stop_criteria(profile.tokenizer, sampling.stop_strings)
        if self._stop_strings is not None:
            window = self._stop_strings.maximum_token_len
            before = [[*[self._pad] * window, *tokens][-window:] for tokens in begun]
            self._before = torch.tensor(before, dtype=torch.long, device=device)

    def join(self, rows: torch.Tensor) -> None:
        """Start these rows, behind the running ones."""
        first = rows * self.limit
        self.running = torch.cat([self.running, rows])
        self.done = torch.cat([self.done, self.done.new_zeros(len(rows))])
        self._place = torch.cat([self._place, first])
        self._last = torch.cat([self._last, first + self.limit - 1])

    def keep(self, index: torch.Tensor) -> None:
        """Continue only with the running rows at these indices, in this order."""
        self.running, self.done, self._place, self._last = (
            t.index_select(0, index) for t in (self.running, self.done, self._place, self._last)
        )

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Draw the next token of each running row from logits (n, V). Returns tokens (n,); ignore those of finished rows."""
        sampling, place = self._sampling, self._place
        tokens, logprob = sample_tokens(
            logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seeds=self._seeds.index_select(0, place),
        )
        ended = (tokens.unsqueeze(1) == self._stop_ids).any(1)
        if self._stop_strings is not None:
            ended |= self._ends_in_text(tokens)
        self._drawn.append((place, tokens, logprob, ended))
        self.done = (place == self._last).logical_or_(ended).logical_or_(self.done)
        self._place = (place + 1).masked_fill_(self.done, self._nowhere)
        return tokens

    @property
    def reads_text(self) -> bool:
        """Whether the text of a row can end it, so that every token must be checked for stop strings."""
        return self._stop_strings is not None

    def draws(self) -> Draws:
        """The buffers for a decoder that draws by itself for the running rows. Call `drawn_by` afterwards."""
        self._write()
        options = {
            name: getattr(self._sampling, name)
            for name in ("temperature", "top_k", "top_p", "min_p")
            if getattr(self._sampling, name) is not None
        }
        return Draws(
            self._place,
            self._last,
            self._seeds,
            self._tokens,
            self._logprobs,
            self._valid,
            self._ended,
            self._stop_ids,
            **options,
        )

    def drawn_by(self, draws: Draws, left: torch.Tensor) -> None:
        """Continue after a decoder's own drawing with the running rows at the indices `left`."""
        self.keep(left)
        self._place, self._last = draws.place, draws.last

    def _ends_in_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n,) bool: the text of each running row, extended by these tokens, ends in a stop string."""
        self._write()
        self._tokens.index_copy_(0, self._place, tokens)
        rows, window = self.running, self._before.shape[1]
        whole = torch.cat([self._before[rows], self._tokens[:-1].view(-1, self.limit)[rows]], 1)
        said = (self._place - rows * self.limit + 1).clamp_max(self.limit)
        # The criteria read the end of each row. Padding precedes a row's first token and decodes to no text.
        places = said.unsqueeze(1) + torch.arange(window, device=rows.device)
        return self._stop_strings(whole.gather(1, places), None)

    def _write(self) -> None:
        """Write drawn tokens to their places."""
        if not self._drawn:
            return
        place, tokens, logprob, ended = (torch.cat(parts) for parts in zip(*self._drawn))
        self._drawn.clear()
        self._tokens.index_copy_(0, place, tokens)
        self._logprobs.index_copy_(0, place, logprob)
        self._ended.index_copy_(0, place, ended)
        self._valid.index_fill_(0, place, True)

    def completions(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens, mask, logprobs, terminated): (B, T') int64, bool, float32, and (B,) bool. Right-padded.

        T' is the length of the longest completion. terminated: the row ended by an end token or a stop string.
        """
        self._write()
        tokens, mask, logprobs, ended = (
            t[:-1].view(self._rows, self.limit)
            for t in (self._tokens, self._valid, self._logprobs, self._ended)
        )
        longest = int(mask.sum(-1).amax())
        return tokens[:, :longest], mask[:, :longest], logprobs[:, :longest], ended.any(-1)
