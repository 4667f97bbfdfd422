"""Short runs of tools/same_bits.py in however many processes there are: python runs.py OUT EXTRA NAMES, each of them JSON.

OUT/NAME is a run's folder. Beside it NAME.pt has the first step's gradient, and NAME.json the collectives of each step.
"""

import atexit
import gc
import json
import os
import sys
from pathlib import Path

import same_bits
import torch
from transformers import TrainerCallback

from bench.step.processes import counting

COUNT, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def resident():
    """Bytes of all tensors that Python knows of."""
    gc.collect()
    found = [one.untyped_storage() for one in map(local, gc.get_objects()) if isinstance(one, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def local(thing):
    return thing.to_local() if type(thing).__name__ == "DTensor" else thing


def of_shards(trainer):
    """Bytes of the deltas that are cut over the processes, and of this process's pieces with the optimiser's state."""
    shards = [] if trainer.sharded is None else list(trainer.sharded.trained.values())
    pieces = [s.local for s in shards]
    moments = [trainer.optimizer.state[piece][name] for piece in pieces for name in ("exp_avg", "exp_avg_sq")]
    return {
        "sharded deltas": sum(4 * s.parameter.numel() for s in shards),
        "pieces and moments": sum(4 * t.numel() for t in (*pieces, *moments)),
    }


class Watch(TrainerCallback):
    """The gradient of the first step, and (name, bytes) of every collective of each step."""

    def __init__(self):
        self.gradient, self.steps, self.seen, self.resident = None, [], [], 0

    def on_step_begin(self, args, state, control, **_):
        self.seen.clear()

    def on_pre_optimizer_step(self, args, state, control, **_):
        if self.gradient is None:
            parameters = self.trainer.policy.adapter_parameters()
            self.gradient = {n: whole(p.grad).clone() for n, p in parameters.items()}

    def on_step_end(self, args, state, control, **_):
        self.steps.append(list(self.seen))
        self.resident = resident()


def once(name, place, extra):
    family, settings = same_bits.RUNS[name]
    settings = {"per_device_eval_batch_size": 64, **same_bits.SETTINGS, **settings}
    for batch in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        settings[batch] //= COUNT
    trainer, watch = same_bits.trainer(family, {**settings, **extra}, place), Watch()
    watch.trainer = trainer
    trainer.add_callback(watch)
    with counting(watch.seen):
        trainer.train()
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
        found |= {"resident": watch.resident, **of_shards(trainer)}
        place.with_suffix(".json").write_text(json.dumps(found))


def processes_have_parted():
    """Fails the process where gloo's threads outlive the run: they abort some."""
    if torch.distributed.is_initialized():
        os._exit(3)


if __name__ == "__main__":
    atexit.register(processes_have_parted)  # the first registered is called last
    torch.set_num_threads(1)
    out, extra, names = map(json.loads, sys.argv[1:])
    for each in names:
        once(each, Path(out) / each.replace(" ", "_").replace(",", ""), extra)
