"""Decoding on the CPU without Python that scales with layers: a policy's model as `clp_kernels.decoder` computes it.

`plan(policy)` says whether a policy can be decoded natively, and why not. It takes Llama and what has its structure (Mistral,
Qwen2, Qwen3, Gemma, Gemma 2 and 3, OLMo 2, Granite, ...): recognised by the modules there are and their names, then tried: a
few random tokens through the native decoder and through transformers must give the same logits. What differs is decoded by
transformers, as everything else is.

    policy                  a base in float32 or bfloat16 on a CPU, computed in float32; "lora", "logit", "none", with "prompt"
                            or without. Of "full" and "attention", whose layers have whole weights that differ by row,
                            transformers' modules serve.
    prefill                 by transformers; its keys and values are kept once for each prompt.
    CLP_ENGINE_DECODING     torch: transformers' modules for everything; native: an error where the native path cannot serve.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
import torch.nn.functional as F
from clp_kernels.backends import backends
from clp_kernels.decoder import DecoderLayer, DecoderWeights, Decoding, Draws, Linear, LowRank, PackedDecoder
from torch import nn

from clp_engine.core.errors import ConfigError
from clp_engine.core.positions import moving_rope
from clp_engine.models.backbones.causal import CausalBackbone
from clp_engine.models.low_rank_layers import ConditionedLayer, ConditionedLinear

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy

_CPU = torch.device("cpu")
SWITCH = "CLP_ENGINE_DECODING"
# Logits of the native decoder and of transformers, as a share of the largest: float32 products in another order; of a bfloat16
# model, transformers rounds every result, which the native decoder does not.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}

_NORMS = {  # names of a layer's norms, in the order norm_attention, norm_attended, norm_mlp, norm_out
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


class Unsupported(Exception):
    """Why a model cannot be decoded natively."""


@dataclass(frozen=True)
class Plan:
    """How a policy is decoded: natively with `packed` weights and `layers` by their place in it, or not, for `reason`."""

    packed: PackedDecoder | None
    layers: dict[tuple[int, str], nn.Module]
    reason: str | None
    identity: tuple = ()


# Plans made, and policies that were told why there is none; a policy itself stays free of what cannot be copied.
_PLANS: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


# -- reading a model ------------------------------------------------------------------------------------------------------


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
    """(gain, eps) of a norm x / sqrt(mean x^2 + eps) * gain, found by trying: models store the gain, or what it is above 1."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is None or eps is None or weight.dim() != 1 or isinstance(norm, ConditionedLayer):
        raise Unsupported(f"{type(norm).__name__} is not a root-mean-square norm with a gain")
    # In float32, whatever the weights are: nothing is rounded then that would have to be allowed for.
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
    """(weight, scale)."""
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
        scale = weight.shape[1] ** 0.5  # earlier versions of transformers scale it in the decoder
    return weight, scale * float(getattr(decoder, "embedding_multiplier", 1.0))


def _modules(model: nn.Module) -> list[nn.Module]:
    """Every module, in no order. `nn.Module.modules` takes a millisecond for a small model, and each rollout asks."""
    found = [model]
    for module in found:  # grows while it is read
        found += [child for child in module._modules.values() if child is not None]
    return found


def check_modules(policy: ConditionedPolicy, dtype: torch.dtype = torch.float32, device: torch.device = _CPU) -> None:
    """Nothing that would run beside the layers' own computation, and all base weights of one kind. Raises Unsupported."""

    def name(module: nn.Module, part: str = "") -> str:
        found = next((n for n, m in policy.model.named_modules() if m is module), "")
        return ".".join(filter(None, (found, part))) or "the model"

    for module in _modules(policy.model):
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unsupported(f"{name(module)} has forward hooks")
        if "forward" in vars(module) and not getattr(module.forward, "changes_no_numbers", False):
            raise Unsupported(f"the forward of {name(module)} was replaced")
        if module.training and isinstance(module, nn.Dropout) and module.p > 0:
            raise Unsupported(f"{name(module)} drops out activations")
        for part, parameter in module._parameters.items():
            if parameter is None:
                continue
            # Adapters are float32, whatever the base model is.
            fits = parameter.dtype is dtype or (parameter.requires_grad and parameter.dtype is torch.float32)
            if not fits or parameter.device.type != device.type:
                place = "a CPU" if device.type == "cpu" else device
                raise Unsupported(
                    f"{name(module, part)} is {parameter.dtype} on {parameter.device}, not {dtype} on {place}"
                )


def read(
    policy: ConditionedPolicy, dtype: torch.dtype = torch.float32, device: torch.device = _CPU
) -> tuple[DecoderWeights, dict[tuple[int, str], nn.Module]]:
    """The decoder, and its linear layers by their place in it; of one dtype, on one device. Raises Unsupported."""
    backbone, config = policy.backbone, policy.model.config.get_text_config()
    if not isinstance(backbone, CausalBackbone):
        raise Unsupported(f"{type(policy.model).__name__} is an encoder-decoder")
    check_modules(policy, dtype, device)
    decoder = backbone.decoder
    rotary = [n for n, _ in decoder.named_children() if n.startswith("rotary_emb")]
    _only(
        decoder, {"embed_tokens", "layers", "norm", *rotary}, {"embed_tokens", "layers", "norm", "rotary_emb"}
    )
    if (getattr(config, "rope_parameters", None) or {}).get("llama_4_scaling_beta"):
        raise Unsupported("its queries are scaled by their position (llama_4_scaling_beta of its rope_parameters)")
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


# -- rotary embeddings ----------------------------------------------------------------------------------------------------


def _rope_kind(decoder: nn.Module, layer_type: str | None) -> str | None:
    """What tells one table from another: the kind of layer, where the rotary embedding has one for each."""
    return layer_type if isinstance(getattr(decoder.rotary_emb, "rope_type", None), dict) else None


def _rope_kinds(decoder: nn.Module, types: list) -> list:
    return sorted({_rope_kind(decoder, t) for t in types}, key=str)


def rope_tables(policy: ConditionedPolicy, positions: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(cos, sin), each (positions, rotary), for each kind of layer: the model's own."""
    decoder, config = policy.backbone.decoder, policy.model.config.get_text_config()
    rotary = decoder.rotary_emb
    if moving := moving_rope(rotary):
        raise Unsupported(f"its rotary embedding ({moving[0]}) depends on how much was read")
    types = getattr(config, "layer_types", None) or [None]
    ids = torch.arange(positions, device=policy.device).unsqueeze(0)
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        ids = ids.expand(3, 1, -1)  # time, height and width: the same for text
    like = decoder.embed_tokens.weight[:1]
    tables = []
    for kind in _rope_kinds(decoder, types):
        cos, sin = rotary(like, ids) if kind is None else rotary(like, ids, kind)
        tables.append((cos.view(-1, *cos.shape[-2:])[0], sin.view(-1, *sin.shape[-2:])[0]))
    return tables


# -- the plan of a policy -------------------------------------------------------------------------------------------------


def base_dtype(policy: ConditionedPolicy) -> torch.dtype:
    """The dtype of the base; float32 where it has no embedding to tell it, so that what differs is named."""
    embedding = getattr(getattr(policy.backbone, "decoder", None), "embed_tokens", None)
    return getattr(getattr(embedding, "weight", None), "dtype", torch.float32)


def _stored(policy: ConditionedPolicy) -> torch.dtype:
    """`base_dtype` where the native decoder takes it, else float32."""
    dtype = base_dtype(policy)
    return dtype if dtype in _TOLERANCE else torch.float32


def frozen_weights(policy: ConditionedPolicy) -> Iterator[tuple[int, int]]:
    """What changes when the base weights are others, or were changed in place."""
    for module in _modules(policy.model):
        for p in module._parameters.values():
            if p is not None and not p.requires_grad:
                yield p.data_ptr(), p._version


def _identity(policy: ConditionedPolicy) -> tuple:
    """Changes when the base weights do, or other kernels are in force."""
    return _isa(), *frozen_weights(policy)


def plan(policy: ConditionedPolicy) -> Plan:
    """How this policy is decoded. Worked out, and the weights packed, at the first call, and kept while the base weights are
    the same; hooks and such are looked for every time."""
    kept = current(_PLANS, policy, _identity(policy), _make)
    try:
        if kept.packed is not None:
            check_modules(policy, _stored(policy))
    except Unsupported as error:
        return Plan(None, {}, str(error))
    return kept


def _isa() -> str:
    return backends()["cpu"].reason


def _make(policy: ConditionedPolicy, identity: tuple) -> Plan:
    def make() -> Plan:
        weights, modules = read(policy, _stored(policy))
        rope_tables(policy, 1)
        made = Plan(PackedDecoder(weights), modules, None, identity)
        _verify(policy, made)
        return made

    return made_or_refused(policy, make, lambda reason: Plan(None, {}, reason, identity))


def _verify(policy: ConditionedPolicy, made: Plan) -> None:
    """Raises Unsupported where the native decoder and transformers differ."""
    from clp_engine.rollouts.engines.modules import BlendDecoding

    trial = Trial.of(policy)
    ours = NativeDecoding(policy, *trial.arguments, made)
    theirs = BlendDecoding(policy, *trial.arguments)
    ours.add(slice(None)), theirs.add(slice(None))
    for tokens in trial.tokens:
        check_alike(policy, ours.step(tokens), theirs.step(tokens), _TOLERANCE[_stored(policy)])


# -- what every plan is made and tried by -----------------------------------------------------------------------------------


class Planned(Protocol):
    """identity: of the base weights that it was made for."""

    identity: tuple


P = TypeVar("P", bound=Planned)


def current(
    plans: MutableMapping[nn.Module, P],
    policy: ConditionedPolicy,
    identity: tuple,
    make: Callable[[ConditionedPolicy, tuple], P],
) -> P:
    """The policy's plan, made anew where its base weights are others than those it was made for."""
    kept = plans.get(policy)
    if kept is None or kept.identity != identity:
        with torch.no_grad():
            kept = plans[policy] = make(policy, identity)
    return kept


def made_or_refused(policy: ConditionedPolicy, make: Callable[[], P], refused: Callable[[str], P]) -> P:
    """What `make` makes, or `refused(reason)`: a model that cannot be read is decoded by transformers."""
    try:
        return make()
    except Unsupported as error:
        return refused(str(error))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return refused(f"{type(policy.model).__name__}: {error}")


@dataclass(frozen=True)
class Trial:
    """Random tokens for two ways of decoding a policy: prompts of different lengths, different blends.

    arguments: of a Decoding, behind the policy; tokens: (rows,) for each step.
    """

    arguments: tuple
    tokens: list[torch.Tensor]

    @classmethod
    def of(cls, policy: ConditionedPolicy) -> Trial:
        from clp_engine.rollouts.types import pad_left

        generator, device = torch.Generator(device="cpu").manual_seed(0), policy.device
        vocab, steps, group = policy.model.config.get_text_config().vocab_size, 3, 2

        def drawn(count: int) -> torch.Tensor:
            return torch.randint(vocab, (count,), generator=generator, device="cpu")

        prompts = [drawn(length).tolist() for length in (3, 7, 5)]
        deltas = len(policy.objectives) if policy.conditioning.blended else 1
        blend = torch.rand(len(prompts), deltas, generator=generator, device="cpu")
        blend[0] = 0
        arguments = *pad_left(prompts, 0, device), blend.to(device), group, steps, len(prompts)
        return cls(arguments, [drawn(len(prompts) * group).to(device) for _ in range(steps)])


def check_alike(
    policy: ConditionedPolicy, given: torch.Tensor, expected: torch.Tensor, tolerance: float
) -> None:
    """Raises Unsupported where logits differ by more than `tolerance` times the largest, which counts as 1 at least."""
    given, expected = given.float(), expected.float()
    difference = (given - expected).abs().max().item()
    if not difference <= tolerance * max(1.0, expected.abs().max().item()):
        raise Unsupported(
            f"{type(policy.model).__name__} looks like Llama and computes something else (its logits differ by "
            f"{difference:.3g})"
        )


def choose(policy: ConditionedPolicy) -> Plan | None:
    """The plan of a policy that is decoded natively, or None; `ConditionedPolicy.detours` tells why not."""
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "auto", "torch", "native"):
        raise ConfigError(f"{SWITCH}={switch}: expected torch, native or auto")
    if switch == "torch":
        return None
    made = plan(policy)
    if made.reason is None:
        return made
    if switch == "native":
        raise ConfigError(f"{SWITCH}=native: {made.reason}")
    return None


class NativeDecoding:
    """`modules.Decoding` by the native decoder; arguments as of `BlendDecoding`."""

    drop_share = 0.0

    def __init__(
        self,
        policy: ConditionedPolicy,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        blend: torch.Tensor | None,
        group: int,
        room: int,
        at_once: int,
        made: Plan,
    ):
        self._policy, self._blend, self._prompts, self._group = (
            policy,
            blend,
            (prompt_ids, prompt_mask),
            group,
        )
        longest = int(prompt_mask.sum(-1).max())
        self._slots = at_once * group
        self._decoding = Decoding(
            made.packed,
            room=room,
            slots=self._slots,
            rope=rope_tables(policy, longest + -(-room // 16) * 16),
            low_rank=self._low_rank(made),
        )

    def _low_rank(self, made: Plan) -> dict[tuple[int, str], LowRank]:
        """A gate row for each prompt, in the order in which they will be added."""
        if self._blend is None:
            return {}
        with self._policy.blend.use(self._blend):
            return {
                key: LowRank(layer.lora_a, layer.lora_b, self._policy.blend.gate(layer.ranks, layer.scalings))
                for key, layer in made.layers.items()
                if isinstance(layer, ConditionedLinear)
            }

    @property
    def places(self) -> int:
        return (self._slots - len(self._decoding)) // self._group

    def add(self, prompts: slice) -> torch.Tensor:
        policy, (ids, mask) = self._policy, (t[prompts] for t in self._prompts)
        skip = ids.shape[1] - int(mask.sum(-1).max())
        with policy.blend.use(None if self._blend is None else self._blend[prompts]):
            hidden, context = policy.backbone.prefill(ids[:, skip:], mask[:, skip:])
            logits = policy.backbone.head.logits(hidden[:, -1]).float()
        layers = context.cache.layers
        numbers = [
            self._decoding.add_prompt(
                [layer.keys[p, :, -length:] for layer in layers],
                [layer.values[p, :, -length:] for layer in layers],
            )
            for p, length in enumerate(mask.sum(-1).tolist())
        ]
        self._decoding.add(torch.tensor(numbers).repeat_interleave(self._group))
        return logits.repeat_interleave(self._group, 0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._decoding.step(tokens)

    def keep(self, rows: torch.Tensor) -> None:
        self._decoding.keep(rows)

    def write(self, logits: torch.Tensor, draws: Draws, others_wait: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """`clp_kernels.decoder.Decoding.write`, until there is a place for a prompt if others wait for one."""
        missing = self._group - (self._slots - len(self._decoding))
        return self._decoding.write(logits, draws, missing if others_wait else 0)
