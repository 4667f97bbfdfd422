"""Small models of each supported family, built from configs, and a tokenizer for them."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCAB = 67  # no tile divides it
_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SMALL = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}

CONFIGS = {
    "qwen2": lambda: Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "qwen2-untied": lambda: Qwen2Config(**_SMALL, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(**_SMALL, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(
        **_SMALL, sliding_window=6, query_pre_attn_scalar=8, final_logit_softcapping=5.0
    ),
    "mistral": lambda: MistralConfig(**_SMALL, sliding_window=6),
    "gpt2": lambda: GPT2Config(**_COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}


def build_model(family: str, seed: int = 0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    with torch.no_grad():
        # Initial weights are so small that every model is nearly uniform; larger ones make errors visible.
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
    return model.eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", "<unk>"] + [f"w{i}" for i in range(VOCAB - 4)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_policy(family: str = "qwen2", objectives=("a", "b"), *, trained: bool = True, **options):
    """A policy over a small model; `trained` gives its adapters something to say."""
    from clp_engine.policy import ConditionedPolicy

    policy = ConditionedPolicy.from_pretrained(
        build_model(family), objectives, tokenizer=build_tokenizer(), **{"rank": 4, **options}
    )
    if trained:
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in policy.adapter_parameters().items():
                if not name.endswith("lora_a"):
                    parameter.normal_(0, 0.1)
    return policy


@pytest.fixture(params=sorted(CONFIGS))
def family(request):
    return request.param
