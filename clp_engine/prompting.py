"""Prompt conditioning: the weighting written into the prompt.

The text is put in front of a plain prompt (after its first special token, if it starts with one), and in front of the last user
message of a chat, as tokens of their own: a prompt that is cut from the left keeps it.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Sequence
from typing import Any

from clp_engine.chat import messages_as_read
from clp_engine.errors import ConfigError

DEFAULT_TEMPLATE = "{weights}\n"
TEMPLATE_WITH_KL = "{weights}, kl {kl}\n"
_MARK = "\x00"


def check_template(template: str) -> None:
    """Raises ConfigError for a template that does not name the weights, or names anything unknown."""
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
    """The template with "name 0.70, name 0.30" for {weights} and the KL coefficient, three digits of it, for {kl}."""
    listed = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(objectives, weights))
    return template.format(weights=listed, kl=f"{kl:.3g}")


def slot(prompt: Any, token_ids: Sequence[int], tokenizer) -> int:
    """Where in token_ids the text goes. prompt: what they were made from, text or chat messages; None if that is not known."""
    if isinstance(prompt, str) or prompt is None:
        special = set(tokenizer.all_special_ids)
        return int(len(token_ids) > 1 and token_ids[0] in special)
    last_user = max((i for i, message in enumerate(prompt) if message.get("role") == "user"), default=None)
    if last_user is None:
        return 0
    marked = copy.deepcopy(messages_as_read(prompt, tokenizer))
    content = marked[last_user]["content"]
    if isinstance(content, str):
        marked[last_user]["content"] = _MARK + content
    else:  # parts
        marked[last_user]["content"] = [{"type": "text", "text": _MARK}, *content]
    rendered = tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False)
    before, _, after = rendered.rpartition(_MARK)
    # Counted from the end: what was cut off lies at the start.
    behind = len(tokenizer(after, add_special_tokens=False)["input_ids"])
    return max(len(token_ids) - behind, 0)
