"""Rollouts to batches: rewards, and the reference's hidden states computed while the reward functions run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer_callback import TrainerState

from clp_engine.core.conditions import Conditions
from clp_engine.core.files import append_text
from clp_engine.data.prompts import PromptBatch, completion_texts
from clp_engine.data.rewards import PendingRewards, RewardSet
from clp_engine.objectives.advantages import scalarise
from clp_engine.objectives.objective import Objective
from clp_engine.objectives.weightings import Weighting
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.policy.references import Reference
from clp_engine.rollouts.types import Rollout
from clp_engine.training.collecting import reference_states
from clp_engine.training.collecting.batches import TrainingBatch
from clp_engine.training.collecting.dealt import Rewarded, dealt, rewarded_by_all
from clp_engine.training.metrics import PhaseTimer, completion_metrics, reward_metrics
from clp_engine.training.parallel.dealing import Shares
from clp_engine.training.parallel.processes import Parallel
from clp_engine.training.settings.groups import MicroBatching


class Rewarding:
    """Rewards the completions of a run. Each process of several rewards its share (`dealt`), and holds the rewards of all.

    reward_scale: what w.R is multiplied by. completions_file: where the completions of training are written to, or None.
    prompts_per_step: prompts of one optimiser step; None: those of the whole rollout.
    `timer` counts the phases "reference" (computed while the reward functions run), "reward" (in which at least one of them
    ran), "reward/<name>" (of each) and "reward_wait" (in which nothing else happened).
    """

    def __init__(
        self,
        policy: ConditionedPolicy,
        rewards: RewardSet,
        tokenizer,
        objective: Objective,
        reference: Reference,
        weighting: Weighting,
        batching: MicroBatching,
        timer: PhaseTimer,
        reward_scale: float = 1.0,
        completions_file: Path | None = None,
        parallel: Parallel | None = None,
        prompts_per_step: int | None = None,
    ):
        self.policy, self.rewards, self.tokenizer = policy, rewards, tokenizer
        self.objective, self.reference, self.weighting = objective, reference, weighting
        self.batching, self.timer = batching, timer
        self.reward_scale, self.completions_file = reward_scale, completions_file
        self.parallel, self.prompts_per_step = parallel or Parallel(), prompts_per_step

    def training_batch(
        self,
        batch: PromptBatch,
        conditions: Conditions,
        drawn: Rollout,
        step: int,
        state: TrainerState,
    ) -> TrainingBatch:
        """A rollout to train on, with its rewards and what was computed while they were. state: what the reward functions
        receive as `trainer_state`."""
        made, columns = self._rewarded(batch, conditions, drawn, state, self.prompts_per_step)
        self.weighting.observe(conditions, made.rewards.view(len(conditions), drawn.group, -1))
        if self.completions_file is not None and self.parallel.is_main:
            self._write_completions(batch, made, columns, step)
        return made

    def evaluation_batch(
        self, batch: PromptBatch, conditions: Conditions, drawn: Rollout, state: TrainerState
    ) -> TrainingBatch:
        return self._rewarded(batch, conditions, drawn, state, None, for_training=False)[0]

    def _rewarded(
        self,
        batch: PromptBatch,
        conditions: Conditions,
        drawn: Rollout,
        state: TrainerState,
        per_step: int | None,
        for_training: bool = True,
    ) -> tuple[TrainingBatch, dict[str, list]]:
        """The batch, and columns of the reward functions for completions.jsonl."""
        started, reference = time.perf_counter(), None
        shares = dealt(self.parallel, drawn, per_step or len(conditions))
        pending = self._start_rewards(batch, drawn, state, shares)
        asked = time.perf_counter() - started  # with functions that run in this thread
        needed = self.objective.uses_reference(conditions.kl) or not self.policy.moves_hidden
        if for_training and needed:
            with self.timer("reference"):
                reference = reference_states.reference_hidden(
                    self.policy, drawn, conditions, self.reference, self.batching, shares
                )
        started = time.perf_counter()
        found = self._of_all([(rows, Rewarded.of(calls)) for rows, calls in pending], drawn)
        rewards, seconds = found.rewards, self.timer.seconds
        seconds["reward_wait"] += asked + time.perf_counter() - started
        seconds["reward"] += found.busy
        for name, spent in found.seconds.items():
            seconds[f"reward/{name}"] += spent
        each = conditions.repeat(drawn.group)
        scalar = scalarise(rewards, each.weights) * self.reward_scale
        metrics = completion_metrics(drawn) | reward_metrics(
            self.rewards.names, rewards, scalar, each, drawn.group
        )
        made = TrainingBatch(
            drawn,
            conditions,
            rewards,
            scalar.to(self.policy.device),
            metrics | found.metrics,
            drawn.tokens,
            reference,
            shares=shares,
        )
        return made, found.columns

    def _start_rewards(
        self, batch: PromptBatch, drawn: Rollout, state: TrainerState, shares: Shares | None
    ) -> list[tuple[list[int], PendingRewards]]:
        """The calls that this process makes, each with the rows it gets."""
        rows = list(range(drawn.completion_ids.shape[0]))
        if shares is None:
            return [(rows, self._start(batch, drawn, state))]
        mine, of_main, calls = shares.mine, self.rewards.of_main, []
        if of_main and self.parallel.is_main:
            calls.append((rows, self._start(batch, drawn, state, of_main)))
        others = [name for name in self.rewards.names if name not in of_main]
        if others and mine:
            own = [p * drawn.group + i for p in mine for i in range(drawn.group)]
            calls.append((own, self._start(batch.taken(mine), drawn.taken(mine), state, others)))
        return calls

    def _of_all(self, own: list[tuple[list[int], Rewarded]], drawn: Rollout) -> Rewarded:
        if self.parallel.count == 1:
            return own[0][1]
        return rewarded_by_all(self.parallel, own, drawn.completion_ids.shape[0], len(self.rewards))

    def _start(
        self, batch: PromptBatch, drawn: Rollout, state: TrainerState, among: Sequence[str] | None = None
    ) -> PendingRewards:
        prompts, columns = batch.repeated(drawn.group)
        columns |= drawn.columns or {}
        token_lists = drawn.token_lists()
        texts = completion_texts(self.tokenizer, token_lists, prompts)
        return self.rewards.start(prompts, texts, token_lists, columns, among, trainer_state=state)

    def _write_completions(
        self, batch: PromptBatch, made: TrainingBatch, columns: dict[str, list], step: int
    ) -> None:
        drawn, rewards = made.rollout, made.rewards
        prompts, _ = batch.repeated(drawn.group)
        texts = completion_texts(self.tokenizer, drawn.token_lists(), prompts)
        weights = made.conditions.repeat(drawn.group).weights.tolist()
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
                **{name: column[i] for name, column in columns.items()},
            }
            lines.append(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        append_text(self.completions_file, "".join(lines))
