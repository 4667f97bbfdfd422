"""A run, from its start or a checkpoint: python resuming.py OUT SETTINGS CHECKPOINT, each of them JSON."""

import json
import os
import sys
from pathlib import Path

import same_bits
import torch

torch.set_num_threads(1)
out, settings, checkpoint = map(json.loads, sys.argv[1:])
batch = same_bits.SETTINGS["per_device_train_batch_size"] // int(os.environ.get("WORLD_SIZE", "1"))
trainer = same_bits.trainer("qwen2", {**settings, "per_device_train_batch_size": batch}, Path(out))
trainer.train(resume_from_checkpoint=checkpoint)
