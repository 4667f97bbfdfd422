"""A sampler of your own for the weightings that training sees.

    python examples/custom_sampler.py [--quick] [--out runs/custom-sampler]

Training draws `(w, kl)` for every prompt from a `ConditionSampler`. This one draws the weightings that users were seen to ask
for, with some noise; and it begins with single objectives, which teach each adapter its own reward before they have to share.
How far along it is, is state: it goes into every checkpoint, so that a resumed run draws what an uninterrupted one would.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from clp_engine import CLPConfig, CLPTrainer, Conditions
from clp_engine.objectives.weightings import ConditionSampler, FixedKL
from clp_engine.tasks import docsum


class AsUsersAsk(ConditionSampler):
    """w = (1 - noise) * u + noise * v, with u one of the weightings asked for and v uniform on the simplex; but with the
    probability `1 - drawn / curriculum`, which falls to 0, a single objective.

    asked: weightings, each M numbers that sum to 1. kl: the KL coefficient of every row. curriculum: prompts until no single
    objective is drawn on purpose.
    """

    def __init__(
        self, asked: Sequence[Sequence[float]], kl: float, noise: float = 0.1, curriculum: int = 400
    ):
        self.asked = torch.tensor(asked)  # (n, M)
        self.noise, self.curriculum = noise, curriculum
        self.drawn = 0
        super().__init__(self._draw_weights, FixedKL(kl))

    def sample(self, rows: int, generator: torch.Generator) -> Conditions:
        conditions = super().sample(rows, generator)
        self.drawn += rows
        return conditions

    def _draw_weights(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """(rows, M). Random numbers come from `generator` alone: its state is in the checkpoint, others' is not."""
        objectives = self.asked.shape[1]
        chosen = self.asked[torch.randint(len(self.asked), (rows,), generator=generator)]
        uniform = torch.empty(rows, objectives).exponential_(generator=generator)
        mixed = (1 - self.noise) * chosen + self.noise * uniform / uniform.sum(-1, keepdim=True)
        alone = torch.eye(objectives)[torch.randint(objectives, (rows,), generator=generator)]
        early = torch.rand(rows, 1, generator=generator) >= self.drawn / self.curriculum
        return torch.where(early, alone, mixed)

    def state_dict(self) -> dict:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict) -> None:
        self.drawn = state["drawn"]


def main(out: Path, quick: bool = False, resume: bool = False) -> tuple[CLPTrainer, AsUsersAsk]:
    """Train, or go on from the newest checkpoint; returns the trainer and its sampler."""
    asked = [(0.8, 0.2), (0.7, 0.3), (0.1, 0.9)]
    sampler = AsUsersAsk(asked, kl=0.02, curriculum=16 if quick else 400)
    trainer = CLPTrainer(
        model="docsum",
        reward_funcs=[docsum.coverage, docsum.brevity],
        args=CLPConfig(
            output_dir=str(out),
            max_steps=4 if quick else 100,
            num_generations=4 if quick else 8,
            per_device_train_batch_size=16 if quick else 64,
            max_completion_length=16 if quick else 40,
            learning_rate=3e-3,
            alpha=0.02,
            save_steps=2 if quick else 20,
            logging_steps=2,
            disable_tqdm=quick,
        ),
        train_dataset=docsum.load_dataset("validation", limit=32 if quick else None),
        condition_sampler=sampler,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    print(f"{sampler.drawn} weightings were drawn; the next ones:")
    print(sampler.sample(5, torch.Generator().manual_seed(0)).weights)
    return trainer, sampler


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/custom-sampler"))
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick, arguments.resume)
