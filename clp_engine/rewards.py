"""Reward functions in TRL's convention, and the (rows, M) tensor they give."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from clp_engine.errors import ConfigError

RewardFunction = Callable[..., Any]


class ClassifierReward:
    """A sequence classifier as a reward: `logits[:, 0]` of prompt and completion (a chat template joins messages)."""

    def __init__(self, model: PreTrainedModel, tokenizer, batch_size: int = 64):
        self.model, self.tokenizer, self.batch_size = (
            model.eval().requires_grad_(False),
            tokenizer,
            batch_size,
        )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        self.__name__ = (model.config.name_or_path or type(model).__name__).rstrip("/").rsplit("/", 1)[-1]

    @torch.no_grad()
    def __call__(self, prompts, completions, **_) -> list[float]:
        texts = [
            p + c if isinstance(p, str) else self.tokenizer.apply_chat_template(p + c, tokenize=False)
            for p, c in zip(prompts, completions)
        ]
        scores = []
        for start in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(
                texts[start : start + self.batch_size],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=isinstance(prompts[0], str),
            ).to(self.model.device)
            scores += self.model(**inputs).logits[:, 0].float().tolist()
        return scores


def _resolve(reward, tokenizer) -> RewardFunction:
    if isinstance(reward, str):
        try:
            model = AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1)
            return ClassifierReward(model, tokenizer or AutoTokenizer.from_pretrained(reward))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot load the reward model {reward!r}: {str(error).strip().splitlines()[0]}"
            ) from error
    if isinstance(reward, PreTrainedModel):
        return ClassifierReward(
            reward, tokenizer or AutoTokenizer.from_pretrained(reward.config.name_or_path)
        )
    if callable(reward):
        return reward
    raise ConfigError(f"reward_funcs: {reward!r} is neither a function, a model, nor the name of one")


class RewardSet:
    """M rewards under their names.

    reward_funcs: one or a list of: a function (sync or async) called with keywords only (`prompts`, `completions`,
    `completion_ids`, every dataset column, `trainer_state`, `log_extra`, `log_metric`) that returns one float or None per
    row; a sequence classifier; or the name or path of one. A mapping gives the names itself; otherwise a function's
    `__name__` and a model's own name are taken.
    """

    def __init__(self, reward_funcs, processing_classes=None):
        if isinstance(reward_funcs, Mapping):
            names, funcs = list(reward_funcs), list(reward_funcs.values())
        else:
            funcs = (
                list(reward_funcs)
                if isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
                else [reward_funcs]
            )
            names = None
        if not funcs:
            raise ConfigError("reward_funcs is empty; give at least one reward")
        tokenizers = (
            processing_classes
            if isinstance(processing_classes, list | tuple)
            else [processing_classes] * len(funcs)
        )
        if len(tokenizers) != len(funcs):
            raise ConfigError(
                f"reward_processing_classes has {len(tokenizers)} entries for {len(funcs)} reward functions"
            )
        self.functions = [_resolve(f, t) for f, t in zip(funcs, tokenizers)]
        self.names = tuple(names or (getattr(f, "__name__", type(f).__name__) for f in self.functions))
        if len(set(self.names)) != len(self.names):
            raise ConfigError(
                f"two rewards have the same name ({', '.join(self.names)}); give a mapping from names to functions"
            )

    def __len__(self) -> int:
        return len(self.functions)

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        columns: Mapping[str, list],
        **context,
    ) -> torch.Tensor:
        """(rows, M) float32, NaN where a function gave None. columns: each of length rows. context: passed on.

        Raises ValueError where a function returns another number of rewards than rows, RuntimeError naming the function
        where one fails.
        """
        arguments = {
            **columns,
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            **context,
        }
        results: list[Any] = [self._call(name, f, arguments) for name, f in zip(self.names, self.functions)]
        waiting = [i for i, r in enumerate(results) if inspect.isawaitable(r)]
        if waiting:
            for i, value in zip(waiting, _run_all([results[i] for i in waiting])):
                if isinstance(value, BaseException):
                    raise RuntimeError(f"reward function {self.names[i]!r} failed: {value!r}") from value
                results[i] = value
        return torch.stack(
            [self._column(name, r, len(completions)) for name, r in zip(self.names, results)], -1
        )

    @staticmethod
    def _call(name: str, function: RewardFunction, arguments: dict) -> Any:
        try:
            return function(**arguments)
        except Exception as error:
            raise RuntimeError(f"reward function {name!r} failed: {error!r}") from error

    @staticmethod
    def _column(name: str, values: Any, rows: int) -> torch.Tensor:
        values = values.tolist() if isinstance(values, torch.Tensor) else list(values)
        if len(values) != rows:
            raise ValueError(
                f"reward function {name!r} returned {len(values)} rewards for {rows} completions"
            )
        return torch.tensor([float("nan") if v is None else float(v) for v in values], dtype=torch.float32)


def _run_all(awaitables: list) -> list:
    """Results (or exceptions) of all, run together; on a thread of its own, since the caller may be inside a running loop."""

    async def gather():
        return await asyncio.gather(*awaitables, return_exceptions=True)

    results: list = []
    thread = threading.Thread(target=lambda: results.extend(asyncio.run(gather())))
    thread.start()
    thread.join()
    return results
