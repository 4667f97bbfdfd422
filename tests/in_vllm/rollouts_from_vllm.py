"""A short training whose completions vLLM draws, and its log."""

import json

from engine.conftest import build_tokenizer

from clp_engine import CLPConfig, CLPTrainer

ROWS = [{"prompt": f"w{i} w{2 * i + 3} w7"} for i in range(8)]
GAP = 1e-4
GAPS = "sampling/sampling_logp_difference/max"


def even(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def low(completion_ids, **_):
    return [sum(token < 20 for token in ids) / len(ids) for ids in completion_ids]


def trainer_of(policy, folder, **more):
    config = {
        "use_cpu": True,
        "use_vllm": True,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 10,
        "max_steps": 3,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "temperature": 0.8,
    }
    return CLPTrainer(
        policy, {"a": even, "b": low}, CLPConfig(str(folder), **config | more), ROWS, None, build_tokenizer()
    )


def log_of(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if GAPS in entry]
