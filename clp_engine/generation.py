"""What a training step learns from: prompts, a condition for each, a group of completions and their rewards.

Every random draw comes from (seed, step, purpose): the batch of a step can be drawn again by anyone who knows its number.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.trainer_callback import TrainerState

from clp_engine import seeds
from clp_engine.conditions import Conditions
from clp_engine.config import CLPConfig
from clp_engine.data import PromptBatch, PromptDataset, completion_texts
from clp_engine.estimators import scalarise
from clp_engine.metrics import PhaseTimer, completion_metrics, reward_metrics
from clp_engine.policy import ConditionedPolicy
from clp_engine.rewards import RewardSet
from clp_engine.rollout import Rollout, SamplingParams, rollout
from clp_engine.samplers import ConditionSampler

# Counters that keep the uses of one seed apart (data.py has 1).
_CONDITIONS, _TOKENS, _EVAL = 2, 3, 4


@dataclass
class Generation:
    """The completions of one batch, rewarded; the first pass over them fills in `old_logprob` (B, T) and, with a value head,
    `values` (B, T), for the passes after it."""

    rollout: Rollout
    conditions: Conditions
    rewards: torch.Tensor
    scalar: torch.Tensor
    metrics: dict[str, float]
    old_logprob: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens read and written: each prompt once per completion, and the completions."""
        return int(self.rollout.prompt_mask.sum()) * self.rollout.group + self.num_generated_tokens

    @property
    def num_generated_tokens(self) -> int:
        return int(self.rollout.completion_mask.sum())


class Collector:
    """Draws the batches of a run, as its settings say; `timer` counts the phases "rollout" and "reward".

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
        self._extra_metrics: dict[str, list[float]] = {}
        self._extra_columns: dict[str, list] = {}

    def training_batch(self, dataset: PromptDataset, step: int, state: TrainerState) -> Generation:
        """Prompts, conditions, completions and rewards of optimiser step `step`."""
        a = self.args
        prompts = a.batch_size // a.num_generations
        position = step // a.num_iterations * prompts
        batch = dataset.batch(dataset.indices(position, prompts, a.seed, a.shuffle_dataset))
        # Prompts of like length share a micro-batch; the order changes nothing else, since every prompt draws for itself.
        conditions = self.sampler.sample(prompts, seeds.generator(a.seed, _CONDITIONS, step))
        order = sorted(range(prompts), key=lambda i: len(batch.token_ids[i]))
        row_seeds = (
            seeds.derive(a.seed, _TOKENS, step, torch.arange(a.batch_size)).view(prompts, -1)[order].view(-1)
        )
        batch = PromptBatch(
            [batch.prompts[i] for i in order],
            [batch.token_ids[i] for i in order],
            {name: [values[i] for i in order] for name, values in batch.columns.items()},
        )
        generation = self._generate(batch, conditions[order], row_seeds, state)
        if a.log_completions:
            self._write_completions(batch, generation, step)
        return generation

    def evaluation_batch(
        self, dataset: PromptDataset, start: int, stop: int, state: TrainerState
    ) -> Generation:
        """Rows [start, stop) of an evaluation set, the same conditions and random numbers every time."""
        a, rows = self.args, stop - start
        conditions = self.sampler.sample(rows, seeds.generator(a.seed, _EVAL, start))
        row_seeds = seeds.derive(a.seed, _EVAL, start, torch.arange(rows * a.num_generations))
        return self._generate(dataset.batch(range(start, stop)), conditions, row_seeds, state)

    def _generate(
        self, batch: PromptBatch, conditions: Conditions, row_seeds: torch.Tensor, state: TrainerState
    ) -> Generation:
        group = self.args.num_generations
        with self.timer("rollout"):
            drawn = rollout(
                self.policy,
                batch.token_ids,
                conditions,
                num_generations=group,
                sampling=self.sampling,
                row_seeds=row_seeds,
                prompts=batch.prompts,
                max_rows=self.args.rollout_rows,
            )
        with self.timer("reward"):
            rewards = self._reward(batch, drawn, state)
            scalar = scalarise(rewards, conditions.repeat(group).weights)
        metrics = completion_metrics(drawn) | reward_metrics(
            self.rewards.names, rewards, scalar, conditions.repeat(group), group
        )
        metrics |= {name: sum(v) / len(v) for name, v in self._extra_metrics.items()}
        return Generation(drawn, conditions, rewards, scalar.to(self.policy.device), metrics)

    def _reward(self, batch: PromptBatch, drawn: Rollout, state: TrainerState) -> torch.Tensor:
        prompts, columns = batch.repeated(drawn.group)
        token_lists = drawn.token_lists()
        self._extra_metrics, self._extra_columns = {}, {}
        return self.rewards(
            prompts,
            completion_texts(self.tokenizer, token_lists, prompts),
            token_lists,
            columns,
            trainer_state=state,
            log_extra=self._extra_columns.__setitem__,
            log_metric=lambda name, value: self._extra_metrics.setdefault(name, []).append(float(value)),
        )

    def _write_completions(self, batch: PromptBatch, generation: Generation, step: int) -> None:
        drawn, rewards = generation.rollout, generation.rewards
        prompts, _ = batch.repeated(drawn.group)
        texts = completion_texts(self.tokenizer, drawn.token_lists(), prompts)
        weights = generation.conditions.repeat(drawn.group).weights.tolist()
        with open(Path(self.args.output_dir) / "completions.jsonl", "a", encoding="utf-8") as file:
            for i, (prompt, text) in enumerate(zip(prompts, texts)):
                row = {
                    "step": step,
                    "prompt": prompt,
                    "completion": text,
                    "weights": dict(zip(self.rewards.names, weights[i])),
                    "rewards": {
                        n: None if math.isnan(r) else r
                        for n, r in zip(self.rewards.names, rewards[i].tolist())
                    },
                    **{name: column[i] for name, column in self._extra_columns.items()},
                }
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
