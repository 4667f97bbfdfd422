"""The policy is what it says: a per-row blend, exactly the base at zero, exportable to PEFT and mergeable."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine.conftest import ENCODER_DECODER, VOCAB, build_model, build_policy, build_tokenizer, model_inputs
from transformers import AutoModelForCausalLM, Gemma2PreTrainedModel

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.engines import trials
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.scoring import score
from clp_engine.rollouts.types import SamplingParams


def ids(rows=4, length=9, seed=3):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_an_untrained_policy_is_its_base_model_for_every_weighting(family):
    base, policy, given = build_model(family), build_policy(family, trained=False), model_inputs(family)
    with torch.no_grad():
        expected = base(**given).logits
        assert torch.equal(policy(**given, weights={"a": 0.3, "b": 0.7}).logits, expected)


def test_rows_with_a_zero_blend_are_the_base_model_in_a_mixed_batch(family):
    base, policy, given = build_model(family), build_policy(family), model_inputs(family)
    mixed = Conditions(torch.tensor([[0.0, 0.0], [0.4, 0.6], [0.0, 0.0], [1.0, 0.0]]), torch.zeros(4))
    with torch.no_grad():
        expected, logits = base(**given).logits, policy(**given, conditions=mixed).logits
    assert torch.equal(logits[[0, 2]], expected[[0, 2]])
    assert (logits[[1, 3]] - expected[[1, 3]]).abs().max() > 1e-2


def test_a_row_does_not_depend_on_the_weightings_beside_it(family):
    policy, given = build_policy(family), model_inputs(family)
    weightings = torch.tensor([[0.1, 0.9], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
    with torch.no_grad():
        together = policy(**given, weights=weightings).logits
        for i, w in enumerate(weightings):
            one = {name: values[i : i + 1] for name, values in given.items()}
            alone = policy(**one, weights=w.tolist()).logits
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_the_blend_is_of_products_not_of_factors():
    policy = build_policy("llama")
    name, layer = next(iter(policy.layers.items()))
    first, second = (layer.weight_delta(torch.tensor(c)) for c in ([1.0, 0.0], [0.0, 1.0]))
    torch.testing.assert_close(layer.weight_delta(torch.tensor([0.3, 0.7])), 0.3 * first + 0.7 * second)
    a, b = layer.lora_a, layer.lora_b
    torch.testing.assert_close(first, 2.0 * b[:, :4] @ a[:4])  # lora_alpha / rank is 2


def test_merge_gives_an_ordinary_model_with_the_same_log_probs(family):
    policy, given = build_policy(family), model_inputs(family)
    weights = {"a": 0.25, "b": 0.75}
    merged = policy.merge(weights)
    assert type(merged) is type(policy.model) and not any("lora" in n for n, _ in merged.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(
            merged(**given).logits.log_softmax(-1),
            policy(**given, weights=weights).logits.log_softmax(-1),
            rtol=1e-4,
            atol=1e-4,
        )
        # and the policy itself still blends
        assert not torch.equal(policy(**given, weights=[1, 0]).logits, policy(**given, weights=[0, 1]).logits)


@pytest.mark.parametrize("ranks", [4, (2, 6)])
def test_peft_loads_an_exported_blend_with_the_same_log_probs(family, ranks, tmp_path):
    from peft import PeftModel

    policy, given = build_policy(family, rank=ranks), model_inputs(family)
    weights = {"a": 0.6, "b": 0.4}
    policy.export_adapter(tmp_path / "adapter", weights=weights)
    loaded = PeftModel.from_pretrained(build_model(family), tmp_path / "adapter")
    with torch.no_grad():
        theirs = loaded(**given).logits.log_softmax(-1)
        ours = policy(**given, weights=weights).logits.log_softmax(-1)
    assert (theirs - ours).abs().max() < 1e-4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == ("SEQ_2_SEQ_LM" if family in ENCODER_DECODER else "CAUSAL_LM")
    assert config["r"] == sum(policy.spec.ranks) and config["lora_alpha"] == config["r"]


def test_the_adapter_export_honours_kl_conditioning(tmp_path):
    from safetensors.torch import load_file

    policy = build_policy("qwen2", kl_conditioning="linear")
    for kl in (0.0, 0.75):
        policy.export_adapter(tmp_path / f"{kl}", weights=[1, 0], kl=kl)
    full, quarter = (load_file(tmp_path / f"{kl}" / "adapter_model.safetensors") for kl in (0.0, 0.75))
    key = next(k for k in full if k.endswith("lora_B.weight"))
    torch.testing.assert_close(quarter[key], full[key] * 0.25)


@pytest.mark.parametrize("family", ["llama-tied", "t5", "t5-v1.1", "bart"])
def test_save_and_load_give_the_same_policy(family, tmp_path):
    policy, given = (
        build_policy(family, rank=(3, 5), kl_conditioning="odds", min_kl=0.1),
        model_inputs(family),
    )
    policy.save_pretrained(tmp_path / "policy")
    again = ConditionedPolicy.load(tmp_path / "policy", base_model=build_model(family))
    assert again.spec == policy.spec
    with torch.no_grad():
        assert torch.equal(
            again(**given, weights=[0.2, 0.8], kl=0.3).logits,
            policy(**given, weights=[0.2, 0.8], kl=0.3).logits,
        )
    assert again.generate("w1 w2", weights=[1, 0], max_new_tokens=4) == policy.generate(
        "w1 w2", weights=[1, 0], max_new_tokens=4
    )


@pytest.mark.parametrize("family", ["llama-tied", "t5", "t5-v1.1", "bart"])
def test_a_base_model_on_disk_is_loaded_as_what_it_is(family, tmp_path):
    base, given = build_model(family), model_inputs(family)
    base.save_pretrained(tmp_path)
    build_tokenizer(family).save_pretrained(tmp_path)
    policy = ConditionedPolicy.from_pretrained(str(tmp_path), ["a", "b"], rank=2, device="cpu")
    assert type(policy.model) is type(base)
    assert policy.tokenizer("w1 w2").input_ids == build_tokenizer(family)("w1 w2").input_ids
    with torch.no_grad():
        torch.testing.assert_close(policy(**given).logits, base(**given).logits)


def test_every_part_of_an_encoder_decoder_is_conditioned_but_its_output_projection():
    t5, gated, bart = (build_policy(family) for family in ("t5", "t5-v1.1", "bart"))
    assert len(t5.layers) == 2 * (4 + 2) + 2 * (8 + 2)  # q, k, v, o; wi, wo; the decoder attends twice
    assert len(gated.layers) == 2 * (4 + 3) + 2 * (8 + 3) and len(bart.layers) == 2 * (4 + 2) + 2 * (8 + 2)
    for policy in (t5, gated, bart):
        assert not any("lm_head" in name for name in policy.layers)
    with pytest.raises(ConfigError, match="shares its weight with the input embedding"):
        build_policy("t5", target_modules=["lm_head"])


def test_only_the_named_layers_are_conditioned_and_the_head_may_be_one_of_them():
    policy = build_policy("llama", target_modules=["q_proj", "lm_head"])
    assert {n.rsplit(".", 1)[-1] for n in policy.layers} == {"q_proj", "lm_head"}
    with torch.no_grad():
        assert not torch.equal(policy(ids(), weights=[1, 0]).logits, policy(ids(), weights=[0, 1]).logits)
    default = build_policy("llama")
    assert len(default.layers) == 2 * 7 and not any("lm_head" in n for n in default.layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"target_modules": ["no_such_proj"]},
            "no linear layer of .* is called 'no_such_proj'; it has .*q_proj",
        ),
        ({"target_modules": ["lm_head"]}, "shares its weight with the input embedding"),
        ({"rank": 0}, "rank=0: expected a whole number, at least 1"),
        ({"rank": (1, 2, 3)}, "rank has 3 entries for 2 objectives"),
        ({"conditioning": "magic"}, "conditioning='magic'"),
        ({"kl_conditioning": "cubic"}, "kl_conditioning='cubic': expected one of none, linear, odds"),
        ({"objectives": ["a", "a"]}, "no name twice"),
    ],
)
def test_bad_settings_say_what_was_expected(change, message):
    with pytest.raises(ConfigError, match=message):
        build_policy("qwen2", **change)


@pytest.mark.parametrize(
    ("weights", "kl", "message"),
    [
        ({"a": 0.5, "c": 0.5}, None, "unknown objective 'c'; this policy has a, b"),
        ({"a": 1.5, "b": -0.5}, None, "must not be negative"),
        ({"a": 0.5, "b": 0.2}, None, "must sum to 1; got a=0.5, b=0.2"),
        ([0.5, 0.3, 0.2], None, "3 entries; expected 2"),
        ([[1, 0]] * 3, None, "weights has 3 entries for 2 rows"),
        (None, 1.5, "alpha between 0 and 1"),
    ],
)
def test_bad_conditions_say_what_was_expected(weights, kl, message):
    with pytest.raises(ConfigError, match=message):
        build_policy("qwen2").conditions(weights, kl, rows=2)


def test_a_policy_needs_a_causal_language_model(tmp_path):
    from transformers import LlamaConfig, LlamaModel

    small = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(ConfigError, match="causal language model"):
        ConditionedPolicy.from_pretrained(LlamaModel(small), ["a"], tokenizer=build_tokenizer())
    with pytest.raises(ConfigError, match="cannot load the model '.*missing'"):
        ConditionedPolicy.from_pretrained(str(tmp_path / "missing"), ["a"])


@pytest.mark.parametrize("kl_conditioning", ["linear", "odds", "none"])
def test_alpha_1_is_the_reference_to_the_bit_where_the_blend_heeds_alpha(kl_conditioning):
    policy = build_policy(kl_conditioning=kl_conditioning, min_kl=0.1)
    prompts, rows = [[5, 6, 7], [8, 9, 10]], torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    at_one = Conditions(rows, torch.ones(2))
    drawn = rollout(policy, prompts, at_one, num_generations=3, sampling=SamplingParams(8), seed=3)
    asked, base = (score(policy, drawn, c, outputs=("logprob",)).logprob for c in (at_one, None))
    assert torch.equal(asked, base) == (kl_conditioning != "none")
    # Beside rows of other coefficients as well: a row's blend is its own.
    mixed = score(policy, drawn, Conditions(rows, torch.tensor([1.0, 0.1])), outputs=("logprob",)).logprob
    assert torch.equal(mixed[:3], base[:3]) == (kl_conditioning != "none")
    assert not torch.equal(mixed[3:], base[3:])


@pytest.mark.parametrize("path", ["torch", "auto"])
def test_threads_that_generate_at_once_get_what_they_would_get_alone(path, monkeypatch):
    """16 threads under 16 weightings, while another scores completions under a 17th."""
    monkeypatch.setenv(trials.SWITCH, path)
    policy = build_policy("llama")
    weightings = [[i / 15, 1 - i / 15] for i in range(16)]

    def generated(weights):
        return [policy.generate("w5 w6 w7", weights, max_new_tokens=12, seed=s)[0] for s in range(3)]

    conditions = policy.conditions([0.3, 0.7])
    drawn = rollout(policy, [[5, 6, 7]], conditions, num_generations=2, sampling=SamplingParams(6))

    def scored(_):
        return [score(policy, drawn, conditions).logprob for _ in range(10)]

    alone = [generated(weights) for weights in weightings]
    expected = scored(None)[0]
    assert len({text for texts in alone for text in texts}) > 24  # the weighting decides
    with ThreadPoolExecutor(17) as pool:
        scores = pool.submit(scored, None)
        together = list(pool.map(generated, weightings))
    assert together == alone
    assert all(torch.equal(found, expected) for found in scores.result())


def test_attention_that_caps_its_scores_is_not_left_to_one_that_does_not(monkeypatch):
    """Gemma 2 loads with sdpa before transformers 5.23, and is another model with it; later versions refuse."""
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    config = build_model("gemma2").config
    config.attn_logit_softcapping = 0.1
    models = {
        name: AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=name).eval()
        for name in ("sdpa", "eager")
    }
    with torch.no_grad():
        for parameter in models["sdpa"].parameters():
            parameter.mul_(
                6.0 if parameter.dim() == 2 else 1.0
            )  # initial weights are so small that attention is uniform
    models["eager"].load_state_dict(models["sdpa"].state_dict())
    given = model_inputs("gemma2")
    with torch.no_grad():
        expected = models["eager"](**given).logits
        policy = ConditionedPolicy.from_pretrained(models["sdpa"], ["a"], rank=2)
        torch.testing.assert_close(policy(**given).logits, expected)


@pytest.mark.parametrize(
    "weights, kl, said",
    [
        ({"a": None}, None, "weights={'a': None}: expected numbers"),
        (5, None, "weights=5: expected numbers"),
        ([[0.5, None]], None, "weights=.*: expected numbers"),
        (None, "x", "kl='x': expected a number"),
        (None, {}, "kl={}: expected a number"),
        (None, [0.1, None], "kl=.*: expected a number"),
        (None, 10**400, "kl=.*: expected a number"),
        (None, float("inf"), "kl=inf: expected beta >= 0"),
        (None, float("nan"), "kl=nan: expected beta >= 0"),
    ],
    ids=str,
)
def test_conditions_that_are_no_finite_numbers_are_refused(weights, kl, said):
    policy = ConditionedPolicy.from_pretrained(build_model("llama"), ["a", "b"], kl_is_beta=True)
    with pytest.raises(ConfigError, match=said):
        policy.conditions(weights, kl)
