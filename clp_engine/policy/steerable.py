"""A conditioned model that is steered in terms of objectives: weights and a KL coefficient become the coefficients of a blend.

    c = c(alpha) * w,      theta(w, alpha) = theta_ref + sum_i c_i Delta_i

This module has the part of a policy that rollouts, scoring and generation need. `policy` builds and saves policies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from clp_kernels import TokenStats
from transformers import PreTrainedModel

from clp_engine.core.conditions import Conditions
from clp_engine.data.positions import Room
from clp_engine.models.conditioned import ConditionedModel
from clp_engine.models.forms import Conditioning
from clp_engine.policy.spec import PolicySpec
from clp_engine.policy.steering import Steering
from clp_engine.rollouts import texts
from clp_engine.rollouts.scoring import hidden_states
from clp_engine.rollouts.types import Profile, Rollout


class SteerableModel(ConditionedModel, Steering):
    """A model with one delta per objective, steered per row. It is the base class of `ConditionedPolicy`."""

    def __init__(self, model: PreTrainedModel, spec: PolicySpec, tokenizer=None, seed: int = 0):
        conditioning = Conditioning.parse(spec.conditioning, spec.carrier)
        if tokenizer is not None:  # checked before the model is changed
            Room.of(model).check_tokenizer(tokenizer)
        super().__init__(model, conditioning, spec.target_modules, spec.ranks, spec.scalings, seed)
        self.spec, self._tokenizer = spec, tokenizer
        self.loaded_from: list[Path] = []  # folders of the adapters that the policy was loaded from

    engine = None  # the engine that draws, see `rollouts.types.RolloutEngine`; None: the fastest that serves the model

    # -- properties ---------------------------------------------------------------------------------------------------

    @property
    def read_from(self) -> list[Path]:
        """The folders that this policy was loaded from, and its base model's, which are needed to load it again."""
        bases = {self.spec.base_model, self.model.config.name_or_path or ""}
        return [*self.loaded_from, *(Path(base) for base in sorted(bases) if base and Path(base).is_dir())]

    @property
    def tokenizer(self):
        """The tokenizer. Setting it raises ConfigError if a special token has no embedding, see `Room.check_tokenizer`."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer) -> None:
        if tokenizer is not None:
            self.room.check_tokenizer(tokenizer)
        self._tokenizer = tokenizer

    @property
    def conditioned(self) -> ConditionedModel:
        return self

    @property
    def profile(self) -> Profile:
        """The properties that a caller needs before it asks for completions."""
        spec = self.spec
        return Profile(
            spec.objectives,
            spec.kl_is_beta,
            spec.default_kl,
            spec.base_model,
            self.tokenizer,
            self.pad_token_id,
            self.stop_token_ids,
            self.room,
        )

    @property
    def stop_token_ids(self) -> list[int]:
        """End tokens of the generation config and the tokenizer. Generation stops at any of them."""
        ids = []
        for source in (self.model.generation_config, self.model.config, self.tokenizer):
            value = getattr(source, "eos_token_id", None)
            ids += value if isinstance(value, list) else [] if value is None else [value]
        return sorted(set(ids))

    @property
    def pad_token_id(self) -> int:
        for source in (self.tokenizer, self.model.generation_config, self.model.config):
            if (value := getattr(source, "pad_token_id", None)) is not None:
                return value
        return (self.stop_token_ids or [0])[0]

    # -- conditions ---------------------------------------------------------------------------------------------------

    def coefficients(self, conditions: Conditions | None) -> torch.Tensor | None:
        """The blend (rows, D) on the model's device, one coefficient per delta, or None if every row is the reference."""
        if conditions is None or not bool(conditions.weights.any()):
            return None
        return self.blending.coefficients(conditions).to(self.device)

    @contextlib.contextmanager
    def blended(self, conditions: Conditions | None) -> Iterator[None]:
        """Run row i of every batch under conditions[i] inside the block. None means the base model."""
        with self.blend.use(self.coefficients(conditions)):
            yield

    # -- computing ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor,
        *args,
        weights=None,
        kl=None,
        conditions: Conditions | None = None,
        **kwargs,
    ):
        """The transformers model's forward, with row i under its own (w, kl).

        Give `conditions`, or `weights` and `kl` as for `conditions()`. An encoder-decoder takes `decoder_input_ids=` as well.
        """
        conditions = conditions or self.conditions(weights, kl, input_ids.shape[0])
        if not torch.compiler.is_compiling():
            self.room.check_ids([int(input_ids.min()), int(input_ids.max())], "input_ids", self.tokenizer)
        with self.blended(conditions):
            return self.model(input_ids, *args, **kwargs)

    def completion_hidden(
        self, batch: Rollout, conditions: Conditions | None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, H): the hidden state that predicts each completion token, see `scoring.hidden_states`.

        conditions: one row per prompt, or None for the base model. Differentiable in the adapters.
        """
        return hidden_states(self, batch, self.coefficients(conditions), mask)

    def token_stats(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *,
        ref_hidden: torch.Tensor | None = None,
        conditions: Conditions | None = None,
        temperature: float = 1.0,
        outputs: Sequence[str] = ("logprob",),
        differentiable: Sequence[str] | None = None,
    ) -> TokenStats:
        """`linear_logprob` through this model's output projection, for hidden (rows, H) and targets (rows,).

        conditions: one per row, needed only if the output projection itself is conditioned.
        """
        return self.stats_under(
            self.coefficients(conditions) if self.conditions_output else None,
            hidden,
            targets,
            ref_hidden=ref_hidden,
            temperature=temperature,
            outputs=outputs,
            differentiable=differentiable,
        )

    def generate(self, prompts: str | Sequence, weights=None, kl=None, **options) -> list:
        """Completions of prompts, each under its own weighting.

        prompts: a text or a chat (a list of messages), or a list of either.
        weights, kl: one for all prompts or one per prompt (see `conditions`).
        options: those of `texts.generate`: max_new_tokens, temperature, top_k, top_p, min_p, stop_strings,
            num_return_sequences, max_rows, seed.

        Returns one string per prompt or, for num_return_sequences > 1, one list of strings per prompt. Any thread may call
        this. Calls run one after another.
        """
        return texts.generate(self, prompts, weights, kl, **options)
