"""A run whose second reward is the main process's: python judged.py OUT, which is JSON. Says how many rows each call had."""

import json
import os
import sys

import same_bits
import torch

from clp_engine import CLPConfig, CLPTrainer

torch.set_num_threads(1)
asked = []


def rare(completions, log_extra, log_metric, **_):
    asked.append(len(completions))
    log_extra("others", [len(completions) - completions.count(c) for c in completions])
    log_metric("distinct", len(set(completions)))
    return [1 - completions.count(c) / len(completions) for c in completions]


rare.on_main_process = True
batch = same_bits.SETTINGS["per_device_train_batch_size"] // int(os.environ.get("WORLD_SIZE", "1"))
config = CLPConfig(
    **{**same_bits.SETTINGS, "per_device_train_batch_size": batch, "output_dir": json.loads(sys.argv[1])}
)
CLPTrainer(
    same_bits.model("qwen2"),
    [same_bits.even, rare],
    config,
    same_bits.rows(),
    processing_class=same_bits.tokenizer("qwen2"),
).train()
print(f"rank {os.environ.get('RANK', '0')} was asked {asked}", flush=True)
