"""Partial rollouts: one long completion does not hold up a batch.

A phase draws at most L = `max_completion_length_per_step` tokens of each completion. A completion that has not ended waits,
with its prompt, condition, random numbers, tokens and their log-probs. A later phase continues it: the model reads prompt +
tokens so far. P is the number of groups in a batch. A step runs phases until P groups have ended whole, and trains on the
first P of them. A phase works on P groups, those that began first; new prompts join behind them. Every prompt that began is
trained on, with all of its completions; their length decides only when. When a run ends, at most P unfinished groups and
P - 1 finished ones are left over.

Up to max_completion_length / L policies write one completion. Each token keeps the log-prob of the policy that drew it, so the
update is off-policy from its first pass on:

    min(ratio * A, clip(ratio) * A),     ratio = pi(y_t | y_<t) / pi_that_drew_it(y_t | y_<t)

The ratio corrects each token given its prefix. It does not correct that an older policy drew the prefix: a product of ratios
would, with too large a variance. Clipping is biased as always. With L = max_completion_length the batches are those of an
ordinary run.

Continuing costs a prefill of prompt and tokens for each unfinished completion: choose L so that few are unfinished. The
scheme is that of Kimi k1.5 (Kimi Team, arXiv 2501.12599, 2025), except that a batch has a fixed number of groups here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers.trainer_callback import TrainerState

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.data.prompts import PromptBatch, Prompts
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.types import Rollout, pad_left
from clp_engine.training.collecting.batches import TrainingBatch
from clp_engine.training.collecting.collector import CollectorParts


@dataclass
class Completion:
    """One completion so far: its tokens, and the log-probs they were drawn with."""

    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    terminated: bool = False


@dataclass
class Group:
    """A prompt (a batch of one), its condition (one row), and its completions.

    number: its place in the stream of all prompts of the run.
    """

    number: int
    prompt: PromptBatch
    condition: Conditions
    completions: list[Completion]

    @property
    def tokens(self) -> int:
        return sum(len(c.tokens) for c in self.completions)


class PartialRollouts:
    """A `Collector` whose completions may take several steps: those under way, and the batches they become."""

    def __init__(self, parts: CollectorParts):
        self._parts, self._settings = parts, parts.planner.settings
        if parts.policy.model.config.is_encoder_decoder:
            raise ConfigError(
                "partial_rollouts reads what is there of a completion as a part of its prompt, which an encoder-decoder "
                "does not; use partial_rollouts=False"
            )
        self._sampling = dataclasses.replace(
            self._settings.sampling, max_new_tokens=self._settings.tokens_per_phase
        )
        self._groups: list[Group] = []  # in the order of their numbers; some may not have begun
        self._planned = 0  # groups that were ever put there

    def training_batch(self, dataset: Prompts, step: int, state: TrainerState) -> TrainingBatch:
        """The first P groups that have ended, rewarded, with the log-probs of the policies that drew them."""
        count, before = self._settings.prompts, {g.number: g.tokens for g in self._groups}
        phases = 0
        while len(done := [g for g in self._groups if self._is_done(g)]) < count:
            self._run_phase(dataset)
            phases += 1
        drawn_now = sum(g.tokens - before.get(g.number, 0) for g in self._groups)
        batch = done[:count]
        batch = [batch[i] for i in self._parts.planner.arranged([g.prompt.token_ids[0] for g in batch])]
        trained = {g.number for g in batch}
        self._groups = [g for g in self._groups if g.number not in trained]
        made = self._parts.rewarding.training_batch(
            _together(batch),
            Conditions.cat([g.condition for g in batch]),
            self._assembled(batch),
            step,
            state,
        )
        made.new_tokens, made.stale = drawn_now, True
        made.metrics |= {
            "partial/phases": phases,
            "partial/waiting_groups": sum(g.tokens > 0 for g in self._groups),
            "partial/stale_tokens": sum(before.get(g.number, 0) for g in batch)
            / max(sum(g.tokens for g in batch), 1),
        }
        return made

    def _is_done(self, group: Group) -> bool:
        return not any(self._goes_on(c) for c in group.completions)

    def _goes_on(self, completion: Completion) -> bool:
        return not completion.terminated and len(completion.tokens) < self._settings.sampling.max_new_tokens

    def _run_phase(self, dataset: Prompts) -> None:
        """At most L more tokens for each completion of the first P groups that have not ended."""
        count = self._settings.prompts
        while len(unfinished := [g for g in self._groups if not self._is_done(g)]) < count:
            self._plan(dataset)
        active = unfinished[:count]
        fresh = [g for g in active if not g.tokens]
        fresh = [fresh[i] for i in self._parts.planner.arranged([g.prompt.token_ids[0] for g in fresh])]
        going_on = [(g, c) for g in active if g.tokens for c in g.completions if self._goes_on(c)]
        with self._parts.timer("rollout"):
            if going_on:
                groups, completions = zip(*going_on)
                self._draw(groups, completions, 1, begun=[c.tokens for c in completions])
            if fresh:
                self._draw(fresh, [c for g in fresh for c in g.completions], self._settings.group)

    def _draw(
        self, groups: Sequence[Group], completions: Sequence[Completion], per_prompt: int, begun=None
    ) -> None:
        """`per_prompt` completions of each group's prompt go on."""
        policy, whole = self._parts.policy, _together(groups)
        conditions = Conditions.cat([g.condition for g in groups])
        row_seeds = torch.tensor([c.seed for c in completions]).view(-1, per_prompt)

        def draw(prompts: list[int]) -> Rollout:
            batch = whole.taken(prompts)
            return rollout(
                policy,
                batch.token_ids,
                conditions[prompts],
                num_generations=per_prompt,
                sampling=self._sampling,
                row_seeds=row_seeds[prompts].view(-1),
                prompts=batch.prompts,
                max_rows=self._settings.max_rows,
                begun=None if begun is None else [begun[p] for p in prompts],
                engine=self._parts.engine,
            )

        read = whole.token_ids
        if begun is not None:
            read = [[*ids, *tokens] for ids, tokens in zip(read, begun)]
        drawn = self._parts.drawn_by_all(read, draw)
        logprobs = drawn.logprobs.tolist()
        for c, tokens, values, ended in zip(
            completions, drawn.token_lists(), logprobs, drawn.terminated.tolist()
        ):
            c.tokens.extend(tokens)
            c.logprobs.extend(values[: len(tokens)])
            c.terminated = ended

    def _plan(self, dataset: Prompts) -> None:
        """Put the next P prompts of the stream behind the others: those of an ordinary run's next rollout."""
        step = self._planned // self._settings.prompts * self._settings.steps
        planned = self._parts.planner.rollout(dataset, step)
        for i, seeds in enumerate(planned.row_seeds.tolist()):
            prompt, condition = planned.batch.taken([i]), planned.conditions[i : i + 1]
            self._groups.append(
                Group(self._planned + i, prompt, condition, [Completion(seed) for seed in seeds])
            )
        self._planned += len(planned.row_seeds)

    def _assembled(self, groups: Sequence[Group]) -> Rollout:
        """The rollout that these completions would have come from at one go."""
        policy, batch = self._parts.policy, _together(groups)
        conditions = Conditions.cat([g.condition for g in groups])
        shown = policy.shown_prompts(batch.token_ids, conditions, batch.prompts)
        plain = pad_left(batch.token_ids, policy.pad_token_id, policy.device)
        read = plain if shown is None else pad_left(shown, policy.pad_token_id, policy.device)
        completions = [c for g in groups for c in g.completions]
        lengths = torch.tensor([len(c.tokens) for c in completions])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
        ids = torch.full(mask.shape, policy.pad_token_id, dtype=torch.long)
        ids[mask] = torch.tensor([t for c in completions for t in c.tokens])
        logprobs = torch.zeros(mask.shape)
        logprobs[mask] = torch.tensor([p for c in completions for p in c.logprobs])
        terminated = torch.tensor([c.terminated for c in completions])
        return Rollout(
            *read,
            *(t.to(policy.device) for t in (ids, mask, logprobs, terminated)),
            *((None, None) if shown is None else plain),
        )

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything under way as tensors: of the groups, of their completions, and of the tokens, one after another."""
        groups = self._groups
        completions = [c for g in groups for c in g.completions]
        return {
            "planned": torch.tensor([self._planned]),
            "numbers": torch.tensor([g.number for g in groups], dtype=torch.long),
            "weights": torch.stack([g.condition.weights[0] for g in groups]) if groups else torch.zeros(0),
            "kl": torch.stack([g.condition.kl[0] for g in groups]) if groups else torch.zeros(0),
            "prompt_lengths": torch.tensor([len(g.prompt.token_ids[0]) for g in groups], dtype=torch.long),
            "prompts": torch.tensor([t for g in groups for t in g.prompt.token_ids[0]], dtype=torch.long),
            "seeds": torch.tensor([c.seed for c in completions], dtype=torch.long),
            "terminated": torch.tensor([c.terminated for c in completions], dtype=torch.bool),
            "lengths": torch.tensor([len(c.tokens) for c in completions], dtype=torch.long),
            "tokens": torch.tensor([t for c in completions for t in c.tokens], dtype=torch.long),
            # float32 as they were sampled: a float of Python holds them exactly, and so does the way back.
            "logprobs": torch.tensor([p for c in completions for p in c.logprobs], dtype=torch.float32),
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor], dataset: Prompts) -> None:
        """Raises ConfigError where the dataset has other prompts than it had."""
        s, group = self._settings, self._settings.group
        prompts = state["prompts"].split(state["prompt_lengths"].tolist())
        lengths = state["lengths"].tolist()
        completions = [
            Completion(*parts)
            for parts in zip(
                state["seeds"].tolist(),
                map(torch.Tensor.tolist, state["tokens"].split(lengths)),
                map(torch.Tensor.tolist, state["logprobs"].split(lengths)),
                state["terminated"].tolist(),
            )
        ]
        self._planned, self._groups = int(state["planned"]), []
        for i, number in enumerate(state["numbers"].tolist()):
            prompt = dataset.batch(dataset.indices(number, 1, s.seed, s.shuffle))
            if prompt.token_ids[0] != prompts[i].tolist():
                raise ConfigError(
                    f"prompt {number} of the run is not what it was when the checkpoint was written, and has completions "
                    "under way; resume with the same dataset and tokenizer"
                )
            condition = Conditions(state["weights"][i : i + 1], state["kl"][i : i + 1])
            self._groups.append(Group(number, prompt, condition, completions[i * group : (i + 1) * group]))


def _together(groups: Sequence[Group]) -> PromptBatch:
    prompts = [g.prompt for g in groups]
    return PromptBatch(
        [p.prompts[0] for p in prompts],
        [p.token_ids[0] for p in prompts],
        {name: [p.columns[name][0] for p in prompts] for name in prompts[0].columns},
    )
