"""The requests of OpenAI's API, checked: POST /v1/chat/completions and POST /v1/completions.

Beside OpenAI's fields a request has `weights` (an object by objective, or a list in their order) and `kl`, or `base: true` for
the base model, and the sampling options `top_k` and `min_p`. A field that would change the completion and is not served is
refused unless it has the value that changes nothing. An unknown field is refused, too: a misspelt weighting must not be
answered with the default one.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clp_engine.core.errors import ConfigError, shown
from clp_engine.serving.requests import MAX_CHARACTERS, flag, kind, number, temperature, whole

MAX_COMPLETIONS = 128
MAX_TOP = 20
_MAX_STOPS, _MAX_STOP = 16, 200  # stop strings, and characters of one

# Fields without influence on a completion, which are read by nobody.
_IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
}
# Fields that are not served, and the values (beside null) that ask for nothing.
_NOT_SERVED: dict[str, tuple] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
_SHARED = {
    "model", "weights", "kl", "base", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stream",
    "stream_options", "logprobs",
}  # fmt: skip
_CHAT = _SHARED | {"messages", "max_completion_tokens", "top_logprobs"}
_TEXT = _SHARED | {"prompt"}


@dataclass(frozen=True)
class OpenAIRequest:
    """A checked request.

    prompts: one chat (a list of messages), or texts and lists of token ids. top: None without log-probs, otherwise the number
    of likeliest tokens beside each token. max_tokens: None takes the server's default. seed: one of chance if none was given.
    """

    chat: bool
    model: str | None
    prompts: Sequence[Any]
    weights: Any
    kl: float | None
    base: bool
    max_tokens: int | None
    temperature: float
    top_p: float | None
    top_k: int | None
    min_p: float | None
    n: int
    seed: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    top: int | None

    @classmethod
    def parse(cls, raw: Any, chat: bool) -> OpenAIRequest:
        """A request from decoded JSON. Raises ConfigError naming the wrong field."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"the request is {kind(raw)}; expected an object")
        # As in OpenAI's API, null is a field left out.
        given = {name: value for name, value in raw.items() if value is not None}
        known = _CHAT if chat else _TEXT
        for name, value in given.items():
            _check_known(name, value, known)
        return cls(
            chat=chat,
            model=_name(given.get("model")),
            prompts=[_messages(given)] if chat else _prompts(given),
            weights=_weights(given.get("weights")),
            kl=number("kl", given["kl"], 0.0, 1e6) if "kl" in given else None,
            base=flag("base", given.get("base", False)),
            max_tokens=_max_tokens(given),
            temperature=temperature("temperature", given.get("temperature", 1.0), 1e6),
            top_p=number("top_p", given.get("top_p", 1.0), 0.0, 1.0),
            top_k=max(whole("top_k", given.get("top_k", 0), -1, 2**31 - 1), 0) or None,
            min_p=number("min_p", given.get("min_p", 0.0), 0.0, 1.0) or None,
            n=whole("n", given.get("n", 1), 1, MAX_COMPLETIONS),
            seed=whole("seed", given["seed"], -(2**53), 2**53) if "seed" in given else secrets.randbits(31),
            stop=_stop(given.get("stop", ())),
            stream=flag("stream", given.get("stream", False)),
            include_usage=_include_usage(given),
            top=_top(given, chat),
        )


def _check_known(name: str, value: Any, known: set[str]) -> None:
    if name in known or name in _IGNORED:
        return
    if name not in _NOT_SERVED:
        raise ConfigError(f"unknown field {shown(name)}; expected {', '.join(sorted(known))}")
    neutral = _NOT_SERVED[name]
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
        raise ConfigError(f"{name}={shown(value)}: this server does not have {name}; leave it out")


def _name(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"model is {kind(value)}; expected a name")
    return value


def _max_tokens(given: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        if name in given:
            return whole(name, given[name], 1, 2**31 - 1)
    return None


def _messages(given: Mapping[str, Any]) -> Any:
    if "messages" not in given:
        raise ConfigError("messages is missing")
    messages = given["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise ConfigError(
            f"messages is {shown(messages)}; expected a list of messages with a role and a content"
        )
    _check_size(len(str(messages)))
    return messages


def _prompts(given: Mapping[str, Any]) -> list[str | list[int]]:
    """Texts and token ids: of OpenAI's four forms, a single prompt becomes a list of one."""
    if "prompt" not in given:
        raise ConfigError("prompt is missing")
    prompt = given["prompt"]
    one = isinstance(prompt, str) or isinstance(prompt, list) and bool(prompt) and _is_ids(prompt)
    prompts = [prompt] if one else prompt
    if (
        not isinstance(prompts, list)
        or not prompts
        or not all(isinstance(p, str) or _is_ids(p) for p in prompts)
    ):
        raise ConfigError(
            f"prompt is {shown(prompt)}; expected a text, a list of token ids, or a list of these"
        )
    _check_size(sum(map(len, prompts)))
    return prompts


def _is_ids(value: Any) -> bool:
    """A list of whole numbers that int64 holds."""
    return isinstance(value, list) and all(type(i) is int and -(2**63) <= i < 2**63 for i in value)


def _check_size(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise ConfigError(f"the prompt has {characters:,} characters; at most {MAX_CHARACTERS:,} are taken")


def _weights(value: Any) -> Any:
    """The weights, for the policy to check; here only that they are numbers."""
    if value is None:
        return None
    if not isinstance(value, Mapping | list):
        raise ConfigError(
            f"weights is {kind(value)}; expected an object with a number for each objective, or a list"
        )
    for weight in value.values() if isinstance(value, Mapping) else value:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(f"weights={shown(value)}: expected numbers from 0 to 1")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    fine = isinstance(stops, list | tuple) and all(
        isinstance(s, str) and 0 < len(s) <= _MAX_STOP for s in stops
    )
    if not fine or len(stops) > _MAX_STOPS:
        raise ConfigError(
            f"stop={shown(value)}: expected a text or at most {_MAX_STOPS} of them, of 1 to {_MAX_STOP} characters"
        )
    return tuple(stops)


def _include_usage(given: Mapping[str, Any]) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, Mapping) or set(options) - {"include_usage", "include_obfuscation"}:
        raise ConfigError(f"stream_options={shown(options)}: expected an object with include_usage")
    if options and not given.get("stream"):
        raise ConfigError("stream_options was given without stream: true")
    return flag("stream_options.include_usage", options.get("include_usage") or False)


def _top(given: Mapping[str, Any], chat: bool) -> int | None:
    """The number of likeliest tokens: `logprobs` of a completion is that number, of a chat the switch for `top_logprobs`."""
    if not chat:
        return whole("logprobs", given["logprobs"], 0, MAX_TOP) if "logprobs" in given else None
    asked = flag("logprobs", given.get("logprobs", False))
    if "top_logprobs" in given and not asked:
        raise ConfigError("top_logprobs was given without logprobs: true")
    return whole("top_logprobs", given.get("top_logprobs", 0), 0, MAX_TOP) if asked else None
