"""The layers of a model that carry deltas, and replacing them by conditioned layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from clp_engine.core.errors import ConfigError
from clp_engine.models.blend import Blend, ConditionedLayer, place
from clp_engine.models.forms import Conditioning
from clp_engine.models.low_rank_layers import ConditionedLinear
from clp_engine.models.text_path import beside_text
from clp_engine.models.whole_weight_layers import (
    InterpolatedAffine,
    InterpolatedEmbedding,
    InterpolatedLinear,
)


def lora_targets(
    model: PreTrainedModel,
    conditioning: Conditioning,
    target_modules: str | Sequence[str] | Callable[[PreTrainedModel], list[str]] | None,
) -> list[str]:
    """Names of the layers that get low-rank factors. With the carrier "logit" the output projection is among them.

    target_modules: see `find_targets`, or a function that takes the model and returns the names.
    """
    if target_modules is not None and "lora" not in conditioning.carriers:
        raise ConfigError(
            f"target_modules={target_modules!r} is for 'lora', which is not among {', '.join(conditioning.carriers)}"
        )
    names: list[str] = []
    if "lora" in conditioning.carriers:
        names = target_modules(model) if callable(target_modules) else find_targets(model, target_modules)
    if "attention" in conditioning.carriers:
        taken = set(attention_layers(model))
        names = [name for name in names if name not in taken]
    _refuse_routed(model, names)
    if "logit" in conditioning.carriers and (head := head_name(model)) not in names:
        names.append(head)
    return names


def head_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output projection shares the input embedding's weight."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def _refuse_routed(model: nn.Module, names: Sequence[str]) -> None:
    """Raises ConfigError for layers inside routed experts: the rows that a router has sorted have lost their blend."""
    for name in names:
        if (routed := _parent_called(model, name, "expert")) is not None:
            raise ConfigError(
                f"{name} belongs to routed experts ({routed}), where a row's blend is not "
                "known; use conditioning 'attention' or 'logit', or 'lora' with target_modules that leave the experts out"
            )


def untie(model: PreTrainedModel) -> None:
    """Give the output projection a copy of the shared weight, and record in the configuration that it is not tied.

    The embeddings of an encoder and a decoder get copies, too. In some families (BART) the same setting ties them, and a saved
    model would be loaded without the embeddings that are no longer tied.
    """
    shared, config = model.get_output_embeddings().weight, model.config.get_text_config()
    holders = [module for module in model.modules() if getattr(module, "weight", None) is shared]
    for module in holders:
        if module is not model.get_input_embeddings():
            module.weight = nn.Parameter(shared.detach().clone(), requires_grad=False)
    config.tie_word_embeddings = model.config.tie_word_embeddings = False


def _parent_called(model: nn.Module, name: str, word: str) -> str | None:
    """The class of the outermost module around a layer whose class name contains `word`, or None."""
    parts = name.split(".")
    classes = (type(model.get_submodule(".".join(parts[:i]))).__name__ for i in range(1, len(parts)))
    return next((c for c in classes if word in c.lower()), None)


def _in_attention(model: nn.Module, name: str) -> bool:
    """Whether a layer lies inside a module whose class name contains "attention"."""
    return _parent_called(model, name, "attention") is not None


def is_whole(module: nn.Module, head: nn.Module | None, ranks: Sequence[int]) -> bool:
    """Whether a layer with low-rank factors of these ranks gets whole matrices instead.

    That is so for an output projection, if every rank is at least the hidden size.
    """
    return module is head and all(rank >= module.weight.shape[-1] for rank in ranks)


def attention_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers of attention modules: the projections of queries, keys, values and output."""
    beside = beside_text(model)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _in_attention(model, name) and not beside(name)
    ]
    if not names:
        raise ConfigError(f"{type(model).__name__} has no linear layers in modules called attention")
    return names


def unconditioned(model: nn.Module) -> list[str]:
    """Names of the parameters that "full" leaves without deltas.

    They are T5's relative position biases, which all rows of a batch share, and the parts of the model that text does not pass.
    """
    beside = beside_text(model)
    return [
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        for own, _ in module.named_parameters(recurse=False)
        if beside(name) or isinstance(module, nn.Embedding) and _in_attention(model, name)
    ]


def attach(
    model: PreTrainedModel,
    conditioning: Conditioning,
    lora_names: Sequence[str],
    ranks: Sequence[int],
    scalings: Sequence[float],
    seed: int,
    blend: Blend,
) -> dict[str, ConditionedLayer]:
    """Replace each layer that carries deltas by a conditioned layer. Returns the new layers by the name of the old ones.

    ranks, scalings: one per delta. Raises ConfigError for a layer that cannot be conditioned.
    """
    head = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(seed)
    deltas: dict[int, nn.Parameter] = {}  # by id of a weight that several layers may share

    def whole_matrix(module: nn.Module, kind: type, *arguments) -> ConditionedLayer:
        layer = kind(module, blend, *arguments, delta=deltas.get(id(module.weight)))
        deltas[id(module.weight)] = layer.deltas_by_name()["lora_b" if module is head else "delta"]
        return layer

    def full(name: str, module: nn.Module) -> ConditionedLayer | None:
        if module is head:
            return whole_matrix(module, ConditionedLinear, ranks, scalings, True)
        if isinstance(module, nn.Linear | Conv1D):
            _refuse_routed(model, [name])
            return InterpolatedLinear(module, blend, len(ranks))
        if isinstance(module, nn.Embedding):
            return (
                None
                if _in_attention(model, name)
                else whole_matrix(module, InterpolatedEmbedding, len(ranks))
            )
        if InterpolatedAffine.fits(module):
            return InterpolatedAffine(module, blend, len(ranks))
        own = ", ".join(f"{n} {tuple(p.shape)}" for n, p in module.named_parameters(recurse=False))
        raise ConfigError(
            f"conditioning 'full' cannot blend {name} ({type(module).__name__}: {own}) per row; "
            "use 'attention', 'lora' or 'logit'"
        )

    lora, attention = set(lora_names), set()
    if "attention" in conditioning.carriers:
        attention = set(attention_layers(model))
    wrapped: dict[int, ConditionedLayer] = {}
    layers: dict[str, ConditionedLayer] = {}
    everything, beside = "full" in conditioning.carriers, beside_text(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in wrapped:
            place(model, {name: wrapped[id(module)]})  # a layer used in two places stays a single layer
            continue
        if name in lora:
            layer = ConditionedLinear(module, blend, ranks, scalings, is_whole(module, head, ranks))
            layer.reset_parameters(generator)
        elif name in attention:
            layer = InterpolatedLinear(module, blend, len(ranks))
        elif everything and dict(module.named_parameters(recurse=False)) and not beside(name):
            layer = full(name, module)
        else:
            continue
        if layer is not None:
            place(model, {name: layer})
            wrapped[id(module)] = layers[name] = layer
    return layers


def find_targets(model: nn.Module, target_modules: str | Sequence[str] | None) -> list[str]:
    """Names of the layers to condition.

    target_modules: None or "all-linear" chooses every nn.Linear / Conv1D except the output projection. Otherwise names,
        matched as in PEFT: a module whose path is the name or ends in ".name".

    In a model of text and images only layers of its language model are chosen, because text does not pass the others. Raises
    ConfigError for a name that matches nothing, or only layers that text does not pass.
    """
    head, beside = model.get_output_embeddings(), beside_text(model)
    every = {name: module for name, module in model.named_modules() if is_projection(module)}
    linear = {name: module for name, module in every.items() if not beside(name)}
    if target_modules in (None, "all-linear"):
        chosen = [name for name, module in linear.items() if module is not head]
    else:
        wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        chosen = [name for name in linear if any(name == w or name.endswith("." + w) for w in wanted)]
        for name in wanted:
            if any(c == name or c.endswith("." + name) for c in chosen):
                continue
            if any(c == name or c.endswith("." + name) for c in every):
                refuse_beside_text(model, f"target_modules: {name!r}")
            kinds = sorted({c.rsplit(".", 1)[-1] for c in linear})
            raise ConfigError(
                f"target_modules: no linear layer of {type(model).__name__} is called {name!r}; "
                f"it has {', '.join(kinds)}"
            )
        check_targets(model, chosen)
    if not chosen:
        raise ConfigError(f"{type(model).__name__} has no nn.Linear or Conv1D layer to condition")
    return chosen


def check_targets(model: nn.Module, names: Sequence[str]) -> None:
    """Raises ConfigError if one of the layers is an output projection that shares its weight with the input embedding."""
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return
    if any(model.get_submodule(name) is head for name in names):
        raise ConfigError(
            "target_modules names the output projection, which shares its weight with the input embedding; "
            "leave it out, or untie the two first"
        )


def is_projection(module: nn.Module) -> bool:
    """Whether a layer is an nn.Linear or Conv1D with the standard forward (unlike Llama 4's router, an nn.Linear)."""
    return isinstance(module, nn.Linear | Conv1D) and type(module).forward in (
        nn.Linear.forward,
        Conv1D.forward,
    )


def refuse_beside_text(model: nn.Module, what: str) -> NoReturn:
    """Raises ConfigError for `what`, which names layers that text does not pass."""
    raise ConfigError(
        f"{what} names layers of {type(model).__name__} that text passes by (a tower or projector of images), and only text "
        "is trained on here; leave it out"
    )
