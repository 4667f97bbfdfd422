"""Objectives begin at PEFT's LoRA adapters: what the policy computes is what peft computes, and all of it can be trained on."""

import json
import shutil

import pytest
import torch
from engine.conftest import add_adapter, build_model, build_policy, build_tokenizer, model_inputs
from peft import LoraConfig, PeftModel, get_peft_model

from clp_engine import CLPConfig, CLPTrainer
from clp_engine.core.errors import ConfigError
from clp_engine.policy.peft import reading
from clp_engine.policy.policy import ConditionedPolicy

LAYERS = {
    "qwen2": ["q_proj", "down_proj"],
    "llama": ["q_proj", "down_proj"],
    "gemma2": ["q_proj", "down_proj"],
    "gpt2": ["attn.c_attn", "mlp.c_proj"],
    "t5": ["q", "wo"],
}
FAMILIES = sorted(LAYERS)


def trained(model, seed=5, **config):
    """A PeftModel whose adapter says something."""
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    randomise(model, seed)
    return model


def randomise(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def save(path, family="llama", seed=5, change=None, **config):
    """A directory that peft wrote, its configuration changed afterwards."""
    model = trained(build_model(family), seed, **{"target_modules": LAYERS[family], **config})
    model.save_pretrained(path)
    if change:
        file = path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return path


def adapters(tmp_path, family):
    """Two adapters of other ranks, scalings and layers."""
    first, second = LAYERS[family]
    return {
        "a": save(tmp_path / "a", family, 1, target_modules=[first], r=3, lora_alpha=9, use_rslora=True),
        "b": save(
            tmp_path / "b",
            family,
            2,
            r=4,
            lora_alpha=2,
            rank_pattern={second: 2},
            alpha_pattern={f".*{first}": 16},
        ),
    }


def log_probs(model, family, **conditions):
    with torch.no_grad():
        return model(**model_inputs(family), **conditions).logits.log_softmax(-1)


def theirs(family, path):
    return log_probs(PeftModel.from_pretrained(build_model(family), path), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_corner_is_the_adapter_that_peft_computes(family, tmp_path):
    paths = adapters(tmp_path, family)
    policy = ConditionedPolicy.from_adapters(build_model(family), paths)
    assert policy.objectives == ("a", "b") and policy.spec.ranks == (3, 4)
    base = log_probs(build_model(family), family)
    for weights, path in (([1, 0], paths["a"]), ([0, 1], paths["b"])):
        expected = theirs(family, path)
        assert (expected - base).abs().max() > 1e-2
        assert (log_probs(policy, family, weights=weights) - expected).abs().max() < 1e-4


def test_a_blend_is_the_one_that_peft_concatenates(tmp_path):
    paths = adapters(tmp_path, "llama")
    policy = ConditionedPolicy.from_adapters(build_model("llama"), paths)
    model = PeftModel.from_pretrained(build_model("llama"), paths["a"], "a")
    model.load_adapter(paths["b"], "b")
    # peft gives the new adapter the first one's use_rslora, and so another scaling than it means: b, without it, goes first.
    model.add_weighted_adapter(["b", "a"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    ours = log_probs(policy, "llama", weights=[0.3, 0.7])
    assert (ours - log_probs(model, "llama")).abs().max() < 1e-4


def test_where_an_adapter_has_no_delta_or_a_lower_rank_there_are_directions_at_zero_that_train(tmp_path):
    policy = ConditionedPolicy.from_adapters(build_model("llama"), adapters(tmp_path, "llama"))
    assert {name.rsplit(".", 1)[-1] for name in policy.layers} == {"q_proj", "down_proj"}
    down = policy.layers["model.layers.0.mlp.down_proj"]  # a has none here, b has rank 2 of 4
    assert down.lora_b[:, [0, 1, 2, 5, 6]].count_nonzero() == 0 and down.lora_b[:, 3:5].all()
    assert down.lora_a.abs().sum(1).min() > 0
    policy(**model_inputs("llama"), weights=[0.5, 0.5]).logits.square().sum().backward()
    assert down.lora_b.grad.abs().sum(0).min() > 0


def test_an_objective_without_an_adapter_begins_at_the_base_model(tmp_path):
    policy = ConditionedPolicy.from_adapters(
        build_model("llama"), {"a": save(tmp_path / "a"), "b": None}, rank=[6, 2], target_modules=["v_proj"]
    )
    assert policy.spec.ranks == (6, 2)
    assert {name.rsplit(".", 1)[-1] for name in policy.layers} == {"q_proj", "down_proj", "v_proj"}
    torch.testing.assert_close(
        log_probs(policy, "llama", weights=[0, 1]), log_probs(build_model("llama"), "llama")
    )
    assert (log_probs(policy, "llama", weights=[1, 0]) - theirs("llama", tmp_path / "a")).abs().max() < 1e-4


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True)])
@pytest.mark.parametrize("rank", [4, 40], ids=["factors", "whole"])
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_adapter_on_the_output_projection_is_followed(family, tied, rank, tmp_path):
    path = save(
        tmp_path / "a", family, target_modules=["lm_head", "q_proj"], r=4, rank_pattern={"lm_head": rank}
    )
    policy = ConditionedPolicy.from_adapters(build_model(family), {"a": path, "b": path})
    assert policy.spec.conditioning == "lora+logit"
    assert policy.layers["lm_head"].whole == (rank > 32)
    assert (log_probs(policy, family, weights=[0.4, 0.6]) - theirs(family, path)).abs().max() < 1e-4


def test_one_delta_for_all_objectives_can_begin_at_an_adapter(tmp_path):
    path = save(tmp_path / "a")
    policy = ConditionedPolicy.from_adapters(
        build_model("llama"), {"a": path, "b": path}, conditioning="none"
    )
    assert len(policy.spec.ranks) == 1
    assert (log_probs(policy, "llama", weights=[1, 0]) - theirs("llama", path)).abs().max() < 1e-4
    with pytest.raises(ConfigError, match="has one delta for all objectives; got 2 adapters"):
        ConditionedPolicy.from_adapters(build_model("llama"), {"a": path, "b": None}, conditioning="none")


def test_adapters_make_a_soup_of_the_embedded_model(tmp_path):
    from transformers import AutoModelForCausalLM

    from clp_engine.tasks.docsum import checkpoint_path

    base = AutoModelForCausalLM.from_pretrained(checkpoint_path())
    for name in ("coverage", "brevity"):
        trained(base, target_modules=["q_proj"]).save_pretrained(tmp_path / name)
    policy = ConditionedPolicy.from_adapters("docsum", {n: tmp_path / n for n in ("coverage", "brevity")})
    policy.save_pretrained(tmp_path / "policy")
    assert ConditionedPolicy.load(tmp_path / "policy").spec == policy.spec
    assert policy.spec.base_model == "docsum"
    assert policy.generate("Return x.", weights=[0.5, 0.5], temperature=0, max_new_tokens=4)


# -- models that hold adapters -----------------------------------------------------------------------------------------


def holder(family="llama", names=("a", "b")):
    """A PeftModel with an adapter per name, of other ranks and layers."""
    first, second = LAYERS[family]
    model = get_peft_model(build_model(family), LoraConfig(r=3, target_modules=[first]), names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(r=5, lora_alpha=3, target_modules=[first, second]))
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peft_model_brings_an_adapter_for_each_objective(family):
    model, expected = holder(family), {}
    for name in ("a", "b"):
        model.set_adapter(name)
        expected[name] = log_probs(model, family)
    policy = ConditionedPolicy.from_pretrained(model, ["b", "a"])
    assert policy.spec.ranks == (5, 3)
    for weights, name in (([1, 0], "b"), ([0, 1], "a")):
        assert (log_probs(policy, family, weights=weights) - expected[name]).abs().max() < 1e-4
    base = log_probs(build_model(family), family)
    torch.testing.assert_close(log_probs(policy.model, family), base)  # the reference has no adapter


def test_a_single_adapter_is_where_every_objective_begins():
    model = trained(build_model("llama"), target_modules=["q_proj"]).eval()
    expected = log_probs(model, "llama")
    policy = ConditionedPolicy.from_pretrained(model, ["a", "b"], rank=6)
    assert policy.spec.ranks == (6, 6)
    assert (log_probs(policy, "llama", weights=[0.2, 0.8]) - expected).abs().max() < 1e-4


def test_adapters_of_transformers_own_integration_count_too():
    model = add_adapter(build_model("llama"), LoraConfig(r=3, target_modules=["q_proj"]))
    randomise(model)
    expected = log_probs(model.eval(), "llama")
    policy = ConditionedPolicy.from_pretrained(model, ["a"])
    assert (log_probs(policy, "llama", weights=[1]) - expected).abs().max() < 1e-4
    assert not any("lora" in name for name, _ in policy.merge().named_parameters())


def test_a_scaling_that_was_changed_in_the_model_is_the_one_that_counts():
    model = trained(build_model("llama"), target_modules=["q_proj"]).eval()
    for layer in model.modules():
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(0.5)
    expected = log_probs(model, "llama")
    policy = ConditionedPolicy.from_pretrained(model, ["a"])
    assert (log_probs(policy, "llama", weights=[1]) - expected).abs().max() < 1e-4


def train(model, tmp_path, **options):
    settings = CLPConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        num_generations=2,
        per_device_train_batch_size=4,
        max_completion_length=4,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    rewards = {name: lambda completions, **_: [float(len(c)) for c in completions] for name in ("a", "b")}
    rows = [{"prompt": f"w{i} w{i + 1}"} for i in range(4)]
    return CLPTrainer(model, rewards, settings, rows, processing_class=build_tokenizer())


def test_the_trainer_takes_a_peft_model(tmp_path):
    model = holder()
    model.set_adapter("b")
    expected = log_probs(model, "llama")
    trainer = train(model, tmp_path)
    assert trainer.policy.spec.ranks == (3, 5)
    assert (log_probs(trainer.policy, "llama", weights=[0, 1]) - expected).abs().max() < 1e-4
    before = {name: p.detach().clone() for name, p in trainer.policy.adapter_parameters().items()}
    trainer.train()
    assert any(not torch.equal(p, before[n]) for n, p in trainer.policy.adapter_parameters().items())
    assert train(holder(), tmp_path, rank=8).policy.spec.ranks == (8, 8)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda p: ConditionedPolicy.from_pretrained(holder(), ["a", "c"]),
            "the model's adapters are a, b, the objectives are a, c",
        ),
        (
            lambda p: ConditionedPolicy.from_pretrained(holder(), ["a", "b"], rank=4),
            "rank=4 is less than that of adapter 'b', 5",
        ),
        (
            lambda p: ConditionedPolicy.from_pretrained(holder(), ["a", "b"], lora_alpha=4),
            "lora_alpha=4 was given with",
        ),
        (
            lambda p: ConditionedPolicy.from_pretrained(holder(), ["a", "b"], conditioning="full"),
            "expected conditioning 'lora'",
        ),
        (
            lambda p: ConditionedPolicy.from_pretrained(merged(), ["a", "b"]),
            "merged into its weight; call unmerge_adapter",
        ),
        (lambda p: train(holder(names=("a", "c")), p), "the objectives are a, b"),
        (
            lambda p: CLPTrainer(holder(), {"a": len, "b": len}, peft_config=LoraConfig()),
            "peft_config was given with a model that holds adapters",
        ),
        (
            lambda p: ConditionedPolicy.from_pretrained(torch.nn.Linear(2, 2), ["a"]),
            "the base model is a Linear; expected",
        ),
    ],
)
def test_models_with_adapters_that_do_not_fit_are_refused_with_the_cause(build, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        build(tmp_path)


def merged():
    model = holder()
    model.merge_adapter()
    return model


def test_a_base_with_adapters_in_it_and_an_adapter_for_a_base_are_told_apart(tmp_path):
    model = add_adapter(build_model("llama"), LoraConfig(r=3, target_modules=["q_proj"]))
    with pytest.raises(
        ConfigError, match="the base model holds adapters of PEFT; give it to ConditionedPolicy.from_pre"
    ):
        ConditionedPolicy.from_adapters(model, {"a": None})
    path = save(tmp_path / "a")
    with pytest.raises(ConfigError, match="it is a LoRA adapter; give its base model"):
        ConditionedPolicy.from_pretrained(str(path), ["a"])


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora=True: DoRA scales whole columns"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]: it replaces whole modules"),
        ({"bias": "all"}, "bias='all', it changes biases of the base model"),
        ({"lora_bias": True}, "lora_bias=True: lora_B has a bias"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices=.*: it replaces rows of the embedding"),
        (
            {"target_modules": ["embed_tokens", "q_proj"]},
            "embed_tokens.lora_embedding_A is no factor of a linear",
        ),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base model's weights"),
        ({"change": {"peft_type": "IA3"}}, "peft_type is IA3; expected LORA"),
        ({"change": {"shiny_new_option": 3}}, "shiny_new_option=3 is no part of plain LoRA"),
        ({"change": {"rank_pattern": {"q_proj": 7}}}, "has rank 4, its adapter_config.json says 7"),
        ({"change": {"rank_pattern": {".*q_p(ro)+j": 7}}}, "has rank 4, its adapter_config.json says 7"),
        (
            {"change": {"rank_pattern": {"(": 7}}},
            r"adapter_config.json: rank_pattern: \['\('\] are no regular expr",
        ),
        (
            {"change": {"rank_pattern": [1]}},
            r"adapter_config.json: rank_pattern=\[1\]: expected a number for each",
        ),
        (
            {"change": {"rank_pattern": {"q_proj": "4"}}},
            "adapter_config.json: rank_pattern=.*: expected a whole number",
        ),
        (
            {"change": {"alpha_pattern": {"q_proj": None}}},
            "adapter_config.json: alpha_pattern=.*: expected a number",
        ),
        ({"change": {"r": "4"}}, "adapter_config.json: r='4': expected a whole number, at least 1"),
        ({"change": {"r": 0}}, "adapter_config.json: r=0: expected a whole number, at least 1"),
        ({"change": {"lora_alpha": float("nan")}}, "adapter_config.json: lora_alpha=nan: expected a number"),
        ({"change": {"lora_alpha": None}}, "adapter_config.json: lora_alpha=None: expected a number"),
        ({"change": {"lora_alpha": 0}}, "computes nothing: its lora_alpha is 0; leave it out"),
        ({"lora_alpha": 0}, "computes nothing: its lora_alpha is 0; leave it out"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_that_are_no_plain_lora_are_refused_by_name(config, message, tmp_path):
    path = save(tmp_path / "a", **config)
    with pytest.raises(ConfigError, match=message):
        ConditionedPolicy.from_adapters(build_model("llama"), {"a": path})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens is an embedding"),
        ({"use_dora": True}, "DoRA scales whole columns"),
    ],
    ids=str,
)
def test_so_are_those_in_a_model(config, message):
    with pytest.raises(ConfigError, match=message):
        ConditionedPolicy.from_pretrained(
            trained(build_model("llama"), **{"target_modules": ["q_proj"], **config}), ["a"]
        )


def test_an_adapter_of_another_model_is_refused(tmp_path):
    path = save(tmp_path / "a")
    with pytest.raises(
        ConfigError, match="adapts model.layers.0.mlp.down_proj, and the base model has no such layer"
    ):
        ConditionedPolicy.from_adapters(build_model("gpt2"), {"a": path})
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "adapter_model.safetensors")
    key = next(k for k in tensors if k.endswith("q_proj.lora_B.weight"))
    save_file({**tensors, key: torch.zeros(48, 4)}, path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"lora_B \(48, 4\), and the layer has 32 inputs and 32 outputs"):
        ConditionedPolicy.from_adapters(build_model("llama"), {"a": path})


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_adapter_with_a_base_weight_of_its_own_is_refused(tmp_path):
    path = save(tmp_path / "a", target_modules=["lm_head"])  # peft writes the output projection itself, too
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "adapter_model.safetensors")
    key = next(k for k in tensors if k.endswith("lm_head.base_layer.weight"))
    save_file({**tensors, key: tensors[key] * 1.5}, path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="has a weight of its own for lm_head"):
        ConditionedPolicy.from_adapters(build_model("llama"), {"a": path})


def test_missing_files_are_named_and_no_pickle_is_opened(tmp_path):
    with pytest.raises(ConfigError, match="no adapter_config.json; expected a directory that PEFT"):
        ConditionedPolicy.from_adapters(build_model("llama"), {"a": tmp_path})
    path = save(tmp_path / "a")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(ConfigError, match="only adapter_model.bin is there, a pickle, which is not opened"):
        ConditionedPolicy.from_adapters(build_model("llama"), {"a": path})
    with pytest.raises(ConfigError, match="adapters is empty"):
        ConditionedPolicy.from_adapters(build_model("llama"), {})


def test_an_expression_that_takes_for_ever_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_PATIENCE", 1)
    hostile = {"rank_pattern": {"(([a-z_.0-9]+)+)+!": 4}}
    path = save(tmp_path / "a", change=hostile)
    with pytest.raises(
        ConfigError, match="rank_pattern: matching its expressions takes more than 1 s; write the names"
    ):
        ConditionedPolicy.from_adapters(build_model("llama"), {"a": path})


def test_names_and_expressions_match_as_peft_has_them():
    from peft.utils.other import get_pattern_key

    layers = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.10.self_attn.q_proj",
        "q_proj",
        "model.xq_proj",
    ]
    keys = [
        "q_proj",
        "0.self_attn.q_proj",
        "q.proj",
        "model.layers.1",
        "layers.10.self_attn.q_proj",
        "_proj",
        "xq_proj",
    ]
    for key in [*keys, *(f"(?:{key})" for key in keys), r"layers\\.\\d0\\..*", ".*", ""]:
        config = {"r": 1, "rank_pattern": {key: 2}}
        ours = reading._by_layer("here", config, "rank_pattern", "r", layers)
        peft_s = {
            layer: config["rank_pattern"].get(get_pattern_key(config["rank_pattern"].keys(), layer), 1)
            for layer in layers
        }
        assert ours == peft_s, key


def test_a_layer_whose_alpha_is_zero_adds_nothing_and_divides_nothing(tmp_path):
    path = save(tmp_path / "a", alpha_pattern={"down_proj": 0})
    policy = ConditionedPolicy.from_adapters(build_model("llama"), {"a": path, "b": None})
    ours = log_probs(policy, "llama", weights=[1.0, 0.0])
    torch.testing.assert_close(ours, theirs("llama", path), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_file_of_an_adapter_is_named_with_the_remedy(tmp_path, name):
    path = save(tmp_path / "a")
    whole = (path / name).read_bytes()
    for damage in damages(whole):
        (path / name).write_bytes(damage)
        with pytest.raises(ConfigError, match=rf"{name}.*(again|expected)|peft_type is") as caught:
            ConditionedPolicy.from_adapters(build_model("llama"), {"a": path})
        assert str(path) in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["clp_config.json", "adapters.safetensors"])
def test_so_is_one_of_a_policy(tmp_path, name):
    policy = build_policy("llama")
    policy.save_pretrained(tmp_path / "p")
    whole = (tmp_path / "p" / name).read_bytes()
    for damage in damages(whole):
        (tmp_path / "p" / name).write_bytes(damage)
        with pytest.raises(ConfigError, match=rf"{name}"):
            ConditionedPolicy.load(tmp_path / "p", base_model=build_model("llama"))
    for change in ({"ranks": [0, 4]}, {"lora_alphas": "x"}, {"objectives": 5}, {"default_kl": None}):
        if name == "clp_config.json":
            (tmp_path / "p" / name).write_text(json.dumps({**json.loads(whole), **change}))
            with pytest.raises(ConfigError, match="clp_config.json is damaged .* copy the policy again"):
                ConditionedPolicy.load(tmp_path / "p", base_model=build_model("llama"))
    (tmp_path / "p" / name).write_bytes(whole)
    with pytest.raises(ConfigError, match="was saved over another base model"):
        ConditionedPolicy.load(tmp_path / "p", base_model=build_model("gpt2"))


def damages(whole: bytes):
    """Cut, empty, foreign, and with its first bytes or a tensor's numbers changed."""
    yield from (
        whole[: len(whole) // 2],
        whole[:7],
        b"",
        b"{}",
        b"[1, 2]",
        b"null",
        b"\xff" * 64,
        b"[" * 10**5,
    )
    yield bytes([whole[0] ^ 0x40]) + whole[1:]
    if whole[:1] != b"{":
        yield whole[:-4] + b"\x00\x00\xc0\x7f"  # NaN


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b'{"adapters": 5}', b'{"adapters": {"a": 5}}'])
def test_so_is_the_description_of_a_blend(tmp_path, content):
    (tmp_path / "clp_blend.json").write_bytes(content)
    with pytest.raises(ConfigError, match="clp_blend.json .*again"):
        ConditionedPolicy.from_adapters(build_model("llama"), tmp_path)


def test_dropout_and_another_base_model_are_said(tmp_path):
    path = save(tmp_path / "a", lora_dropout=0.1)
    with pytest.warns(UserWarning, match="lora_dropout=0.1 is left out"):
        ConditionedPolicy.from_adapters(build_model("llama"), {"a": path})
    base = build_model("llama")
    base.save_pretrained(tmp_path / "mine")
    path = save(tmp_path / "a", change={"base_model_name_or_path": "org/another"})
    with pytest.warns(UserWarning, match="trained on the base model 'org/another' and is put on .*mine"):
        ConditionedPolicy.from_adapters(str(tmp_path / "mine"), {"a": path}, tokenizer=build_tokenizer())


@pytest.mark.filterwarnings("error::UserWarning:clp_engine")
def test_the_same_base_model_in_another_place_is_not_remarked_on(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "here" / "tiny")
    path = save(tmp_path / "a", change={"base_model_name_or_path": "org/tiny"})
    ConditionedPolicy.from_adapters(str(tmp_path / "here" / "tiny"), {"a": path}, tokenizer=build_tokenizer())
    shutil.rmtree(path)


# -- quantised models --------------------------------------------------------------------------------------------------


def quantised_layer():
    """What stands where bitsandbytes keeps 4-bit weights: a subclass of nn.Linear from its package."""
    kind = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    return kind(32, 32, bias=False)


def with_quantised_layer():
    model = build_model("llama")
    model.model.layers[1].self_attn.q_proj = quantised_layer()
    return model


def with_quantised_config():
    model = build_model("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    return model


def with_integers():
    model = build_model("llama")
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (with_quantised_layer, "model.layers.1.self_attn.q_proj is a Linear4bit of bitsandbytes"),
        (with_quantised_config, r"quantization_config \(gptq\)"),
        (with_integers, "q_proj has weights of torch.int8"),
    ],
)
def test_a_quantised_base_is_refused_wherever_it_enters(model, found, tmp_path):
    for enter in (
        lambda: ConditionedPolicy.from_pretrained(model(), ["a", "b"]),
        lambda: ConditionedPolicy.from_adapters(model(), {"a": None}),
        lambda: train(model(), tmp_path),
    ):
        with pytest.raises(ConfigError, match=f"the base model is quantised: .*{found}.*dequantize"):
            enter()
    build_policy("llama").save_pretrained(tmp_path / "policy")
    with pytest.raises(ConfigError, match="is quantised"):
        ConditionedPolicy.load(tmp_path / "policy", base_model=model())


def test_a_quantised_checkpoint_is_refused_before_it_is_loaded(tmp_path):
    model = build_model("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"quantised: its configuration has quantization_config \(awq\)"):
        ConditionedPolicy.from_pretrained(str(tmp_path), ["a"])
