"""Small models of each supported family, built from configs, and a tokenizer for them."""

import pytest
import torch
from later import later
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    Gemma2Config,
    Gemma2PreTrainedModel,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    Mistral3Config,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3VLConfig,
    T5Config,
)

from clp_engine.models.base import auto_class

# As in transformers 5.23 and later: what the tests compare with has its softcap, too.
Gemma2PreTrainedModel._supports_sdpa = False

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

_T5 = {
    **_COMMON,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}
_BART = {
    **_COMMON,
    "d_model": 32,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
}

CAUSAL = {
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
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}
_QWEN_TOKENS = {f"{name}_token_id": VOCAB - i for i, name in enumerate(("image", "video"), 1)}
_MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
# Models of text and images: a language model beside a tower and a projector.
COMPOSITE = {
    "gemma3": lambda: Gemma3Config(
        text_config={
            **_SMALL,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config=_TOWER,
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
    ),
    "mistral3": lambda: Mistral3Config(
        text_config={**_SMALL, "model_type": "mistral", "sliding_window": None},
        vision_config={**_TOWER, "model_type": "pixtral", "head_dim": 8},
        image_token_index=VOCAB - 1,
    ),
    "llava": lambda: LlavaConfig(
        text_config={**_SMALL, "model_type": "llama"},
        vision_config={**_TOWER, "model_type": "clip_vision_model", "projection_dim": 8},
        image_token_index=VOCAB - 1,
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config={**_SMALL, "rope_parameters": _MROPE},
        vision_config={**_QWEN_TOWER, "fullatt_block_indexes": [0]},
        **_QWEN_TOKENS,
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config={**_SMALL, "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        vision_config={**_QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_QWEN_TOKENS,
    ),
}
ENCODER_DECODER = {
    "t5": lambda: T5Config(**_T5),
    "t5-v1.1": lambda: T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": lambda: BartConfig(**_BART),
}
CONFIGS = {**CAUSAL, **COMPOSITE, **ENCODER_DECODER}


def build_model(family: str, seed: int = 0):
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    model = auto_class(config).from_config(config)
    if family == "t5-v1.1":
        # transformers ties what it builds from a config; a checkpoint may hold the two apart.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.15)
    with torch.no_grad():
        # Initial weights are so small that every model is nearly uniform; larger ones make errors visible. T5's are larger.
        larger = 2.0 if family.startswith("t5") else 6.0
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(larger)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
        if family == "bart":
            model.final_logits_bias.normal_(0, 0.5)
    return model.eval()


def model_inputs(family: str, rows: int = 4, length: int = 9, seed: int = 3) -> dict[str, torch.Tensor]:
    """Random tokens as the family's own forward takes them."""
    generator = torch.Generator().manual_seed(seed)
    names = ["input_ids", "decoder_input_ids"] if family in ENCODER_DECODER else ["input_ids"]
    return {name: torch.randint(3, VOCAB, (rows, length), generator=generator) for name in names}


def plain_logits(model, prompt: list[int], completion: list[int], **conditions) -> torch.Tensor:
    """Logits (T, V) that predict each token of a completion, by one unpadded pass of a model's (or policy's) own forward."""
    if model.config.is_encoder_decoder:
        shifted = [model.config.decoder_start_token_id, *completion[:-1]]
        return model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([shifted]), **conditions).logits[
            0
        ]
    return model(torch.tensor([prompt + completion]), **conditions).logits[0, len(prompt) - 1 : -1]


def build_classifier(**options) -> LlamaForSequenceClassification:
    """One score per text: what is a reward when it lies in a folder or is given as a model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        **options,
    )
    return LlamaForSequenceClassification(config)


def build_tokenizer(family: str = "qwen2") -> PreTrainedTokenizerFast:
    """Words w0, w1, ...; for an encoder-decoder every text ends with <eos>, as T5's do."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>"] + [f"w{i}" for i in range(VOCAB - 4)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if family in ENCODER_DECODER:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def add_adapter(model: PreTrainedModel, config) -> PreTrainedModel:
    """The model with an adapter of transformers' own integration of PEFT, which may ask for a newer PEFT than there is."""
    try:
        model.add_adapter(config)
    except (ValueError, ImportError) as error:
        if "PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    return model


def build_policy(family: str = "qwen2", objectives=("a", "b"), *, trained: bool = True, **options):
    """A policy over a small model; `trained` gives its adapters something to say."""
    from clp_engine.policy.policy import ConditionedPolicy

    policy = ConditionedPolicy.from_pretrained(
        build_model(family), objectives, tokenizer=build_tokenizer(family), **{"rank": 4, **options}
    )
    if trained:
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in policy.adapter_parameters().items():
                if not name.endswith("lora_a"):
                    parameter.normal_(0, 0.1)
    return policy


FIRST = (
    "llama",
    "gemma2",
    "gpt2",
    "t5",
    "bart",
)  # the others differ from these in what they tie and in a window


@pytest.fixture(params=[*FIRST, *later(*sorted(set(CONFIGS) - set(FIRST)))])
def family(request):
    return request.param
