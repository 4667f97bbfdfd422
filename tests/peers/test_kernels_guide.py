"""The blocks of docs/kernels.md that need another library."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "kernels"))
import guide  # noqa: E402


def test_the_trl_block_trains(tmp_path):
    peft, datasets, _ = (pytest.importorskip(name) for name in ("peft", "datasets", "trl"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from clp_engine.tasks.docsum import checkpoint_path

    (block,) = guide.blocks("trl")
    options = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=1, max_completion_length=6,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, logging_steps=1)  # fmt: skip
    trainer = guide.run(
        block,
        {
            "model": AutoModelForCausalLM.from_pretrained(checkpoint_path()),
            "tokenizer": AutoTokenizer.from_pretrained(checkpoint_path()),
            "reward": lambda completions, **_: [float(len(set(text))) for text in completions],
            "dataset": datasets.Dataset.from_list([{"prompt": "Return the sum of two numbers."}] * 4),
            "lora": peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
            "options": options,
        },
    )["trainer"]
    assert trainer.state.global_step == 1


def test_the_liger_block_gives_gradients():
    pytest.importorskip("liger_kernel")
    (block,) = guide.blocks("liger_kernel")
    hidden = torch.randn(6, 64, requires_grad=True)
    names = {
        "torch": torch,
        "hidden": hidden,
        "weight": torch.randn(1000, 64),
        "targets": torch.tensor([5, 17, 999, -100, 0, 42]),
    }
    guide.run(block, names)
    assert hidden.grad[:3].any() and not hidden.grad[3].any()
