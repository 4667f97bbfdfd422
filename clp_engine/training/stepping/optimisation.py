"""The optimiser of a run: made from its settings, clipped, and moved along its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from transformers import get_scheduler

from clp_engine.core.errors import ConfigError
from clp_engine.objectives.objective import Objective
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.training.budget import Budget
from clp_engine.training.parallel import trained_shards
from clp_engine.training.parallel.processes import Parallel
from clp_engine.training.parallel.trained_shards import TrainedShard
from clp_engine.training.settings.groups import OptimiserSettings
from clp_engine.training.stepping.flat_adamw import FlatAdamW, set_slots_of, slots_of


class Optimisation:
    """Optimiser and schedule over the parameters of policy and objective.

    optimizer, scheduler: a user's own, instead of `FlatAdamW` over the adapters and `lr_scheduler_type`; either may be None.
    shards: the adapters of which each process steps one piece, by name; their optimiser is `FlatAdamW`.
    Raises ConfigError where a scheduler cannot take in the objective's own parameters.
    """

    def __init__(
        self,
        policy: ConditionedPolicy,
        objective: Objective,
        settings: OptimiserSettings,
        budget: Budget,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler=None,
        shards: Mapping[str, TrainedShard] = MappingProxyType({}),
    ):
        self._shards, self._device = shards, policy.device
        whole = {n: p for n, p in policy.adapter_parameters().items() if n not in shards}
        self._adapters, self._others = list(whole.values()), list(objective.parameters().values())
        self._named = {**whole, **{n: s.local for n, s in shards.items()}, **objective.parameters()}
        if optimizer is not None and self._others and scheduler is not None:
            raise ConfigError(
                "optimizers: a scheduler of your own knows nothing of the value head of baseline='value'; "
                "give the optimiser alone, or another baseline"
            )
        self.optimizer = optimizer or FlatAdamW(
            self._adapters,
            apart=[shard.local for shard in shards.values()],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        if self._others:
            group = {"params": self._others, "lr": settings.own_learning_rate, "weight_decay": 0.0}
            self.optimizer.add_param_group(group)
        self._tokens = budget.tokens if scheduler is None else None  # over which the schedule runs
        if scheduler is None:
            whole = budget.tokens or budget.steps
            warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * whole)
            scheduler = get_scheduler(
                settings.schedule, self.optimizer, warmup, whole, settings.schedule_options
            )
        self.scheduler = scheduler

    def begin_step(self) -> None:
        """Before the first gradient of a step."""
        if isinstance(self.optimizer, FlatAdamW):
            self.optimizer.bind()

    def add_up(self, parallel: Parallel) -> None:
        """Make every gradient the sum of all processes': one collective for the adapters, one for what the objective trains.
        The backward passes have summed those of the shards."""
        for shard in self._shards.values():
            shard.take_gradient()
        if parallel.count == 1:
            return
        if isinstance(self.optimizer, FlatAdamW):
            parallel.sum_(self.optimizer.flat_gradients)
        else:
            _sum_together(parallel, self._adapters)
        if self._others:
            _sum_together(parallel, self._others)

    def clip(self, max_norm: float, step: int, parallel: Parallel) -> torch.Tensor:
        """Clip the gradients to `max_norm`, 0 for no clipping. Returns the norm of the adapters', unread where the optimiser
        itself leaves out a step whose norm is not finite."""
        limit, flat = max_norm or None, isinstance(self.optimizer, FlatAdamW)
        if flat:
            shards = self._shards.values()
            apart = [trained_shards.norm(shards, parallel, self._device)] if shards else []
            norm = self.optimizer.clip(limit, apart)
        else:
            norm = torch.nn.utils.clip_grad_norm_(self._adapters, limit or math.inf)
            check_norm(norm.item(), step)
        if self._others:
            torch.nn.utils.clip_grad_norm_(self._others, limit or math.inf)
            if flat:  # whose step divides all gradients by the adapters' scale
                torch._foreach_mul_([p.grad for p in self._others], self.optimizer.grad_scale)
        return norm

    def advance_schedule(self, generated_tokens: int) -> None:
        """The learning rate of the next step: by the steps done, or by the share of the token budget used."""
        if self._tokens is not None:
            self.scheduler.last_epoch = min(generated_tokens, self._tokens) - 1
        self.scheduler.step()

    def zero_grad(self) -> None:
        """After a step."""
        self.optimizer.zero_grad(set_to_none=True)
        for shard in self._shards.values():
            shard.parameter.grad = None

    def slots(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(parameter, slot, value) of the optimiser's state, with whole values: every process must iterate over all."""
        for name, parameter in self._named.items():
            for slot, value in slots_of(self.optimizer, parameter).items():
                whole = name not in self._shards or value.dim() == 0
                yield name, slot, value if whole else self._shards[name].joined(value)

    def set_slots(self, name: str, slots: Mapping[str, torch.Tensor]) -> None:
        """The other way round, of one parameter."""
        parameter, shard = self._named[name], self._shards.get(name)
        if shard is not None:
            slots = {n: t if t.dim() == 0 else shard.piece(t).clone() for n, t in slots.items()}
        set_slots_of(self.optimizer, parameter, {n: t.to(parameter.device) for n, t in slots.items()})

    def state_dict(self) -> dict:
        """Of the schedule; the optimiser's slots are tensors, see `slots`."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.scheduler.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr()):
            group["lr"] = rate


@torch.no_grad()
def _sum_together(parallel: Parallel, parameters: Sequence[torch.nn.Parameter]) -> None:
    """The same for parameters whose gradients lie apart. A process without work has none, which counts as zeros."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    parallel.sum_([flat])
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def check_norm(norm: float, step: int) -> None:
    """Raises RuntimeError for a gradient norm that is not finite."""
    if not math.isfinite(norm):
        raise RuntimeError(
            f"the gradient norm is {norm} at step {step}: a reward or log-prob is not "
            "finite, or the learning rate is too high; the parameters are those of the step before"
        )
