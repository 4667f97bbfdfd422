"""The values of `conditioning=`: which parameters carry deltas, how many, and whether the prompt states the weighting.

    none        one delta for every weighting: an ordinary fine-tuned model
    lora        linear layers have a delta of rank r per objective: s_i B_i A_i
    full        every weight has a delta per objective
    attention   the attention projections have a whole delta per objective
    logit       the output projection has a delta of rank r per objective (a whole one for a rank of the hidden size or more)
    prompt      one delta for every weighting, and the weighting is written into the prompt

Forms can be combined, as in "attention+prompt" or "lora+logit". Wang et al. ("Conditional Language Policy", 2024) call the
forms that blend parameters full-CLP, attn-CLP and logit-CLP.
"""

from __future__ import annotations

from dataclasses import dataclass

from clp_engine.core.errors import ConfigError

# The carriers in the order in which they claim layers: "lora" leaves out the layers of "full" and "attention".
CARRIERS = ("full", "attention", "logit", "lora")
CONDITIONING = ("none", *CARRIERS, "prompt")


@dataclass(frozen=True)
class Conditioning:
    """A parsed `conditioning=`.

    carriers: the kinds of parameters that have deltas, out of CARRIERS.
    blended: there is one delta per objective, blended by the weighting. Otherwise there is a single delta.
    prompt: the weighting is written into the prompt.
    """

    carriers: tuple[str, ...]
    blended: bool
    prompt: bool

    @classmethod
    def parse(cls, conditioning: str, carrier: str = "lora") -> Conditioning:
        """carrier: the trained parameters if `conditioning` is "none" or "prompt". Raises ConfigError for an invalid form."""
        parts = conditioning.split("+")
        unknown = [part for part in parts if part not in CONDITIONING]
        if unknown or len(set(parts)) != len(parts):
            raise ConfigError(
                f"conditioning={conditioning!r}: expected one of {', '.join(CONDITIONING)}, or several joined by +"
            )
        if "none" in parts and len(parts) > 1:
            raise ConfigError(f"conditioning={conditioning!r}: 'none' stands alone")
        if "full" in parts and (covered := {"attention", "logit", "lora"} & set(parts)):
            raise ConfigError(
                f"conditioning={conditioning!r}: 'full' has every weight already; leave out {', '.join(sorted(covered))}"
            )
        if carrier not in CARRIERS:
            raise ConfigError(f"carrier={carrier!r}: expected one of {', '.join(CARRIERS)}")
        carriers = tuple(c for c in CARRIERS if c in parts)
        if carriers and carrier != "lora":
            raise ConfigError(
                f"carrier={carrier!r} is for conditioning 'none' and 'prompt'; {conditioning!r} says what it trains"
            )
        return cls(carriers or (carrier,), bool(carriers), "prompt" in parts)

    @property
    def has_ranks(self) -> bool:
        return "lora" in self.carriers or "logit" in self.carriers
