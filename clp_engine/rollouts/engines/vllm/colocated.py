"""vLLM in this process: it shares the device with training, and may sleep while the policy learns."""

from __future__ import annotations

import contextlib
import gc
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch

from clp_engine.core.errors import ConfigError
from clp_engine.rollouts.engines.vllm.draws import Draw, Drawn
from clp_engine.rollouts.engines.vllm.stacks import Stack

_INSTALL = 'pip install "clp-engine[vllm]", or use_vllm=False'


class Colocated:
    """A `Vllm`. arguments: of `vllm.LLM`, beside those of adapters and log-probs, which are given here.

    sleeps: whether vLLM's weights leave the device, and its cache is dropped, while nothing is drawn (vLLM's sleep, level 1).
    """

    def __init__(self, arguments: Mapping[str, Any], sleeps: bool = False):
        self._arguments, self._sleeps = dict(arguments), sleeps
        self._llm: Any = None

    def load(self, stack: Stack) -> None:
        if self._llm is None:
            with _own_random_numbers():
                self._llm = self._started(stack)
        self._wake()
        try:
            self._llm.llm_engine.add_lora(_request(stack))
        except Exception as error:  # vLLM raises errors of any class for an adapter
            raise ConfigError(
                f"vLLM refused the adapters ({str(error).strip().splitlines()[0]}); leave out the layers that it names "
                "(target_modules, conditioning), or use_vllm=False"
            ) from error

    def unload(self, stack: Stack) -> None:
        if self._llm is not None:
            self._wake()
            self._llm.llm_engine.remove_lora(stack.number)

    def complete(self, draws: Sequence[Draw], options: dict[str, Any], stack: Stack) -> list[Drawn]:
        from vllm import SamplingParams

        options = {**options, "detokenize": bool(options["stop"])}
        params = [
            SamplingParams(
                **options, seed=draw.seed, extra_args=None if draw.clp is None else {"clp": draw.clp}
            )
            for draw in draws
        ]
        adapters = [None if draw.clp is None else _request(stack) for draw in draws]
        prompts = [{"prompt_token_ids": draw.prompt} for draw in draws]
        self._check_room(max(len(draw.prompt) for draw in draws), options["max_tokens"])
        self._wake()
        try:
            with _own_random_numbers():
                done = self._llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        finally:
            if self._sleeps:
                self._llm.sleep(level=1)
        found = []
        for request in done:
            (output,) = request.outputs
            tokens = list(output.token_ids)
            logprobs = [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]
            found.append(Drawn(tokens, logprobs, output.finish_reason == "stop"))
        return found

    def close(self, stack: Stack | None) -> None:
        if self._llm is None:
            return
        self._llm = None
        gc.collect()
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()

    def _check_room(self, prompt: int, new: int) -> None:
        """vLLM in the process cuts a completion that its max_model_len has no room for, and says nothing."""
        room = self._llm.llm_engine.vllm_config.model_config.max_model_len
        if prompt + new > room:
            raise ConfigError(
                f"a prompt has {prompt} tokens and its completion up to {new}, and vLLM has room for {room}; raise "
                "vllm_max_model_length, or shorten them (max_prompt_length, max_completion_length)"
            )

    def _started(self, stack: Stack) -> Any:
        # In this process, where it shares the device's memory with the policy; read when vllm is imported.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(f"use_vllm=True: vllm cannot be imported ({error}); {_INSTALL}") from error
        try:
            llm = LLM(
                **{
                    "logprobs_mode": "processed_logprobs",
                    "enable_lora": True,
                    "max_loras": 1,
                    "max_cpu_loras": 2,  # the version that is left, and the one that comes
                    "max_lora_rank": stack.rank,
                    "enable_sleep_mode": self._sleeps,
                    **self._arguments,
                }
            )
        except (ValueError, TypeError, OSError, NotImplementedError) as error:
            raise ConfigError(
                f"vLLM did not start ({str(error).strip().splitlines()[-1]}); its arguments are vllm_engine_args and the other "
                "vllm_ settings"
            ) from error
        from vllm.v1.engine.input_processor import InputProcessor

        if not getattr(InputProcessor.process_inputs, "clp_engine_plugin", False):
            raise ConfigError(
                "vLLM did not load clp-engine's plug-in, so that it would blend nothing; unset VLLM_PLUGINS, or name "
                "clp_engine in it"
            )
        return llm

    def _wake(self) -> None:
        if self._sleeps and self._llm.llm_engine.is_sleeping():
            self._llm.wake_up()


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """vLLM seeds the global generators when it starts, and draws from them; reward functions may draw from them, too."""
    of_python, of_numpy, of_torch = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)


def _request(stack: Stack) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(stack.name, stack.number, str(stack.path))
