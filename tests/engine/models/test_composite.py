"""Models of text and images as language models: the text path alone is conditioned, packed, and right."""

import pytest
import torch
from engine.conftest import COMPOSITE, VOCAB, build_model, build_policy, build_tokenizer, plain_logits
from transformers import AutoModelForCausalLM, Llama4TextConfig, Ministral3Config, PaliGemmaConfig
from transformers.models.llama4 import Llama4ForCausalLM

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.models.base import auto_class
from clp_engine.models.text_path import beside_text, text_stack
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.engines import native
from clp_engine.rollouts.engines.choice import detours
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.scoring import pack_rollout, score
from clp_engine.rollouts.types import SamplingParams
from clp_engine.training.settings.config import CLPConfig
from clp_engine.training.trainer import CLPTrainer

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32, 33]]
WEIGHTS = torch.tensor([[0.5, 0.5], [0.4, 0.6], [1.0, 0.0], [0.2, 0.8]])
MIXED = Conditions(WEIGHTS, torch.full((4,), 0.1))


@pytest.fixture(params=sorted(COMPOSITE))
def composite(request):
    return request.param


def drawn_by(policy, temperature: float = 1.0):
    sampling = SamplingParams(10, temperature=temperature)
    return rollout(policy, PROMPTS, MIXED, num_generations=2, sampling=sampling, seed=2)


def stale(model) -> None:
    """Leave behind what a call with an image leaves: an offset of positions, for a batch of another size."""
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = torch.full((3, 1), 17)


def llama4(**options):
    """Llama 4's language model: chunks of attention, layers without positions, and routed experts where `moe_layers` says."""
    common = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "head_dim": 8}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "no_rope_layers": [1, 0]}
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **common,
        **sizes,
        **heads,
        **{"attention_chunk_size": 4, "num_local_experts": 2, "moe_layers": [], **options},
    )
    model = Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def llama4_policy(**options):
    policy = ConditionedPolicy.from_pretrained(
        llama4(**options), ["a", "b"], rank=4, tokenizer=build_tokenizer()
    )
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters().items():
            if name.endswith("lora_b"):
                parameter.normal_(0, 0.1)
    return policy


def test_the_whole_fast_path_is_taken_for_text(composite):
    policy = build_policy(composite)
    assert detours(policy) == []
    assert policy.shares_prompts
    assert native.plan(policy).reason is None


def test_the_text_path_alone_is_conditioned_in_every_form(composite):
    model = build_model(composite)
    stack, beside = text_stack(model), beside_text(model)
    prefix = next(name for name, module in model.named_modules() if module is stack) + "."
    assert prefix == "model.language_model."
    for conditioning in ("lora", "attention", "full", "lora+logit"):
        policy = build_policy(composite, conditioning=conditioning)
        assert all(name.startswith(prefix) or name == "lm_head" for name in policy.layers), conditioning
        assert not any(map(beside, policy.layers))


def test_scores_are_those_of_plain_transformers(composite):
    policy = build_policy(composite)
    stale(policy.model)
    batch = drawn_by(policy)
    ours = score(policy, batch, MIXED)
    for row, (completion, prompt) in enumerate(
        zip(batch.token_lists(), [p for p in PROMPTS for _ in range(2)])
    ):
        weights = WEIGHTS[row // 2].tolist()
        for name, blend in (("logprob", weights), ("ref_logprob", None)):
            if blend is None:
                with policy.blend.use(None):
                    logits = policy.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            else:
                logits = plain_logits(policy, prompt, completion, weights=[weights], kl=0.1)
            expected = logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1))[:, 0]
            found = getattr(ours, name)[row, : len(completion)]
            torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slow", [False, True], ids=["native", "modules"])
def test_greedy_tokens_are_those_of_transformers_generate(composite, slow):
    policy = build_policy(composite)
    if slow:
        policy.model.register_forward_hook(
            lambda *_: None
        )  # the native decoder leaves models with hooks to transformers
        assert any("hooks" in line for line in detours(policy))
    stale(policy.model)
    found = drawn_by(policy, temperature=0).token_lists()[::2]
    model = policy.attach()
    for prompt, tokens, weights in zip(PROMPTS, found, WEIGHTS):
        ids = torch.tensor([prompt])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            weights=weights.unsqueeze(0),
            kl=0.1,
            do_sample=False,
            max_new_tokens=10,
        )
        assert made[0, len(prompt) :].tolist() == tokens


def test_gradients_are_those_of_one_plain_pass_for_each_row(composite):
    policy = build_policy(composite)
    batch = drawn_by(policy)
    stale(policy.model)
    packed = pack_rollout(batch)
    torch.manual_seed(0)
    factors = torch.randn(len(packed.predictors), VOCAB)
    hidden = policy.completion_hidden(batch, MIXED)
    (policy.backbone.head.logits(hidden) * factors).sum().backward()
    ours = {name: p.grad.clone() for name, p in policy.adapter_parameters().items()}
    policy.zero_grad()
    start = 0
    for row, completion in enumerate(batch.token_lists()):
        weights = [WEIGHTS[row // 2].tolist()]
        logits = plain_logits(policy, PROMPTS[row // 2], completion, weights=weights, kl=0.1)
        (logits * factors[start : start + len(completion)]).sum().backward()
        start += len(completion)
    for name, parameter in policy.adapter_parameters().items():
        scale = parameter.grad.abs().max().clamp_min(1e-3)
        assert (ours[name] - parameter.grad).abs().max() <= 2e-4 * scale, name


def test_a_rollout_leaves_the_state_of_the_model_alone(composite):
    policy = build_policy(composite)
    stale(policy.model)
    score(policy, drawn_by(policy), MIXED)
    for module in policy.model.modules():
        if hasattr(module, "rope_deltas"):
            assert torch.equal(module.rope_deltas, torch.full((3, 1), 17))


def test_a_composite_is_loaded_from_disk_saved_and_exported_for_peft(composite, tmp_path):
    from peft import PeftModel

    base = build_model(composite)
    base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    policy = ConditionedPolicy.from_pretrained(str(tmp_path / "base"), ["a", "b"], rank=4)
    assert detours(policy) == []
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters().items():
            if name.endswith("lora_b"):
                parameter.normal_(0, 0.1)
    policy.save_pretrained(tmp_path / "policy")
    again = ConditionedPolicy.load(tmp_path / "policy")
    ids = torch.randint(3, VOCAB - 3, (2, 9))
    expected = policy(ids, weights=[0.3, 0.7]).logits
    assert torch.equal(again(ids, weights=[0.3, 0.7]).logits, expected)
    policy.export_adapter(tmp_path / "adapter", weights=[0.3, 0.7])
    loaded = auto_class(base.config).from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    merged = policy.merge(weights=[0.3, 0.7])
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_composite_is_trained_resumed_and_checkpointed_layer_by_layer(tmp_path):
    def trained(folder, policy, steps, resume=None, **options):
        args = CLPConfig(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            num_generations=2,
            per_device_train_batch_size=4,
            max_completion_length=6,
            save_steps=2,
            learning_rate=1e-2,
            disable_tqdm=True,
            **options,
        )
        rows = [{"prompt": f"w{i} w{i + 1}"} for i in range(5, 30)]
        rewards = {"a": lambda completion_ids, **_: [float(sum(c) % 7) for c in completion_ids]}
        trainer = CLPTrainer(policy, rewards, args, rows)
        trainer.train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in policy.adapter_parameters().items()}

    def fresh():
        return build_policy("qwen2_5_vl", ["a"])

    once = trained("once", fresh(), 4)
    again = trained("again", fresh(), 4, resume=str(tmp_path / "once" / "checkpoint-2"))
    layered = trained("layered", fresh(), 4, gradient_checkpointing=True)
    for name, value in once.items():
        assert torch.equal(value, again[name]), name
        torch.testing.assert_close(value, layered[name], rtol=1e-4, atol=1e-5)
    assert any(
        not torch.equal(value, p) for value, p in zip(once.values(), fresh().adapter_parameters().values())
    )


def test_queries_that_are_scaled_by_their_position_are_packed_and_not_left_to_the_native_decoder():
    options = {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 3, "rope_theta": 10000.0}
    config = COMPOSITE["mistral3"]().text_config.to_dict()
    config = Ministral3Config(
        **{k: v for k, v in config.items() if k not in ("model_type", "rope_parameters", "layer_types")},
        rope_parameters={"rope_type": "yarn", "factor": 2.0, **options},
    )
    torch.manual_seed(0)
    policy = ConditionedPolicy.from_pretrained(
        AutoModelForCausalLM.from_config(config), ["a", "b"], tokenizer=build_tokenizer()
    )
    assert ["llama_4_scaling_beta" in line for line in detours(policy)] == [True]
    batch = drawn_by(policy)
    torch.testing.assert_close(score(policy, batch, MIXED).logprob, batch.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
@pytest.mark.parametrize("lengths", [(1, 1, 2), (2, 4, 5)], ids=["as many tokens as heads", "more"])
def test_norms_of_heads_are_blended_for_each_packed_token(family, lengths):
    """Their inputs are (1, tokens, heads, size) in one family and (1, heads, tokens, size) in the other."""
    policy = build_policy(family, conditioning="full")
    assert any(name.endswith("q_norm") for name in policy.layers)
    conditions = Conditions(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.full((2,), 0.1))
    first, second, room = lengths
    prompts = [[5] * first, [8] * second]
    batch = rollout(policy, prompts, conditions, sampling=SamplingParams(room), seed=1)
    heads = policy.config.text_config.num_attention_heads
    assert (len(pack_rollout(batch).ids) == heads) == (room == 2)
    torch.testing.assert_close(score(policy, batch, conditions).logprob, batch.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conditioning", ["full", "attention", "lora+logit"])
def test_whole_weights_are_merged_saved_and_read_back(conditioning, tmp_path):
    policy = build_policy("gemma3", conditioning=conditioning)
    ids = torch.randint(3, VOCAB - 3, (2, 9))
    expected = policy(ids, weights=[0.3, 0.7]).logits
    policy.merge(weights=[0.3, 0.7]).save_pretrained(tmp_path)
    again = auto_class(policy.config).from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_layers_of_images_is_refused_with_what_to_do(tmp_path):
    from peft import LoraConfig, get_peft_model

    def adapter(**options):
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)
        model = get_peft_model(build_model("llava"), config)
        model.save_pretrained(tmp_path)
        return model

    adapter()
    with pytest.raises(ConfigError, match=r"adapts model\.vision_tower\..*exclude_modules"):
        ConditionedPolicy.from_adapters(build_model("llava"), {"a": tmp_path})
    theirs = adapter(exclude_modules=r".*vision_tower.*")
    policy = ConditionedPolicy.from_adapters(build_model("llava"), {"a": tmp_path, "b": None})
    ids = torch.randint(3, VOCAB - 3, (2, 9))
    found = policy(ids, weights=[1.0, 0.0]).logits
    torch.testing.assert_close(found, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_targets_of_images_are_refused_and_names_that_both_have_mean_the_language_model():
    policy = build_policy("gemma3", target_modules=["q_proj"])
    assert set(policy.layers) == {f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)}
    with pytest.raises(
        ConfigError, match=r"target_modules: 'out_proj' names layers of Gemma3.* text passes by"
    ):
        build_policy("gemma3", target_modules=["q_proj", "out_proj"])


def test_a_lora_config_chooses_on_the_text_path_and_says_what_it_leaves():
    from peft import LoraConfig

    from clp_engine.policy.peft.lora_config import described

    def chosen(family="gemma3", **options):
        return described(LoraConfig(r=4, **options))["target_modules"](build_model(family))

    whole = {name for name in build_policy("gemma3").layers}
    assert set(chosen(target_modules="all-linear")) == whole
    with pytest.warns(
        UserWarning, match="1 of the 3 layers that it chooses get no adapter: text passes them by"
    ):
        assert len(chosen(target_modules=["q_proj"])) == 2
    with pytest.raises(ConfigError, match="text passes by"):
        chosen(target_modules=["out_proj"])
    assert {name.rsplit(".", 1)[-1] for name in chosen("llava")} == {"q_proj", "v_proj"}


def test_llama_4_is_a_causal_model_that_says_how_it_runs():
    policy = llama4_policy()
    [detour] = detours(policy)
    assert "chunked_attention" in detour
    batch = drawn_by(policy)
    ours = score(policy, batch, MIXED).logprob
    for row, completion in enumerate(batch.token_lists()):
        weights = [WEIGHTS[row // 2].tolist()]
        logits = plain_logits(policy, PROMPTS[row // 2], completion, weights=weights, kl=0.1)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1))[:, 0]
        torch.testing.assert_close(ours[row, : len(completion)], expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_model_that_looks_ahead_is_refused():
    common = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {
        **common,
        "model_type": "gemma",
        "vocab_size": VOCAB,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 0,
    }
    vision = {**common, "image_size": 8, "patch_size": 4, "projection_dim": 32}
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=32, image_token_index=VOCAB - 1
    )
    torch.manual_seed(0)
    model = auto_class(config).from_config(config)
    with pytest.raises(ConfigError, match=r"PaliGemma.* attends to tokens that come later"):
        ConditionedPolicy.from_pretrained(model, ["a"])


def test_a_router_is_not_a_projection():
    policy = llama4_policy(moe_layers=[1])
    assert not any("router" in name for name in policy.layers)
    assert any("shared_expert" in name for name in policy.layers)
    assert torch.isfinite(score(policy, drawn_by(policy), MIXED).logprob).all()
    with pytest.raises(ConfigError, match="no linear layer of Llama4ForCausalLM is called 'router'"):
        ConditionedPolicy.from_pretrained(llama4(moe_layers=[1]), ["a"], target_modules=["router"])
