"""What `evaluate` measures at every prompt: rewards, KL, length and texts of a policy at all conditions and of its base."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from clp_engine.core.conditions import Conditions
from clp_engine.core.seeds import derive
from clp_engine.data.prompts import PromptBatch, PromptDataset, completion_texts
from clp_engine.data.rewards import RewardSet
from clp_engine.evaluation import completion_metrics as metrics
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.scoring import score
from clp_engine.rollouts.types import Rollout, Samplable, SamplingParams
from clp_engine.training.parallel.processes import Parallel


@dataclass(frozen=True)
class Opponent:
    """Another policy whose completions a judge compares: the same prompts and conditions, as that policy reads them."""

    policy: Samplable
    dataset: PromptDataset
    conditions: Conditions


@dataclass(frozen=True)
class Plan:
    """How completions are drawn, and a judge (one reward function) that compares them with the opponent's. Without an opponent
    they are compared with the base model's."""

    num_generations: int
    sampling: SamplingParams
    batch_rows: int
    seed: int
    progress: bool
    parallel: Parallel
    judge: RewardSet | None = None
    opponent: Opponent | None = None


@dataclass(frozen=True)
class Measured:
    """The measurements of P + 1 policies at N prompts; the last policy is the base model. Means over G generations.

    rewards: (P + 1, N, M), over those that the objective applies to, or NaN. calibration: (P + 1, M). wins: (P, N) or None.
    """

    rewards: np.ndarray
    kl: np.ndarray  # (P + 1, N)
    length: np.ndarray  # (P + 1, N)
    truncated: np.ndarray  # (P + 1, N)
    distinct: np.ndarray  # (P + 1, N)
    similarity: np.ndarray  # (P + 1, N)
    calibration: np.ndarray
    wins: np.ndarray | None


def measure(
    policy: Samplable,
    reward_set: RewardSet,
    dataset: PromptDataset,
    conditions: Conditions,
    plan: Plan,
) -> Measured:
    """Run every prompt at every condition and at the base. Processes take batches in turn."""
    parallel, found = plan.parallel, []
    generations, objectives = plan.num_generations, len(policy.profile.objectives)
    everyone = Conditions.cat([conditions, Conditions.reference(1, objectives)])
    shape = (len(everyone), len(dataset), generations)
    rewards = np.full((*shape, objectives), np.nan)
    kl, length, truncated, confidence = (np.zeros(shape) for _ in range(4))
    distinct, similarity = np.zeros(shape[:2]), np.zeros(shape[:2])
    drawn_ids: dict[tuple[int, int], list[list[int]]] = {}
    with tqdm(total=math.prod(shape), desc="evaluate", unit="row", disable=not plan.progress) as bar:
        for points, prompts, batch, drawn in _draws(policy, everyone, dataset, plan):
            # Greedy decoding (temperature 0) has no distribution: the KL is that of the model at temperature 1.
            stats = score(
                policy,
                drawn,
                everyone[points],
                outputs=("logprob", "kl"),
                temperature=plan.sampling.temperature or 1.0,
            )
            likely = (stats.logprob.sum(-1) / drawn.lengths.clamp_min(1)).exp()
            of_row = [stats.kl.sum(-1), drawn.lengths, ~drawn.terminated, likely]
            group = (len(points), generations)
            of_prompt = _groups(drawn)
            places = list(zip(points.tolist(), prompts.tolist()))
            found.append(
                (
                    (points.numpy(), prompts.numpy()),
                    *(t.reshape(group).cpu().numpy() for t in of_row),
                    _rewards(policy, reward_set, drawn, batch).reshape(*group, -1),
                    [metrics.distinct(one) for one in of_prompt],
                    [metrics.self_similarity(one) for one in of_prompt],
                    dict(zip(places, of_prompt)) if plan.judge is not None else {},
                )
            )
            bar.update(len(points) * generations * parallel.count)
    for at, *of_rows, of_batch, different, alike, texts in itertools.chain(*parallel.gather(found)):
        for whole, part in zip((kl, length, truncated, confidence), of_rows):
            whole[at] = part
        rewards[at], distinct[at], similarity[at] = of_batch, different, alike
        drawn_ids |= texts
    applies = (~np.isnan(rewards)).sum(2)
    mean = np.divide(np.nansum(rewards, 2), applies, out=np.full(applies.shape, np.nan), where=applies > 0)
    calibration = np.array(
        [
            [metrics.calibration_error(c, r[..., i]) for i in range(objectives)]
            for c, r in zip(confidence, rewards)
        ]
    )
    wins = None if plan.judge is None else _wins(policy, conditions, dataset, plan, drawn_ids)
    return Measured(
        mean, kl.mean(-1), length.mean(-1), truncated.mean(-1), distinct, similarity, calibration, wins
    )


def _draws(
    policy: Samplable, conditions: Conditions, dataset: PromptDataset, plan: Plan
) -> Iterator[tuple[torch.Tensor, torch.Tensor, PromptBatch, Rollout]]:
    """This process' share of all pairs of a condition and a prompt, in batches: (points, prompts), and what was drawn."""
    whole, parallel = dataset.batch(range(len(dataset))), plan.parallel
    batches = _batches(whole.token_ids, len(conditions), plan.batch_rows // plan.num_generations)
    for points, prompts in itertools.islice(batches, parallel.rank, None, parallel.count):
        batch = whole.taken(prompts.tolist())
        # The seeds do not depend on the point: every point has the same random streams.
        seeds = derive(plan.seed, prompts.unsqueeze(-1), torch.arange(plan.num_generations)).flatten()
        drawn = rollout(
            policy,
            batch.token_ids,
            conditions[points],
            num_generations=plan.num_generations,
            sampling=plan.sampling,
            row_seeds=seeds,
            prompts=batch.prompts,
        )
        yield points, prompts, batch, drawn


def _groups(drawn: Rollout) -> list[list[list[int]]]:
    """The completions of each prompt."""
    ids = drawn.token_lists()
    return [ids[at : at + drawn.group] for at in range(0, len(ids), drawn.group)]


def _batches(
    encoded: Sequence[Sequence[int]], policies: int, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(points, prompts), at most `size` pairs at a time. Prompts of like length lie together, all points
    of one prompt beside each other: little padding, and the same mixture of points in every batch."""
    order = torch.tensor(sorted(range(len(encoded)), key=lambda n: len(encoded[n])))
    points = torch.arange(policies).repeat(len(order))
    size = max(size, 1)
    return zip(points.split(size), order.repeat_interleave(policies).split(size))


def _rewards(policy: Samplable, reward_set: RewardSet, drawn: Rollout, batch: PromptBatch) -> np.ndarray:
    """(B, M) rewards of a rollout."""
    prompts, columns = batch.repeated(drawn.group)
    ids = drawn.token_lists()
    values = reward_set(prompts, completion_texts(policy.profile.tokenizer, ids, prompts), ids, columns)
    return values.cpu().numpy().astype(np.float64)


def _wins(
    policy: Samplable,
    conditions: Conditions,
    dataset: PromptDataset,
    plan: Plan,
    drawn: dict[tuple[int, int], list[list[int]]],
) -> np.ndarray:
    """(P, N): the mean preference for the policy's completions of a prompt, over the generations that the judge decides.

    Completion g of a prompt meets completion g of the opponent's. The points of a prompt are judged in one call, and processes
    take prompts in turn. drawn: the completions of every point and of the base model, by (point, prompt).
    """
    judge, parallel = plan.judge, plan.parallel
    assert judge is not None
    shape, base = (len(conditions), len(dataset)), len(conditions)
    others = {(p, n): drawn[base, n] for p, n in np.ndindex(shape)}
    tokenizers = [policy.profile.tokenizer] * 2
    if (opponent := plan.opponent) is not None:
        tokenizers[1], own = opponent.policy.profile.tokenizer, {}
        for points, prompts, _, rows in _draws(opponent.policy, opponent.conditions, opponent.dataset, plan):
            own |= zip(zip(points.tolist(), prompts.tolist()), _groups(rows))
        others = {place: ids for part in parallel.gather(own) for place, ids in part.items()}
    found = []
    for n in range(parallel.rank, len(dataset), parallel.count):
        prompts, columns = dataset.batch([n]).repeated(base * plan.num_generations)
        ids = [[one for p in range(base) for one in side[p, n]] for side in (drawn, others)]
        texts = [completion_texts(t, side, prompts) for t, side in zip(tokenizers, ids)]
        preferred = metrics.preferences(judge, prompts, texts, ids, columns)
        found.append((n, metrics.mean_of(preferred.reshape(base, -1))))
    wins = np.full(shape, np.nan)
    for n, of_prompt in itertools.chain(*parallel.gather(found)):
        wins[:, n] = of_prompt
    return wins
