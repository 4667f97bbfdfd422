"""A training whose completions come from elsewhere: python elsewhere.py OUT SETTINGS, both JSON.

Without use_vllm a rollout_func draws, and gives the reward `won` a column.
"""

import json
import os
import sys

import same_bits

from clp_engine import CLPConfig, CLPTrainer, rollout
from clp_engine.core.errors import DrawingFailed

OUT, SETTINGS = map(json.loads, sys.argv[1:])
COUNT = int(os.environ.get("WORLD_SIZE", "1"))


def draw(prompts, trainer):
    request = trainer.rollout_request
    ids = same_bits.tokenizer("qwen2")(prompts)["input_ids"]
    drawn = rollout(
        trainer.policy,
        ids[:: request.group],
        request.conditions,
        num_generations=request.group,
        sampling=request.sampling,
        row_seeds=request.row_seeds,
    )
    lists = drawn.token_lists()
    return {
        "prompt_ids": ids,
        "completion_ids": lists,
        "logprobs": [
            [value - 0.5 for value in row[: len(t)]] for row, t in zip(drawn.logprobs.tolist(), lists)
        ],
        "env_mask": [[int(i != 1) for i in range(len(t))] for t in lists],
        "first": [t[0] for t in lists],
    }


def won(completion_ids, first=None, **_):
    if first is not None:
        assert first == [ids[0] for ids in completion_ids]
    return [float(ids[0] % 3) for ids in completion_ids]


settings = {**same_bits.SETTINGS, "max_steps": 3, "use_cpu": True, "logging_steps": 1, **SETTINGS}
settings["per_device_train_batch_size"] //= COUNT
vllm = settings.get("use_vllm")
trainer = CLPTrainer(
    same_bits.model("qwen2"),
    [same_bits.even, won],
    CLPConfig(output_dir=OUT, **settings),
    same_bits.rows(),
    processing_class=same_bits.tokenizer("qwen2"),
    rollout_func=None if vllm else draw,
)
try:
    trainer.train()
except DrawingFailed as error:
    print(f"rank {trainer.parallel.rank} was told: {error}", flush=True)
