"""A policy, a checkpoint and an adapter know which base model they belong to, whatever its name."""

import json
import re
from contextlib import nullcontext

import pytest
import torch
from engine.conftest import build_model, build_policy, build_tokenizer
from engine.training.test_trainer import build_trainer
from safetensors.torch import load_file, save_file

from clp_engine.core.errors import ConfigError
from clp_engine.models import fingerprint
from clp_engine.policy.policy import ConditionedPolicy

OTHER = "was saved over another base model than .*tensors differ, first "


def merged(model):
    """As after merging an adapter of a thousandth of the weights' size into one layer."""
    with torch.no_grad():
        weight = next(m for m in model.modules() if isinstance(m, torch.nn.Linear)).weight
        a, b = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
        weight += 1e-3 * weight.norm() / (b @ a).norm() * (b @ a)
    return model


def resized(model):
    model.resize_token_embeddings(80)
    return model


CHANGED = {"merged": merged, "resized": resized, "as it was": lambda model: model}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("mode", ["lora", "full", "lora+logit"])
def test_a_policy_is_loaded_over_the_model_that_it_was_saved_over(change, mode, tmp_path):
    build_policy("llama", conditioning=mode).save_pretrained(tmp_path)
    same = change == "as it was"
    with nullcontext() if same else pytest.raises(ConfigError, match=OTHER):
        ConditionedPolicy.load(tmp_path, base_model=CHANGED[change](build_model("llama")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_model_in_another_dtype_is_the_same(dtype, tmp_path):
    """A model that was rounded is told from one that was changed by more than rounding."""
    build_policy("qwen2").save_pretrained(tmp_path)
    ConditionedPolicy.load(tmp_path, base_model=build_model("qwen2").to(dtype))
    other = build_model("qwen2", seed=1).to(dtype)
    with pytest.raises(ConfigError, match=OTHER):
        ConditionedPolicy.load(tmp_path, base_model=other)


def test_what_differs_is_named_with_both_numbers(tmp_path):
    build_policy("llama").save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=re.escape("first model.embed_tokens.weight: shape [67, 32] then, [80, 32] now")
    ):
        ConditionedPolicy.load(tmp_path, base_model=resized(build_model("llama")))
    with pytest.raises(
        ConfigError, match=r"1 of \d+ tensors differ, first .*q_proj.weight: sum .* then, .* now\. Load"
    ):
        ConditionedPolicy.load(tmp_path, base_model=merged(build_model("llama")))
    (tmp_path / fingerprint.FILE).unlink()  # as an earlier version wrote it
    ConditionedPolicy.load(tmp_path, base_model=merged(build_model("llama")))


def test_a_damaged_file_is_named(tmp_path):
    build_policy("llama").save_pretrained(tmp_path)
    (tmp_path / fingerprint.FILE).write_text(json.dumps({"model.norm.weight": [1]}))
    with pytest.raises(ConfigError, match="base_model.json is damaged"):
        ConditionedPolicy.load(tmp_path, base_model=build_model("llama"))


def test_adapters_are_checked_one_by_one_and_together(tmp_path):
    policy = build_policy("llama")
    policy.save_adapters(tmp_path / "each")
    policy.export_adapter(tmp_path / "blend", [0.5, 0.5])
    for adapters in (tmp_path / "each", {"a": tmp_path / "each" / "a"}, {"a": tmp_path / "blend"}):
        ConditionedPolicy.from_adapters(build_model("llama"), adapters, tokenizer=build_tokenizer())
        with pytest.raises(ConfigError, match=OTHER):
            ConditionedPolicy.from_adapters(merged(build_model("llama")), adapters)


def test_weights_changed_in_place_are_read_again(tmp_path):
    model = build_model("llama")
    before = fingerprint.of(model)
    policy = ConditionedPolicy.from_pretrained(model, ["a"])
    assert fingerprint.of(policy.model) == before
    assert fingerprint.of(policy.model) is fingerprint.of(policy.model)
    merged(policy.model)
    assert fingerprint.of(policy.model) != before


def test_a_run_resumes_on_its_own_model_with_its_own_rewards_alone(tmp_path):
    def rewards(*names):
        return {name: lambda completions, **_: [0.0] * len(completions) for name in names}

    build_trainer(
        tmp_path, rewards=rewards("a", "b"), max_steps=2, save_strategy="steps", save_steps=1
    ).train()
    with pytest.raises(
        ConfigError, match="the objectives a, b, in this order, and this run b, a; give the rewards"
    ):
        build_trainer(tmp_path, rewards=rewards("b", "a"), max_steps=2).train(resume_from_checkpoint=True)
    trainer = build_trainer(tmp_path, rewards=rewards("a", "b"), max_steps=2)
    merged(trainer.policy.model)
    with pytest.raises(ConfigError, match=OTHER):
        trainer.train(resume_from_checkpoint=True)


def without_a_tensor(tensors):
    return {n: t for n, t in tensors.items() if n != next(n for n in tensors if n.endswith("exp_avg"))}


def with_one_row(tensors):
    name = next(n for n, t in tensors.items() if n.endswith("exp_avg") and t.dim() == 2)
    return {**tensors, name: tensors[name][:1].contiguous()}


def with_a_stranger(tensors):
    return {**tensors, "optimizer.nobody.exp_avg": torch.zeros(2)}


@pytest.mark.parametrize("noted", [True, False], ids=["with digests", "as earlier versions wrote it"])
@pytest.mark.parametrize("damage", [without_a_tensor, with_one_row, with_a_stranger])
def test_a_damaged_optimiser_is_refused_before_anything_is_restored(damage, noted, tmp_path):
    build_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    save_file(damage(load_file(folder / "training.safetensors")), folder / "training.safetensors")
    if not noted:
        state = json.loads((folder / "trainer_state.json").read_text())
        del state["sha256"]
        (folder / "trainer_state.json").write_text(json.dumps(state))
    trainer = build_trainer(tmp_path, max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.policy.adapter_parameters().items()}
    expected = "is not as it was written" if noted else "fits no parameter of this run|is not whole"
    with pytest.raises(ConfigError, match=rf"training.safetensors.*({expected}).*another checkpoint"):
        trainer.train(resume_from_checkpoint=folder)
    assert all(torch.equal(p, before[name]) for name, p in trainer.policy.adapter_parameters().items())


def test_damaged_adapters_and_cut_files_of_a_checkpoint_are_refused(tmp_path):
    build_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    whole = (folder / "policy" / "adapters.safetensors").read_bytes()
    (folder / "policy" / "adapters.safetensors").write_bytes(whole[:-4] + bytes(4))
    with pytest.raises(ConfigError, match="adapters.safetensors is not as it was written"):
        build_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=folder)
    (folder / "policy" / "adapters.safetensors").write_bytes(whole)
    (folder / "trainer_state.json").write_text("{")
    with pytest.raises(ConfigError, match="trainer_state.json is damaged or no JSON"):
        build_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=folder)
