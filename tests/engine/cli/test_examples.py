"""Every example of examples/ runs as it is, and does what it says."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clp_engine.training.running import load_policy

EXAMPLES = Path(__file__).parents[3] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_test_for_every_example():
    tested = {name.removeprefix("test_example_") for name in globals() if name.startswith("test_example_")}
    assert tested == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.check
def test_example_kernel_loop(capsys):
    """Each objective's own reward rises where it is asked for, and more than where the other one is."""
    found = load("kernel_loop").main(quick=True)
    small, both, large = (found[w] for w in ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0)))
    assert all(reward == pytest.approx(1 / 3, abs=0.1) for before, _ in found.values() for reward in before)
    assert small[1][0] > 0.48 and small[1][1] < 0.25 and large[1][1] > 0.48 and large[1][0] < 0.3
    assert sum(both[1]) > 0.72  # with both at once, of either: a third of the vocabulary earns nothing


def test_the_kernel_loop_has_the_gradient_of_its_objective(monkeypatch):
    """Against the derivative of J over all completions of a policy that can be enumerated: 3 tokens, 2 steps."""
    loop = load("kernel_loop")
    for name, value in {"HIDDEN": 8, "VOCAB": 3, "LENGTH": 2, "RANK": 2, "BETA": 0.3}.items():
        monkeypatch.setattr(loop, name, value)
    policy = loop.Policy()
    torch.manual_seed(0)
    with torch.no_grad():
        policy.lora_b.normal_()
    everything = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # (9, 2)
    weights = torch.tensor([[0.7, 0.3]]).expand(9, 2)

    def logprobs(gate):
        states = policy.states(everything, gate) @ policy.head.t()
        return states.log_softmax(-1).gather(-1, everything.unsqueeze(-1)).squeeze(-1).sum(-1)

    own, reference = logprobs(loop.gate_of(weights)), logprobs(torch.zeros(9, 4))
    value = (weights * loop.rewards(everything)).sum(-1) - loop.BETA * (own - reference)
    exact = torch.autograd.grad((own.exp() * value).sum(), policy.parameters)

    # All pairs of completions, each with its probability: the expectation over groups of two.
    pairs = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    probability = own.detach().exp()[pairs].prod(-1)
    total = [torch.zeros_like(p) for p in policy.parameters]
    for pair, share in zip(pairs, probability):
        loss = loop.loss_of(policy, weights[:2], everything[pair], group=2)
        for sum_, part in zip(total, torch.autograd.grad(loss, policy.parameters)):
            sum_ -= share * part
    for estimated, true in zip(total, exact):
        assert true.norm() > 1e-3 and (estimated - true).norm() < 1e-4 * true.norm() + 1e-5


@pytest.mark.check
def test_the_kernel_loop_needs_torch_alone():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print(sorted({'transformers', 'clp_engine'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, str(EXAMPLES / "kernel_loop.py")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.check
def test_example_chat_three_rewards(tmp_path, capsys):
    example = load("chat_three_rewards")
    said = example.main(tmp_path / "chat", quick=True)
    assert len(said) == 4 and all(len(answers) == 2 for answers in said.values())
    policy = load_policy(tmp_path / "chat")
    assert policy.objectives == ("short", "on_topic", "whole_sentence")
    # What was saved is a chat model: it reads the user's message through the template, as training did.
    prompt = example.chats("test", 1)[0]["prompt"]
    encoded = policy.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert encoded.endswith("<|summary|>") and "<|" not in encoded.removesuffix("<|summary|>")
    assert (
        policy.generate([prompt], (1.0, 0.0, 0.0), temperature=0, max_new_tokens=40)[0]
        == said[(1.0, 0.0, 0.0)][0]
    )


def test_the_chat_rewards_disagree():
    example = load("chat_three_rewards")
    prompts = [[{"role": "user", "content": "the list is sorted in place"}]] * 3
    completions = [
        [{"role": "assistant", "content": text}]
        for text in ("Sorts.", "the list is sorted", "Sorts it at once.")
    ]
    best = [
        max(range(3), key=reward(prompts=prompts, completions=completions).__getitem__)
        for reward in (example.short, example.on_topic, example.whole_sentence)
    ]
    assert best[0] == 0 and best[1] == 1 and best[2] != 1


@pytest.mark.check
def test_example_reward_models(tmp_path, capsys):
    example = load("reward_models")
    trainer, errors = example.main(tmp_path, quick=True)
    assert trainer.policy.objectives == ("relevance", "concise")
    assert (tmp_path / "concise" / "model.safetensors").is_file()
    # A few steps teach the reward's size at least: an answer of 0 to everything would be off by its mean square.
    held_out = [
        wanted for _, wanted in example.concise_examples(example.docsum.load_dataset("validation", limit=16))
    ]
    assert errors["concise"] < torch.tensor(held_out).square().mean().item() / 2
    logged = [entry for entry in trainer.state.log_history if "rewards/concise/mean" in entry]
    assert len(logged) == 3 and all("rewards/relevance/mean" in entry for entry in logged)


def test_example_custom_sampler(tmp_path, capsys):
    """The share of single objectives falls to none; a resumed run draws what an uninterrupted one does."""
    example = load("custom_sampler")
    sampler = example.AsUsersAsk([(0.8, 0.2)], kl=0.1, noise=0.2, curriculum=1000)
    shares = []
    for seed in range(3):
        weights = sampler.sample(500, torch.Generator().manual_seed(seed)).weights
        assert torch.allclose(weights.sum(-1), torch.ones(500))
        shares.append((weights.max(-1).values == 1).float().mean().item())
    assert shares[0] == 1.0 and shares[1] == pytest.approx(0.5, abs=0.1) and shares[2] == 0.0
    assert weights[:, 0].mean().item() == pytest.approx(0.8 * 0.8 + 0.2 * 0.5, abs=0.02)

    whole, drawn = example.main(tmp_path / "run", quick=True)
    assert drawn.drawn == 4 * 4 + 5  # four prompts a step, and the five that are shown
    expected = {name: p.detach().clone() for name, p in whole.policy.adapter_parameters().items()}
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again, drawn = example.main(tmp_path / "run", quick=True, resume=True)
    assert drawn.drawn == 4 * 4 + 5
    assert all(torch.equal(p, expected[name]) for name, p in again.policy.adapter_parameters().items())
