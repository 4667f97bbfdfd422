"""Chat prompts: checks of their messages, and their tokens under a tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from clp_engine.core.errors import ConfigError


def check_prompt(prompt: Any, where: str) -> None:
    """Raises ConfigError unless the prompt is a text or a list of text messages. where: its place, for the message.

    A message has a `role` and a `content`: a text, or a list of parts `{"type": "text", "text": ...}`. It may have other keys,
    which the chat template reads. Its content may be None if other keys hold all of it (tool calls of an earlier turn).
    """
    if isinstance(prompt, str):
        _check_text(prompt, where)
        if not prompt:
            raise ConfigError(f"{where}: its prompt is empty; mend or remove it")
        return
    if not isinstance(prompt, list | tuple) or not prompt or not all(isinstance(m, Mapping) for m in prompt):
        raise ConfigError(
            f"{where}: a prompt is a text or a list of messages such as {{'role': 'user', 'content': '...'}}; got "
            f"{_shown(prompt)}"
        )
    for message in prompt:
        if "role" not in message or "content" not in message:
            raise ConfigError(
                f"{where}: a message needs a role and a content; got the keys {', '.join(map(str, message))}"
            )
        content = message["content"]
        if content is None or isinstance(content, str):
            _check_text(content or "", where)
            continue
        for part in content if isinstance(content, list | tuple) else [content]:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text":
                raise ConfigError(
                    f"{where}: a message has a part of type {kind!r}; prompts are text here, parts of type 'text' only "
                    "(train a model for images, audio or video with TRL)"
                )
            if not isinstance(part.get("text"), str):
                raise ConfigError(
                    f"{where}: a message has a part of type 'text' without a text; got {part!r:.80}"
                )
            _check_text(part["text"], where)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: its text has half of a character ({text[error.start]!r} at {error.start}), which no tokenizer reads; "
            "mend or remove it"
        ) from None


def messages_as_read(messages: list, tokenizer) -> list[dict[str, Any]]:
    """The messages in a form that the tokenizer's chat template reads.

    Lists of parts stay if the template handles them; otherwise the texts of a message's parts are joined into one text. A
    template made for texts alone prints a list of parts as Python or JSON would, leaves it out, or fails.
    """
    whole = [m["content"] for m in messages if isinstance(m["content"], list | tuple)]
    if not whole:
        return list(messages)
    import jinja2

    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except (jinja2.TemplateError, TypeError, AttributeError):
        read = False
    else:
        printed = any(form in text for content in whole for form in (str(content), _json(content)))
        read = not printed and all(part["text"].strip() in text for content in whole for part in content)
    if read:
        return list(messages)
    return [
        {**m, "content": "".join(part["text"] for part in m["content"])}
        if isinstance(m["content"], list | tuple)
        else m
        for m in messages
    ]


def encode_chat(messages: list, tokenizer) -> list[int]:
    """Tokens of the messages under the tokenizer's chat template, up to the start of the assistant's answer.

    Raises ConfigError if the tokenizer has no template, or its template refuses the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            "the prompts are chat messages and the tokenizer has no chat template; set tokenizer.chat_template, or give texts"
        )
    import jinja2

    messages = messages_as_read(messages, tokenizer)
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    except (jinja2.TemplateError, TypeError) as error:
        raise ConfigError(f"the tokenizer's chat template does not take the messages: {error}") from error


def _json(content: Any) -> str:
    """`content` as the templates' tojson filter writes it."""
    return json.dumps(content, ensure_ascii=False, default=str)


def _shown(prompt: Any) -> str:
    if isinstance(prompt, list | tuple):
        return f"a list of {type(prompt[0]).__name__}" if prompt else "an empty list"
    return f"type {type(prompt).__name__}"
