"""How a policy is asked: the blend that a user's weights and KL coefficient come to, and what they write into a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from clp_engine.core.conditions import Blending, Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.models.forms import Conditioning
from clp_engine.policy import prompt_conditioning
from clp_engine.policy.spec import SPEC_FILE, PolicySpec, read_spec


class Steering:
    """The part of a policy that a caller asks. Classes with it have `spec`, `conditioning` and `tokenizer`."""

    spec: PolicySpec
    conditioning: Conditioning
    tokenizer: Any

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.spec.objectives

    @property
    def kl_is_beta(self) -> bool:
        return self.spec.kl_is_beta

    @property
    def blending(self) -> Blending:
        spec = self.spec
        return Blending(
            spec.objectives,
            self.conditioning.blended,
            spec.kl_conditioning,
            spec.min_kl,
            spec.default_kl,
            spec.kl_is_beta,
        )

    def conditions(self, weights=None, kl=None, rows: int = 1) -> Conditions:
        """Per-row conditions from a user's weights and KL coefficients.

        weights: a mapping by name, a sequence of M numbers, a list of either with one per row, a (rows, M) tensor, or None
            (uniform).
        kl: a number, one per row, or None (`spec.default_kl`).

        Raises ConfigError naming the invalid value.
        """
        return self.blending.conditions(weights, kl, rows)

    def prompt_text(self, weights=None, kl=None) -> str:
        """The text that prompt conditioning writes into a prompt at one weighting. Empty for other policies."""
        return self._prompt_texts(self.conditions(weights, kl))[0]

    def _prompt_texts(self, conditions: Conditions) -> list[str]:
        """The text for each row's prompt. Empty for a blend of zero: such a row is the reference and reads the plain prompt."""
        moved = self.conditioning.prompt and bool(conditions.weights.any())
        blend = self.blending.coefficients(conditions) if moved else None
        if blend is None:
            return [""] * len(conditions)
        return [
            prompt_conditioning.weighting_text(self.spec.prompt_template, self.objectives, weights, kl)
            if moved
            else ""
            for weights, kl, moved in zip(
                conditions.weights.tolist(), conditions.kl.tolist(), blend.any(-1).tolist(), strict=True
            )
        ]

    def shown_prompts(
        self, prompt_ids: Sequence[Sequence[int]], conditions: Conditions, prompts: Sequence | None = None
    ) -> list[list[int]] | None:
        """The tokens that the policy reads for each prompt under its condition. None without prompt conditioning.

        prompts: the texts or chats that prompt_ids were made from, needed for chat messages. Reference rows read the plain
            prompt.
        """
        if not self.conditioning.prompt:
            return None
        if self.tokenizer is None:
            raise ConfigError(
                "prompt conditioning needs a tokenizer; give one to from_pretrained(tokenizer=...)"
            )
        asked = [None] * len(prompt_ids) if prompts is None else prompts
        return [
            prompt_conditioning.with_weighting(prompt, ids, text, self.tokenizer) if text else list(ids)
            for prompt, ids, text in zip(asked, prompt_ids, self._prompt_texts(conditions), strict=True)
        ]


@dataclass(frozen=True)
class Description(Steering):
    """A saved policy whose weights are elsewhere, as on a server."""

    spec: PolicySpec
    tokenizer: Any

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning.parse(self.spec.conditioning, self.spec.carrier)

    @classmethod
    def read(cls, directory: Path) -> Description:
        """The policy in a folder that `save_pretrained` wrote, with its tokenizer or the base model's.

        Raises ConfigError for a damaged file, and without a tokenizer.
        """
        spec = read_spec(directory / SPEC_FILE)
        own = (directory / "tokenizer_config.json").is_file()
        try:
            return cls(spec, AutoTokenizer.from_pretrained(directory if own else spec.base_model))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{directory}: the policy's tokenizer cannot be loaded ({str(error).strip().splitlines()[0]}); save the policy "
                "with one"
            ) from error
