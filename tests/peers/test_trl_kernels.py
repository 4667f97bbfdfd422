"""clp_kernels.integrations.trl beside the functions of the installed TRL."""

import importlib

import pytest
import torch

pytest.importorskip("trl")

import trl.trainer.utils as trl_utils  # noqa: E402
from clp_kernels.integrations import patch_trl  # noqa: E402
from clp_kernels.integrations import trl as ours  # noqa: E402
from kernel_calls import (  # noqa: E402
    DTYPES,
    assert_as_good_as_peer,
    assert_as_good_as_peer_in_the_median,
    entropy64,
    head,
    logprob64,
    z64,
)
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from trl.kernels import ChunkedLogProbFunction  # noqa: E402
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: E402

OPTIONS = [
    {},
    {"temperature": 0.7, "logit_scale": 1.7},
    {"softcap": 15.0, "logit_scale": 0.6, "temperature": 1.3},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize(
    "rows, vocabulary, chunk, bias",
    [(37, 1500, 512, True), (37, 1500, 32768, False), (5, 50257, 32768, True)],
)
def test_chunked_logprob_is_as_accurate_as_trls(dtype, options, rows, vocabulary, chunk, bias):
    tensors = head((rows,), vocabulary=vocabulary, dtype=dtype, bias=bias)
    targets = torch.randint(vocabulary, (rows,))

    def call(function):
        def run(hidden, weight, bias=None):
            logprob, entropy, log_sum_sq, mean, _ = function.apply(
                hidden, weight, bias, targets, options.get("temperature", 1.0), chunk, options.get("softcap"),
                options.get("logit_scale", 1.0))  # fmt: skip
            assert not log_sum_sq.requires_grad and not mean.requires_grad
            return logprob, entropy, log_sum_sq, mean

        return run

    def exact(hidden, weight, bias=None):
        z = z64(hidden, weight, bias, **options)
        two = (2 * z.log_softmax(-1)).logsumexp(-1).detach()
        return logprob64(z, targets), entropy64(z), two, z.mean(-1).detach()

    assert_as_good_as_peer(call(ours.ChunkedLogProbFunction), call(ChunkedLogProbFunction), exact, tensors)


def test_top1_is_trls_also_where_two_logits_are_equal():
    hidden, weight = torch.randn(64, 16), torch.randn(40, 16)
    weight[7] = weight[31]  # the first of two equals is the argmax
    hidden[:8] = weight[7]
    targets = (hidden @ weight.T).argmax(-1)
    targets[:8:2], targets[1:8:2], targets[40:] = 7, 31, 3
    arguments = (hidden, weight, None, targets, 1.0, 16)
    found = ours.ChunkedLogProbFunction.apply(*arguments)[4]
    assert torch.equal(found, ChunkedLogProbFunction.apply(*arguments)[4])
    assert found[:8].tolist() == [True, False] * 4 and found.dtype is torch.bool


def test_what_is_not_asked_for_is_not_computed():
    tensors, targets = head((6,)), torch.randint(1500, (6,))
    arguments = (tensors["hidden"], tensors["weight"], None, targets, 1.0, 512, None, 1.0)
    assert ours.ChunkedLogProbFunction.apply(*arguments, ("log_probs",))[1:] == (None,) * 4
    _, entropy, *others = ours.ChunkedLogProbFunction.apply(*arguments, ("entropy",))
    assert entropy.shape == (6,) and others == [None] * 3
    with pytest.raises(ValueError, match=r"outputs has \['entropies'\]; expected some of entropy"):
        ours.ChunkedLogProbFunction.apply(*arguments, ("entropies",))


@pytest.mark.parametrize(
    "hidden_dtype, weight_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_a_head_in_another_dtype_is_cast_to_hiddens_as_trl_does(hidden_dtype, weight_dtype):
    tensors = head((20,), bias=False)
    tensors = {"hidden": tensors["hidden"].to(hidden_dtype), "weight": tensors["weight"].to(weight_dtype)}
    targets = torch.randint(1500, (20,))

    def call(function):
        return lambda hidden, weight: function.apply(hidden, weight, None, targets, 1.0, 512, None, 1.0, ())[
            0
        ]

    def exact(hidden, weight):
        return logprob64(z64(hidden, weight.to(hidden_dtype).double()), targets)

    assert_as_good_as_peer(call(ours.ChunkedLogProbFunction), call(ChunkedLogProbFunction), exact, tensors)


def test_autocast_decides_the_products_dtype_as_in_trl():
    tensors, targets = head((20,), bias=False), torch.randint(1500, (20,))
    rounded = {name: tensor.bfloat16().double() for name, tensor in tensors.items()}
    exact = logprob64(z64(**rounded), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, theirs = (
            f.apply(tensors["hidden"], tensors["weight"], None, targets, 1.0, 512, None, 1.0, ())[0]
            for f in (ours.ChunkedLogProbFunction, ChunkedLogProbFunction)
        )
    assert got.dtype is theirs.dtype is torch.float32
    assert (got - exact).abs().max() <= 1.5 * (theirs - exact).abs().max()
    assert (got - exact).abs().max() < 1e-4  # of products of rounded operands, not of float32 ones
    assert (exact - logprob64(z64(**{n: t.double() for n, t in tensors.items()}), targets)).abs().max() > 1e-3


def test_one_row():
    tensors, targets = head((1,)), torch.tensor([1499])
    logprob, entropy, *_ = ours.ChunkedLogProbFunction.apply(*tensors.values(), targets, 1.0, 512)
    z = z64(**{name: tensor.double() for name, tensor in tensors.items()})
    torch.testing.assert_close(
        logprob.double(), logprob64(z, targets), rtol=0, atol=1e-5
    )  # logits of 20, in float32
    torch.testing.assert_close(entropy.double(), entropy64(z), rtol=0, atol=1e-5)


def test_no_rows_and_a_frozen_head():
    tensors = head((0,))
    hidden = tensors["hidden"].requires_grad_()
    outputs = ours.ChunkedLogProbFunction.apply(
        hidden, tensors["weight"], tensors["bias"], torch.zeros(0, dtype=torch.int64), 1.0, 512
    )
    assert all(output.shape == (0,) for output in outputs)
    (gradient,) = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), hidden)
    assert gradient.shape == (0, 64)


def test_a_zero3_parameter_is_refused_where_a_gradient_is_wanted():
    tensors, targets = head((3,)), torch.randint(1500, (3,))
    tensors["weight"].ds_id = 0
    arguments = (tensors["hidden"], tensors["weight"], None, targets, 1.0, 512)
    with pytest.raises(RuntimeError, match="ZeRO-3 parameter.*use ZeRO-2 or FSDP2"):
        ours.ChunkedLogProbFunction.apply(*arguments)
    with torch.no_grad():
        ours.ChunkedLogProbFunction.apply(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("biased", ["", "teacher_"])  # one of the two has a bias
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_divergence_is_as_accurate_as_trls(dtype, beta, biased, options):
    def draw():
        student, teacher = head((29,), 64, dtype=dtype), head((29,), 48, dtype=dtype)
        for model in (student, teacher):
            model["weight"] *= (
                0.4  # a divergence of some 3 nats, not of 20, between models that have nothing in common
            )
        tensors = {**student, **{f"teacher_{name}": tensor for name, tensor in teacher.items()}}
        return {name: t for name, t in tensors.items() if "bias" not in name or name == f"{biased}bias"}

    temperature, softcap, scale = (
        options.get(name, default)
        for name, default in (("temperature", 1.0), ("softcap", None), ("logit_scale", 1.0))
    )

    def call(function):
        def run(hidden, weight, teacher_hidden, teacher_weight, bias=None, teacher_bias=None):
            divergence, entropy = function.apply(
                hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, beta, temperature, scale, softcap,
                scale, softcap)  # fmt: skip
            assert not entropy.requires_grad
            return divergence, entropy

        return run

    def exact(hidden, weight, teacher_hidden, teacher_weight, bias=None, teacher_bias=None):
        z = z64(hidden, weight, bias, **options)
        log_p = z.log_softmax(-1)
        log_q = z64(teacher_hidden, teacher_weight, teacher_bias, **options).log_softmax(-1)
        pairs = (log_p, log_q) if beta else (log_q, log_p)
        return (pairs[0].exp() * (pairs[0] - pairs[1])).sum(-1), entropy64(z).detach()

    frozen = ("teacher_hidden", "teacher_weight", "teacher_bias")
    assert_as_good_as_peer_in_the_median(
        call(ours.ChunkedDivergenceFunction), call(ChunkedDivergenceFunction), exact, draw, frozen=frozen
    )


def test_a_divergence_without_a_kernel_is_refused():
    tensors = head((3,), bias=False)
    models = (tensors["hidden"], tensors["weight"], None) * 2
    with pytest.raises(
        NotImplementedError, match=r"beta is 0.5; expected 0 .* or 1 .*skip=\['ChunkedDivergenceFunction'\]"
    ):
        ours.ChunkedDivergenceFunction.apply(*models, 0.5)
    with pytest.raises(
        NotImplementedError, match=r"\(1.0, None\) for the student and \(1.0, 30.0\) for the teacher"
    ):
        ours.ChunkedDivergenceFunction.apply(*models, 1.0, 1.0, 1.0, None, 1.0, 30.0)


def logits_of(dtype, vocabulary=1500):
    """Completions' logits as trainers have them: a slice of a longer sequence, not contiguous."""
    return (torch.randn(3, 8, vocabulary) * 3).to(dtype)[:, 1:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("count", [None, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_selective_log_softmax_is_as_accurate_as_trls(dtype, temperature, count, masked):
    shape = (3, 7) if count is None else (3, 7, count)
    index, mask = torch.randint(1500, shape), torch.ones(shape, dtype=torch.int64)
    if masked:
        mask[0, 3:], mask[2] = 0, 0

    def exact(logits):
        log_p = (logits / temperature).log_softmax(-1)
        chosen = log_p.gather(-1, index if count else index[..., None])
        return (chosen if count else chosen[..., 0]) * mask

    def call(function):
        return lambda logits: function(logits, index, temperature, mask if masked else None)

    assert_as_good_as_peer(
        call(ours.selective_log_softmax),
        call(trl_utils.selective_log_softmax),
        exact,
        {"logits": logits_of(dtype)},
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [1, 128])
def test_entropy_of_logits_is_as_accurate_as_trls(dtype, chunk_size):
    assert_as_good_as_peer(
        lambda logits: ours.entropy_from_logits(logits, chunk_size),
        lambda logits: trl_utils.entropy_from_logits(logits, chunk_size),
        lambda logits: entropy64(logits),
        {"logits": logits_of(dtype)},
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_logprob_and_entropy_in_one_pass_are_as_accurate_as_trls(dtype, requires_grad):
    index, mask = torch.randint(50257, (3, 7)), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 2:] = False

    def call(function):
        def run(logits):
            logprob, entropy = function(logits, index, requires_grad, 0.8, mask)
            assert entropy.requires_grad is requires_grad
            return logprob, entropy

        return run

    def exact(logits):
        z = logits / 0.8
        entropy = entropy64(z) * mask
        return logprob64(z, index) * mask, entropy if requires_grad else entropy.detach()

    assert_as_good_as_peer(
        call(ours.selective_log_softmax_and_entropy),
        call(trl_utils.selective_log_softmax_and_entropy),
        exact,
        {"logits": logits_of(dtype, 50257)},
    )


def test_masked_rows_may_have_any_index_and_get_no_gradient():
    logits, index = torch.randn(2, 5, 30, requires_grad=True), torch.randint(30, (2, 5))
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    index[mask == 0] = 99
    logprob = ours.selective_log_softmax(logits, index, row_mask=mask)
    assert (logprob[mask == 0] == 0).all() and (logprob[mask == 1] < 0).all()
    (gradient,) = torch.autograd.grad(logprob.sum(), logits)
    assert (gradient[mask == 0] == 0).all() and (gradient[mask == 1] != 0).all()


def holders(name):
    """Where TRL holds what patch_trl replaces."""
    return {
        "ChunkedLogProbFunction": [("trl.kernels", name), ("trl.kernels.chunked_logprob", name),
                                   ("trl.trainer.utils", f"_{name}")],
        "ChunkedDivergenceFunction": [("trl.kernels.chunked_divergence", name), ("trl.trainer.distillation_trainer", name)],
        "selective_log_softmax": [("trl.trainer.utils", name), ("trl.experimental.cpo.cpo_trainer", name)],
        "entropy_from_logits": [("trl.trainer.utils", name)],
        "selective_log_softmax_and_entropy": [("trl.trainer.utils", name), ("trl.experimental.tpo.tpo_trainer", name)],
    }[name]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:trl")
@pytest.mark.parametrize("replacement", [r for r in ours.REPLACEMENTS if not r.only], ids=lambda r: r.name)
def test_the_patch_is_wherever_trl_imported_the_name_and_leaves_with_the_block(replacement):
    pytest.importorskip("trl.experimental.tpo.tpo_trainer")
    places = [(importlib.import_module(module), name) for module, name in holders(replacement.name)]
    original = getattr(*places[0])
    assert all(getattr(*place) is original for place in places) and original is not replacement.new
    with pytest.raises(KeyError), patch_trl():
        with patch_trl():
            assert all(getattr(*place) is replacement.new for place in places)
        assert all(getattr(*place) is replacement.new for place in places)
        raise KeyError("whatever goes wrong in the block")
    assert all(getattr(*place) is original for place in places)


def test_trls_own_names_are_all_replaced_by_functions_that_take_its_arguments():
    import inspect

    for replacement in ours.REPLACEMENTS:
        original, new = (
            getattr(importlib.import_module(replacement.module), replacement.name),
            replacement.new,
        )
        if inspect.isclass(original):
            original, new = original.forward, new.apply
            theirs = list(inspect.signature(original).parameters.values())[1:]  # without ctx
        else:
            theirs = list(inspect.signature(original).parameters.values())
        mine = list(inspect.signature(new).parameters.values())
        assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in theirs]


@pytest.fixture
def model():
    config = Qwen2Config(
        vocab_size=1500, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2)  # fmt: skip
    model = Qwen2ForCausalLM(config)
    trl_utils.add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy", "is_top1"))
    return model


def test_the_fused_head_gives_the_same_and_projects_completions_alone(model, monkeypatch):
    ids = torch.randint(1500, (2, 12))
    labels = ids.clone()
    labels[:, :7], labels[1, 10:] = -100, -100  # prompts, and the padding of one
    rows = []

    def counted(hidden, *arguments, **options):
        rows.append(hidden.shape[0])
        return linear_logprob(hidden, *arguments, **options)

    linear_logprob = ours.linear_logprob
    monkeypatch.setattr(ours, "linear_logprob", counted)

    def step():
        model.zero_grad()
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (output.loss - 0.1 * output.entropy.mean()).backward()
        return output, {name: p.grad.clone() for name, p in model.named_parameters()}

    theirs, their_grads = step()
    with patch_trl():
        mine, my_grads = step()
    assert rows == [int((labels[:, 1:] != -100).sum())]  # 8 of 22 positions; TRL's torch code takes them all
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(mine.is_top1, theirs.is_top1)
    for name, gradient in their_grads.items():
        torch.testing.assert_close(my_grads[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_batch_without_any_label_is_a_differentiable_zero(model):
    ids = torch.randint(1500, (2, 5))
    with patch_trl():
        output = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    output.loss.backward()
    assert output.loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def train_with_trl(folder, beta):
    """Three steps of TRL's GRPOTrainer with a LoRA -> the log of each step, the adapter, and the rows that were scored."""
    peft, datasets, trl = (pytest.importorskip(name) for name in ("peft", "datasets", "trl"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from clp_engine.tasks.docsum import checkpoint_path

    torch.manual_seed(1)  # the adapter's first factors
    # In float32: TRL's products of bfloat16 weights are rounded before the softmax, which changes what is sampled by step 1.
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    config = trl.GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=8, num_generations=4, max_steps=3, max_completion_length=12,
        beta=beta, learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        bf16=False, seed=1, top_entropy_quantile=0.8)  # fmt: skip
    prompts = [
        {"prompt": text}
        for text in ("Return the sum of two numbers.", "A long description of a file object, " * 4)
    ]
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions], args=config,
        train_dataset=datasets.Dataset.from_list(prompts * 8), processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))  # fmt: skip
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return steps, {
        name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_grpo_training_has_the_same_losses_and_scores_fewer_rows(beta, tmp_path, monkeypatch):
    """Sampling is TRL's own in both; what differs is rounding, 1e-6 of a log-prob, through three steps of Adam."""
    scored = {"trl": 0, "ours": 0}

    def counting(who, function):
        def run(hidden, *arguments, **options):
            scored[who] += hidden.shape[0]
            return function(hidden, *arguments, **options)

        return run

    linear_logprob, forward = ours.linear_logprob, ChunkedLogProbFunction.apply
    monkeypatch.setattr(ours, "linear_logprob", counting("ours", linear_logprob))
    monkeypatch.setattr(ChunkedLogProbFunction, "apply", counting("trl", forward))
    theirs, their_adapter = train_with_trl(tmp_path / "trl", beta)
    assert scored["trl"] > 0 and scored["ours"] == 0
    unpatched, scored["trl"] = scored["trl"], 0
    with patch_trl():
        mine, my_adapter = train_with_trl(tmp_path / "patched", beta)
    assert scored["trl"] == 0 and 0 < scored["ours"] < 0.6 * unpatched  # no prompts, no padding
    assert len(mine) == len(theirs) == 3
    for step, (a, b) in enumerate(zip(mine, theirs)):
        names = ["loss", "reward", "entropy", "completions/mean_length", "grad_norm"] + ["kl"] * (beta > 0)
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), f"{name} at step {step}"
    assert any(entry["loss"] != 0 for entry in theirs)
    change = max(adapter.abs().max() for name, adapter in their_adapter.items() if "lora_B" in name)
    assert change > 1e-4  # it trained
    for name, adapter in their_adapter.items():
        # The mean: where a gradient is next to nothing, Adam makes a whole step of its rounding.
        assert (my_adapter[name] - adapter).abs().mean() < 0.01 * change, name
