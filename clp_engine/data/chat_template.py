"""Values for a tokenizer's chat template (TRL's `chat_template_kwargs`), written into the template itself.

A line such as `{%- set enable_thinking = false %}` at the start of the template sets the value wherever the template is used:
in training, and after the policy and its tokenizer are loaded by a program that does not know the setting.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from clp_engine.core.errors import ConfigError


def with_values(tokenizer, values: Mapping[str, Any] | None):
    """A copy of `tokenizer` whose chat template sets these variables, or `tokenizer` itself if there are no values.

    Values are text, numbers, booleans, None, and lists and mappings of these. Raises ConfigError for other values, and for a
    tokenizer that does not have exactly one chat template.
    """
    if not values:
        return tokenizer
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        found = "several" if template else "none"
        raise ConfigError(
            f"chat_template_kwargs={dict(values)!r}: the tokenizer has {found}; expected one chat template"
        )
    odd = [name for name in values if not str(name).isidentifier()]
    if odd:
        raise ConfigError(f"chat_template_kwargs: {odd[0]!r} is no name of a variable")
    changed = copy.deepcopy(tokenizer)
    settings = "".join(f"{{%- set {name} = {_literal(name, value)} %}}" for name, value in values.items())
    changed.chat_template = settings + template
    return changed


def _literal(name: str, value: Any) -> str:
    """`value` as a Jinja literal. Jinja reads Python's literals: True, None, 'text', [1, 2], {'a': 1}."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(name, one) for one in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_literal(name, one)}" for key, one in value.items()) + "}"
    raise ConfigError(f"chat_template_kwargs: {name}={value!r}: expected text, numbers, lists or mappings")
