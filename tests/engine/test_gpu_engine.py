"""The engine on a GPU says what it says on a CPU; graphs are captured, used and captured again; runs resume to the bit."""

import contextlib
import json
import logging
import threading

import pytest
import torch
from clp_kernels import use_backend
from devices import PRETENDED
from engine.conftest import CAUSAL, build_model, build_policy, build_tokenizer
from transformers import TrainerCallback

from clp_engine import CLPConfig, CLPTrainer, ConditionedPolicy, evaluate
from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.models.backbones import packing
from clp_engine.rollouts.engines import cuda_graphs
from clp_engine.rollouts.engines.choice import detours
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.types import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton"),
]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32, 33], [40, 41]]
WEIGHTS = [[0.0, 0.0], [0.4, 0.6], [1.0, 0.0], [0.2, 0.8], [0.5, 0.5]]
ROWS = [{"prompt": "w1 w2 w3"}, {"prompt": "w9 w10"}, {"prompt": "w20"}, {"prompt": "w30 w31 w32 w33 w34"}]


@pytest.fixture
def quick_if_pretended():
    """Kernels are rehearsed in their own tests and in rollouts: in the interpreter a training step takes minutes."""
    with use_backend("reference") if PRETENDED else contextlib.nullcontext():
        yield


QUICK = pytest.mark.usefixtures("quick_if_pretended")


def mixed(device):
    return Conditions(torch.tensor(WEIGHTS, device=device), torch.full((5,), 0.1, device=device))


def on_gpu(policy):
    return policy.to("cuda")


def many_words(completions, **_):
    return [float(len(set(c.split()))) for c in completions]


def few_words(completions, **_):
    return [-float(len(c.split())) for c in completions]


@pytest.fixture
def captured(monkeypatch):
    """The numbers of slots that graphs were captured for."""
    counts, capture = [], cuda_graphs.GraphDecoder._capture

    def counted(self, count):
        counts.append(count)
        return capture(self, count)

    monkeypatch.setattr(cuda_graphs.GraphDecoder, "_capture", counted)
    return counts


# In the interpreter a rollout takes half a minute.
@pytest.mark.parametrize("name", ["gemma2", "gpt2", "qwen2"] if PRETENDED else sorted(CAUSAL))
def test_a_rollout_says_what_it_says_on_a_cpu(name, captured):
    policy = build_policy(name)
    options = {"num_generations": 2, "sampling": SamplingParams(7), "seed": 3}
    expected = rollout(policy, PROMPTS, mixed("cpu"), **options)
    on_gpu(policy)
    drawn = rollout(policy, PROMPTS, mixed("cuda"), **options)
    assert drawn.completion_ids.is_cuda and captured
    assert (cuda_graphs.plan(policy).reason is None) == (name != "gpt2")
    assert drawn.token_lists() == expected.token_lists()
    torch.testing.assert_close(drawn.logprobs.cpu(), expected.logprobs, rtol=1e-3, atol=1e-3)


def test_a_graph_draws_with_every_option_and_waiting_prompts_join(captured):
    policy = build_policy("qwen2")
    sampling = SamplingParams(6, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01)
    options = {"sampling": sampling, "seed": 2, "max_rows": 3}
    expected = rollout(policy, PROMPTS, mixed("cpu"), **options)
    on_gpu(policy)
    drawn = rollout(policy, PROMPTS, mixed("cuda"), **options)
    assert captured and drawn.token_lists() == expected.token_lists()
    torch.testing.assert_close(drawn.logprobs.cpu(), expected.logprobs, rtol=1e-3, atol=1e-3)
    assert torch.equal(drawn.terminated.cpu(), expected.terminated)


def test_graphs_serve_the_rollouts_that_follow_until_parameters_move(captured):
    policy = on_gpu(build_policy("qwen2"))
    options = {"sampling": SamplingParams(5), "seed": 1}
    first = rollout(policy, PROMPTS, mixed("cuda"), **options)
    graphs = list(captured)
    # A step of the optimiser changes parameters in place: graphs see it.
    with torch.no_grad():
        for parameter in policy.adapter_parameters().values():
            parameter.mul_(-3)
    second = rollout(policy, PROMPTS, mixed("cuda"), **options)
    assert captured == graphs and second.token_lists() != first.token_lists()
    eager = rollout(policy.to("cpu"), PROMPTS, mixed("cpu"), **options)
    assert second.token_lists() == eager.token_lists()
    on_gpu(policy)
    again = rollout(policy, PROMPTS, mixed("cuda"), **options)
    assert len(captured) > len(graphs) and again.token_lists() == second.token_lists()


def out_of_resources():
    """What a Triton kernel raises that does not fit; it is no RuntimeError."""
    errors = pytest.importorskip("triton.runtime.errors")
    return errors.OutOfResources(300_000, 232_448, "shared memory")


@pytest.fixture
def failing_captures(monkeypatch):
    """The first `failing_captures[0]` captures fail, inside the capture."""
    left, forward = [0], cuda_graphs.GraphDecoder._forward

    def fails(self, count):
        if torch.cuda.is_current_stream_capturing() and left[0]:
            left[0] -= 1
            raise out_of_resources()
        return forward(self, count)

    monkeypatch.setattr(cuda_graphs.GraphDecoder, "_forward", fails)
    return left


def without_graphs(caplog):
    return [r for r in caplog.records if "without the graph" in r.message]


@QUICK
@pytest.mark.parametrize("failures", [1, 2])
def test_a_capture_that_fails_is_tried_once_more_and_again_in_the_next_rollout(
    failures, failing_captures, captured, caplog
):
    policy = on_gpu(build_policy("qwen2"))
    options = {"sampling": SamplingParams(5), "seed": 1}
    expected = rollout(policy, PROMPTS, mixed("cuda"), **options).token_lists()
    cuda_graphs._SLOTS.clear(), captured.clear()
    failing_captures[0] = failures
    with caplog.at_level(logging.WARNING, cuda_graphs.__name__):
        assert rollout(policy, PROMPTS, mixed("cuda"), **options).token_lists() == expected
    assert len(captured) == 2 and len(without_graphs(caplog)) == failures - 1
    assert "shared memory" in caplog.text
    caplog.clear()
    assert rollout(policy, PROMPTS, mixed("cuda"), **options).token_lists() == expected
    assert len(captured) == 1 + failures and not caplog.records and cuda_graphs._SLOTS[policy].graphs


def test_a_benchmark_measures_no_step_that_was_not_captured(failing_captures, monkeypatch):
    policy = on_gpu(build_policy("qwen2"))
    monkeypatch.setenv("CLP_ENGINE_DECODING", "native")
    failing_captures[0] = 2
    with pytest.raises(type(out_of_resources())):
        rollout(policy, PROMPTS, mixed("cuda"), sampling=SamplingParams(5))
    assert rollout(policy, PROMPTS, mixed("cuda"), sampling=SamplingParams(5)).completion_ids.is_cuda


@QUICK
def test_a_graph_is_captured_while_another_thread_uses_the_gpu(captured):
    """As a reward's model does: its allocations and launches are none of the capture's."""
    policy, stop = on_gpu(build_policy("qwen2")), threading.Event()

    def reward():
        while not stop.is_set():
            torch.empty(1 << 20, device="cuda").normal_().sum().item()
            torch.cuda.empty_cache()

    thread = threading.Thread(target=reward)
    if not PRETENDED:  # whose captures note every thread's launches
        thread.start()
    try:
        for _ in range(3):
            cuda_graphs._SLOTS.clear()
            rollout(policy, PROMPTS, mixed("cuda"), sampling=SamplingParams(5))
            assert cuda_graphs._SLOTS[policy].graphs
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


@QUICK
def test_packing_that_fails_on_the_gpu_alone_is_said(monkeypatch, caplog):
    """As where a kernel cannot be compiled there."""
    attention = packing.prefix_attention

    def refuses(q, *arguments, **options):
        if q.is_cuda:
            raise out_of_resources()
        return attention(q, *arguments, **options)

    monkeypatch.setattr(packing, "prefix_attention", refuses)
    policy = build_policy("gemma2")
    expected = rollout(policy, PROMPTS, mixed("cpu"), sampling=SamplingParams(5), seed=1)
    assert policy.backbone.packing_fault is None
    on_gpu(policy)
    with caplog.at_level(logging.WARNING):
        drawn = rollout(policy, PROMPTS, mixed("cuda"), sampling=SamplingParams(5), seed=1)
    assert drawn.token_lists() == expected.token_lists()
    [said] = [r.message for r in caplog.records if "Gemma2ForCausalLM on a GPU" in r.message]
    assert "shared memory" in said and "neither slots nor CUDA graphs" in said
    assert any("two passes" in line for line in detours(policy))
    monkeypatch.setenv("CLP_ENGINE_DECODING", "native")
    with pytest.raises(ConfigError, match="CLP_ENGINE_DECODING=native: .*shared memory"):
        rollout(policy, PROMPTS, mixed("cuda"), sampling=SamplingParams(5), seed=1)
    assert policy.to("cpu").backbone.packing_fault is None


@QUICK
def test_scores_are_those_of_a_cpu():
    policy = build_policy("qwen2")
    drawn = rollout(policy, PROMPTS, mixed("cpu"), num_generations=2, sampling=SamplingParams(6), seed=3)

    def scores(device):
        batch = rollout(policy, PROMPTS, mixed(device), num_generations=2, sampling=SamplingParams(6), seed=3)
        hidden = policy.completion_hidden(batch, mixed(device))
        reference = policy.completion_hidden(batch, None)
        targets = batch.completion_ids[batch.completion_mask]
        return policy.token_stats(hidden, targets, ref_hidden=reference, outputs=("logprob", "entropy", "kl"))

    expected = scores("cpu")
    on_gpu(policy)
    found = scores("cuda")
    for name in ("logprob", "entropy", "kl"):
        value = getattr(found, name)
        assert value.is_cuda and value.shape == (drawn.tokens,)
        torch.testing.assert_close(value.cpu(), getattr(expected, name), rtol=1e-3, atol=1e-4)


class StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def config(folder, **changes):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_steps": 2,
        "max_completion_length": 5,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "alpha": 0.1,
        "rank": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    return CLPConfig(**options | changes)


def trainer(folder, **changes):
    return CLPTrainer(
        build_model("qwen2"),
        [many_words, few_words],
        config(folder, **changes),
        ROWS,
        processing_class=build_tokenizer(),
    )


@QUICK
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kl_estimator": "exact"},
        {"num_iterations": 2},
        {"gradient_checkpointing": True},
        {"conditioning": "full"},
        {"conditioning": "logit"},
        {"conditioning": "prompt"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "lora",
)
def test_training(changes, tmp_path):
    run = trainer(tmp_path, **changes)
    assert run.policy.device.type == "cuda"
    before = {name: p.detach().clone() for name, p in run.policy.adapter_parameters().items()}
    run.train()
    assert any(not torch.equal(before[name], p) for name, p in run.policy.adapter_parameters().items())
    logs = [entry for entry in run.state.log_history if "step_time" in entry]
    assert len(logs) == 2 and all(torch.tensor(entry["loss"]).isfinite() for entry in logs)
    for entry in logs:
        # A batch that is trained on twice is compared with itself once.
        assert entry.get("sampling/sampling_logp_difference/max", 0.0) < 1e-3
    assert "sampling/sampling_logp_difference/max" in logs[0]


@QUICK
def test_the_same_losses_as_on_a_cpu(tmp_path):
    found = {}
    for device in ("cpu", "cuda"):
        run = trainer(tmp_path / device, use_cpu=device == "cpu")
        assert run.policy.device.type == device
        run.train()
        found[device] = [
            (entry["loss"], entry["grad_norm"], entry["kl"], entry["reward"])
            for entry in run.state.log_history
            if "step_time" in entry
        ]
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-2, atol=1e-4)


@QUICK
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    whole = trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    half = trainer(tmp_path / "half", **options)
    half.add_callback(StopAfter(2))
    half.train()
    rest = trainer(tmp_path / "half", **options)
    rest.train(resume_from_checkpoint=True)
    for name, parameter in whole.policy.adapter_parameters().items():
        assert torch.equal(parameter, rest.policy.adapter_parameters()[name]), name


@QUICK
def test_evaluating_generating_and_exporting(tmp_path):
    run = trainer(tmp_path)
    run.train()
    report = evaluate(
        run.policy,
        [many_words, few_words],
        ROWS,
        grid=3,
        sampling=SamplingParams(4),
        output_dir=tmp_path / "e",
    )
    assert len(report.points) >= 3 and json.loads((tmp_path / "e" / "report.json").read_text())
    texts = run.policy.generate(["w1 w2", "w3"], [[0.3, 0.7], [1.0, 0.0]], max_new_tokens=4)
    assert len(texts) == 2
    run.policy.export_adapter(tmp_path / "adapter", weights=[0.5, 0.5])
    merged = run.policy.merge(weights=[0.5, 0.5])
    ids = torch.tensor([[5, 6, 7]], device="cuda")
    expected = run.policy(ids, weights=[0.5, 0.5], kl=None).logits
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-3)
    run.save_model(tmp_path / "saved")
    loaded = ConditionedPolicy.load(tmp_path / "saved", base_model=build_model("qwen2"), device="cuda")
    torch.testing.assert_close(loaded(ids, weights=[0.5, 0.5], kl=None).logits, expected)
