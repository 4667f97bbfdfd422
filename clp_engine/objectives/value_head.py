"""A learned baseline: what the return from a token on is expected to be, before that token is known.

    V(x, y_<t; w, kl) = location + spread * f([rms_norm(h_t), w, reward_scale, kl_coef])
    f(z) = v . silu(U z + b) + c,     U (WIDTH, H + M + 2)

h_t is the policy's hidden state that predicts token t. It is a function of the prompt, the condition and the tokens before t,
so V leaves the expected gradient as it is (`coefficients`, baseline "value"). One completion per prompt is enough.

The head is fitted by least squares to the observed returns to go G_t, in units of their running location and spread:

    loss = mean_t ((G_t - V_t) / spread)^2

The hidden states are detached, so the head's error does not move the policy. The two share no parameter, so the head's loss
needs no coefficient beside the head's learning rate. A step uses V as it was before the step's own update: a head that was
fitted to these completions would know something of their tokens, and would bias the gradient.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from clp_engine.core import seeds

WIDTH = 128
DECAY = 0.98  # per step, of the running moments


class ValueHead(nn.Module):
    """V for tokens with hidden states (N, H) and conditions (N, M + 2); float32. Starts as `location` alone, at 0."""

    moments: torch.Tensor

    def __init__(self, hidden_size: int, num_objectives: int, seed: int = 0):
        super().__init__()
        self.hidden = nn.Linear(hidden_size + num_objectives + 2, WIDTH)
        self.output = nn.Linear(WIDTH, 1)
        with torch.no_grad():
            bound = self.hidden.in_features**-0.5
            self.hidden.weight.uniform_(
                -bound, bound, generator=seeds.generator(seed, seeds.Stream.VALUE_HEAD)
            )
            for zero in (self.hidden.bias, self.output.weight, self.output.bias):
                zero.zero_()
        # Decayed sums of 1, G and G^2 over the returns of earlier steps.
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))

    @staticmethod
    def features(weights: torch.Tensor, reward_scale: torch.Tensor, kl_coef: torch.Tensor) -> torch.Tensor:
        """What the head is told of the condition: w (rows, M) and the factors (rows,) of the objective, (rows, M + 2)."""
        return torch.cat([weights, reward_scale.unsqueeze(-1), kl_coef.unsqueeze(-1)], -1)

    @property
    def location(self) -> float:
        count, total, _ = self.moments.tolist()
        return total / count if count else 0.0

    @property
    def spread(self) -> float:
        """Standard deviation of the returns of earlier steps; 1 before the first, and where they were all equal."""
        count, _, square = self.moments.tolist()
        variance = square / count - self.location**2 if count else 0.0
        # Rounding leaves a little of a variance of zero.
        return variance**0.5 if variance > 1e-12 * max(1.0, self.location**2) else 1.0

    def forward(self, hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """V of each token, (N,) float32."""
        hidden = functional.rms_norm(hidden.detach().float(), hidden.shape[-1:])
        inputs = torch.cat([hidden, features.to(hidden)], -1)
        return self.location + self.spread * self.output(functional.silu(self.hidden(inputs))).squeeze(-1)

    def loss(self, values: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
        """Squared errors, summed over tokens, in units of the spread."""
        return ((values - returns) / self.spread).square().sum()

    @torch.no_grad()
    def observe(self, returns: torch.Tensor) -> None:
        """Take the returns (N,) of a step into the running moments, when the step is over."""
        returns = returns.double()
        now = torch.stack([torch.ones_like(returns).sum(), returns.sum(), returns.square().sum()])
        self.moments.mul_(DECAY).add_(now.to(self.moments))


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
    """1 - Var(G - V) / Var(G), a scalar: 1 is a perfect prediction, 0 as good as a constant; NaN where G does not vary."""
    spread = returns.var(unbiased=False)
    return torch.where(spread > 0, 1 - (returns - values).var(unbiased=False) / spread, torch.nan)
