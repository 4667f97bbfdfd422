"""The kernels in a loop written by hand: clp_kernels and torch, nothing else of this package.

    python examples/kernel_loop.py [--quick]

A recurrent policy with frozen weights writes six tokens. Two objectives own a low-rank adapter each: one wants tokens of the
vocabulary's first third, the other one of its last. Every row of a batch has a weighting of its own, drawn anew each step:

    h_t = tanh(multi_lora_linear([h_(t-1), embedding of y_(t-1)]))         the row's blend of the adapters
    J   = w.R(y) - beta * sum_t KL(pi(.|y_<t) || pi_ref(.|y_<t))           exact, over the whole vocabulary

The reference is the same layer with a gate of zeros. The gradient of the KL has two parts: of KL_t itself, and of its
expectation over the tokens drawn before, which is a score-function term with the KL still to come.
"""

from __future__ import annotations

import argparse

import torch
from clp_kernels import expand_gate, linear_logprob, multi_lora_linear, sample_tokens
from torch import Tensor

HIDDEN, VOCAB, LENGTH, RANK = 64, 150, 6, 8
BETA = 0.05


def rewards(tokens: Tensor) -> Tensor:
    """(rows, 2): the share of small tokens, and of large ones."""
    return torch.stack([tokens < VOCAB / 3, tokens >= 2 * VOCAB / 3], -1).float().mean(1)


class Policy:
    """Frozen weights, and two adapters that start as nothing (B is zero)."""

    def __init__(self, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw) / shape[-1] ** 0.5

        self.embedding = torch.randn(VOCAB + 1, HIDDEN, generator=draw)  # the last one is the start token's
        self.weight, self.head = normal(HIDDEN, 2 * HIDDEN), 2 * normal(VOCAB, HIDDEN)
        self.lora_a = normal(2 * RANK, 2 * HIDDEN).requires_grad_()
        self.lora_b = torch.zeros(HIDDEN, 2 * RANK, requires_grad=True)
        self.parameters = [self.lora_a, self.lora_b]

    def step(self, state: Tensor, last: Tensor, gate: Tensor) -> Tensor:
        """(rows, HIDDEN): the state that predicts the next token, each row under its own row of `gate`."""
        read = torch.cat([state, self.embedding[last]], -1)
        return multi_lora_linear(read, self.weight, self.lora_a, self.lora_b, gate).tanh()

    def states(self, tokens: Tensor, gate: Tensor) -> Tensor:
        """(rows, LENGTH, HIDDEN): what predicts each token of completions that are there already."""
        rows = len(tokens)
        state, last, found = torch.zeros(rows, HIDDEN), torch.full((rows,), VOCAB), []
        for t in range(LENGTH):
            state = self.step(state, last, gate)
            found.append(state)
            last = tokens[:, t]
        return torch.stack(found, 1)

    @torch.no_grad()
    def sample(self, gate: Tensor, generator: torch.Generator) -> Tensor:
        """(rows, LENGTH) tokens."""
        rows = len(gate)
        state, last, drawn = torch.zeros(rows, HIDDEN), torch.full((rows,), VOCAB), []
        for _ in range(LENGTH):
            state = self.step(state, last, gate)
            last, _ = sample_tokens(state @ self.head.t(), generator=generator)
            drawn.append(last)
        return torch.stack(drawn, 1)


def gate_of(weights: Tensor) -> Tensor:
    """(rows, 2 RANK): each weight as often as its adapter has ranks, times lora_alpha / rank = 2."""
    return expand_gate(weights, ranks=(RANK, RANK), scalings=(2.0, 2.0))


def loss_of(policy: Policy, weights: Tensor, tokens: Tensor, group: int) -> Tensor:
    """Its gradient is an unbiased estimate of that of -J, averaged over rows; `group` rows in a row share a weighting."""
    gate = gate_of(weights)
    hidden = policy.states(tokens, gate)
    with torch.no_grad():
        reference = policy.states(tokens, torch.zeros_like(gate))
    stats = linear_logprob(
        hidden, policy.head, tokens, ref_hidden=reference, outputs=("logprob", "kl")
    )  # both (rows, LENGTH)
    with torch.no_grad():
        to_come = stats.kl.sum(-1, keepdim=True) - stats.kl.cumsum(-1)  # after token t
        returns = (weights * rewards(tokens)).sum(-1, keepdim=True) - BETA * to_come  # (rows, LENGTH)
        groups = returns.view(-1, group, LENGTH)
        others = (groups.sum(1, keepdim=True) - groups) / (group - 1)  # leave-one-out baseline
        advantage = (groups - others).view_as(returns)
    return -(advantage * stats.logprob - BETA * stats.kl).sum(-1).mean()


def measure(policy: Policy, weights: tuple[float, float], seed: int = 1, rows: int = 512) -> list[float]:
    """Mean of both rewards at one weighting."""
    gate = gate_of(torch.tensor([weights]).expand(rows, 2).contiguous())
    return rewards(policy.sample(gate, torch.Generator().manual_seed(seed))).mean(0).tolist()


def main(quick: bool = False) -> dict[tuple[float, float], tuple[list[float], list[float]]]:
    """Train; returns the rewards before and after at three weightings."""
    prompts, group, steps = 16, 8, 150 if quick else 400
    policy, draw = Policy(), torch.Generator().manual_seed(0)
    asked = [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    before = [measure(policy, weights) for weights in asked]
    optimizer = torch.optim.AdamW(policy.parameters, lr=2e-2, weight_decay=0.0)
    for step in range(steps):
        first = torch.rand(prompts, 1, generator=draw)
        weights = torch.cat([first, 1 - first], -1).repeat_interleave(group, 0)  # (rows, 2)
        tokens = policy.sample(gate_of(weights), draw)
        loss = loss_of(policy, weights, tokens, group)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            print(f"step {step + 1}: mean w.R of this batch {(weights * rewards(tokens)).sum(-1).mean():.3f}")
    after = [measure(policy, weights) for weights in asked]
    print("\nweights        small, large before   after")
    for weights, old, new in zip(asked, before, after):
        print(f"{weights}     {old[0]:.2f}, {old[1]:.2f}           {new[0]:.2f}, {new[1]:.2f}")
    return {weights: (old, new) for weights, old, new in zip(asked, before, after)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    main(parser.parse_args().quick)
