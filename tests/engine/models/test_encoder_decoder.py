"""What only encoder-decoders have: a prompt in an encoder, a start token, scaled or shifted output; and a whole run of one."""

import dataclasses
import shutil

import pytest
import torch
from engine.conftest import ENCODER_DECODER, VOCAB, build_model, build_policy, build_tokenizer, model_inputs
from engine.training.test_trainer import ROWS, high_words, log_of, low_words, settings

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.evaluation.evaluate import evaluate
from clp_engine.models.backbones.choice import make_backbone
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.scoring import completion_stats, score
from clp_engine.rollouts.types import SamplingParams, pad_left
from clp_engine.training.trainer import CLPTrainer

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32, 33]]


@pytest.fixture(params=sorted(ENCODER_DECODER))
def family(request):
    return request.param


def states(policy, prompts, completions, weights, extra=0):
    """Hidden states of completions, prompts padded by `extra` positions more than they need."""
    ids, mask = pad_left([*prompts, [1] * (max(map(len, prompts)) + extra)], 0, torch.device("cpu"))
    ids, mask = ids[:-1], mask[:-1]
    with policy.blend.use(weights):
        first, context = policy.backbone.prefill(ids, mask)
        return torch.cat([first, policy.backbone.extend(context, completions)], 1)


def test_padding_changes_nothing(family):
    policy = build_policy(family)
    weights, completions = torch.tensor([[0.3, 0.7]]).expand(4, 2), torch.arange(40, 60).view(4, 5)
    with torch.no_grad():
        together, wider = (states(policy, PROMPTS, completions, weights, extra) for extra in (0, 7))
        torch.testing.assert_close(wider, together, rtol=1e-5, atol=1e-5)
        for i, prompt in enumerate(PROMPTS):
            alone = states(policy, [prompt], completions[i : i + 1], weights[:1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_tokens_in_pieces_are_tokens_at_once(family):
    policy = build_policy(family)
    ids, mask = pad_left(PROMPTS, 0, torch.device("cpu"))
    completions = torch.arange(40, 60).view(4, 5)
    with torch.no_grad(), policy.blend.use(torch.tensor([[0.3, 0.7]]).expand(4, 2)):
        _, context = policy.backbone.prefill(ids, mask)
        whole = policy.backbone.extend(context, completions)
        _, context = policy.backbone.prefill(ids, mask)
        context.repeat(1, room=5)
        pieces = [policy.backbone.extend(context, part) for part in completions.split([1, 3, 1], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
        _, context = policy.backbone.prefill(ids, mask)
        context.repeat(2, room=5)
        rows = torch.tensor([0, 5, 6])
        context.select(rows)
        with policy.blend.use(torch.tensor([[0.3, 0.7]]).expand(3, 2)):
            some = policy.backbone.extend(context, completions[rows // 2])
        torch.testing.assert_close(some, whole[rows // 2], rtol=1e-5, atol=1e-5)


def test_a_group_shares_its_prompt_and_gives_the_gradient_of_prompts_of_its_own(family):
    policy = build_policy(family)
    conditions = Conditions(torch.tensor([[0.5, 0.5], [0.4, 0.6], [1.0, 0.0], [0.2, 0.8]]), torch.zeros(4))
    drawn = rollout(policy, PROMPTS, conditions, num_generations=3, sampling=SamplingParams(6), seed=2)
    apart = type(drawn)(
        drawn.prompt_ids.repeat_interleave(3, 0),
        drawn.prompt_mask.repeat_interleave(3, 0),
        *(getattr(drawn, name) for name in ("completion_ids", "completion_mask", "logprobs", "terminated")),
    )
    gradients = []
    for batch, rows in ((drawn, conditions), (apart, conditions.repeat(3))):
        _, stats = completion_stats(policy, batch, rows, outputs=("logprob", "entropy"))
        (stats.logprob.sum() + stats.entropy.square().sum()).backward()
        gradients.append({n: p.grad for n, p in policy.adapter_parameters().items()})
        for parameter in policy.adapter_parameters().values():
            parameter.grad = None
    shared, alone = gradients
    assert any(g.abs().max() > 1e-3 for name, g in shared.items() if "encoder." in name)
    for name, gradient in alone.items():
        scale = gradient.abs().max().clamp_min(1e-3)
        assert (shared[name] - gradient).abs().max() < 2e-4 * scale, name


def test_the_head_has_the_models_scale_and_bias():
    t5, bart = (make_backbone(build_model(f)).head for f in ("t5", "bart"))
    assert t5.logit_scale == pytest.approx(32**-0.5) and t5.bias is None and bart.bias.abs().max() > 0.5
    gated = build_model("t5-v1.1")
    scaled = getattr(gated.config, "scale_decoder_outputs", gated.config.tie_word_embeddings)
    assert make_backbone(gated).head.logit_scale == pytest.approx(32**-0.5 if scaled else 1.0)


@pytest.mark.parametrize("change", [{"logit_scale": 0.9}, {"offset": None}])
def test_a_head_that_is_not_the_models_is_refused(change):
    backbone = make_backbone(build_model("bart"))
    backbone.check_head()
    backbone.head = dataclasses.replace(backbone.head, **change)
    with pytest.raises(ConfigError, match="BartForConditionalGeneration does something between"):
        backbone.check_head()


def test_a_conditioned_output_projection_is_scored_as_it_is_sampled():
    policy = build_policy("t5-v1.1", target_modules=["lm_head", "q"])
    conditions = Conditions(torch.tensor([[0.0, 0.0], [0.4, 0.6], [1.0, 0.0], [0.2, 0.8]]), torch.zeros(4))
    drawn = rollout(policy, PROMPTS, conditions, num_generations=2, sampling=SamplingParams(6), seed=4)
    torch.testing.assert_close(score(policy, drawn, conditions).logprob, drawn.logprobs, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_scored_as_it_is_sampled(family):
    policy = ConditionedPolicy.from_pretrained(build_model(family).bfloat16(), ["a", "b"], rank=4)
    conditions = Conditions(torch.tensor([[0.0, 0.0], [0.4, 0.6], [1.0, 0.0], [0.2, 0.8]]), torch.zeros(4))
    drawn = rollout(policy, PROMPTS, conditions, num_generations=2, sampling=SamplingParams(8), seed=4)
    gaps = (score(policy, drawn, conditions).logprob - drawn.logprobs).abs()
    assert (
        gaps.max() < 0.2 and gaps[drawn.completion_mask].mean() < 0.03
    )  # a few units of 2 ** -8, logits up to 10


def test_models_that_cannot_be_driven_say_so():
    from transformers import AutoModelForSeq2SeqLM, LEDConfig, ProphetNetConfig

    tokens = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    led = LEDConfig(**tokens, d_model=16, encoder_layers=1, decoder_layers=1, attention_window=4)
    with pytest.raises(ConfigError, match="LEDForConditionalGeneration puts positions before rows"):
        make_backbone(AutoModelForSeq2SeqLM.from_config(led))
    prophet = ProphetNetConfig(**tokens, hidden_size=16, num_encoder_layers=1, num_decoder_layers=1)
    with pytest.raises(ConfigError, match="ProphetNet.* does not take masks and caches as other models"):
        make_backbone(AutoModelForSeq2SeqLM.from_config(prophet).eval()).check_head()


def test_a_model_without_a_start_token_is_refused():
    model = build_model("bart")
    for name in ("decoder_start_token_id", "bos_token_id"):
        for config in (model.config, model.generation_config):
            setattr(config, name, None)
    with pytest.raises(ConfigError, match="no decoder_start_token_id"):
        ConditionedPolicy.from_pretrained(model, ["a"])


def test_a_decoder_that_computes_the_prompts_keys_again_is_refused():
    model = build_model("bart")
    forward = model.model.decoder.forward

    def forgetful(*args, **kwargs):
        cache = kwargs.get("cache") or kwargs.get("past_key_values")
        if cache is not None:
            cache.is_updated = {}
            cache.cross_attention_cache.layers.clear()
        return forward(*args, **kwargs)

    model.model.decoder.forward = forgetful
    with pytest.raises(ConfigError, match="cannot be used"):
        make_backbone(model).check_head()


def trainer_of(path, family, **changes):
    return CLPTrainer(
        build_model(family),
        {"low": low_words, "high": high_words},
        settings(path, save_strategy="steps", save_steps=2, **changes),
        ROWS,
        processing_class=build_tokenizer(family),
    )


def test_a_run_trains_resumes_to_the_bit_and_evaluates(family, tmp_path):
    whole = trainer_of(tmp_path / "whole", family)
    assert whole.train().global_step == 4
    first = log_of(tmp_path / "whole")[0]
    assert first["sampling/sampling_logp_difference/max"] < 1e-3 and abs(first["kl"]) < 1e-6
    assert log_of(tmp_path / "whole")[-1]["kl"] > 0
    assert 0 <= whole.evaluate(ROWS)["eval_rewards/low/mean"] <= 1
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    trainer_of(tmp_path / "again", family).train(resume_from_checkpoint=True)
    for name in ("policy/adapters.safetensors", "checkpoint-4/training.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name

    policy = ConditionedPolicy.load(tmp_path / "whole" / "policy", base_model=build_model(family))
    given = model_inputs(family)
    with torch.no_grad():
        assert torch.equal(
            policy(**given, weights=[1, 0]).logits, whole.policy(**given, weights=[1, 0]).logits
        )
    report = evaluate(
        policy,
        {"low": low_words, "high": high_words},
        [row["prompt"] for row in ROWS],
        grid=3,
        sampling=SamplingParams(6),
        bootstrap=20,
        progress=False,
    )
    assert len(report.points) == 3 and all(point.kl > 0 for point in report.points)


@pytest.mark.check
def test_training_makes_t5_heed_its_weights(tmp_path):
    trainer = trainer_of(
        tmp_path,
        "t5",
        max_steps=40,
        per_device_train_batch_size=32,
        alpha=0.005,
        learning_rate=3e-2,
        max_grad_norm=0,
    )
    trainer.train()
    prompts = [row["prompt"] for row in ROWS] * 2
    low, high = (
        sum(low_words(trainer.policy.generate(prompts, w, max_new_tokens=8))) / len(prompts)
        for w in ({"low": 1.0}, {"high": 1.0})
    )
    assert low - high > 0.25, (low, high)
