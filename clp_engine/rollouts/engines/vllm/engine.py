"""VllmEngine: the completions of a policy, drawn by vLLM."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from clp_engine.core.errors import ConfigError
from clp_engine.models.conditioned import ConditionedModel
from clp_engine.rollouts.engines.vllm.draws import Vllm, draws_of, options_of
from clp_engine.rollouts.engines.vllm.stacks import Stack, fingerprint
from clp_engine.rollouts.engines.whole import of_lists
from clp_engine.rollouts.types import Rollout, RolloutRequest

NAME = "vllm"


class VllmEngine:
    """A `RolloutEngine`. Log-probs are vLLM's at the sampling temperature, of what top_k, top_p and min_p leave.

    model: whose completions are drawn. export: writes the model's stack into a folder (`policy.export_stack`).
    folder: where the versions are written; a server reads it under the same path.
    by_main: runs a function in the main process, and returns everywhere when it has ended. With more than one process every one
        of them calls `publish` before any draws (`publishes`).
    """

    def __init__(
        self,
        model: ConditionedModel,
        vllm: Vllm,
        export: Callable[[Path], object],
        folder: Path,
        by_main: Callable[[Callable[[], None]], None] | None = None,
    ):
        self._model, self._vllm, self._export = model, vllm, export
        self._folder, self._by_main = folder.absolute(), by_main
        self._id, self._number = uuid.uuid4().hex[:8], 0  # several runs may share a server
        self._stack: Stack | None = None
        self._published = ""

    def run(self, request: RolloutRequest) -> Rollout:
        if request.source is not self._model:
            raise ConfigError(
                f"vLLM serves the policy of one training, and a {type(request.source).__name__} is to be drawn from; draw it "
                "with the engine's own decoder (engine=None)"
            )
        if self._by_main is None:
            self.publish()
        assert self._stack is not None  # published
        options = options_of(request.sampling, request.source.profile.stop_token_ids)
        drawn = self._vllm.complete(draws_of(request), options, self._stack)
        return of_lists(
            request, [d.tokens for d in drawn], [d.logprobs for d in drawn], [d.ended for d in drawn], NAME
        )

    def publish(self) -> None:
        """Serve the policy as it is now, and no longer as it was. Does nothing for a policy that has not moved."""
        found = fingerprint(self._model.adapter_parameters())
        if found == self._published:
            return
        name = f"clp-{self._id}-{self._number + 1}"
        new, old = Stack(name, self._folder / name, self._number + 1), self._stack
        if self._by_main is None:
            self._replace(old, new)
        else:
            self._by_main(lambda: self._replace(old, new))
        self._stack, self._number, self._published = new, new.number, found

    def _replace(self, old: Stack | None, new: Stack) -> None:
        try:
            self._export(new.path)
            self._vllm.load(new)
        except BaseException:
            new.remove()
            raise
        if old is not None:
            self._vllm.unload(old)
            old.remove()

    def close(self) -> None:
        """Take back what was published. The engine can be used again, and then publishes first."""
        stack, self._stack, self._published = self._stack, None, ""
        held = (
            stack if stack is not None and stack.path.exists() else None
        )  # else another process took it back
        try:
            self._vllm.close(held)
        finally:
            if held is not None:
                held.remove()
