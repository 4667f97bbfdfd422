"""Prompt conditioning: the weighting is written into the prompt.

A plain prompt gets the text in front (after its first special token, if it starts with one), as separate tokens. A chat gets it
at the start of its last user message, before the chat template is applied: templates trim messages and add text around them, so
that no position in the rendered chat is certain. A prompt that is cut from the left keeps the text.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from clp_engine.core.errors import ConfigError
from clp_engine.data.chat import encode_chat, messages_as_read

DEFAULT_TEMPLATE = "{weights}\n"
TEMPLATE_WITH_KL = "{weights}, kl {kl}\n"
_MARK = "\x00"


def check_template(template: str) -> None:
    """Raises ConfigError for a template without {weights}, or with an unknown name."""
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ConfigError(f"prompt_template={template!r}: {error}") from None
    try:
        template.format(weights="", kl="")
    except (ValueError, LookupError, AttributeError) as error:
        raise ConfigError(f"prompt_template={template!r}: {error}") from None
    if "weights" not in fields or fields - {"weights", "kl"}:
        raise ConfigError(
            f"prompt_template={template!r}: expected text with {{weights}} in it, and {{kl}} where the KL coefficient varies"
        )


def weighting_text(template: str, objectives: Sequence[str], weights: Sequence[float], kl: float) -> str:
    """The template with "name 0.70, name 0.30" for {weights} and the KL coefficient, to three digits, for {kl}."""
    listed = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(objectives, weights))
    return template.format(weights=listed, kl=f"{kl:.3g}")


def with_weighting(prompt: Any, token_ids: Sequence[int], text: str, tokenizer) -> list[int]:
    """The tokens of a prompt with `text` written into it.

    prompt: the text or chat messages that token_ids were made from; None if unknown.
    token_ids: the prompt's tokens, possibly cut from the left. As many tokens are cut from the result, but none of the text.

    Raises ConfigError for a chat template that does not show the start of a user message.
    """
    messages = None if prompt is None or isinstance(prompt, str) else messages_as_read(prompt, tokenizer)
    users = [i for i, message in enumerate(messages or ()) if message.get("role") == "user"]
    if not users:
        special = messages is None and len(token_ids) > 1 and token_ids[0] in set(tokenizer.all_special_ids)
        written = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*token_ids[:special], *written, *token_ids[special:]]
    cut = len(encode_chat(messages, tokenizer)) - len(token_ids)

    def rendered_with(begin: str) -> str:
        shown = [*messages]
        shown[users[-1]] = _beginning_with(begin, messages[users[-1]])
        return tokenizer.apply_chat_template(shown, add_generation_prompt=True, tokenize=False)

    rendered, shown = rendered_with(text), text.strip()
    before, mark, _ = rendered_with(_MARK + text).partition(_MARK)
    earlier = before.count(shown)  # the chat may contain the same text earlier
    parts = rendered.split(shown, earlier + 1)
    if not mark or len(parts) != earlier + 2:
        raise ConfigError(
            f"prompt conditioning writes {text!r} into the last user message, and the tokenizer's chat template does not show "
            "it; change prompt_template or tokenizer.chat_template"
        )
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    if cut <= 0:
        return ids
    start = len(rendered) - len(parts[-1]) - len(shown)
    first = _tokens_up_to(start, rendered, tokenizer)
    if cut <= first:
        return ids[cut:]
    behind = _tokens_up_to(start + len(shown), rendered, tokenizer, whole=True)
    return [*ids[first:behind], *ids[behind + cut - first :]]


def _beginning_with(text: str, message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if content is None or isinstance(content, str):
        return {**message, "content": text + (content or "")}
    return {**message, "content": [{"type": "text", "text": text}, *content]}


def _tokens_up_to(place: int, rendered: str, tokenizer, whole: bool = False) -> int:
    """The number of tokens of the rendered chat before a place. whole: count the token that contains the place, too."""
    if not tokenizer.is_fast:
        return len(tokenizer(rendered[:place], add_special_tokens=False)["input_ids"])
    spans = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return sum(start < place if whole else end <= place for start, end in spans)
