"""Reading the weights of a model with Llama's structure, by their role, for this project's own decoders."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from clp_kernels.decoder import DecoderLayer, DecoderWeights, Linear
from torch import nn

from clp_engine.data.positions import moving_rope
from clp_engine.models.backbones.causal import CausalBackbone
from clp_engine.models.blend import ConditionedLayer
from clp_engine.models.conditioned import ConditionedModel
from clp_engine.models.low_rank_layers import ConditionedLinear
from clp_engine.rollouts.engines.trials import Unsupported

_CPU = torch.device("cpu")


_NORMS = {  # names of a layer's norms in the order norm_attention, norm_attended, norm_mlp, norm_out
    frozenset({"input_layernorm", "post_attention_layernorm"}): (
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    ),
    frozenset(
        {
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        }
    ): (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    frozenset({"post_attention_layernorm", "post_feedforward_layernorm"}): (
        None,
        "post_attention_layernorm",
        None,
        "post_feedforward_layernorm",
    ),
}


def _only(module: nn.Module, allowed: set[str], needed: set[str]) -> None:
    names = {name for name, _ in module.named_children()}
    if needed - names or names - allowed:
        odd = ", ".join(sorted((needed - names) | (names - allowed)))
        raise Unsupported(f"{type(module).__name__} is not put together as Llama's is ({odd})")


def _plain_linear(module: nn.Module, name: str) -> Linear:
    base = module.base if isinstance(module, ConditionedLinear) else module
    if type(base) is not nn.Linear:
        raise Unsupported(
            f"{name} is a {type(base).__name__}, not a linear layer with low-rank factors or none"
        )
    return Linear(base.weight, base.bias)


@torch.no_grad()
def _gain(norm: nn.Module) -> tuple[torch.Tensor, float]:
    """(gain, eps) of a norm x / sqrt(mean x^2 + eps) * gain, found by evaluating it: some models store gain - 1."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is None or eps is None or weight.dim() != 1 or isinstance(norm, ConditionedLayer):
        raise Unsupported(f"{type(norm).__name__} is not a root-mean-square norm with a gain")
    # The trial runs in float32 for weights of any dtype, so that no tolerance for rounding is needed.
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(3, weight.shape[0], generator=generator, device="cpu").to(weight.device)
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    for gain in (weight.float(), 1.0 + weight.float()):
        if torch.allclose(norm(x), normed * gain, rtol=1e-5, atol=1e-6):
            return gain.detach().clone(), float(eps)
    raise Unsupported(f"{type(norm).__name__} is not a root-mean-square norm with a gain")


def _activation(function) -> str:
    x = torch.linspace(-6, 6, 97, device="cpu")
    known = {"silu": F.silu(x), "gelu_tanh": F.gelu(x, approximate="tanh")}
    y = function(x)
    for name, expected in known.items():
        if torch.allclose(y, expected, rtol=1e-5, atol=1e-6):
            return name
    raise Unsupported(f"its activation {type(function).__name__} is neither SiLU nor GELU by tanh")


def _embedding(decoder: nn.Module) -> tuple[torch.Tensor, float]:
    """(weight, scale) of the token embedding."""
    embedding = decoder.embed_tokens
    if not isinstance(embedding, nn.Embedding):
        raise Unsupported(f"its embedding is a {type(embedding).__name__}")
    weight = embedding.weight
    if embedding.max_norm is not None:
        raise Unsupported("its embedding renormalises what it looks up")
    ids = torch.arange(min(8, weight.shape[0]), device=weight.device)
    looked_up, stored = embedding(ids).float(), weight[ids].float()
    at = stored.abs().argmax()
    scale = (looked_up.flatten()[at] / stored.flatten()[at]).item() if stored.flatten()[at] else 1.0
    rounding = 1e-5 if weight.dtype is torch.float32 else 2 * torch.finfo(weight.dtype).eps
    if not torch.allclose(looked_up, stored * scale, rtol=rounding, atol=1e-7):
        raise Unsupported(f"its embedding {type(embedding).__name__} does more than look up and scale")
    if type(embedding) is nn.Embedding and type(decoder).__name__.startswith("Gemma"):
        scale = weight.shape[1] ** 0.5  # earlier versions of transformers apply the scale in the decoder
    return weight, scale * float(getattr(decoder, "embedding_multiplier", 1.0))


def _modules(model: nn.Module) -> list[nn.Module]:
    """Every module, in no particular order. `nn.Module.modules` takes 1 ms for a small model, and each rollout calls this."""
    found = [model]
    for module in found:  # the list grows during the loop
        found += [child for child in module._modules.values() if child is not None]
    return found


def check_modules(
    model: ConditionedModel, dtype: torch.dtype = torch.float32, device: torch.device = _CPU
) -> None:
    """Raises Unsupported if anything but the layers' own computation would run, or if base weights differ in kind."""

    def name(module: nn.Module, part: str = "") -> str:
        found = next((n for n, m in model.model.named_modules() if m is module), "")
        return ".".join(filter(None, (found, part))) or "the model"

    for module in _modules(model.model):
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unsupported(f"{name(module)} has forward hooks")
        if "forward" in vars(module) and not getattr(module.forward, "changes_no_numbers", False):
            raise Unsupported(f"the forward of {name(module)} was replaced")
        if module.training and isinstance(module, nn.Dropout) and module.p > 0:
            raise Unsupported(f"{name(module)} drops out activations")
        for part, parameter in module._parameters.items():
            if parameter is None:
                continue
            # Adapters are float32 for a base model of any dtype.
            fits = parameter.dtype is dtype or (parameter.requires_grad and parameter.dtype is torch.float32)
            if not fits or parameter.device.type != device.type:
                place = "a CPU" if device.type == "cpu" else device
                raise Unsupported(
                    f"{name(module, part)} is {parameter.dtype} on {parameter.device}, not {dtype} on {place}"
                )


def read(
    model: ConditionedModel, dtype: torch.dtype = torch.float32, device: torch.device = _CPU
) -> tuple[DecoderWeights, dict[tuple[int, str], nn.Module]]:
    """(decoder weights, linear layers by their place in it), of one dtype and on one device. Raises Unsupported."""
    backbone, config = model.backbone, model.model.config.get_text_config()
    if not isinstance(backbone, CausalBackbone):
        raise Unsupported(f"{type(model.model).__name__} is an encoder-decoder")
    check_modules(model, dtype, device)
    decoder = backbone.decoder
    rotary = [n for n, _ in decoder.named_children() if n.startswith("rotary_emb")]
    _only(
        decoder, {"embed_tokens", "layers", "norm", *rotary}, {"embed_tokens", "layers", "norm", "rotary_emb"}
    )
    if (getattr(config, "rope_parameters", None) or {}).get("llama_4_scaling_beta"):
        raise Unsupported(
            "its queries are scaled by their position (llama_4_scaling_beta of its rope_parameters)"
        )
    types = getattr(config, "layer_types", None) or [None] * len(decoder.layers)
    sliding = getattr(config, "sliding_window", None)
    modules: dict[tuple[int, str], nn.Module] = {}
    shared: dict[str, set] = {name: set() for name in ("eps", "scale", "softcap", "residual", "activation")}

    def gain(parent: nn.Module, name: str | None) -> torch.Tensor | None:
        if name is None or getattr(parent, name, None) is None:
            return None
        value, eps = _gain(getattr(parent, name))
        shared["eps"].add(eps)
        return value

    layers = []
    for i, layer in enumerate(decoder.layers):
        norms = {n for n, _ in layer.named_children()} - {"self_attn", "mlp"}
        if (names := _NORMS.get(frozenset(norms))) is None:
            raise Unsupported(
                f"{type(layer).__name__} has parts or norms that Llama's has not ({', '.join(sorted(norms))})"
            )
        attention, mlp = layer.self_attn, layer.mlp
        projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
        _only(attention, projections | {"q_norm", "k_norm"}, projections)
        _only(mlp, {"gate_proj", "up_proj", "down_proj", "act_fn"}, {"gate_proj", "up_proj", "down_proj"})
        linears = {}
        for parent, name in [(attention, n) for n in "qkvo"] + [(mlp, n) for n in ("gate", "up", "down")]:
            module = getattr(parent, f"{name}_proj")
            linears[name] = _plain_linear(module, f"layers.{i}.{name}_proj")
            modules[i, name] = module
        shared["scale"].add(float(attention.scaling))
        shared["softcap"].add(getattr(attention, "attn_logit_softcapping", None))
        shared["residual"].add(float(getattr(layer, "residual_multiplier", 1.0)))
        shared["activation"].add(_activation(mlp.act_fn))
        windowed = types[i] == "sliding_attention" if types[i] is not None else sliding is not None
        layers.append(
            DecoderLayer(
                **linears,
                **{
                    field: gain(layer, name)
                    for field, name in zip(("norm_attention", "norm_attended", "norm_mlp", "norm_out"), names)
                },
                q_norm=gain(attention, "q_norm"),
                k_norm=gain(attention, "k_norm"),
                window=sliding if windowed else None,
                rope=_rope_kinds(decoder, types).index(_rope_kind(decoder, types[i])),
            )
        )
    norm = gain(decoder, "norm")
    for name, values in shared.items():
        if len(values) != 1:
            raise Unsupported(f"its layers differ in {name} ({', '.join(map(str, values))})")
    head = backbone.head
    modules[-1, "head"] = head.module
    embedding, embedding_scale = _embedding(decoder)
    head_dim = int(getattr(decoder.layers[0].self_attn, "head_dim", 0) or config.head_dim)
    weights = DecoderWeights(
        embedding,
        layers,
        norm,
        Linear(_plain_linear(head.module, "the output projection").weight, head.bias),
        heads=layers[0].q.weight.shape[0] // head_dim,
        kv_heads=layers[0].k.weight.shape[0] // head_dim,
        head_dim=head_dim,
        eps=shared["eps"].pop(),
        activation=shared["activation"].pop(),
        embedding_scale=embedding_scale,
        residual_scale=shared["residual"].pop(),
        attention_scale=shared["scale"].pop(),
        attention_softcap=shared["softcap"].pop(),
        logit_scale=head.logit_scale,
        logit_softcap=head.softcap,
    )
    return weights, modules


def _rope_kind(decoder: nn.Module, layer_type: str | None) -> str | None:
    """The key of a rotary table: the layer type if the rotary embedding has one table per type, otherwise None."""
    return layer_type if isinstance(getattr(decoder.rotary_emb, "rope_type", None), dict) else None


def _rope_kinds(decoder: nn.Module, types: list) -> list:
    return sorted({_rope_kind(decoder, t) for t in types}, key=str)


def rope_tables(model: ConditionedModel, positions: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The model's own (cos, sin), each (positions, rotary), for each kind of layer. Raises Unsupported for moving tables."""
    decoder, config = model.backbone.decoder, model.model.config.get_text_config()
    rotary = decoder.rotary_emb
    if moving := moving_rope(rotary):
        raise Unsupported(f"its rotary embedding ({moving[0]}) depends on how much was read")
    types = getattr(config, "layer_types", None) or [None]
    ids = torch.arange(positions, device=model.device).unsqueeze(0)
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        ids = ids.expand(3, 1, -1)  # time, height and width, which are equal for text
    like = decoder.embed_tokens.weight[:1]
    tables = []
    for kind in _rope_kinds(decoder, types):
        cos, sin = rotary(like, ids) if kind is None else rotary(like, ids, kind)
        tables.append((cos.view(-1, *cos.shape[-2:])[0], sin.view(-1, *sin.shape[-2:])[0]))
    return tables


def base_dtype(model: ConditionedModel) -> torch.dtype:
    """The dtype of the input embedding, or float32 without one. A later check then names the parameter that differs."""
    embedding = getattr(getattr(model.backbone, "decoder", None), "embed_tokens", None)
    return getattr(getattr(embedding, "weight", None), "dtype", torch.float32)


def frozen_weights(model: ConditionedModel) -> Iterator[tuple[int, int]]:
    """The address and version of every base weight, which change when a weight is replaced or changed in place."""
    for module in _modules(model.model):
        for p in module._parameters.values():
            if p is not None and not p.requires_grad:
                yield p.data_ptr(), p._version
