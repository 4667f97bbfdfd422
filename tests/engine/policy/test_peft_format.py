"""Objectives and blends as PEFT adapters: peft computes from them what the policy computes, and the policy comes back."""

import json

import pytest
import torch
from engine.conftest import build_model, build_policy, build_tokenizer, model_inputs
from peft import PeftModel
from safetensors.torch import load_file

from clp_engine.core.errors import ConfigError
from clp_engine.policy.peft.writing import VLLM_RANKS, vllm_rank
from clp_engine.policy.policy import ConditionedPolicy

FAMILIES = ["qwen2", "llama", "gpt2", "gemma2", "t5"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def log_probs(model, family, **conditions):
    with torch.no_grad():
        return model(**model_inputs(family), **conditions).logits.log_softmax(-1)


def distance(one, other):
    return (one - other).abs().max().item()


# -- one adapter per objective ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_objective_is_an_adapter_of_peft_and_their_cat_is_the_blend(family, tmp_path):
    policy = build_policy(family, rank=(3, 5), lora_alpha=(6, 4), kl_conditioning="linear")
    assert policy.save_adapters(tmp_path / "all") == {"a": 0.0, "b": 0.0}
    model = PeftModel.from_pretrained(build_model(family), tmp_path / "all" / "a", "a")
    model.load_adapter(tmp_path / "all" / "b", "b")
    for name, weights in (("a", [1, 0]), ("b", [0, 1])):
        model.set_adapter(name)
        assert distance(log_probs(model, family), log_probs(policy, family, weights=weights, kl=0)) < 1e-4
    weights, kl = [0.3, 0.7], 0.25
    scaled = policy.coefficients(policy.conditions(weights, kl))[0].tolist()
    model.add_weighted_adapter(["a", "b"], scaled, "blend", combination_type="cat")
    model.set_adapter("blend")
    blended = log_probs(policy, family, weights=weights, kl=kl)
    assert distance(log_probs(model, family), blended) < 1e-4
    assert distance(blended, log_probs(policy, family, weights=weights, kl=0)) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_from_adapters_makes_the_policy_again(family, tmp_path):
    policy = build_policy(family, rank=(3, 5), lora_alpha=(6, 4), kl_conditioning="odds", min_kl=0.1)
    policy.save_adapters(tmp_path / "all")
    again = ConditionedPolicy.from_adapters(build_model(family), tmp_path / "all")
    assert again.spec == policy.spec
    for name, parameter in policy.adapter_parameters().items():
        torch.testing.assert_close(again.adapter_parameters()[name], parameter, rtol=1e-6, atol=0)
    assert again.generate("w1 w2", weights=[1, 0], max_new_tokens=4) == policy.generate(
        "w1 w2", weights=[1, 0], max_new_tokens=4
    )


def test_what_is_written_can_be_trained_on_by_peft(tmp_path):
    policy = build_policy("llama", rank=(3, 5), lora_alpha=(6, 4))
    policy.save_adapters(tmp_path)
    for i, name in enumerate("ab"):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (policy.spec.ranks[i], policy.spec.lora_alphas[i])
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
    layer = policy.layers["model.layers.0.self_attn.q_proj"]
    written = load_file(tmp_path / "b" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    assert torch.equal(written[key.format("A")], layer.lora_a[3:])
    assert torch.equal(written[key.format("B")], layer.lora_b[:, 3:])


def test_a_file_says_how_the_adapters_are_blended(tmp_path):
    policy = build_policy("llama", ["my/reward", "my.reward"], kl_conditioning="linear", kl_is_beta=True)
    policy.save_adapters(tmp_path / "all")
    blend = json.loads((tmp_path / "all" / "clp_blend.json").read_text())
    assert blend["adapters"] == {"my/reward": "my_reward", "my.reward": "my_reward_"}
    assert blend["blend"] == "theta(w, kl) = theta_ref + c * sum_i w_i * Delta_i"
    assert (blend["c"], blend["alpha"]) == ("1 - alpha", "kl / (1 + kl)")
    again = ConditionedPolicy.from_adapters(build_model("llama"), tmp_path / "all")
    assert again.objectives == policy.objectives and again.kl_is_beta
    with pytest.raises(
        ConfigError, match="no clp_blend.json here; expected a directory written by save_adapters"
    ):
        ConditionedPolicy.from_adapters(build_model("llama"), tmp_path)


@pytest.mark.parametrize("conditioning", ["none", "prompt", "lora+prompt"])
def test_policies_that_blend_no_parameters_come_back_as_such(conditioning, tmp_path):
    policy = build_policy("llama", conditioning=conditioning)
    policy.save_adapters(tmp_path)
    single = conditioning != "lora+prompt"
    assert (tmp_path / "adapter").is_dir() == single
    again = ConditionedPolicy.from_adapters(build_model("llama"), tmp_path)
    assert again.spec == policy.spec
    assert distance(*(log_probs(p, "llama", weights=[0.5, 0.5]) for p in (policy, again))) < 1e-5


@pytest.mark.filterwarnings("ignore:this adapter changes an output projection")
@pytest.mark.parametrize("conditioning", ["lora+logit", "logit", "attention", "attention+lora"])
def test_other_forms_come_back_as_low_rank_factors(conditioning, tmp_path):
    policy = build_policy("qwen2", conditioning=conditioning)
    rank = None if "attention" not in conditioning else 32
    if "attention" in conditioning:  # biases of lora_B, which adapters from elsewhere may not have
        for name, parameter in policy.adapter_parameters().items():
            if name.endswith("delta_bias"):
                parameter.data.zero_()
    errors = policy.save_adapters(tmp_path, rank=rank)
    assert max(errors.values()) < 1e-5
    for name, weights in (("a", [1, 0]), ("b", [0, 1])):
        loaded = PeftModel.from_pretrained(build_model("qwen2"), tmp_path / name)
        assert distance(log_probs(loaded, "qwen2"), log_probs(policy, "qwen2", weights=weights)) < 1e-4
    if "attention" in conditioning:
        with pytest.raises(ConfigError, match="lora_bias=True"):
            ConditionedPolicy.from_adapters(build_model("qwen2"), tmp_path)
        return
    again = ConditionedPolicy.from_adapters(build_model("qwen2"), tmp_path)
    assert again.spec == policy.spec
    assert distance(*(log_probs(p, "qwen2", weights=[0.3, 0.7]) for p in (policy, again))) < 1e-4


# -- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_low_rank_blend_is_cut_by_svd_with_its_error(family, tmp_path):
    policy = build_policy(family, rank=(3, 5))
    weights = {"a": 0.6, "b": 0.4}
    errors = {r: policy.export_adapter(tmp_path / f"{r}", weights, rank=r) for r in (2, 6, 8, 9)}
    assert errors[2] > errors[6] > 0 and errors[8] == errors[9] == 0
    merged = policy.merge(weights)
    lost = size = 0.0
    written = load_file(tmp_path / "2" / "adapter_model.safetensors")
    for name, layer in policy.layers.items():
        delta = layer.weight_delta(torch.tensor([0.6, 0.4]))
        a, b = (written[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert a.shape[0] == b.shape[1] == 2
        lost, size = lost + (b @ a - delta).square().sum(), size + delta.square().sum()
    assert errors[2] == pytest.approx((lost / size).sqrt().item(), rel=1e-4)
    exact = PeftModel.from_pretrained(build_model(family), tmp_path / "9")
    assert distance(log_probs(exact, family), log_probs(merged, family)) < 1e-4
    assert exact.peft_config["default"].r == 8


def test_objectives_cut_to_a_rank_keep_their_scaling(tmp_path):
    policy = build_policy("llama", rank=(3, 6), lora_alpha=(6, 2))
    errors = policy.save_adapters(tmp_path, rank=4)
    assert errors["a"] == 0 and 0 < errors["b"] < 1
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] / 4 == pytest.approx(2 / 6)
    layer = policy.layers["model.layers.0.mlp.up_proj"]
    u, s, v = torch.linalg.svd(layer.weight_delta(torch.tensor([0.0, 1.0])))
    written = load_file(tmp_path / "b" / "adapter_model.safetensors")
    a, b = (written[f"base_model.model.model.layers.0.mlp.up_proj.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(
        config["lora_alpha"] / 4 * b @ a, u[:, :4] * s[:4] @ v[:4], rtol=1e-4, atol=1e-5
    )


def test_objectives_that_the_blend_leaves_out_take_no_rank(tmp_path):
    policy = build_policy("llama", rank=(3, 5))
    policy.export_adapter(tmp_path / "a", weights=[0, 1])
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path / "a")
    assert loaded.peft_config["default"].r == 5
    assert distance(log_probs(loaded, "llama"), log_probs(policy, "llama", weights=[0, 1])) < 1e-4
    linear = build_policy("llama", kl_conditioning="linear")
    linear.export_adapter(tmp_path / "reference", weights=[0, 1], kl=1.0)
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path / "reference")
    assert distance(log_probs(loaded, "llama"), log_probs(build_model("llama"), "llama")) < 1e-6


def test_a_rank_that_vllm_does_not_take_is_said_with_the_remedy(tmp_path):
    policy = build_policy("llama", rank=(300, 213), target_modules=["q_proj"])
    with pytest.warns(UserWarning, match="rank 513 is more than vLLM takes .512 at most.: give rank=512"):
        policy.export_adapter(tmp_path / "a", weights=[0.5, 0.5])
    assert policy.export_adapter(tmp_path / "b", weights=[0.5, 0.5], rank=32) < 1e-6  # layers are 32 wide
    assert policy.export_adapter(tmp_path / "c", weights=[1, 0]) == 0  # 300


def test_the_rank_to_serve_an_adapter_with_is_the_next_that_vllm_has():
    assert [vllm_rank(r) for r in (1, 2, 16, 48, 257, 512, 513)] == [1, 8, 16, 64, 320, 512, None]
    assert VLLM_RANKS == tuple(sorted(VLLM_RANKS))


def test_all_layers_of_an_adapter_have_one_rank_as_vllm_reads_it(tmp_path):
    policy = build_policy("llama", conditioning="attention+lora", rank=2)
    policy.export_adapter(tmp_path / "a", weights=[0.5, 0.5], rank=20)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {config["r"]} == {20}
    assert config["rank_pattern"] == {} and config["lora_alpha"] == 20


# -- folders ---------------------------------------------------------------------------------------------------------


WRITES = {
    "export_adapter": lambda policy, folder: policy.export_adapter(folder, weights=[0.5, 0.5]),
    "save_adapters": lambda policy, folder: policy.save_adapters(folder),
    "export_stack": lambda policy, folder: policy.export_stack(folder),
    "save_pretrained": lambda policy, folder: policy.save_pretrained(folder),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_other_files_in_the_folder_stay(tmp_path, write):
    policy = build_policy("llama")
    for name in ("notes.txt", "a/notes.txt"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    for _ in range(2):
        write(policy, tmp_path / "out")
    for name in ("notes.txt", "a/notes.txt"):
        assert (tmp_path / "out" / name).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_nothing_is_written_into_a_base_model_or_over_adapters_that_were_read(tmp_path, write):
    build_model("llama").save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    policy = ConditionedPolicy.from_pretrained(tmp_path / "base", ("a", "b"))
    policy.save_adapters(tmp_path / "adapters")
    policy.save_pretrained(tmp_path / "policy")
    again = ConditionedPolicy.from_adapters(tmp_path / "base", tmp_path / "adapters")
    loaded = ConditionedPolicy.load(tmp_path / "policy")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused = [(policy, "base"), (again, "adapters"), (loaded, "policy"), (policy, ".")]
    for written, folder in refused[:1] if write is WRITES["save_pretrained"] else refused:
        with pytest.raises(ConfigError, match="give another folder"):
            write(written, tmp_path / folder)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# -- stacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_in_peft_is_the_sum_of_all_deltas_and_a_gate_of_its_rows_makes_any_blend(family, tmp_path):
    policy = build_policy(family, rank=(3, 4), lora_alpha=(6, 4), kl_conditioning="linear")
    assert policy.export_stack(tmp_path / "stack") == 0
    blend = json.loads((tmp_path / "stack" / "clp_blend.json").read_text())
    assert (blend["objectives"], blend["ranks"], blend["kl_conditioning"]) == (["a", "b"], [3, 4], "linear")
    model = PeftModel.from_pretrained(build_model(family), tmp_path / "stack")
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (8, 8)  # 7 products, padded to the next rank of vLLM
    coefficients = torch.tensor([[1.0, 1.0]])
    with policy.blend.use(coefficients):
        summed = policy.model(**model_inputs(family)).logits.log_softmax(-1)
    assert distance(log_probs(model, family), summed) < 1e-4
    weights, kl = [0.3, 0.7], 0.25
    gate = policy.coefficients(policy.conditions(weights, kl))[0].repeat_interleave(torch.tensor([3, 4]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert not parameter[:, 7:].any()
            parameter.data[:, :7] *= gate
        elif "lora_A" in name:
            assert not parameter[7:].any()
    blended = log_probs(policy, family, weights=weights, kl=kl)
    assert distance(log_probs(model, family), blended) < 1e-4
    assert distance(blended, summed) > 1e-3


def test_a_stack_of_cut_deltas_has_their_error_and_the_rows_of_each(tmp_path):
    policy = build_policy("llama", rank=(3, 6), lora_alpha=(6, 4))
    assert 0 < policy.export_stack(tmp_path, rank=4) < 1
    blend = json.loads((tmp_path / "clp_blend.json").read_text())
    assert blend["ranks"] == [3, 4]
    layer = policy.layers["model.layers.0.mlp.up_proj"]
    u, s, v = torch.linalg.svd(layer.weight_delta(torch.tensor([0.0, 1.0])))
    written = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (written[f"base_model.model.model.layers.0.mlp.up_proj.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(b[:, 3:7] @ a[3:7], u[:, :4] * s[:4] @ v[:4], rtol=1e-4, atol=1e-5)


def test_a_stack_knows_its_defaults_and_its_version(tmp_path):
    policy = build_policy("llama", kl_conditioning="odds", min_kl=0.1)
    policy.export_stack(tmp_path / "one", weights={"a": 0.25, "b": 0.75}, kl=0.5)
    policy.export_stack(tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "clp_blend.json").read_text()) for name in ("one", "two"))
    assert (one["default_weights"], one["default_kl"]) == ({"a": 0.25, "b": 0.75}, 0.5)
    assert (two["default_weights"], two["default_kl"]) == ({"a": 0.5, "b": 0.5}, policy.spec.default_kl)
    assert one["version"] == two["version"] and (one["min_kl"], one["kl_is_beta"]) == (0.1, False)
    next(iter(policy.adapter_parameters().values())).data += 1
    policy.export_stack(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "clp_blend.json").read_text())["version"] != one["version"]
    with pytest.raises(ConfigError, match="needs a KL coefficient above 0"):
        policy.export_stack(tmp_path / "three", kl=0.0)


def test_what_cannot_be_a_stack_is_refused_with_the_remedy(tmp_path):
    large = build_policy("llama", rank=(300, 213), target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="sum to 513, and vLLM takes 512 at most: give rank=256 or less"):
        large.export_stack(tmp_path / "a")
    assert large.export_stack(tmp_path / "a", rank=32) < 1e-6  # layers are 32 wide
    with pytest.raises(ConfigError, match="has no LoRA form; write a whole model instead"):
        build_policy("llama", conditioning="full").export_stack(tmp_path / "b", rank=8)
    with pytest.raises(ConfigError, match="has a bias, which no gate of ranks reaches"):
        build_policy("qwen2", conditioning="attention").export_stack(tmp_path / "b", rank=8)
    with pytest.raises(ConfigError, match="is a whole weight; give a rank to cut it to"):
        build_policy("llama", conditioning="attention").export_stack(tmp_path / "b")
    with pytest.raises(ConfigError, match="unknown objective 'c'; this policy has a, b"):
        build_policy("llama").export_stack(tmp_path / "b", weights={"c": 1.0})
    assert not (tmp_path / "b").exists()
    with pytest.raises(
        ConfigError,
        match="holds a stack for vLLM .export_stack.; expected a directory written by save_adapters",
    ):
        ConditionedPolicy.from_adapters(build_model("llama"), tmp_path / "a")
