"""What a training step learns from: prompts, a condition for each, a group of completions and their rewards.

Every random draw comes from (seed, step, purpose): the batch of a step can be drawn again by anyone who knows its number.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.trainer_callback import TrainerState

from clp_engine.core import seeds
from clp_engine.core.conditions import Conditions
from clp_engine.core.files import append_text
from clp_engine.data.prompts import PromptBatch, Prompts, completion_texts
from clp_engine.data.rewards import PendingRewards, RewardSet
from clp_engine.objectives.advantages import scalarise
from clp_engine.objectives.coefficients import needs_reference
from clp_engine.objectives.weightings import ConditionSampler
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.types import Rollout, SamplingParams
from clp_engine.training.collecting import reference_states
from clp_engine.training.config import CLPConfig
from clp_engine.training.stepping.metrics import PhaseTimer, completion_metrics, reward_metrics

# Counters that keep the uses of one seed apart (data.py has 1).
_CONDITIONS, _TOKENS, _EVAL = 2, 3, 4


@dataclass
class Generation:
    """Completions, rewarded, and what the passes over them keep.

    rewards: (B, M); scalar: (B,) w.R, times the sum of reward_weights where they are given; metrics: of everything that was
        drawn.
    new_tokens: completion tokens drawn for it; others than its own where partial rollouts go on (`partial_rollouts`).
    reference: of each completion (n_b, H) or None, the reference's hidden states, where `reference_states` had them computed.
    advantage: (B,), taken from whole groups where `rollout` has a part of them alone (`rollout_selection`), or None.
    token_share: of each group's tokens that stay in the loss (`rollout_selection`).
    old_logprob: (B, T), what the tokens were sampled with, where the policy has moved since (`rollout.logprobs`); None in
        the pass of the policy that sampled them, whose ratio is one by construction.
    passes: over these completions so far. values: (B, T), of a value head, from the first of them.
    """

    rollout: Rollout
    conditions: Conditions
    rewards: torch.Tensor
    scalar: torch.Tensor
    metrics: dict[str, float]
    new_tokens: int
    reference: list[torch.Tensor | None] | None = None
    advantage: torch.Tensor | None = None
    token_share: float = 1.0
    old_logprob: torch.Tensor | None = None
    passes: int = 0
    values: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens read and written: each prompt once per completion, and the completions."""
        return int(self.rollout.counts[0].sum()) * self.rollout.group + self.num_generated_tokens

    @property
    def num_generated_tokens(self) -> int:
        return self.rollout.tokens

    def split(self, count: int) -> list[Generation]:
        """`count` parts of as many prompts each, one for each optimiser step; before any pass."""
        if count == 1:
            return [self]
        prompts, group = len(self.conditions) // count, self.rollout.group
        parts = []
        for start in range(0, count * prompts, prompts):
            rows = slice(start * group, (start + prompts) * group)
            reference, advantage = (None if t is None else t[rows] for t in (self.reference, self.advantage))
            parts.append(
                Generation(
                    self.rollout.prompts(start, start + prompts),
                    self.conditions[start : start + prompts],
                    self.rewards[rows],
                    self.scalar[rows],
                    self.metrics,
                    self.new_tokens,
                    reference,
                    advantage,
                    self.token_share,
                )
            )
        return parts


class Collector:
    """Draws the batches of a run, as its settings say.

    `timer` counts the phases "rollout", "reference" (computed while the reward functions run), "reward" (in which at least
    one of them ran), "reward/<name>" (of each) and "reward_wait" (in which nothing else happened).

    The methods' `state` is what the reward functions receive as `trainer_state`.
    """

    def __init__(
        self,
        policy: ConditionedPolicy,
        rewards: RewardSet,
        sampler: ConditionSampler,
        tokenizer,
        args: CLPConfig,
        timer: PhaseTimer,
    ):
        self.policy, self.rewards, self.sampler = policy, rewards, sampler
        self.tokenizer, self.args, self.timer = tokenizer, args, timer
        self.sampling = SamplingParams(
            args.max_completion_length,
            args.temperature,
            args.top_k,
            args.top_p,
            args.min_p,
            tuple(args.stop_strings or ()),
        )

    def training_batch(self, dataset: Prompts, step: int, state: TrainerState) -> Generation:
        """Prompts, conditions, completions and rewards of the rollout that optimiser step `step` starts with."""
        batch, conditions, row_seeds = self.planned(dataset, step)
        order = self.arranged(batch.token_ids)
        batch, conditions = batch.taken(order), conditions[order]
        drawn = self.draw(batch, conditions, row_seeds[order].view(-1))
        return self.rewarded_batch(batch, conditions, drawn, step, state)

    def planned(self, dataset: Prompts, step: int) -> tuple[PromptBatch, Conditions, torch.Tensor]:
        """What that rollout is to draw, in the order of the data: P prompts, their conditions, row seeds (P, group)."""
        a = self.args
        prompts = a.rollout_size // a.num_generations
        position = step // a.steps_per_rollout * prompts
        batch = dataset.batch(dataset.indices(position, prompts, a.seed, a.shuffle_dataset))
        conditions = self.sampler.sample(prompts, seeds.generator(a.seed, _CONDITIONS, step))
        row_seeds = seeds.derive(a.seed, _TOKENS, step, torch.arange(a.rollout_size))
        return batch, conditions, row_seeds.view(prompts, -1)

    def arranged(self, token_ids: list[list[int]]) -> list[int]:
        """An order in which prompts of like length share a micro-batch, within the part of each optimiser step. It changes
        nothing else, since every prompt draws for itself."""
        per_step = self.args.batch_size // self.args.num_generations
        return sorted(range(len(token_ids)), key=lambda i: (i // per_step, len(token_ids[i])))

    def rewarded_batch(
        self,
        batch: PromptBatch,
        conditions: Conditions,
        drawn: Rollout,
        step: int,
        state: TrainerState,
        new_tokens: int | None = None,
    ) -> Generation:
        """A rollout to train on, with its rewards and what was computed while they were."""
        generation = self._rewarded(batch, conditions, drawn, state, for_training=True)
        if new_tokens is not None:
            generation.new_tokens = new_tokens
        if self.args.log_completions:
            self._write_completions(batch, generation, step)
        return generation

    def evaluation_batch(self, batch: PromptBatch, start: int, state: TrainerState) -> Generation:
        """Rows of an evaluation set from row `start` on, the same conditions and random numbers every time."""
        a, rows = self.args, len(batch.prompts)
        conditions = self.sampler.sample(rows, seeds.generator(a.seed, _EVAL, start))
        row_seeds = seeds.derive(a.seed, _EVAL, start, torch.arange(rows * a.evaluation_group))
        return self._rewarded(batch, conditions, self.draw(batch, conditions, row_seeds), state)

    def draw(self, batch: PromptBatch, conditions: Conditions, row_seeds: torch.Tensor) -> Rollout:
        """Completions of each prompt, one per row seed."""
        with self.timer("rollout"):
            return rollout(
                self.policy,
                batch.token_ids,
                conditions,
                num_generations=len(row_seeds) // len(batch.prompts),
                sampling=self.sampling,
                row_seeds=row_seeds,
                prompts=batch.prompts,
                max_rows=self.args.rollout_rows,
            )

    def _rewarded(
        self,
        batch: PromptBatch,
        conditions: Conditions,
        drawn: Rollout,
        state: TrainerState,
        for_training: bool = False,
    ) -> Generation:
        started, reference = time.perf_counter(), None
        pending = self._start_rewards(batch, drawn, state)
        asked = time.perf_counter() - started  # with functions that run in this thread
        needed = needs_reference(conditions.kl, self.args.log_kl) or not self.policy.moves_hidden
        if for_training and needed:
            with self.timer("reference"):
                reference = reference_states.reference_hidden(self.policy, drawn, self.args)
        started = time.perf_counter()
        rewards = pending.result()
        seconds = self.timer.seconds
        seconds["reward_wait"] += asked + time.perf_counter() - started
        seconds["reward"] += pending.busy
        for name, spent in pending.seconds.items():
            seconds[f"reward/{name}"] += spent
        each = conditions.repeat(drawn.group)
        scalar = scalarise(rewards, each.weights) * self.args.reward_scale
        metrics = completion_metrics(drawn) | reward_metrics(
            self.rewards.names, rewards, scalar, each, drawn.group
        )
        self._extra_columns = pending.columns
        return Generation(
            drawn,
            conditions,
            rewards,
            scalar.to(self.policy.device),
            metrics | pending.metrics,
            drawn.tokens,
            reference,
        )

    def _start_rewards(self, batch: PromptBatch, drawn: Rollout, state: TrainerState) -> PendingRewards:
        prompts, columns = batch.repeated(drawn.group)
        token_lists = drawn.token_lists()
        texts = completion_texts(self.tokenizer, token_lists, prompts)
        return self.rewards.start(prompts, texts, token_lists, columns, trainer_state=state)

    def _write_completions(self, batch: PromptBatch, generation: Generation, step: int) -> None:
        drawn, rewards = generation.rollout, generation.rewards
        prompts, _ = batch.repeated(drawn.group)
        texts = completion_texts(self.tokenizer, drawn.token_lists(), prompts)
        weights = generation.conditions.repeat(drawn.group).weights.tolist()
        lines = []
        for i, (prompt, text) in enumerate(zip(prompts, texts)):
            row = {
                "step": step,
                "prompt": prompt,
                "completion": text,
                "weights": dict(zip(self.rewards.names, weights[i])),
                "rewards": {
                    n: None if math.isnan(r) else r for n, r in zip(self.rewards.names, rewards[i].tolist())
                },
                **{name: column[i] for name, column in self._extra_columns.items()},
            }
            lines.append(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        append_text(Path(self.args.output_dir) / "completions.jsonl", "".join(lines))
