"""The mix of two unbiased gradients that had the least variance in earlier steps; any mix of the two is unbiased."""

from __future__ import annotations

import math


class MixController:
    """The share of `exact` in `mixed` that had the least variance in earlier steps.

    g1 (`return`) and g2 (`exact`) have the same mean, so E|g1 + c (g2 - g1)|^2, and with it the variance,
    is least at

        c* = E[g1 . (g1 - g2)] / E|g1 - g2|^2

    Both expectations are running averages (`decay` per step); c is their ratio, clamped to [0, 1], and
    `initial` before the first step. A step must use `mix` as it stood before the step's own update: a
    coefficient that depends on the step's samples would bias the gradient.

    The trainer gives sums over tokens of per-token gradients at the head's hidden states: a stand-in for
    the parameter gradient (it leaves out the correlation between tokens), computed from what the backward
    pass holds already. Any mix is unbiased, so the stand-in costs variance at worst, never bias.
    """

    def __init__(self, initial: float = 0.5, decay: float = 0.95):
        if not 0 <= initial <= 1 or not 0 <= decay < 1:
            raise ValueError(
                f"MixController needs initial in [0, 1] and decay in [0, 1); got {initial} and {decay}"
            )
        self.initial, self.decay = float(initial), float(decay)
        self.dot = self.norm = 0.0

    @property
    def mix(self) -> float:
        if self.norm == 0.0:
            return self.initial
        return min(1.0, max(0.0, self.dot / self.norm))

    def update(self, dot: float, norm: float) -> float:
        """Takes in a step's sum of g1 . (g1 - g2) and of |g1 - g2|^2; returns the mix for the next step."""
        dot, norm = float(dot), float(norm)
        if not (math.isfinite(dot) and math.isfinite(norm)) or norm < 0:
            raise ValueError(
                f"MixController.update needs finite sums with norm >= 0; got dot={dot}, norm={norm}"
            )
        # Both averages start at zero, so what they lack in the first steps cancels in their ratio.
        self.dot = self.decay * self.dot + (1 - self.decay) * dot
        self.norm = self.decay * self.norm + (1 - self.decay) * norm
        return self.mix

    def state_dict(self) -> dict[str, float]:
        return {"dot": self.dot, "norm": self.norm}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if set(state) != {"dot", "norm"}:
            raise ValueError(
                f"state of a MixController has the keys dot and norm; "
                f"got {', '.join(sorted(state)) or 'none'}"
            )
        self.dot, self.norm = float(state["dot"]), float(state["norm"])
