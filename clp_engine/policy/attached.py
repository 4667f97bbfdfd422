"""A policy inside plain transformers: a model of its own class whose `forward` and `generate` take `weights=` and `kl=`.

    model = policy.attach()                                     # or attach(another loaded copy of the base model)
    model.generate(**inputs, weights={"coverage": 0.7, "brevity": 0.3}, num_beams=4)
    model(ids, weights=torch.tensor([[1.0, 0.0], [0.2, 0.8]]))  # one per row
    model.set_blend({"brevity": 1.0}, kl=0.1)                   # the default of later calls; uniform at first
    model.detach()

`model` stays an instance of its class (a subclass of the same name replaces the class), so that pipelines, Trainer and
torch.compile treat it as usual. Its layers share the policy's deltas: training either one changes both. If `generate` makes
several rows of a prompt (beams, num_return_sequences), each row has its prompt's blend.

Under gradient checkpointing, a layer that is recomputed in the backward pass runs under the blend of its forward pass. Under
torch.compile, a tensor of weights is an input of the graph, and its values are not checked. A mapping or a list is read before
the graph begins, which costs a graph break ahead of the layers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from clp_engine.core.conditions import Conditions, blend_coefficients
from clp_engine.core.errors import ConfigError
from clp_engine.models.base import holds_adapters, refuse_quantised
from clp_engine.models.blend import Blend, ConditionedLayer, place

if TYPE_CHECKING:
    from clp_engine.policy.steerable import SteerableModel

# Arguments whose first dimension is the batch. The decoder's come first: an encoder's rows may be prompts instead.
_BATCHED = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "inputs")


@dataclass
class Steering:
    """The state of an attached model.

    default: the blend (1, D) of calls that give neither weights nor kl. said: the weights and kl that `default` was made of,
        each None if it was not set.
    generating: the blend (1 or prompts, D) during a `generate`, otherwise None.
    base: the model's own layers, by name, which `detach` puts back.
    """

    policy: SteerableModel
    blend: Blend
    base: dict[str, nn.Module]
    default: torch.Tensor
    said: tuple = (None, None)
    generating: torch.Tensor | None = None
    _spread: tuple[torch.Tensor, torch.Tensor] | None = None

    def coefficients(self, weights, kl, rows: int) -> torch.Tensor:
        """The blend (1 or rows, D) for a batch of `rows`."""
        if weights is not None or kl is not None:
            weights, kl = (own if given is None else given for own, given in zip(self.said, (weights, kl)))
            if torch.compiler.is_compiling() and isinstance(weights, torch.Tensor):
                return self._unchecked(weights, kl)
            return read_blend(self.policy, weights, kl, rows)
        prompts = self.default if self.generating is None else self.generating
        if prompts.shape[0] in (1, rows):
            return prompts
        if rows % prompts.shape[0]:
            raise ConfigError(
                f"the model received {rows} rows for {prompts.shape[0]} weightings; expected as many, or a multiple"
            )
        # The same tensor object for every token, so that the layers reuse what they derived from it.
        found = None if torch.compiler.is_compiling() else self._spread
        if found is None or found[0] is not prompts or len(found[1]) != rows:
            found = prompts, prompts.repeat_interleave(rows // prompts.shape[0], 0)
            if not torch.compiler.is_compiling():
                self._spread = found
        return found[1]

    def _unchecked(self, weights: torch.Tensor, kl) -> torch.Tensor:
        """`read_blend` in tensor operations alone, without checks of values, for torch.compile."""
        spec, weights = self.policy.spec, weights.float().reshape(-1, weights.shape[-1])
        if weights.shape[-1] != len(spec.objectives):
            raise ConfigError(
                f"weights has {weights.shape[-1]} columns for the objectives {', '.join(spec.objectives)}"
            )
        if not self.policy.conditioning.blended:
            weights = weights.any(-1, keepdim=True).float()
        kl = spec.default_kl if kl is None else kl
        if not isinstance(kl, torch.Tensor):
            kl = torch.full((1,), float(kl), device=weights.device)
        conditions = Conditions(weights, kl.float().reshape(-1))
        return blend_coefficients(
            conditions, spec.kl_conditioning, min_kl=spec.min_kl, kl_is_beta=spec.kl_is_beta
        )

    @contextlib.contextmanager
    def prompts(self, coefficients: torch.Tensor) -> Iterator[None]:
        """Use `coefficients` as the blend of the prompts that `generate` continues inside the block."""
        before, self.generating = self.generating, coefficients
        try:
            with self.blend.use(coefficients):  # generate calls an encoder directly
                yield
        finally:
            self.generating, self._spread = before, None


@torch.compiler.disable
def read_blend(policy: SteerableModel, weights, kl, rows: int) -> torch.Tensor:
    """The blend (rows, D) for a user's weights and KL coefficient, see `policy.conditions`."""
    return policy.coefficients(policy.conditions(weights, kl, rows))


def attach(policy: SteerableModel, model: PreTrainedModel) -> PreTrainedModel:
    """Put the policy's layers into `model`, a copy of its base model, and make it steerable. Returns `model`."""
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"attach: expected a loaded transformers model, got {type(model).__name__}")
    if model is policy.model:
        raise ConfigError(
            "attach: this is the policy's own model; leave model out, the one given back shares its weights"
        )
    if isinstance(model, Steerable) or any(isinstance(m, ConditionedLayer) for m in model.modules()):
        raise ConfigError("attach: the model is attached to a policy already; call its detach() first")
    if holds_adapters(model):
        raise ConfigError("attach: the model holds adapters of PEFT; merge or unload them first")
    refuse_quantised(model)
    blend, made = Blend(), {}
    layers: dict[str, ConditionedLayer] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in policy.model.named_modules(remove_duplicate=False):
        if isinstance(layer, ConditionedLayer):
            base = modules.get(name)
            _check_layer(name, layer, base)
            layers[name] = made.setdefault(id(base), layer.over(base, blend))
    base = {name: layer.base for name, layer in layers.items()}
    place(model, layers)
    model.__class__ = _steerable_class(type(model))
    model._steering = Steering(policy, blend, base, read_blend(policy, None, None, 1))
    for module in model.modules():  # gradient checkpointing may have been switched on before
        if (run := module.__dict__.get("_gradient_checkpointing_func")) is not None:
            module._gradient_checkpointing_func = _under_its_blend(blend, run)
    return model


def _check_layer(name: str, layer: ConditionedLayer, base: nn.Module | None) -> None:
    def described(module: nn.Module) -> str:
        return f"a {type(module).__name__} with weight {tuple(module.weight.shape)}"

    if getattr(base, "weight", None) is None:
        found = "missing"
    elif type(base) is not type(layer.base) or base.weight.shape != layer.base.weight.shape:
        found = described(base)
    else:
        found = None
    if found is not None:
        raise ConfigError(
            f"attach: {name} is {found} in the model; expected a copy of the policy's base model, with "
            f"{described(layer.base)} there"
        )
    delta = next(iter(layer.deltas_by_name().values()))
    if base.weight.device != delta.device:
        raise ConfigError(
            f"attach: the model is on {base.weight.device} and the policy's deltas, which are shared, on {delta.device}; move "
            "one of them"
        )


class Steerable:
    """The additions of an attached model to its own class. `ConditionedPolicy.attach` makes such models."""

    _steering: Steering

    def set_blend(self, weights=None, kl=None) -> None:
        """Set the weighting and KL coefficient of calls that do not give theirs, one for all rows.

        Values are as for `policy.conditions`. None means uniform weights, and the policy's default KL coefficient.
        """
        steering = self._steering
        steering.default, steering.said = read_blend(steering.policy, weights, kl, 1), (weights, kl)

    def detach(self) -> PreTrainedModel:
        """Undo `attach`. Returns the model in its former state, without deltas."""
        place(self, self._steering.base)
        for module in self.modules():
            run = module.__dict__.get("_gradient_checkpointing_func")
            if (plain := getattr(run, "plain", None)) is not None:
                module._gradient_checkpointing_func = plain
        self.__class__ = type(self).__mro__[2]
        del self._steering
        return self

    def generate(self, *args, weights=None, kl=None, **kwargs):
        """transformers' generate with (weights, kl), one for all prompts or one per prompt."""
        steering = self._steering
        with steering.prompts(steering.coefficients(weights, kl, _count_rows(args, kwargs))):
            return super().generate(*args, **kwargs)

    def save_pretrained(self, *_, **__):
        raise ConfigError(
            "an attached model holds the policy's layers: write policy.save_adapters(...), or "
            "policy.merge(weights).save_pretrained(...), or call detach() for the base model alone"
        )

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        run = _under_its_blend(self._steering.blend, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, run, **kwargs)


@functools.cache
def _steerable_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of `kind` of the same name. Its forward has the signature of `kind`, which transformers reads, plus weights
    and kl."""

    def forward(self, *args, weights=None, kl=None, **kwargs):
        steering = self._steering
        with steering.blend.use(steering.coefficients(weights, kl, _count_rows(args, kwargs))):
            return kind.forward(self, *args, **kwargs)

    functools.update_wrapper(forward, kind.forward)
    own = inspect.signature(kind.forward)
    added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in ("weights", "kl")]
    parameters = list(own.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = own.replace(parameters=[*parameters[:at], *added, *parameters[at:]])
    body = {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (Steerable, kind), body)


def _count_rows(args: tuple, kwargs: Mapping[str, Any]) -> int:
    """The number of rows in a call's batch. 1 without any (generate then begins with the start token)."""
    named = [kwargs[name] for name in _BATCHED if kwargs.get(name) is not None]
    for value in [*named, *args[:1]]:
        if isinstance(value, torch.Tensor):
            return value.shape[0]
    return 1


def _under_its_blend(blend: Blend, run: Callable) -> Callable:
    """The checkpointing function `run`, with the present blend put in force again for the recomputation."""

    def checkpointed(function: Callable, *args, **kwargs):
        coefficients, index = blend.coefficients, blend.index

        def under_blend(*inner, **options):
            with blend.use(coefficients, index):
                return function(*inner, **options)

        return run(under_blend, *args, **kwargs)

    checkpointed.plain = run
    return checkpointed
