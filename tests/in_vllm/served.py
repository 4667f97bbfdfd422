"""Small models, their stacks and plain adapters in folders, and what this engine completes with them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from engine.conftest import VOCAB, build_tokenizer
from transformers import LlamaConfig, Qwen2Config

from clp_engine import ConditionedPolicy, SamplingParams, rollout
from clp_engine.models.base import auto_class

SHAPE = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the least that vLLM's attention on CPUs has
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
CONFIGS = {"llama": lambda: LlamaConfig(**SHAPE), "qwen2": lambda: Qwen2Config(**SHAPE)}
# Of each policy: with and without the output projection (vLLM has LoRA there for Llama alone), both forms of c(kl).
POLICIES = {
    "llama": {"conditioning": "lora+logit", "kl_conditioning": "linear"},
    "qwen2": {"conditioning": "lora", "kl_conditioning": "odds", "min_kl": 0.2},
}
DEFAULT, PLAIN = {"a": 0.25, "b": 0.75}, {"a": 0.9, "b": 0.1}
NEW_TOKENS = 12
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}w9"


def build_base(family: str):
    """A model whose next tokens are far from uniform, so that a wrong number shows."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    model = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
        model.lm_head.weight[2] = 0  # few completions end early
    return model.eval()


@dataclass
class Served:
    """A policy, and the folders that vLLM serves it from: of its base model, of its stack, and of a plain adapter."""

    policy: ConditionedPolicy
    base: Path
    stack: Path
    plain: Path
    max_lora_rank: ClassVar[int] = 8

    def tokens(self, prompts: list[list[int]], weights=None, kl=None, conditions=None) -> list[list[int]]:
        """This engine's own greedy completions."""
        conditions = conditions or self.policy.conditions(weights, kl, len(prompts))
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)
        drawn = rollout(self.policy, prompts, conditions, sampling=sampling)
        return [ids[mask].tolist() for ids, mask in zip(drawn.completion_ids, drawn.completion_mask)]

    def base_tokens(self, prompts: list[list[int]]) -> list[list[int]]:
        conditions = self.policy.conditions(rows=len(prompts))
        return self.tokens(
            prompts, conditions=dataclasses.replace(conditions, weights=conditions.weights * 0)
        )

    def logprobs(self, prompt: list[int], tokens: list[int], weights, kl) -> torch.Tensor:
        """Of the tokens of a completion, by one pass over the whole sequence."""
        with torch.no_grad():
            logits = self.policy(torch.tensor([prompt + tokens]), weights=weights, kl=kl).logits[0]
        return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def prepare(folder: Path, family: str) -> Served:
    base = folder / "base"
    build_base(family).save_pretrained(base)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(base)
    policy = ConditionedPolicy.from_pretrained(
        base, ("a", "b"), rank=(3, 4), lora_alpha=(6, 4), **POLICIES[family]
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters().items():
            if name.endswith("lora_b"):
                parameter.normal_(0, 0.25)
    policy.export_stack(folder / "stack", weights=DEFAULT, kl=0.1)
    policy.export_adapter(folder / "plain", PLAIN, kl=0.1)
    return Served(policy, base, folder / "stack", folder / "plain")


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (length,), generator=generator).tolist()
