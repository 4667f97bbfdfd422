"""The policy behind the page: its description, the front that its run measured, and completions beside the base model's."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.data import sources
from clp_engine.data.prompts import encode_prompts
from clp_engine.evaluation.report import ParetoReport
from clp_engine.rollouts.types import SamplingParams
from clp_engine.serving.requests import MAX_CHARACTERS, MAX_NEW_TOKENS, MAX_TEMPERATURE, GenerateRequest
from clp_engine.serving.served import Source
from clp_engine.training import running
from clp_engine.training.runs import run_spec, trust

EXAMPLES = 6
_REMEMBERED = 64  # completions of the base model: moving a slider asks for the same one again


@dataclass(frozen=True)
class _Prompt:
    """prompt: text or chat messages. token_ids: the tokens that the model reads. note: on text that was cut off, or None."""

    prompt: str | list[dict[str, str]]
    token_ids: list[int]
    note: str | None


class Session:
    """The page's view of a served policy and the folder it came from; see `describe` and `generate`.

    examples: a file of prompts that the page offers, in the formats of `sources.read_rows`. None takes the run's own data,
    if they lie in the run's folder or this user trained the run. Raises ConfigError where the examples cannot be read.
    """

    def __init__(self, served: Source, examples: str | Path | None = None):
        self.served, self.run, self.spec, self.policy = served, served.run, served.spec, served.policy
        self._config = served.config
        self._examples, self._chats = _examples(self.spec, self.run, examples)
        self._base: OrderedDict[tuple, dict[str, Any]] = OrderedDict()

    # -- what it is ---------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What the page shows of the policy, for JSON. Each call reads the report again: it may be new."""
        policy, config = self.policy, self._config
        front, front_note = self._front()
        template = getattr(policy.tokenizer, "chat_template", None) is not None
        return {
            "run": self.served.name,
            "base_model": policy.spec.base_model or "a model without a name",
            "objectives": list(policy.objectives),
            "weights_note": self._weights_note(),
            "kl": _kl(self.served),
            # None: there is nothing to choose.
            "chat": self._chats is not False if template else None,
            "defaults": {
                "temperature": config.get("temperature", 1.0) or 1.0,
                "max_new_tokens": min(config.get("max_completion_length", 128), self._most_tokens),
            },
            "limits": {
                "characters": MAX_CHARACTERS,
                "max_new_tokens": self._most_tokens,
                "temperature": MAX_TEMPERATURE,
            },
            "examples": self._examples,
            "front": front,
            "front_note": front_note,
        }

    @property
    def _most_tokens(self) -> int:
        return min(MAX_NEW_TOKENS, self.served.room)

    def _weights_note(self) -> str | None:
        """The reason why the weights have no effect, or None where they have one."""
        if len(self.policy.objectives) == 1:
            return "There is one objective, so its weight is always 1."
        if not self.policy.conditioning.blended and not self.policy.conditioning.prompt:
            return "This policy was trained with conditioning none: it says the same at every weighting."
        return None

    def _front(self) -> tuple[dict[str, Any] | None, str | None]:
        """The points and base of the report, or None; and the reason where there are none, or None."""
        folders = [self.run]
        if (
            running.policy_directory(self.run) == self.run.parent / "policy"
        ):  # RUN/policy: the report is RUN's
            folders.append(self.run.parent)
        measured = [folder for folder in folders if (folder / "report.json").is_file()]
        if not measured:
            return (
                None,
                f"Nothing has been measured yet: clp-engine evaluate {self.run} does, and the front is drawn here.",
            )
        try:
            report = ParetoReport.load(measured[0])
        except ConfigError as error:
            return None, str(error)
        if tuple(report.objectives) != self.policy.objectives:
            return (
                None,
                f"The report is about {', '.join(report.objectives)}, this policy about {', '.join(self.policy.objectives)}.",
            )
        raw = report.to_dict()
        points = [
            {
                "weights": point["weights"],
                "kl_coef": point["kl_coef"],
                "rewards": {name: value["mean"] for name, value in point["rewards"].items()},
                "kl": point["kl"],
            }
            for point in raw["points"]
        ]
        front = {
            "points": points,
            "base": {name: value["mean"] for name, value in raw["base"]["rewards"].items()},
            "kl_coefs": report.kl_coefs,
            "prompts": report.setup["prompts"],
        }
        return front, None

    # -- what it says -------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> dict[str, Any]:
        """The policy's completion at the request's condition and, where requested, the base model's, for JSON.

        Raises ConfigError for weights and KL coefficients that do not fit the policy, and for a text that is too long for
        the model.
        """
        conditions = self.served.conditions(request.weights, request.kl)
        sampling = SamplingParams(request.max_new_tokens, request.temperature)
        prompt = self._read(request, conditions)
        started = time.perf_counter()
        completion, base = await _both(
            self._complete(prompt, conditions, sampling, request.seed),
            self._base_completion(prompt, sampling, request.seed) if request.base else _nothing(),
        )
        return {
            # Six digits: they are float32, and 0.1 should read as 0.1.
            "weights": {
                n: round(w, 6) for n, w in zip(self.policy.objectives, conditions.weights[0].tolist())
            },
            "kl": round(conditions.kl[0].item(), 6),
            "prompt_tokens": len(prompt.token_ids),
            "prompt_note": prompt.note,
            "completion": completion,
            "base": base,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def _read(self, request: GenerateRequest, conditions: Conditions) -> _Prompt:
        """The request's text in the form of the prompts in training, as tokens."""
        tokenizer, note, text = self.policy.tokenizer, None, request.text.strip()
        prompt: str | list[dict[str, str]] = text
        if self.spec is not None and self.spec.task is not None:
            from clp_engine.tasks.docsum.dataset import as_prompt

            prompt = as_prompt(text, tokenizer)
            if text not in prompt:
                note = (
                    "The text is longer than the model reads; what comes after the first words was left out."
                )
        elif request.chat:
            if getattr(tokenizer, "chat_template", None) is None:
                raise ConfigError("chat was asked for, and this policy's tokenizer has no chat template")
            prompt = [{"role": "user", "content": text}]
        token_ids = encode_prompts([prompt], tokenizer)[0]
        limit = self._config.get("max_prompt_length")
        if limit is not None and len(token_ids) > limit:
            note = f"The text has {len(token_ids)} tokens; as in training, the model reads the last {limit}."
            token_ids = token_ids[-limit:]
        shown = self.served.read(token_ids, conditions, prompt)
        self.served.check(shown, request.max_new_tokens, "the text")
        return _Prompt(prompt, token_ids, note)

    async def _base_completion(self, prompt: _Prompt, sampling: SamplingParams, seed: int) -> dict[str, Any]:
        key = tuple(prompt.token_ids), sampling, seed
        if key not in self._base:
            reference = Conditions.reference(1, len(self.policy.objectives))
            self._base[key] = await self._complete(prompt, reference, sampling, seed)
            if len(self._base) > _REMEMBERED:
                self._base.popitem(last=False)
        self._base.move_to_end(key)
        return self._base[key]

    async def _complete(
        self, prompt: _Prompt, conditions: Conditions, sampling: SamplingParams, seed: int
    ) -> dict[str, Any]:
        ids = self.served.read(prompt.token_ids, conditions, prompt.prompt)
        return (await self.served.complete(ids, conditions, sampling, seed))._asdict()


async def _both(first: Coroutine, second: Coroutine) -> tuple[Any, Any]:
    """The results of both. Where one fails, or the client leaves, both have ended before this returns."""
    tasks = [asyncio.ensure_future(first), asyncio.ensure_future(second)]
    try:
        one, other = await asyncio.gather(*tasks)
        return one, other
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _nothing() -> None:
    return None


def _kl(served: Source) -> dict[str, Any]:
    """Name, value and range of the KL coefficient, or the reason why it is fixed."""
    policy, spec = served.policy, served.policy.spec
    name = "beta" if policy.kl_is_beta else "alpha"
    known = {"name": name, "value": round(spec.default_kl, 6)}
    if (reason := served.kl_fixed) is not None:
        return {**known, "adjustable": False, "reason": reason}
    trained = served.config.get(f"{name}_range") or served.config.get(f"{name}_grid")
    if trained:
        low, high, reason = min(trained), max(trained), None
    else:
        low, high = spec.min_kl or spec.default_kl / 10, max(10 * spec.default_kl, 0.1)
        high = high if policy.kl_is_beta else min(high, 1.0)
        reason = (
            f"Training is not known to have seen other values than {spec.default_kl:g}; this goes beyond it."
        )
    return {**known, "adjustable": True, "low": low, "high": high, "reason": reason}


def _examples(
    spec: run_spec.RunSpec | None, run: Path, given: str | Path | None
) -> tuple[list[dict[str, str]], bool | None]:
    """Texts that the page offers, and whether the run's prompts are chats (None where this is unknown)."""
    if given is not None:
        rows = sources.read_rows(given)[:EXAMPLES]
    elif spec is None:
        return [], None
    elif spec.task is not None:
        rows = spec.eval_rows(EXAMPLES)
        return [{"name": row["name"], "text": row["document"]} for row in rows], False
    else:
        path = Path(spec.eval_dataset or spec.dataset)
        # Another person's run could name any file of this user, and the page would show it.
        folder = run if (run / "run.json").is_file() else run.parent
        if not (trust.is_own(spec) or path.resolve().is_relative_to(folder.resolve())):
            return [], None
        try:
            rows = sources.read_rows(path)[:EXAMPLES]
        except ConfigError:  # the run was copied here without its data
            return [], None
    texts = [text for row in rows if (text := _user_text(row["prompt"])) is not None]
    named = [{"name": " ".join(text.split())[:60], "text": text} for text in texts]
    return named, not isinstance(rows[0]["prompt"], str)


def _user_text(prompt: Any) -> str | None:
    """The text that a user would type for this prompt. None for a chat of several messages."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and isinstance(prompt[0].get("content"), str):
        return prompt[0]["content"]
    return None
