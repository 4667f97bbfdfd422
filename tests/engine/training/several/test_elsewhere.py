"""Several processes whose completions come from elsewhere: a user's function in each, or one server that all of them ask."""

import json
import threading

import pytest
import torch
from engine.rollouts.test_from_vllm import Answering, usual
from launch import launched
from safetensors.torch import load_file

pytestmark = pytest.mark.check


def log_of(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "grad_norm" in entry]


def test_a_function_of_each_process_trains_what_one_trains(tmp_path):
    for count in (1, 2):
        done = launched(count, "elsewhere.py", str(tmp_path / str(count)), {})
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / str(count) / "policy" / "adapters.safetensors") for count in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(log_of(tmp_path / "2"), log_of(tmp_path / "1"), strict=True):
        for name in theirs:
            if "time" not in name and "runtime" not in name:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), name
    assert theirs["sampling/importance_sampling_ratio/mean"] == pytest.approx(2.718281828**0.5, rel=1e-2)


def test_one_process_publishes_all_ask_and_all_end_with_a_checkpoint(tmp_path):
    drawn, lock = [], threading.Lock()

    def goes(path, body):
        if "seed" in body:
            with lock:
                drawn.append(body["seed"])
                if len(drawn) > 2 * 16:  # in the third step
                    server.answer = lambda *_: None
                    return None
        return usual(path, body)

    server = Answering(goes)
    try:
        settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
        settings |= {"vllm_server_timeout": 2.0, "per_device_train_batch_size": 16, "num_generations": 4}
        done = launched(2, "elsewhere.py", str(tmp_path), settings)
    finally:
        server.shutdown()
        server.server_close()
    assert f"rank 0 was told: vLLM at {server.url} does not answer" in done.stdout, done.stderr[-3000:]
    loads = [body["lora_name"] for body in server.paths("/v1/load_lora_adapter")]
    assert len(set(loads)) == 3 and len(loads[:3]) == 3
    assert len(set(drawn[:32])) == 32  # no row was drawn by both
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list((tmp_path / "vllm").iterdir())
