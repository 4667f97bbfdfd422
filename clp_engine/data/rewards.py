"""Reward functions in TRL's convention, and the (rows, M) tensor of their rewards.

Reward functions run beside the thread that asks for them, so that training can do work that needs no reward meanwhile:

    async functions       all at once, in one event loop that lives as long as the RewardSet
    other functions       on `workers` threads, in their order; with workers=0 in the asking thread, before `start` returns
    modules, classifiers  in the asking thread, whose device they use

Python runs the bytecode of one thread at a time. A function that waits (network, files, subprocesses) or computes in C overlaps
with training. A function that loops in Python alternates with the thread that feeds the device, without gain or loss.

Global random generators (random, numpy, torch): with one worker, functions run one after another in their order, and the engine
draws nothing meanwhile, so that a run can be repeated to the bit. Functions that draw at the same time (async ones, or two and
more workers) take their numbers in an undefined order. Give each such function a generator of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from clp_engine.core.errors import ConfigError
from clp_engine.core.transformers_releases import keep_softcap
from clp_engine.data.chat import messages_as_read
from clp_engine.data.positions import Room
from clp_engine.data.reward_threads import EventLoop, Workers

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]

_LARGEST = 1e18  # a larger reward overflows float32 when squared, as in a standard deviation or gradient norm
_SHORT = type(None) | bool | int | float
_FAILURES = (Exception, asyncio.CancelledError)  # errors of a reward function; any other ends the program


class ClassifierReward:
    """A sequence classifier as a reward: `logits[:, 0]` for prompt and completion (a chat template joins messages)."""

    def __init__(self, model: PreTrainedModel, tokenizer, batch_size: int = 64):
        self.model, self.tokenizer, self.batch_size = (
            model.eval().requires_grad_(False),
            tokenizer,
            batch_size,
        )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._room = Room.of(model)
        self.__name__ = (model.config.name_or_path or type(model).__name__).rstrip("/").rsplit("/", 1)[-1]
        try:
            self._room.check_tokenizer(tokenizer)
        except ConfigError as error:
            raise ConfigError(f"reward model {self.__name__!r}: {error}") from None
        keep_softcap(model)
        for config in (model.config, model.config.get_text_config()):  # two configs for text and images
            config.pad_token_id = tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, prompts, completions, **_) -> list[float]:
        texts = [
            p + c if isinstance(p, str) else self._rendered([*p, *c]) for p, c in zip(prompts, completions)
        ]
        scores = []
        for start in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(
                texts[start : start + self.batch_size],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,  # as in TRL: the prompt's text contains the start token if there is one
            )
            highest = int(inputs["input_ids"].max())
            self._room.check_ids([highest], f"a text for the reward model {self.__name__!r}", self.tokenizer)
            inputs = inputs.to(self.model.device)
            scores += self.model(**inputs).logits[:, 0].float().tolist()
        return scores

    def _rendered(self, messages: list) -> str:
        return self.tokenizer.apply_chat_template(messages_as_read(messages, self.tokenizer), tokenize=False)


def _resolve(reward, tokenizer) -> RewardFunction:
    if isinstance(reward, str):
        try:
            model = AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1)
            return ClassifierReward(model, tokenizer or AutoTokenizer.from_pretrained(reward))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot load the reward model {reward!r}: {str(error).strip().splitlines()[0]}"
            ) from error
    if isinstance(reward, torch.nn.Module) and hasattr(
        reward, "config"
    ):  # a compiled model is no PreTrainedModel
        return ClassifierReward(
            reward, tokenizer or AutoTokenizer.from_pretrained(reward.config.name_or_path)
        )
    if callable(reward):
        return reward
    raise ConfigError(f"reward_funcs: {reward!r} is neither a function, a model, nor the name of one")


class RewardSet:
    """M rewards with their names.

    reward_funcs: one reward, a list of rewards, or a mapping from names to rewards. A reward is a function, a sequence
        classifier, or the name or path of a sequence classifier. Without a mapping, a function's `__name__` and a model's own
        name are used.
    workers: the number of threads for functions that are not async (module docstring).

    A function, sync or async, is called with keywords only: `prompts`, `completions`, `completion_ids`, every dataset column of
    another name, `trainer_state`, `log_extra`, `log_metric`. It returns a number or None for each row, as a list, an array or a
    tensor, also of shape (rows, 1). NaN counts as None. Each function gets its own copy of the lists.
    """

    def __init__(self, reward_funcs, processing_classes=None, workers: int = 0):
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
        self.names = tuple(names or map(_name, self.functions))
        if len(set(self.names)) != len(self.names):
            raise ConfigError(
                f"two rewards have the same name ({', '.join(self.names)}); give a mapping from names to functions"
            )
        self._workers = Workers(workers) if workers else None
        self._loop = EventLoop()
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self.functions)

    @property
    def of_main(self) -> tuple[str, ...]:
        """The names of those that the main process of several calls, with all completions; the others are called by every
        process with its own. A function asks for it by an attribute, `on_main_process = True`."""
        return tuple(
            n for n, f in zip(self.names, self.functions) if getattr(_wrapped(f), "on_main_process", False)
        )

    def to(self, device: torch.device) -> RewardSet:
        """Move classifiers to the device of the completions."""
        for function in self.functions:
            if isinstance(function, ClassifierReward):
                function.model.to(device)
        return self

    def start(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        columns: Mapping[str, list],
        among: Collection[str] | None = None,
        **context,
    ) -> PendingRewards:
        """Start every function, or those `among` these names. columns: lists of length rows. context: further keywords, passed
        on unchanged."""
        arguments = {  # in TRL's order
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            **columns,
            **context,
        }
        asked = self.names if among is None else among
        calls = [_Call(name, f, self._loop) for name, f in zip(self.names, self.functions) if name in asked]
        here = []
        for call in calls:  # calls that run elsewhere start first, so that they overlap with the rest
            own = {name: _copied(value) for name, value in arguments.items()}
            if _is_async(call.function):
                call.run(own)
            elif self._workers is None or isinstance(call.function, ClassifierReward | torch.nn.Module):
                here.append((call, own))
            else:
                call.on_worker = True
                self._workers.submit(_in_context_of_caller(call, own))
        for call, own in here:
            call.run(own)
            if call.failed:
                call.value()  # raises
        return PendingRewards(calls, len(completions), self._warned, self.names)

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        columns: Mapping[str, list],
        **context,
    ) -> torch.Tensor:
        """The rewards themselves: `start(...).result()`."""
        return self.start(prompts, completions, completion_ids, columns, **context).result()


class PendingRewards:
    """The running reward calls for one batch of completions."""

    def __init__(self, calls: list[_Call], rows: int, warned: set[str], names: Sequence[str]):
        self._calls, self._rows, self._warned, self._names = calls, rows, warned, names

    def result(self) -> torch.Tensor:
        """Wait for all calls and return their rewards, (rows, M) float32, with NaN for None and for functions not asked.

        Raises ValueError naming a function that returns anything but a finite number or None per row, or that logs another
        number of values. Raises RuntimeError naming a function that fails, with the function's error as the cause.
        """
        columns = {call.name: self._column(call, call.value()) for call in self._calls}
        absent = torch.full((self._rows,), math.nan)
        rewards = torch.stack([columns.get(name, absent) for name in self._names], -1)
        unrewarded = (
            rewards.isnan().all(-1).nonzero().flatten().tolist() if len(columns) == len(self._names) else []
        )
        if unrewarded:
            logger.warning(
                "every reward function returned None for %d of %d completions (the first: number %d); they are not trained on",
                len(unrewarded),
                self._rows,
                unrewarded[0],
            )
        return rewards

    def _column(self, call: _Call, returned: Any) -> torch.Tensor:
        what = f"reward function {call.name!r}"
        values = self._per_row(returned)
        if values is None:
            given = repr(returned) if isinstance(returned, _SHORT) else f"a {type(returned).__name__}"
            hint = "; is its return statement missing?" if returned is None else ""
            raise ValueError(
                f"{what} returned {given}; expected a list, an array or a tensor of {self._rows} numbers, one for each "
                f"completion{hint}"
            )
        if len(values) != self._rows:
            raise ValueError(f"{what} returned {len(values)} rewards for {self._rows} completions")
        numbers = []
        for row, value in enumerate(values):
            number = math.nan if value is None else _number(value)
            if number is None or abs(number) > _LARGEST:
                raise ValueError(
                    f"{what} returned {value!r:.80} for completion {row}; expected a number of at most {_LARGEST:g} in size, "
                    "or None where it does not apply"
                )
            if value is not None and math.isnan(number) and call.name not in self._warned:
                self._warned.add(call.name)
                logger.warning(
                    "%s returned NaN for completion %d; NaN counts as None (said once; rewards/%s/missing is the share)",
                    what,
                    row,
                    call.name,
                )
            numbers.append(number)
        for column, logged in call.columns.items():
            if isinstance(logged, str) or not hasattr(logged, "__len__") or len(logged) != self._rows:
                length = len(logged) if hasattr(logged, "__len__") else "no"
                raise ValueError(
                    f"{what} gave log_extra {length} values for {column!r} ({type(logged).__name__}); expected a list of "
                    f"{self._rows}, one for each completion"
                )
        return torch.tensor(numbers, dtype=torch.float32)

    @staticmethod
    def _per_row(returned: Any) -> list | None:
        """A function's return value as a list without trailing dimensions of 1, or None if it is not list-like."""
        if hasattr(returned, "tolist") and hasattr(returned, "ndim"):
            if returned.ndim == 0:
                return None
            return returned.reshape(returned.shape[: _dimensions(returned.shape)]).tolist()
        if isinstance(returned, str | bytes | Mapping | Set) or not isinstance(returned, Iterable):
            return None
        return list(returned)

    # The properties below are complete after `result` has returned. They follow the order of the functions.

    @property
    def columns(self) -> dict[str, list]:
        """The values that functions passed to `log_extra`, by column."""
        return {name: values for call in self._calls for name, values in call.columns.items()}

    @property
    def logged(self) -> dict[str, list[float]]:
        """The values that functions passed to `log_metric`, by name."""
        values: dict[str, list[float]] = {}
        for call in self._calls:
            for name, value in call.metrics:
                values.setdefault(name, []).append(value)
        return values

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds from start to end of each function."""
        return {call.name: call.ended - call.started for call in self._calls}

    @property
    def busy(self) -> float:
        """Seconds during which at least one function was running."""
        total, until = 0.0, float("-inf")
        for start, end in sorted((call.started, call.ended) for call in self._calls):
            total, until = total + max(0.0, end - max(start, until)), max(until, end)
        return total


class _Call:
    """One function called with one batch of completions. It can run on any thread, and stores its result or error."""

    def __init__(self, name: str, function: RewardFunction, loop: EventLoop):
        self.name, self.function, self._loop = name, function, loop
        self.columns: dict[str, list] = {}
        self.metrics: list[tuple[str, float]] = []
        self.started = self.ended = 0.0
        self.on_worker = False
        self._done: Future = Future()

    def run(self, arguments: dict) -> None:
        """Call the function and store its result or error. An error that is no Exception (an interrupt) is also raised here."""
        self.started = time.perf_counter()
        try:
            value = self.function(
                **arguments, log_extra=self.columns.__setitem__, log_metric=self._log_metric
            )
        except BaseException as error:
            self._end(error)
            if not isinstance(error, _FAILURES):
                raise
        else:
            if inspect.isawaitable(value):
                self._loop.submit(self._run_awaitable(value))
            else:
                self._end(None, value)

    async def _run_awaitable(self, awaitable) -> None:
        try:
            value = await awaitable
        except BaseException as error:
            self._end(error)
        else:
            self._end(None, value)

    def _log_metric(self, name: str, value: float) -> None:
        self.metrics.append((name, float(value)))

    def _end(self, error: BaseException | None, value: Any = None) -> None:
        self.ended = time.perf_counter()
        if error is None:
            self._done.set_result(value)
        else:
            self._done.set_exception(error)

    @property
    def failed(self) -> bool:
        return self._done.done() and self._done.exception() is not None

    def value(self) -> Any:
        """Wait for the function's return value. Raises RuntimeError if the function failed."""
        try:
            return self._done.result()
        except _FAILURES as error:
            hint = ""
            if self.on_worker and "thread" in str(error):
                hint = "; it ran on a worker thread: reward_workers=0 calls it in the main one"
            raise RuntimeError(f"reward function {self.name!r} failed: {error!r}{hint}") from error


def _number(value: Any) -> float | None:
    """A number, or an array or tensor with one element, as a float. None for any other value."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _dimensions(shape: Sequence[int]) -> int:
    """The number of dimensions without trailing ones of size 1, at least 1."""
    count = len(shape)
    while count > 1 and shape[count - 1] == 1:
        count -= 1
    return count


def _copied(value: Any) -> Any:
    """A deep copy of lists and dicts, so that a function can edit its arguments. Other objects are shared."""
    if type(value) is list:
        if value and type(value[0]) in (int, float, str):  # elements of one plain kind need no copy
            return value[:]
        return [_copied(v) for v in value]
    return {k: _copied(v) for k, v in value.items()} if type(value) is dict else value


def _wrapped(function: RewardFunction) -> RewardFunction:
    """The function inside a functools.partial, however deeply nested."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name(function: RewardFunction) -> str:
    function = _wrapped(function)
    return getattr(function, "__name__", type(function).__name__)


def _is_async(function: RewardFunction) -> bool:
    function = _wrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _in_context_of_caller(call: _Call, arguments: dict) -> Callable[[], None]:
    """The call in the caller's context variables and CUDA device, which both belong to a thread."""
    context = contextvars.copy_context()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        if device is not None:
            torch.cuda.set_device(device)
        context.run(call.run, arguments)

    return run
