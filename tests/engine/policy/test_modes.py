"""Every form of conditioning lives a whole life: trains, resumes to the bit, evaluates, generates, merges and exports; causal
models and encoder-decoders alike."""

import itertools
import json

import pytest
import torch
from engine.conftest import build_model, build_tokenizer, model_inputs
from later import later

from clp_engine import CLPConfig, CLPTrainer, evaluate
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.types import SamplingParams

FORMS = {
    "lora": {},
    "full": {"learning_rate": 1e-3},
    "attention": {"learning_rate": 1e-3},
    "logit": {},
    "whole-logit": {"conditioning": "logit", "rank": 32},
    "prompt": {},
    "attention+prompt": {},
    "lora+logit": {},
    "none": {"carrier": "full", "weight_sampler": "fixed", "fixed_weights": [0.3, 0.7]},
    "lora-kl": {
        "conditioning": "lora",
        "alpha": None,
        "alpha_grid": [0.05, 0.5, 1.0],
        "kl_conditioning": "linear",
    },
    "prompt-kl": {"conditioning": "prompt", "alpha": None, "alpha_range": [0.05, 0.5]},
    "full-odds": {
        "conditioning": "full",
        "alpha": None,
        "alpha_range": [0.05, 0.5],
        "kl_conditioning": "odds",
    },
}
EVERY = list(itertools.product(["llama-tied", "gemma2", "t5", "bart"], FORMS))
FIRST = [case for case in EVERY if case[0] == "llama-tied" or case == ("t5", "lora")]


def even(completion_ids, **_):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def small(completion_ids, **_):
    return [sum(i < 20 for i in ids) / len(ids) for ids in completion_ids]


def train(family, form, folder, steps=4, resume=None):
    config = CLPConfig(
        **{
            "output_dir": str(folder),
            "conditioning": form,
            "max_steps": steps,
            "num_generations": 2,
            "per_device_train_batch_size": 6,
            "max_completion_length": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "alpha": 0.05,
            "rank": 4,
            "save_steps": 2,
            "disable_tqdm": True,
            **FORMS[form],
        }
    )
    rows = [{"prompt": " ".join(f"w{(i * j) % 60}" for j in range(1, 3 + i % 3))} for i in range(8)]
    trainer = CLPTrainer(
        build_model(family), [even, small], config, rows, processing_class=build_tokenizer(family)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.policy


@pytest.mark.filterwarnings("ignore:this adapter changes an output projection")
@pytest.mark.parametrize("family, form", [*FIRST, *later(*(case for case in EVERY if case not in FIRST))])
def test_a_whole_life(family, form, tmp_path):
    policy = train(family, form, tmp_path / "run")
    parameters = policy.adapter_parameters()
    assert all(bool(torch.isfinite(p).all()) for p in parameters.values())
    moved = [name for name, p in parameters.items() if not name.endswith("lora_a") and bool(p.any())]
    assert moved, "nothing was learnt"

    resumed = train(
        family, form, tmp_path / "run", resume=tmp_path / "run" / "checkpoint-2"
    ).adapter_parameters()
    assert parameters.keys() == resumed.keys()
    assert all(torch.equal(p, resumed[name]) for name, p in parameters.items())

    loaded = ConditionedPolicy.load(tmp_path / "run" / "policy", base_model=build_model(family))
    weights = {"even": 0.25, "small": 0.75}
    text = [p.generate("w1 w2 w3", weights, max_new_tokens=4, seed=3) for p in (policy, loaded)]
    assert text[0] == text[1]

    report = evaluate(
        policy,
        [even, small],
        ["w1 w2", "w3"],
        grid=3,
        sampling=SamplingParams(4),
        bootstrap=10,
        progress=False,
    )
    assert len(report.points) == 3 and all(p.kl >= 0 for p in report.points)

    given = model_inputs(family)
    if policy.conditioning.prompt:
        assert "even 0.25, small 0.75" in policy.prompt_text(weights)
    with torch.no_grad():
        merged = policy.merge(weights)(**given).logits
        torch.testing.assert_close(merged, policy(**given, weights=weights).logits, rtol=1e-3, atol=1e-3)

    if "full" in policy.conditioning.carriers:
        return  # refused with a pointer to merge: see test_conditioning
    from peft import PeftModel

    rank = 32 if "attention" in policy.conditioning.carriers or form == "whole-logit" else None
    error = policy.export_adapter(tmp_path / "adapter", weights, rank=rank)
    theirs = PeftModel.from_pretrained(build_model(family), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(theirs(**given).logits, merged, rtol=1e-3, atol=1e-3)
    assert error < 1e-4
    assert json.loads((tmp_path / "adapter" / "blend.json").read_text())["weights"] == pytest.approx(weights)
