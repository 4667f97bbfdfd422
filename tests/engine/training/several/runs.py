"""Short runs of tools/same_bits.py in however many processes there are: python runs.py OUT EXTRA NAMES, each of them JSON.

OUT/NAME is a run's folder. Beside it NAME.pt has the first step's gradient, and NAME.json the collectives of each step.
"""

import json
import os
import sys
from pathlib import Path

import same_bits
import torch
import torch.distributed as dist
from transformers import TrainerCallback

COUNT, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")


class Watch(TrainerCallback):
    """The gradient of the first step, and (name, bytes) of every collective of each step."""

    def __init__(self):
        self.gradient, self.steps, self.seen = None, [], []

    def counting(self, name):
        original = getattr(dist.distributed_c10d, name)

        def call(*arguments, **options):
            tensors = [t for a in arguments[:1] for t in (a if isinstance(a, list) else [a])]
            self.seen.append((name, sum(t.numel() * t.element_size() for t in tensors)))
            return original(*arguments, **options)

        for module in (dist, dist.distributed_c10d):
            setattr(module, name, call)
        return lambda: [setattr(module, name, original) for module in (dist, dist.distributed_c10d)]

    def on_step_begin(self, args, state, control, **_):
        self.seen.clear()

    def on_pre_optimizer_step(self, args, state, control, **_):
        if self.gradient is None:
            self.gradient = {n: p.grad.clone() for n, p in self.trainer.policy.adapter_parameters().items()}

    def on_step_end(self, args, state, control, **_):
        self.steps.append(list(self.seen))


def once(name, place, extra):
    family, settings = same_bits.RUNS[name]
    settings = {"per_device_eval_batch_size": 64, **same_bits.SETTINGS, **settings}
    for batch in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        settings[batch] //= COUNT
    trainer, watch = same_bits.trainer(family, {**settings, **extra}, place), Watch()
    watch.trainer = trainer
    trainer.add_callback(watch)
    undo = [watch.counting(one) for one in COLLECTIVES]
    try:
        trainer.train()
    finally:
        for back in undo:
            back()
    if RANK == 0:
        torch.save(watch.gradient, place.with_suffix(".pt"))
        own = sum(p.numel() * p.element_size() for p in trainer.policy.model.parameters())
        shards = [
            p.to_local().numel() * p.element_size()
            for p in trainer.policy.model.parameters()
            if hasattr(p, "to_local")
        ]
        numbers = sum(p.numel() for p in trainer.policy.adapter_parameters().values())
        found = {"steps": watch.steps, "adapters": 4 * numbers, "model": own, "shards": sum(shards)}
        place.with_suffix(".json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, extra, names = map(json.loads, sys.argv[1:])
    for each in names:
        once(each, Path(out) / each.replace(" ", "_").replace(",", ""), extra)
