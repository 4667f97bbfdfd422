"""The path of text from tokens to logits: a whole language model, or one part of a model of text and images.

Models of text and images (Gemma 3, Mistral 3, LLaVA, Qwen-VL) hold a language model, a tower for images, and a projector
between them. Text passes the language model's stack of layers and the output projection alone. The state that such a model
keeps between two calls (Qwen-VL's rope_deltas) belongs to images. A direct call of the stack neither reads nor writes it.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PretrainedConfig, PreTrainedModel


def is_composite(config: PretrainedConfig) -> bool:
    """Whether a causal model has other towers (for images or audio) beside its language model."""
    return not getattr(config, "is_encoder_decoder", False) and config.get_text_config() is not config


def text_stack(model: PreTrainedModel) -> PreTrainedModel:
    """The stack of layers that turns tokens into hidden states. `model` itself if it contains no separate stack."""
    stack = model.base_model
    if stack is model:  # Llama 4's language model has the prefix of its place in the model of text and images
        stack = getattr(model, "model", model)
    return stack.get_decoder() if is_composite(model.config) else stack


def beside_text(model: PreTrainedModel) -> Callable[[str], bool]:
    """A function that says, for a module's name, whether text does not pass it: image towers and projectors."""
    if not is_composite(model.config):
        return lambda name: False
    stack, head = text_stack(model), model.get_output_embeddings()
    inside = {id(module) for module in (*stack.modules(), head)}
    passed = {name for name, m in model.named_modules(remove_duplicate=False) if id(m) in inside}
    return lambda name: name not in passed
