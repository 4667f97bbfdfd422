"""Runs of a model with five layers in however many processes there are: python layerwise.py OUT RUNS EXTRA, each of them JSON.

RUNS has settings by name; OUT/NAME is a run's folder. OUT/NAME/RANK.json has `most`, the layers that were whole or on their way
at once, and `passes`, how many began between two exchanges. Of the phases in which each process makes its own number it has
`exchanges`, and the layers `gathered` and numbers `told` in them.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import same_bits
import torch
from transformers import LlamaConfig

from clp_engine import CLPTrainer
from clp_engine.training.parallel.processes import Parallel

COUNT, RANK = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
LAYERS = 5


@dataclasses.dataclass
class Watch:
    most: int = 0
    passes: list[int] = dataclasses.field(default_factory=lambda: [0])
    exchanges: int = 0
    gathered: int = 0
    told: int = 0

    @contextlib.contextmanager
    def following(self, trainer: CLPTrainer) -> Iterator[None]:
        if trainer.sharded is None:
            yield
            return
        from torch.distributed.fsdp._fully_shard import _fsdp_param_group as of_fsdp

        groups = [g for layer in trainer.sharded.layers for g in layer._get_fsdp_state()._fsdp_param_groups]
        plain, vote, meet = of_fsdp.foreach_all_gather, Parallel._most, Parallel.meet

        def gather(*arguments, **options):
            there = [g for g in groups if g.is_unsharded or g._all_gather_result is not None]
            self.most = max(self.most, len(there) + 1)
            self.gathered += trainer.parallel.before_exchange is not None
            return plain(*arguments, **options)

        def most(this, flags):
            if this.before_exchange is not None and len(flags) == 1:
                self.told += 1
                self.passes[-1] += flags[0]
            return vote(this, flags)

        def met(this):
            if this.before_exchange is not None:
                self.exchanges += 1
            meet(this)
            self.passes.append(0)

        of_fsdp.foreach_all_gather, Parallel._most, Parallel.meet = gather, most, met
        try:
            yield
        finally:
            of_fsdp.foreach_all_gather, Parallel._most, Parallel.meet = plain, vote, meet


def once(place: Path, settings: dict) -> None:
    for batch in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        settings[batch] //= COUNT
    trainer, watch = same_bits.trainer("llama", settings, place), Watch()
    with watch.following(trainer):
        trainer.train()
        with trainer.at_own_pace():
            texts = trainer.policy.generate(["w1 w2"], max_new_tokens=4 + int(RANK))
    (place / f"{RANK}.json").write_text(json.dumps({**dataclasses.asdict(watch), "texts": texts}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, runs, extra = map(json.loads, sys.argv[1:])
    same_bits.MODELS["llama"] = lambda: LlamaConfig(**{**same_bits.SMALL, "num_hidden_layers": LAYERS})
    for name, settings in runs.items():
        once(Path(out) / name, {**settings, **extra})
