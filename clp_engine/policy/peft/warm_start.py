"""Policies that begin at existing adapters: one LoRA adapter per objective, of any ranks and layers.

Objective i has one rank and one scaling s_i on all layers: the largest rank of its adapter's layers, and the scaling of most of
them. If the adapter has another scaling s in a layer, B holds (s / s_i) B. If the adapter has a lower rank in a layer, or
leaves out a layer that another objective has, A gets further rows, drawn as for a new policy, and B gets columns of zeros. The
policy then computes the adapter's own function, and training can use the further rows and columns.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from clp_engine.core import records
from clp_engine.core.conditions import BLEND_FILE
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import read_json
from clp_engine.models import fingerprint
from clp_engine.models.base import load_base, model_location
from clp_engine.models.forms import Conditioning
from clp_engine.models.low_rank_layers import ConditionedLinear
from clp_engine.models.targets import find_targets, head_name
from clp_engine.models.text_path import beside_text
from clp_engine.policy.peft.reading import Adapter, Factors, adapters_of, read_adapter, take_out_adapters
from clp_engine.policy.peft.writing import BLEND_SETTINGS
from clp_engine.policy.steerable import SteerableModel

DEFAULT_RANK = 16

Source = str | Path | Adapter | None


def build(
    make: Callable[..., SteerableModel],
    base: str | PreTrainedModel,
    adapters: Mapping[str, Source] | str | Path,
    *,
    conditioning: str | None = None,
    rank: int | Sequence[int] | None = None,
    target_modules: str | Sequence[str] | None = None,
    tokenizer=None,
    dtype=None,
    device=None,
    **options: Any,
) -> SteerableModel:
    """See `ConditionedPolicy.from_adapters`. make: `from_pretrained` of the policy's class."""
    if isinstance(adapters, str | Path):
        directory = Path(adapters)
        adapters, saved = read_blend(directory)
        if conditioning is None:
            conditioning = saved.pop("conditioning", None)
        else:
            saved = {name: value for name, value in saved.items() if name not in ("conditioning", "carrier")}
        options = saved | options
        if tokenizer is None and (directory / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(directory)
    if not adapters:
        raise ConfigError("adapters is empty; expected an adapter, or None, for each objective")
    opened: dict[str, Adapter] = {}
    for source in adapters.values():
        if source is not None and not isinstance(source, Adapter) and str(source) not in opened:
            opened[str(source)] = read_adapter(source)
    found = [opened.get(str(s), s) if isinstance(s, str | Path) else s for s in adapters.values()]
    model, tokenizer, name = load_base(base, tokenizer, dtype, device)
    for adapter in {id(a): a for a in found if a is not None}.values():
        _check_base(adapter, model, name)
    if conditioning is None:
        conditioning = _conditioning(model, found, options.get("prompt_template"))
    parsed = Conditioning.parse(conditioning, options.get("carrier", "lora"))
    if not parsed.blended:
        if any(a is not found[0] for a in found):
            raise ConfigError(
                f"conditioning={conditioning!r} has one delta for all objectives; got {len(found)} adapters: give the same for "
                "each, or a conditioning with 'lora'"
            )
        found = found[:1]
    ranks = _ranks(found, rank)
    policy = make(
        model,
        tuple(adapters),
        conditioning=conditioning,
        rank=ranks,
        lora_alpha=[2.0 * r if a is None else a.scaling * r for a, r in zip(found, ranks)],
        target_modules=_targets(model, parsed, found, target_modules),
        tokenizer=tokenizer,
        **options,
    )
    policy.spec = dataclasses.replace(policy.spec, base_model=name)
    _fill(policy.layers, found)
    policy.loaded_from = [Path(source) for source in opened if Path(source).is_dir()]
    # `export_adapter` writes a fingerprint into an adapter's own folder, `save_adapters` into the folder around several.
    for folder in dict.fromkeys(place for path in policy.loaded_from for place in (path, path.parent)):
        fingerprint.check(folder, policy.model)
    return policy


def of_model(model: nn.Module, objectives: Sequence[str]) -> tuple[PreTrainedModel, dict[str, Adapter]]:
    """(base model, adapter of each objective) from a model that holds adapters, which are taken out of it.

    Adapters are matched by name. A single adapter is used for all objectives, so that every weighting begins at it.
    """
    found = adapters_of(model)
    if len(found) == 1:
        (adapter,) = found.values()
        return take_out_adapters(model), dict.fromkeys(objectives, adapter)
    if set(found) != set(objectives):
        raise ConfigError(
            f"the model's adapters are {', '.join(found)}, the objectives are {', '.join(objectives)}; expected one adapter "
            "named after each objective, or a single one; ConditionedPolicy.from_adapters takes them under any name"
        )
    return take_out_adapters(model), {name: found[name] for name in objectives}


@dataclass(frozen=True)
class _Blend:
    """The entries of BLEND_FILE beside separate adapters: see `writing.BLEND_SETTINGS`."""

    conditioning: str
    carrier: str
    adapters: dict[str, str]
    kl_conditioning: str
    min_kl: float | None
    default_kl: float
    kl_is_beta: bool
    prompt_template: str | None


def read_blend(directory: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """(adapters by objective, settings for `build`) from a directory that `save_adapters` wrote."""
    if not (directory / BLEND_FILE).is_file():
        raise ConfigError(
            f"{directory}: no {BLEND_FILE} here; expected a directory written by save_adapters, or a mapping from each "
            "objective to its adapter"
        )
    raw = read_json(directory / BLEND_FILE)
    if "stack" in raw:
        raise ConfigError(
            f"{directory} holds a stack for vLLM (export_stack); expected a directory written by save_adapters, which keeps "
            "the objectives apart"
        )
    remedy = "write it again with save_adapters"
    blend = records.of(_Blend, raw, directory / BLEND_FILE, remedy)
    records.finite({"min_kl": blend.min_kl, "default_kl": blend.default_kl}, directory / BLEND_FILE, remedy)
    settings: dict[str, Any] = {name: getattr(blend, name) for name in BLEND_SETTINGS}
    if blend.conditioning in ("none", "prompt"):
        settings |= {"conditioning": blend.conditioning}
        # A whole delta that was cut to a rank for PEFT is low-rank from here on.
        settings |= {"carrier": blend.carrier if blend.carrier == "logit" else "lora"}
    return {name: directory / path for name, path in blend.adapters.items()}, settings


def _conditioning(
    model: PreTrainedModel, adapters: Sequence[Adapter | None], prompt_template: str | None
) -> str:
    """The conditioning that has a delta in every layer in which one of the adapters has one."""
    named = {name for adapter in adapters if adapter is not None for name in adapter.layers}
    head = head_name(model)
    parts = [*(["lora"] if named - {head} or not named else []), *(["logit"] if head in named else [])]
    return "+".join(parts + (["prompt"] if prompt_template else []))


def _ranks(adapters: Sequence[Adapter | None], asked: int | Sequence[int] | None) -> list[int]:
    own = [DEFAULT_RANK if a is None else a.rank for a in adapters]
    if asked is None:
        return own
    ranks = [asked] * len(own) if isinstance(asked, int) else list(asked)
    if len(ranks) != len(own):
        raise ConfigError(f"rank has {len(ranks)} entries for {len(own)} deltas")
    for adapter, rank in zip(adapters, ranks):
        if adapter is not None and rank < adapter.rank:
            raise ConfigError(
                f"rank={rank} is less than that of {adapter.source}, {adapter.rank}; give at least that, or leave rank out"
            )
    return ranks


def _targets(
    model: PreTrainedModel,
    conditioning: Conditioning,
    adapters: Sequence[Adapter | None],
    further: str | Sequence[str] | None,
) -> list[str] | None:
    """Names of the layers with low-rank factors, for `from_pretrained`: the adapters' layers and `further` ones.

    None, for every linear layer, if both are empty. Raises ConfigError for a layer that the model lacks or has in another form.
    """
    if not set(conditioning.carriers) <= {"lora", "logit"}:
        raise ConfigError(
            f"LoRA adapters have low-rank deltas: expected conditioning 'lora', 'logit' or both, got "
            f"{', '.join(conditioning.carriers)}"
        )
    head, modules, beside = head_name(model), dict(model.named_modules()), beside_text(model)
    names: list[str] = []
    for adapter in adapters:
        for name, factors in () if adapter is None else adapter.layers.items():
            _check_layer(adapter, name, factors, modules.get(name))
            if beside(name):
                raise ConfigError(
                    f"{adapter.source} adapts {name}, which text passes by (a tower or projector of images), and only text is "
                    "trained on here: merge the adapter into the base model, or train it without those layers (exclude_modules)"
                )
            carrier = "logit" if name == head and "logit" in conditioning.carriers else "lora"
            if carrier not in conditioning.carriers:
                raise ConfigError(
                    f"{adapter.source} adapts {name}, which conditioning {'+'.join(conditioning.carriers)!r} leaves as it is; "
                    f"add {carrier!r}"
                )
            if carrier == "lora" and name not in names:
                names.append(name)
    if further is not None:
        names += [name for name in find_targets(model, further) if name not in names]
    return names or None


def _check_layer(adapter: Adapter, name: str, factors: Factors, module: nn.Module | None) -> None:
    if not isinstance(module, nn.Linear | Conv1D):
        what = "has no such layer" if module is None else f"has a {type(module).__name__} there"
        raise ConfigError(
            f"{adapter.source} adapts {name}, and the base model {what}; it was trained on another model"
            + (f" ({adapter.base_model})" if adapter.base_model else "")
        )
    shape = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
    if (factors.b.shape[0], factors.a.shape[1]) != tuple(shape):
        raise ConfigError(
            f"{adapter.source}: {name} has lora_A {tuple(factors.a.shape)} and lora_B {tuple(factors.b.shape)}, and the layer "
            f"has {shape[1]} inputs and {shape[0]} outputs; it was trained on another model"
            + (f" ({adapter.base_model})" if adapter.base_model else "")
        )


def _check_base(adapter: Adapter, model: PreTrainedModel, name: str) -> None:
    """Warn if an adapter names another base model. The same name in another place counts as the same model.

    Raises ConfigError if the adapter has weights of its own for the base model.
    """
    modules = dict(model.named_modules())
    for layer, theirs in adapter.base_weights.items():
        ours = getattr(modules.get(layer), "weight", None)
        if ours is None or ours.shape != theirs.shape or not torch.allclose(ours, theirs.to(ours), rtol=1e-2):
            raise ConfigError(
                f"{adapter.source} has a weight of its own for {layer}, which the base model does not have (resized, or "
                "trained?); put that weight into the base model, save it, and begin from there"
            )
    ours = {str(n).rstrip("/") for n in (name, model_location(name), model.config.name_or_path) if n}
    theirs = adapter.base_model.rstrip("/")
    if theirs and ours and theirs not in ours and Path(theirs).name not in {Path(n).name for n in ours}:
        warnings.warn(
            f"{adapter.source} was trained on the base model {adapter.base_model!r} and is put on {sorted(ours)[0]!r}: unless "
            "these are the same weights it does something else there",
            stacklevel=4,
        )


@torch.no_grad()
def _fill(layers: Mapping[str, nn.Module], adapters: Sequence[Adapter | None]) -> None:
    """Give each objective's delta the adapter's value. Parts beyond the adapter's rank keep their initial values."""
    start = {name: [0] for name in layers}
    for i, adapter in enumerate(adapters):
        for name, layer in layers.items():
            if isinstance(layer, ConditionedLinear):
                at = start[name]
                at.append(at[-1] + layer.ranks[i])
                if adapter is not None and name in adapter.layers:
                    _fill_layer(layer, at[-2], i, adapter.layers[name])


def _fill_layer(layer: ConditionedLinear, at: int, i: int, factors: Factors) -> None:
    """Fill delta i of a layer. at: the index at which its factors begin."""
    a, b = (t.to(layer.lora_b) for t in (factors.a, factors.b))
    if layer.whole:
        layer.lora_b[:, at : at + layer.in_features] = factors.scaling * (b @ a)
        return
    rank = a.shape[0]
    layer.lora_a[at : at + rank] = a
    layer.lora_b[:, at : at + rank] = b * (factors.scaling / layer.scalings[i])
