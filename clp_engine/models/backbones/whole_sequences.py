"""Causal models with attention, masks or caches that the engine cannot drive in parts (ALiBi, state spaces, hybrids, ...).

The completions of a prompt share nothing. Each is scored as one whole sequence, and transformers' own `generate`, which knows
the model's cache, writes each completion. Tokens are drawn from the same seeds as on the fast path, so that the results agree.
The price is that every prompt is computed once per completion.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from clp_engine.core.errors import ConfigError
from clp_engine.models.backbones.base import Backbone, difference
from clp_engine.models.text_path import text_stack

# logits (rows, V) -> (tokens (rows,), whether all rows have ended)
Draw = Callable[[torch.Tensor], tuple[torch.Tensor, bool]]


class WholeSequenceBackbone(Backbone):
    """A causal model whose sequences run whole. reason: why the model cannot be driven in parts, for messages."""

    shares_prompts = False

    def __init__(self, model: PreTrainedModel, reason: str):
        super().__init__(model)
        self.packing_fault = reason
        self.decoder = text_stack(model)
        if self.decoder is model:
            raise ConfigError(
                f"{type(model).__name__} has no decoder stack under it; a causal language model is needed"
            )

    def whole(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        completion_ids: torch.Tensor,
        valid: torch.Tensor,
    ) -> torch.Tensor:
        """(B, T, H): the hidden state that predicts each token of completions (B, T) after left-padded prompts (B, S)."""
        ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, valid], 1)
        # All padding goes behind the tokens, where a causal model does not see it, however the model treats masks.
        order = (~mask).long().argsort(dim=-1, stable=True)
        longest = int(mask.sum(-1).max())
        ids, mask = ids.gather(1, order)[:, :longest], mask.gather(1, order)[:, :longest]
        hidden = self.decoder(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        steps = torch.arange(completion_ids.shape[1], device=ids.device)
        at = (prompt_mask.sum(-1, keepdim=True) - 1 + steps).clamp_max(longest - 1)
        return hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

    def generate(self, prompt_ids: torch.Tensor, rows: int, steps: int, draw: Draw) -> None:
        """Write `rows` completions of one unpadded prompt (1, S), at most `steps` tokens each. `draw` draws every token."""
        drawn = _Drawn(draw)
        with _without_own_settings(self.model):
            self.model.generate(
                prompt_ids.expand(rows, -1),
                attention_mask=torch.ones_like(prompt_ids).expand(rows, -1),
                generation_config=GenerationConfig(max_new_tokens=steps, do_sample=False),
                logits_processor=LogitsProcessorList([drawn]),
                stopping_criteria=StoppingCriteriaList([drawn.ended]),
            )

    def check_head(self) -> None:
        ids = self._probe()
        mask = torch.ones_like(ids, dtype=torch.bool)
        with torch.no_grad():
            expected = self._plain_logits(ids[:, :3], ids[:, 3:])
            try:
                ours = self.head.logits(self.whole(ids[:, :3], mask[:, :3], ids[:, 3:], mask[:, 3:]))
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                raise ConfigError(f"{type(self.model).__name__} cannot be used: {error}") from error
        self._compare(ours, expected)
        self._check_causal(ids, expected)

    def _check_causal(self, ids: torch.Tensor, expected: torch.Tensor) -> None:
        """Raises ConfigError if another last token changes the logits `expected` of earlier tokens.

        A prefix language model (PaliGemma) is of that kind: later tokens would affect the scores of a completion's tokens.
        """
        other = ids.clone()
        other[:, -1] = ids[:, 0]
        with torch.no_grad():
            changed = difference(self._plain_logits(other[:, :3], other[:, 3:]), expected)
        if changed:
            raise ConfigError(
                f"{type(self.model).__name__} attends to tokens that come later (its logits change by {changed:.3g} with the "
                "token after them), so that completions have no log-probs token by token; it cannot be used"
            )

    def prefill(self, prompt_ids, prompt_mask):
        raise ConfigError(f"{type(self.model).__name__} runs whole sequences alone: {self.packing_fault}")

    def extend(self, context, ids, valid=None):
        raise ConfigError(f"{type(self.model).__name__} runs whole sequences alone: {self.packing_fault}")

    def _plain_logits(self, prompt_ids: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(torch.cat([prompt_ids, completion_ids], 1)).logits
        return logits[:, prompt_ids.shape[1] - 1 : -1]


class _Drawn(LogitsProcessor):
    """Masks all logits but that of the token drawn by `draw`, which a greedy generate then takes."""

    def __init__(self, draw: Draw):
        self._draw, self._all_ended = draw, False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        tokens, self._all_ended = self._draw(scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.unsqueeze(1), 0.0)

    def ended(self, input_ids: torch.LongTensor, scores, **_) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._all_ended, device=input_ids.device)


@contextlib.contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Disable the settings of the model's own generation config inside the block."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
