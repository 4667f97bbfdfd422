"""Every form of conditioning is a per-row blend of the parameters it names, starts at the base model, merges and exports."""

import json

import pytest
import torch
from engine.conftest import (
    COMPOSITE,
    VOCAB,
    build_model,
    build_policy,
    build_tokenizer,
    model_inputs,
    plain_logits,
)

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.data.chat import encode_chat
from clp_engine.models.forms import Conditioning
from clp_engine.models.targets import unconditioned
from clp_engine.policy import prompt_conditioning
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.scoring import score
from clp_engine.rollouts.types import SamplingParams

MODES = {
    "full": {},
    "attention": {},
    "logit": {},
    "whole-logit": {"conditioning": "logit", "rank": 32},
    "attention+lora": {},
    "lora+logit": {},
}


def options(mode):
    return {"conditioning": mode, **MODES[mode]}


@pytest.fixture(params=sorted(MODES))
def mode(request):
    return request.param


def ids(rows=4, length=9, seed=3):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def row(given, i):
    return {name: values[i : i + 1] for name, values in given.items()}


WEIGHTINGS = torch.tensor([[0.1, 0.9], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])


def test_an_untrained_policy_is_its_base_model(family, mode):
    base, policy = build_model(family), build_policy(family, trained=False, **options(mode))
    with torch.no_grad():
        torch.testing.assert_close(
            policy(**model_inputs(family), weights=WEIGHTINGS).logits, base(**model_inputs(family)).logits
        )


def test_the_reference_is_the_base_model_to_the_bit_and_zero_rows_are_it(family, mode):
    base, policy = build_model(family), build_policy(family, **options(mode))
    mixed = Conditions(torch.tensor([[0.0, 0.0], [0.4, 0.6], [0.0, 0.0], [1.0, 0.0]]), torch.zeros(4))
    with torch.no_grad():
        expected = base(**model_inputs(family)).logits
        assert torch.equal(
            policy(**model_inputs(family), conditions=Conditions.reference(4, 2)).logits, expected
        )
        logits = policy(**model_inputs(family), conditions=mixed).logits
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-4)
    assert (logits[[1, 3]] - expected[[1, 3]]).abs().max() > 1e-2


def test_each_row_is_the_model_merged_at_its_weighting(family, mode):
    policy = build_policy(family, **options(mode))
    with torch.no_grad():
        together = policy(**model_inputs(family), weights=WEIGHTINGS).logits.log_softmax(-1)
        for i, w in enumerate(WEIGHTINGS):
            merged = policy.merge(w.tolist())
            assert type(merged) is type(policy.model)
            alone = merged(**row(model_inputs(family), i)).logits.log_softmax(-1)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_merged_model_survives_saving_and_loading(family, mode, tmp_path):
    merged = build_policy(family, **options(mode)).merge([0.3, 0.7])
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            again(**model_inputs(family)).logits, merged(**model_inputs(family)).logits
        )


def test_merging_leaves_policy_and_base_as_they_were(family):
    policy = build_policy(family, conditioning="full")
    with torch.no_grad():
        before = policy(**model_inputs(family), weights=WEIGHTINGS).logits
        policy.merge([0.3, 0.7])
        assert torch.equal(policy(**model_inputs(family), weights=WEIGHTINGS).logits, before)
        assert torch.equal(
            policy(**model_inputs(family), conditions=Conditions.reference(4, 2)).logits,
            build_model(family)(**model_inputs(family)).logits,
        )


def test_full_gradients_are_those_of_the_merged_model_times_the_coefficient(family):
    """dDelta_i = sum over rows of w_i dW(row), by autograd through each row's own merged model."""
    policy = build_policy(family, conditioning="full")
    probe = torch.randn(4, 9, VOCAB, generator=torch.Generator().manual_seed(0))
    (policy(**model_inputs(family), weights=WEIGHTINGS).logits * probe).sum().backward()
    expected = {name: torch.zeros_like(p) for name, p in policy.adapter_parameters().items()}
    for i, w in enumerate(WEIGHTINGS):
        merged = policy.merge(w.tolist()).requires_grad_(True)
        (merged(**row(model_inputs(family), i)).logits * probe[i : i + 1]).sum().backward()
        for name in expected:
            layer, _, part = name.rpartition(".")
            (target, stack), *more = policy.layers[layer].targets()
            if part == "delta_bias":
                target, stack = more[0]
            gradient = getattr(merged.get_submodule(layer), target).grad
            for k in range(2):
                # `stack` is the deltas in the parameter's layout, and a view: what is written there lands in the delta's.
                view = expected[name].as_strided(stack.shape, stack.stride(), stack.storage_offset())
                view[k] += w[k] * gradient
    for name, parameter in policy.adapter_parameters().items():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=2e-3, atol=2e-3 * expected[name].abs().max().item() + 1e-5
        )


def test_full_has_a_delta_for_every_parameter(family):
    policy = build_policy(family, conditioning="full")
    base = build_model(family)
    shared = unconditioned(base)  # T5's relative position biases, and layers for images
    assert bool(shared) == (family.startswith("t5") or family in COMPOSITE)
    count = sum(p.numel() for name, p in base.named_parameters() if name not in shared)
    assert sum(p.numel() for p in policy.adapter_parameters().values()) == 2 * count


def test_attention_has_the_attention_projections_alone():
    policy = build_policy("llama", conditioning="attention")
    assert {n.rsplit(".", 1)[-1] for n in policy.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    gpt2 = build_policy("gpt2", conditioning="attention")
    assert all(".attn." in name for name in gpt2.layers) and len(gpt2.layers) == 4
    both = build_policy("llama", conditioning="attention+lora")
    assert len(both.layers) == 14 and len(both.spec.target_modules) == 6


def test_logit_conditioning_goes_through_the_fused_head(family, mode):
    """Scores of a sampled batch, head inside linear_logprob, equal those of the model's own logits."""
    policy = build_policy(family, **options(mode))
    conditions = policy.conditions(WEIGHTINGS[:2], rows=2)
    drawn = rollout(
        policy, [[5, 6, 7], [8, 9, 10]], conditions, num_generations=2, sampling=SamplingParams(5), seed=1
    )
    stats = score(policy, drawn, conditions)
    mask = drawn.completion_mask
    torch.testing.assert_close(stats.logprob[mask], drawn.logprobs[mask], rtol=1e-4, atol=1e-4)
    for b in range(4):
        prompt, completion = [[5, 6, 7], [8, 9, 10]][b // 2], drawn.token_lists()[b]
        condition = conditions[b // 2 : b // 2 + 1]
        with torch.no_grad():
            p = plain_logits(policy, prompt, completion, conditions=condition).log_softmax(-1)
            q = plain_logits(policy, prompt, completion, conditions=Conditions.reference(1, 2)).log_softmax(
                -1
            )
        exact = (p.exp() * (p - q)).sum(-1)
        torch.testing.assert_close(stats.kl[b, : len(completion)], exact, rtol=1e-3, atol=1e-5)


def test_save_and_load_give_the_same_policy(family, mode, tmp_path):
    policy = build_policy(family, **options(mode))
    policy.save_pretrained(tmp_path / "policy")
    again = ConditionedPolicy.load(tmp_path / "policy", base_model=build_model(family))
    assert again.spec == policy.spec
    with torch.no_grad():
        assert torch.equal(
            again(**model_inputs(family), weights=WEIGHTINGS).logits,
            policy(**model_inputs(family), weights=WEIGHTINGS).logits,
        )


@pytest.mark.parametrize("mode", ["attention", "logit", "lora+logit", "whole-logit", "attention+lora"])
@pytest.mark.filterwarnings("ignore:this adapter changes an output projection")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "t5", "t5-v1.1", "bart"])
def test_a_blend_exports_to_peft(family, mode, tmp_path):
    from peft import PeftModel

    policy = build_policy(family, **options(mode))
    rank = None if mode in ("logit", "lora+logit") else 32
    error = policy.export_adapter(tmp_path / "adapter", weights=[0.6, 0.4], rank=rank)
    assert error < 1e-5
    loaded = PeftModel.from_pretrained(build_model(family), tmp_path / "adapter")
    with torch.no_grad():
        theirs = loaded(**model_inputs(family)).logits.log_softmax(-1)
        ours = policy(**model_inputs(family), weights=[0.6, 0.4]).logits.log_softmax(-1)
    assert (theirs - ours).abs().max() < 1e-4
    assert json.loads((tmp_path / "adapter" / "blend.json").read_text())["weights"] == pytest.approx(
        {"a": 0.6, "b": 0.4}
    )


def test_an_adapter_on_a_tied_output_projection_comes_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="merge_and_unload would change both"):
        build_policy("llama-tied", conditioning="logit").export_adapter(tmp_path / "a", weights=[1, 0])


def test_a_whole_delta_is_exported_at_a_rank_with_its_error(tmp_path):
    policy = build_policy("llama", conditioning="attention")
    with pytest.raises(ConfigError, match="whole weight; give a rank"):
        policy.export_adapter(tmp_path / "a", weights=[1, 0])
    errors = [policy.export_adapter(tmp_path / str(r), weights=[1, 0], rank=r) for r in (4, 16, 32)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5
    with pytest.raises(ConfigError, match="rank=0: expected at least 1"):
        policy.export_adapter(tmp_path / "z", weights=[1, 0], rank=0)
    with pytest.raises(ConfigError, match="has no LoRA form"):
        build_policy("llama", conditioning="full").export_adapter(tmp_path / "f", weights=[1, 0], rank=4)


def test_positions_looked_up_once_for_all_rows_are_blended_per_row():
    """Marian's position embedding returns (T, H)."""
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(0)
    sizes = {
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 1), ("ffn_dim", 16), ("attention_heads", 2))
    }
    model = MarianMTModel(
        MarianConfig(
            vocab_size=VOCAB, d_model=16, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, **sizes
        )
    ).eval()
    policy = ConditionedPolicy.from_pretrained(
        model, ["a", "b"], conditioning="full", tokenizer=build_tokenizer()
    )
    with torch.no_grad():
        for parameter in policy.adapter_parameters().values():
            parameter.normal_(0, 0.1)
        given = model_inputs("bart", length=4)  # as many positions as rows
        together = policy(**given, weights=WEIGHTINGS).logits
        for i, w in enumerate(WEIGHTINGS):
            torch.testing.assert_close(
                together[i : i + 1], policy.merge(w.tolist())(**row(given, i)).logits, rtol=1e-4, atol=1e-4
            )


def test_routed_experts_are_refused():
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=VOCAB,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        num_experts=2,
        decoder_start_token_id=0,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    )
    model = SwitchTransformersForConditionalGeneration(config).eval()
    with pytest.raises(ConfigError, match="belongs to routed experts"):
        ConditionedPolicy.from_pretrained(model, ["a", "b"], tokenizer=build_tokenizer())


def test_a_policy_in_another_dtype_still_runs():
    policy = build_policy("llama", conditioning="full").to(torch.bfloat16)
    with torch.no_grad():
        assert policy(ids(), weights=WEIGHTINGS).logits.isfinite().all()


def test_what_cannot_be_loaded_says_why(tmp_path):
    policy = build_policy("llama")
    policy.save_pretrained(tmp_path / "p")
    with pytest.raises(ConfigError, match="saved from a model in memory; give it with base_model="):
        ConditionedPolicy.load(tmp_path / "p")
    spec = tmp_path / "p" / "clp_config.json"
    raw = json.loads(spec.read_text())
    for missing in ("carrier", "prompt_template"):  # as an earlier version wrote it
        del raw[missing]
    spec.write_text(json.dumps(raw))
    assert ConditionedPolicy.load(tmp_path / "p", base_model=build_model("llama")).spec == policy.spec
    spec.write_text(json.dumps(raw | {"novelty": 1}))
    with pytest.raises(ConfigError, match="does not know .novelty.; it was written by a newer one"):
        ConditionedPolicy.load(tmp_path / "p", base_model=build_model("llama"))


# ---- one delta for all weightings


def test_without_conditioning_every_weighting_is_the_same_model(family):
    policy = build_policy(family, conditioning="none")
    with torch.no_grad():
        logits = policy(**model_inputs(family), weights=WEIGHTINGS).logits
        torch.testing.assert_close(policy(**model_inputs(family), weights=[0.5, 0.5]).logits, logits)
        assert (logits - build_model(family)(**model_inputs(family)).logits).abs().max() > 1e-2
        reference = policy(**model_inputs(family), conditions=Conditions.reference(4, 2)).logits
        assert torch.equal(reference, build_model(family)(**model_inputs(family)).logits)


@pytest.mark.parametrize("carrier", ["lora", "full", "attention", "logit"])
def test_specialists_become_the_corners_of_a_soup(carrier):
    specialists = []
    for seed in (1, 2):
        specialist = build_policy("llama-tied", conditioning="none", carrier=carrier, seed=seed)
        with torch.no_grad():
            for name, parameter in specialist.adapter_parameters().items():
                if not name.endswith("lora_a"):
                    parameter.mul_(seed)
        specialists.append(specialist)
    soup = ConditionedPolicy.from_specialists(specialists)
    assert soup.spec.conditioning == carrier and soup.objectives == ("a", "b")
    with torch.no_grad():
        for i, specialist in enumerate(specialists):
            corner = [float(k == i) for k in range(2)]
            torch.testing.assert_close(soup(ids(), weights=corner).logits, specialist(ids()).logits)
        # in between, the weights are interpolated
        merged = [s.merge() for s in specialists]
        between = dict(soup.merge([0.25, 0.75]).named_parameters())
        other = dict(merged[1].named_parameters())
        for name, parameter in merged[0].named_parameters():
            torch.testing.assert_close(
                between[name], 0.25 * parameter + 0.75 * other[name], rtol=1e-4, atol=1e-5
            )


def test_specialists_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="no specialists were given"):
        ConditionedPolicy.from_specialists([])
    linear = build_policy("llama", conditioning="none", kl_conditioning="linear")
    with pytest.raises(ConfigError, match="kl_conditioning is 'none' and 'linear'"):
        ConditionedPolicy.from_specialists([build_policy("llama", conditioning="none"), linear])
    whole, factors = (build_policy("llama", conditioning="none", carrier="logit", rank=r) for r in (32, 4))
    with pytest.raises(ConfigError, match="one has a whole output projection"):
        ConditionedPolicy.from_specialists([whole, factors])
    other = build_policy("llama", conditioning="none")
    with torch.no_grad():
        other.model.get_input_embeddings().weight.add_(1)
    with pytest.raises(ConfigError, match="models whose weights differ"):
        ConditionedPolicy.from_specialists([build_policy("llama", conditioning="none"), other])
    one, two = (build_policy("llama", conditioning="none", carrier=c) for c in ("lora", "full"))
    with pytest.raises(ConfigError, match="same base model, carrier"):
        ConditionedPolicy.from_specialists([one, two])
    with pytest.raises(ConfigError, match="1 specialists for 2 objectives"):
        ConditionedPolicy.from_specialists([one])
    with pytest.raises(ConfigError, match="conditioning='none'"):
        ConditionedPolicy.from_specialists([build_policy("llama")] * 2)


# ---- prompt conditioning


@pytest.mark.parametrize("family", ["llama", "t5", "gemma2"])
@pytest.mark.parametrize("conditioning", ["prompt", "attention+prompt"])
def test_the_policy_reads_the_weighting_and_the_reference_does_not(family, conditioning):
    policy = build_policy(family, conditioning=conditioning, prompt_template="{weights} ")
    prompts, weights = [[5, 6, 7], [8, 9]], torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    conditions = policy.conditions(weights, rows=2)
    drawn = rollout(policy, prompts, conditions, num_generations=2, sampling=SamplingParams(4), seed=1)
    stats = score(policy, drawn, conditions)
    torch.testing.assert_close(stats.logprob, drawn.logprobs, rtol=1e-4, atol=1e-4)
    for b, completion in enumerate(drawn.token_lists()):
        p = b // 2
        shown = policy.tokenizer(policy.prompt_text(weights[p].tolist()), add_special_tokens=False).input_ids
        assert len(shown) == 4
        index = torch.arange(len(completion)), torch.tensor(completion)
        with torch.no_grad():
            ours = plain_logits(policy, [*shown, *prompts[p]], completion, conditions=conditions[p : p + 1])
            reference = plain_logits(build_model(family), prompts[p], completion)
        for logits, found in ((ours, stats.logprob), (reference, stats.ref_logprob)):
            expected = logits.log_softmax(-1)[index]
            torch.testing.assert_close(found[b, : len(completion)], expected, rtol=1e-4, atol=1e-4)


def test_the_weighting_is_written_into_the_prompt_of_the_policy_alone():
    policy = build_policy("llama", conditioning="prompt", prompt_template="{weights} kl {kl}")
    assert policy.prompt_text({"a": 0.25, "b": 0.75}, 0.05) == "a 0.25, b 0.75 kl 0.05"
    conditions = Conditions(torch.tensor([[0.25, 0.75], [0.0, 0.0]]), torch.tensor([0.05, 0.1]))
    shown = policy.shown_prompts([[5, 6], [7, 8]], conditions)
    text = policy.tokenizer("a 0.25, b 0.75 kl 0.05", add_special_tokens=False)["input_ids"]
    assert shown == [[*text, 5, 6], [7, 8]]
    assert build_policy("llama").shown_prompts([[5, 6]], conditions[:1]) is None


def test_where_the_blend_is_zero_the_policy_reads_the_plain_prompt_and_is_the_reference():
    policy = build_policy("llama", conditioning="lora+prompt", kl_conditioning="linear")
    conditions = policy.conditions([0.5, 0.5], [1.0, 0.5], 2)
    assert policy.prompt_text([0.5, 0.5], 1.0) == "" != policy.prompt_text([0.5, 0.5], 0.5)
    drawn = rollout(policy, [[5, 6], [7, 8]], conditions, num_generations=2, sampling=SamplingParams(4))
    kl = score(policy, drawn, conditions).kl.sum(-1)
    assert (kl[:2].abs() < 1e-6).all() and (kl[2:] > 1e-3).all()


def test_a_policy_answers_chat_messages():
    policy = build_policy("llama", conditioning="prompt")
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} w9"
    chat = [{"role": "user", "content": "w1 w2"}]
    plain = policy.generate("w1 w2 w9", [1, 0], max_new_tokens=4, seed=1)
    assert policy.generate(chat, [1, 0], max_new_tokens=4, seed=1) == plain
    assert (
        policy.generate([chat, "w1 w2 w9"], [1, 0], max_new_tokens=4)[0]
        == policy.generate([chat], [1, 0], max_new_tokens=4)[0]
    )
    assert policy.generate([]) == []


def test_the_text_follows_a_leading_special_token_of_a_plain_prompt():
    tokenizer = build_tokenizer()
    (w3,) = tokenizer("w3")["input_ids"]
    bos = tokenizer.bos_token_id
    assert prompt_conditioning.with_weighting("w1 w2", [bos, 5, 6], "w3", tokenizer) == [bos, w3, 5, 6]
    assert prompt_conditioning.with_weighting("w1 w2", [5, 6], "w3", tokenizer) == [w3, 5, 6]
    assert prompt_conditioning.with_weighting(None, [5], "w3", tokenizer) == [w3, 5]
    assert prompt_conditioning.with_weighting(
        [{"role": "system", "content": "w1"}], [5, 6], "w3", tokenizer
    ) == [w3, 5, 6]


TEMPLATES = {
    "plain": "{{ ' <bos> ' + m['content'] + ' <eos> ' }}",
    "trims": "{{ ' <bos> ' + m['content'] | trim + ' <eos> ' }}",
    "trims all": "{{ ' <bos> \\n' + (m['content'] | trim) + '\\n\\n <eos>' }}",
    "parts": "{% for p in m['content'] %}{{ ' <bos> ' + p['text'] | trim + ' <eos> ' }}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("content", ["w1 w2", "  w1\n w2 \n", "w5 w6 w1"])
def test_a_chat_s_last_user_message_begins_with_the_text_whatever_the_template_trims(template, content):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{TEMPLATES[template]}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ ' <unk> ' }}{% endif %}"
    )
    chat = [
        {"role": "system", "content": "  w3 w3 "},
        {"role": "user", "content": "w4"},
        {"role": "user", "content": content},
    ]
    if template == "parts":
        chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
    ids = encode_chat(chat, tokenizer)
    shown = {
        cut: tokenizer.convert_ids_to_tokens(
            prompt_conditioning.with_weighting(chat, ids[cut:], " w5 w6\n", tokenizer)
        )
        for cut in range(len(ids))
    }
    text = ["w5", "w6"] if template != "parts" else ["w5", "w6", "<eos>", "<bos>"]
    whole = [
        "<bos>",
        "w3",
        "w3",
        "<eos>",
        "<bos>",
        "w4",
        "<eos>",
        "<bos>",
        *text,
        *content.split(),
        "<eos>",
        "<unk>",
    ]
    assert shown[0] == whole
    for cut in range(len(ids)):
        # What is cut from the prompt is cut from what is shown; the text stays.
        assert shown[cut][-2:] == whole[-2:] if cut < len(ids) - 1 else shown[cut][-1:] == whole[-1:]
        assert shown[cut] == (whole[cut:] if cut <= 8 else ["w5", "w6", *whole[cut + 2 :]])


def test_a_template_that_hides_the_text_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | replace('w5', 'w6') }}{% endfor %}"
    with pytest.raises(ConfigError, match="chat template does not show it; change prompt_template"):
        prompt_conditioning.with_weighting([{"role": "user", "content": "w1"}], [5], "w5 ", tokenizer)


@pytest.mark.parametrize(
    "template", ["no fields", "{weights} {unknown}", "{weights", "{kl}", "{weights:.2f}"]
)
def test_a_template_must_name_the_weights(template):
    with pytest.raises(ConfigError, match="prompt_template="):
        build_policy("llama", conditioning="prompt", prompt_template=template)


# ---- names


@pytest.mark.parametrize(
    ("conditioning", "carriers", "blended", "prompt"),
    [
        ("lora", ("lora",), True, False),
        ("attention+prompt", ("attention",), True, True),
        ("prompt", ("lora",), False, True),
        ("none", ("lora",), False, False),
        ("lora+logit", ("logit", "lora"), True, False),
    ],
)
def test_names_of_conditioning(conditioning, carriers, blended, prompt):
    assert Conditioning.parse(conditioning) == Conditioning(carriers, blended, prompt)


@pytest.mark.parametrize(
    "conditioning", ["", "magic", "lora+lora", "none+lora", "full+lora", "full+attention"]
)
def test_names_that_mean_nothing_are_refused(conditioning):
    with pytest.raises(ConfigError, match="conditioning="):
        Conditioning.parse(conditioning)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditioning": "none", "carrier": "prompt"}, "carrier='prompt'"),
        (
            {"conditioning": "lora", "carrier": "full"},
            "carrier='full' is for conditioning 'none' and 'prompt'",
        ),
        (
            {"conditioning": "full", "target_modules": ["q_proj"]},
            "target_modules=.* is for 'lora'",
        ),
        ({"conditioning": "lora", "prompt_template": "{weights}"}, "writes no prompt"),
        ({"conditioning": "none", "rank": (2, 3)}, "rank has 2 entries"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        build_policy("llama", **change)
