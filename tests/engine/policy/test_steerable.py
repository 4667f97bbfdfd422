"""A policy inside plain transformers is the policy: per row, in generate and pipelines, checkpointed, compiled; and undone."""

import warnings

import pytest
import torch
from engine.conftest import (
    add_adapter,
    build_model,
    build_policy,
    build_tokenizer,
    model_inputs,
    plain_logits,
)
from later import later
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments, pipeline

from clp_engine.core.errors import ConfigError

FAMILIES = ["qwen2", "llama", "gpt2", "gemma2", "t5", "bart"]
CONDITIONING = ["lora", "attention", "logit", "full", "lora+logit", "none"]
WEIGHTINGS = torch.tensor([[0.1, 0.9], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
some_families = pytest.mark.parametrize("family", FAMILIES)
that_write = pytest.mark.parametrize(
    "family", FAMILIES[:-1]
)  # BART's biases are such that it says one word, whatever its blend


def logits(model, family="llama", **conditions):
    with torch.no_grad():
        return model(**model_inputs(family), **conditions).logits


def same(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@some_families
@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_forward_is_the_policy_s_own_for_every_row(family, conditioning):
    policy = build_policy(family, conditioning=conditioning, kl_conditioning="linear")
    model = policy.attach()
    assert (
        isinstance(model, type(build_model(family))) and type(model).__name__ == type(policy.model).__name__
    )
    kl = [0.0, 0.5, 0.2, 0.9]
    same(logits(model, family, weights=WEIGHTINGS, kl=kl), logits(policy, family, weights=WEIGHTINGS, kl=kl))
    mapping = {"a": 0.3, "b": 0.7}
    same(logits(model, family, weights=mapping), logits(policy, family, weights=mapping))


def test_without_weights_the_blend_is_uniform_or_the_one_that_was_set():
    policy = build_policy("llama", kl_conditioning="linear", default_kl=0.4)
    model = policy.attach()
    same(logits(model), logits(policy, weights=[0.5, 0.5], kl=0.4))
    model.set_blend({"b": 1.0}, kl=0.2)
    same(logits(model), logits(policy, weights=[0, 1], kl=0.2))
    same(logits(model, weights=[1, 0]), logits(policy, weights=[1, 0], kl=0.2))
    same(logits(model, kl=0.7), logits(policy, weights=[0, 1], kl=0.7))
    model.set_blend()
    same(logits(model), logits(policy, weights=[0.5, 0.5], kl=0.4))
    with pytest.raises(ConfigError, match="unknown objective 'c'"):
        model.set_blend({"c": 1.0})


def test_the_policy_is_left_as_it_was_and_its_weights_and_deltas_are_shared():
    policy = build_policy("llama")
    before = logits(policy, weights=WEIGHTINGS)
    model = policy.attach()
    model.set_blend([1, 0])
    assert type(policy.model) is LlamaForCausalLM and not hasattr(policy.model, "set_blend")
    assert torch.equal(logits(policy, weights=WEIGHTINGS), before)
    assert torch.equal(logits(policy.model), logits(build_model("llama")))
    own = {id(p) for p in policy.parameters()}
    assert {id(p) for p in model.parameters()} == own
    with torch.no_grad():
        next(p for n, p in policy.adapter_parameters().items() if n.endswith("lora_b")).add_(0.3)
    assert not torch.equal(logits(policy, weights=WEIGHTINGS), before)
    same(logits(model, weights=WEIGHTINGS), logits(policy, weights=WEIGHTINGS))


@some_families
def test_another_copy_of_the_base_is_attached_in_place_and_detached_without_a_trace(family):
    policy, model = (
        build_policy(family, conditioning="full" if family == "bart" else "lora"),
        build_model(family),
    )
    plain, kind = logits(model, family), type(model)
    modules = {name: id(module) for name, module in model.named_modules()}
    attributes = set(vars(model))
    assert policy.attach(model) is model
    same(logits(model, family, weights=WEIGHTINGS), logits(policy, family, weights=WEIGHTINGS))
    assert model.detach() is model and type(model) is kind
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert set(vars(model)) == attributes
    assert torch.equal(logits(model, family), plain)
    same(logits(policy.attach(model), family, weights=WEIGHTINGS), logits(policy, family, weights=WEIGHTINGS))


def test_a_copy_in_another_dtype_runs_in_that_dtype():
    policy = build_policy("llama", conditioning="full")
    model = policy.attach(build_model("llama").to(torch.bfloat16))
    found = logits(model, weights=WEIGHTINGS)
    assert found.dtype == torch.bfloat16
    same(found.float().log_softmax(-1), logits(policy, weights=WEIGHTINGS).log_softmax(-1), 0.25)


# -- generate ----------------------------------------------------------------------------------------------------------


PROMPTS = [f"w{i} w{i + 3} w{2 * i + 1}" for i in range(4)]


def greedy(model, policy, **options):
    inputs = policy.tokenizer(PROMPTS, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=6, **options)
    if not model.config.is_encoder_decoder:
        ids = ids[:, inputs["input_ids"].shape[1] :]
    return policy.tokenizer.batch_decode(ids, skip_special_tokens=True)


@that_write
def test_greedy_generation_is_that_of_the_policy_and_of_the_merged_model(family):
    policy = build_policy(family)
    model = policy.attach()
    found = greedy(model, policy, weights=WEIGHTINGS.tolist())
    expected = policy.generate(PROMPTS, WEIGHTINGS.tolist(), temperature=0, max_new_tokens=6)
    assert found == expected and len(set(found)) > 1
    for i, w in enumerate(WEIGHTINGS.tolist()):
        assert found[i] == greedy(policy.merge(w), policy)[i]


@that_write
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_every_beam_has_the_blend_of_its_prompt(family, options):
    policy = build_policy(family)
    per_prompt = options.get("num_return_sequences", 1)
    found = greedy(policy.attach(), policy, weights=WEIGHTINGS, **options)
    assert len(found) == 4 * per_prompt
    for i, w in enumerate(WEIGHTINGS.tolist()):
        rows = slice(i * per_prompt, (i + 1) * per_prompt)
        assert found[rows] == greedy(policy.merge(w), policy, **options)[rows]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_samples_of_one_prompt_have_its_blend(family):
    policy = build_policy(family)
    model = policy.attach()
    inputs = policy.tokenizer(PROMPTS, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(
        **inputs,
        weights=WEIGHTINGS,
        do_sample=True,
        top_k=0,
        num_return_sequences=3,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_logits=True,
    )
    start = 1 if family == "t5" else inputs["input_ids"].shape[1]
    for row in range(12):
        prompt, w = row // 3, WEIGHTINGS[row // 3].tolist()
        completion = out.sequences[row, start:].tolist()
        ids = inputs["input_ids"][prompt].tolist()
        expected = plain_logits(policy, ids, completion, weights=w)
        length = next((t + 1 for t, token in enumerate(completion) if token in policy.stop_token_ids), 4)
        ours = torch.stack([step[row] for step in out.logits])
        same(ours[:length], expected[:length], 1e-4)


def test_the_blend_that_was_set_is_that_of_generate_too():
    policy = build_policy("llama")
    model = policy.attach()
    model.set_blend([0, 1])
    assert greedy(model, policy) == greedy(policy.merge([0, 1]), policy)
    assert greedy(model, policy, num_beams=2) == greedy(policy.merge([0, 1]), policy, num_beams=2)


def test_an_error_in_the_middle_leaves_no_blend_behind():
    policy = build_policy("llama")
    model = policy.attach()
    with pytest.raises(ValueError, match="no_such_option"):
        greedy(model, policy, weights=[1, 0], no_such_option=3)
    same(logits(model), logits(policy))
    with pytest.raises(ConfigError, match="weights has 3 entries for 4 rows"):
        greedy(model, policy, weights=WEIGHTINGS[:3])


def test_pipelines_pass_the_weights_on():
    policy = build_policy("llama")
    model = policy.attach()
    pipe = pipeline("text-generation", model=model, tokenizer=build_tokenizer(), return_full_text=False)
    options = {"do_sample": False, "max_new_tokens": 6}
    for w in ({"a": 1.0}, {"b": 1.0}):
        found = [out[0]["generated_text"].split() for out in pipe(PROMPTS, weights=w, **options)]
        assert found == [text.split() for text in greedy(policy.merge(w), policy)]
    rows = pipe(PROMPTS, weights=WEIGHTINGS.tolist(), batch_size=4, **options)
    assert [out[0]["generated_text"].split() for out in rows] == [
        text.split() for text in greedy(model, policy, weights=WEIGHTINGS)
    ]


# -- training ----------------------------------------------------------------------------------------------------------


def gradients(model, policy, family, weights=WEIGHTINGS):
    policy.zero_grad()
    out = model(**model_inputs(family), weights=weights, use_cache=False).logits
    functional.cross_entropy(out.flatten(0, 1), model_inputs(family)["input_ids"].flatten()).backward()
    return {name: p.grad.clone() for name, p in policy.adapter_parameters().items()}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_recomputes_each_layer_under_its_blend(family, when):
    policy = build_policy(family).double()
    expected = gradients(policy, policy, family)
    model = build_model(family).double()
    if when == "before":
        model.gradient_checkpointing_enable()
    policy.attach(model)
    if when == "after":
        model.gradient_checkpointing_enable()
    without_dropout(model.train())
    runs = []
    layer = next(iter(m for m in model.modules() if type(m).__name__ == "ConditionedLinear"))
    layer.register_forward_hook(lambda *_: runs.append(1))
    found = gradients(model, policy, family)
    assert len(runs) == 2  # once more in the backward pass
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient
        )  # in float64, whose rounding no processor makes visible here
    # Two passes on their way: each is recomputed under its own blend, not the last one.
    policy.zero_grad()
    passes = [model(**model_inputs(family), weights=w, use_cache=False).logits for w in ([1, 0], [0, 1])]
    sum(p.square().mean() for p in passes).backward()
    twice = {name: p.grad.clone() for name, p in policy.adapter_parameters().items()}
    policy.zero_grad()
    for w in ([1, 0], [0, 1]):
        policy(**model_inputs(family), weights=w, use_cache=False).logits.square().mean().backward()
    for name, p in policy.adapter_parameters().items():
        torch.testing.assert_close(twice[name], p.grad)
    model.detach()
    model.requires_grad_(True)
    model(**model_inputs(family), use_cache=False).logits.sum().backward()


def test_the_trainer_of_transformers_trains_the_deltas(tmp_path):
    policy = build_policy("llama")
    model = policy.attach()
    model.set_blend([1, 0])
    before = {name: p.detach().clone() for name, p in policy.adapter_parameters().items()}
    rows = [{"input_ids": ids, "labels": ids} for ids in model_inputs("llama")["input_ids"]]
    settings = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        learning_rate=0.1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, settings, train_dataset=rows).train()
    layer = policy.layers["model.layers.0.self_attn.q_proj"]
    changed = layer.lora_b.detach() != before["model.layers.0.self_attn.q_proj.lora_b"]
    assert changed[:, :4].any() and not changed[:, 4:].any()  # the second objective had no share
    assert torch.equal(logits(policy.model), logits(build_model("llama")))  # nor had the base


def test_a_merged_model_does_not_run_layers_that_were_checkpointed_for_training():
    policy = build_policy("llama")
    expected = logits(policy.merge([1, 0]))
    policy.checkpoint_layers()
    same(logits(policy.merge([1, 0])), expected)
    same(logits(policy.attach(), weights=[1, 0]), expected)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "conditioning"),
    [("llama", "lora"), *later(("gpt2", "lora"), ("t5", "lora"), ("llama", "full"))],
)
def test_a_compiled_forward_is_one_graph_with_the_blend_as_its_input(family, conditioning, dynamo):
    policy = build_policy(family, conditioning=conditioning, kl_conditioning="linear")
    model = torch.compile(policy.attach(), backend="aot_eager", fullgraph=True)
    for weights, kl in ((WEIGHTINGS, 0.1), (WEIGHTINGS.flip(0), 0.1), (WEIGHTINGS.flip(1), 0.1)):
        same(
            logits(model, family, weights=weights, kl=kl),
            logits(policy, family, weights=weights, kl=kl),
            1e-4,
        )
        assert dynamo["stats"]["unique_graphs"] == 1
    assert not dynamo["graph_break"]


@pytest.mark.check
def test_a_mapping_is_read_ahead_of_the_layers_and_is_data_too(dynamo):
    policy = build_policy("llama")
    model = torch.compile(policy.attach(), backend="aot_eager")
    for a in (0.1, 0.6, 1.0):
        weights = {"a": a, "b": 1 - a}
        same(logits(model, weights=weights), logits(policy, weights=weights), 1e-4)
        graphs = dynamo["stats"]["unique_graphs"] if a == 0.1 else graphs  # noqa: F821
        assert dynamo["stats"]["unique_graphs"] == graphs


@pytest.mark.check
def test_the_default_is_an_input_of_the_graph_as_well(dynamo):
    policy = build_policy("llama")
    attached = policy.attach()
    model = torch.compile(attached, backend="aot_eager", fullgraph=True)
    for w in ([1, 0], [0.3, 0.7], [0, 1]):
        attached.set_blend(w)
        same(logits(model), logits(policy, weights=w), 1e-4)
    assert dynamo["stats"]["unique_graphs"] == 1


@pytest.mark.check
def test_a_compiled_backward_pass_has_the_same_gradients(dynamo):
    policy = build_policy("llama").double()
    expected = gradients(policy, policy, "llama")
    found = gradients(torch.compile(policy.attach(), backend="aot_eager", fullgraph=True), policy, "llama")
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


# -- what is refused ---------------------------------------------------------------------------------------------------


def attached_twice(policy):
    return policy.attach(policy.attach())


def quantised(policy):
    model = build_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return policy.attach(model)


def with_peft(policy):
    from peft import LoraConfig

    return policy.attach(add_adapter(build_model("llama"), LoraConfig(target_modules=["q_proj"])))


def narrower(policy):
    model = build_model("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    return policy.attach(model)


@pytest.mark.parametrize(
    ("enter", "message"),
    [
        (
            lambda p: p.attach(build_model("gpt2")),
            "model.layers.0.self_attn.q_proj is missing in the model; expected a copy",
        ),
        (
            narrower,
            r"up_proj is a Linear with weight \(40, 32\) in the model; .* a Linear with weight \(48, 32\) there",
        ),
        (lambda p: p.attach(p.model), "this is the policy's own model; leave model out"),
        (attached_twice, "attached to a policy already; call its detach"),
        (quantised, r"the base model is quantised: .*\(bitsandbytes\)"),
        (with_peft, "holds adapters of PEFT; merge or unload them first"),
        (lambda p: p.attach("llama"), "expected a loaded transformers model, got str"),
        (lambda p: p.attach().save_pretrained("x"), "write policy.save_adapters"),
    ],
)
def test_models_that_do_not_fit_are_refused_with_the_cause(enter, message):
    with pytest.raises(ConfigError, match=message):
        enter(build_policy("llama"))


def test_nothing_is_changed_by_a_refusal():
    model = build_model("llama")
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(40, 32, bias=False)
    names = [type(m) for m in model.modules()]
    with pytest.raises(ConfigError):
        build_policy("llama").attach(model)
    assert [type(m) for m in model.modules()] == names


def test_a_policy_that_writes_the_weighting_into_the_prompt_says_so():
    with pytest.warns(UserWarning, match="reads prompts as they are: put policy.prompt_text"):
        build_policy("llama", conditioning="prompt").attach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(build_policy("llama").attach(), PreTrainedModel)
