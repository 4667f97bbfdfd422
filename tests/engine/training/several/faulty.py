"""A run in which something goes wrong on rank 1, at its third step: python faulty.py FAULT OUT SETTINGS, each of them JSON."""

import json
import os
import signal
import sys
import time

import same_bits
import torch
from transformers import TrainerCallback

from clp_engine import CLPConfig, CLPTrainer

torch.set_num_threads(1)
fault, out, settings = map(json.loads, sys.argv[1:])
RANK, FIRST = int(os.environ["RANK"]), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


class Signals(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2 and FIRST and RANK == 1:
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory (as if)")
        if state.global_step == 2 and fault == "interrupted" and RANK == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # the launcher's, beside the terminal's


calls = 0


def even(completion_ids, **_):
    global calls
    calls += 1
    if calls == 3 and RANK == 1:
        if fault == "raises":
            raise ValueError("the judge has gone home")
        if fault == "hangs":
            time.sleep(1000)
        if fault == "infinite":
            return [float("inf")] * len(completion_ids)
    return same_bits.even(completion_ids)


common = {
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 4,
    "output_dir": out,
}
config = CLPConfig(**{**same_bits.SETTINGS, **common, **settings})
trainer = CLPTrainer(
    same_bits.model("qwen2"),
    [even, same_bits.small],
    config,
    same_bits.rows()[:: -1 if fault == "other data" and RANK else 1],
    processing_class=same_bits.tokenizer("qwen2"),
    callbacks=[Signals],
)
if fault == "nan":
    plain = trainer.objective.coefficients

    def spoilt(*arguments, **options):
        found = plain(*arguments, **options)
        if RANK == 1 and trainer.state.global_step == 2:
            found.logprob.fill_(float("nan"))
        return found

    trainer.objective.coefficients = spoilt
if fault == "disk" and RANK == 0:
    from clp_engine.training.checkpoints import checkpoint

    written = checkpoint.save_file

    def save_file(*arguments, **options):
        if trainer.state.global_step == 3:
            raise OSError(28, "No space left on device", out)
        return written(*arguments, **options)

    checkpoint.save_file = save_file
if fault in ("raises in a layer", "hangs in a layer") and RANK == 1:
    layer = trainer.policy.model.model.layers[1]

    def spoil(module, inputs):
        if trainer.state.global_step == 2:
            if fault == "hangs in a layer" and torch.is_grad_enabled():  # in the update
                time.sleep(1000)
            if fault == "raises in a layer" and inputs[0].shape[1] == 1:  # for a token of a completion
                raise ValueError("the layer has gone home")

    layer.mlp.register_forward_pre_hook(spoil)
again = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
trainer.train(resume_from_checkpoint=again or None)
print(f"rank {RANK} at the end, step {trainer.state.global_step}", flush=True)
