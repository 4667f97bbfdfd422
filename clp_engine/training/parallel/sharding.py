"""A base model that is sharded over the processes, by torch's fully_shard (FSDP2), where it does not fit in each of them.

Each decoder layer's weights are cut into as many pieces as there are processes, gathered before the layer runs and dropped
after it, in the forward and in the backward pass. Low-rank factors, embeddings, norms outside the layers and the output
projection stay whole in every process: they are trained, or read out of their module by the kernels.

Gathering is a collective, so that all processes have to run the same number of passes through the layers:

    drawing, scoring, evaluating    lengths differ by process: the layers are gathered once and stay whole meanwhile (`whole`)
    the update                      a process with fewer micro-batches than the others adds passes with gradients of zero
                                    (`stepping.update.keep_pace`)

accelerate 1.15 falls back to DDP without a word where its FSDP settings meet a CPU. Its settings are read here instead, so that
the tests on CPUs run what GPUs run. Source: torch's documentation of torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clp_engine.core.errors import ConfigError, shown
from clp_engine.models.backbones.causal import CausalBackbone
from clp_engine.training.parallel.processes import TRUE, Parallel, asked

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

    from clp_engine.policy.policy import ConditionedPolicy

# accelerate's variables, by the names that transformers' fsdp_config has for them.
_VARIABLES = {
    "version": "FSDP_VERSION",
    "reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD",
    "cpu_offload": "FSDP_OFFLOAD_PARAMS",
    "activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
}
# Those that describe what is done here anyway, or only FSDP1.
_WITHOUT_EFFECT = frozenset(
    """auto_wrap_policy transformer_layer_cls_to_wrap state_dict_type cpu_ram_efficient_loading sync_module_states
    use_orig_params backward_prefetch forward_prefetch limit_all_gathers min_num_params xla xla_fsdp_v2
    xla_fsdp_grad_ckpt""".split()
)


@dataclass(frozen=True)
class ShardSettings:
    """reshard_after_forward: drop a layer's weights after its forward pass, too, and gather them again for the backward pass.
    cpu_offload: keep the pieces in the host's memory. activation_checkpointing: as gradient_checkpointing."""

    reshard_after_forward: bool = True
    cpu_offload: bool = False
    activation_checkpointing: bool = False

    @classmethod
    def of(cls, fsdp: str | None, config: Mapping[str, Any] | None) -> ShardSettings | None:
        """From transformers' fields `fsdp` and `fsdp_config`, else from accelerate's environment; None: nothing is sharded.

        Raises ConfigError for what cannot be honoured.
        """
        words = (fsdp or "").split()
        if odd := [w for w in words if w not in ("full_shard", "shard_grad_op", "offload", "auto_wrap")]:
            raise ConfigError(
                f"fsdp={shown(fsdp)}: {odd[0]} is not here; expected full_shard, shard_grad_op, offload, auto_wrap"
            )
        given = {name.removeprefix("fsdp_"): value for name, value in (config or {}).items()}
        if not fsdp:
            if given:
                raise ConfigError(
                    "fsdp_config was given without fsdp; give fsdp='full_shard', or leave it out"
                )
            if not asked("ACCELERATE_USE_FSDP"):
                return None
            given = {name: os.environ[v] for name, v in _VARIABLES.items() if v in os.environ}
            given.setdefault("version", "1")  # accelerate's default
        if str(given.pop("version", 2)) != "2":
            raise ConfigError(
                "FSDP1 flattens parameters, which the blended layers read one by one; use fsdp_version: 2"
            )
        if unknown := given.keys() - cls.__annotations__.keys() - _WITHOUT_EFFECT:
            raise ConfigError(
                f"fsdp_config: {sorted(unknown)[0]} is not here; expected {', '.join(cls.__annotations__)}"
            )
        found = {
            n: str(v).lower() in (*TRUE, "full_shard") for n, v in given.items() if n in cls.__annotations__
        }
        if "offload" in words:
            found["cpu_offload"] = True
        if "shard_grad_op" in words:
            found["reshard_after_forward"] = False
        return cls(**found)


@dataclass(frozen=True)
class ShardedBase:
    """The decoder layers of a policy, whose weights are sharded."""

    layers: list[FSDPModule]
    reshard_after_forward: bool
    _inside: list[bool] = field(default_factory=list)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside the block every process has all weights, and passes need no collective. Every process must enter it."""
        if self._inside:
            yield
            return
        for layer in self.layers:
            layer.set_reshard_after_forward(False)
            layer.unshard()
        self._inside.append(True)
        try:
            yield
        finally:
            self._inside.clear()
            for layer in self.layers:
                layer.reshard()
                layer.set_reshard_after_forward(self.reshard_after_forward)


def shard(policy: ConditionedPolicy, settings: ShardSettings, parallel: Parallel) -> ShardedBase:
    """Shard the frozen weights of the policy's decoder layers, in place.

    Raises ConfigError for a model whose layers are not driven one stack at a time (encoder-decoders).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    backbone = policy.conditioned.backbone
    if not isinstance(backbone, CausalBackbone):
        raise ConfigError(
            f"fsdp: {type(policy.model).__name__} is no decoder of one stack; leave fsdp out (DDP), or use a smaller model"
        )
    trained = set(policy.adapter_parameters().values())
    layers = [m for m in backbone.decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    if any(name.rpartition(".")[2] not in ("lora_a", "lora_b") for name in policy.adapter_parameters()):
        raise ConfigError(
            "fsdp shards a frozen base under low-rank deltas; with whole-weight deltas every process holds all weights: leave "
            "fsdp out"
        )
    offloaded = settings.cpu_offload and policy.device.type != "cpu"  # else they are there already
    options = {
        "mesh": init_device_mesh(policy.device.type, (parallel.count,)),
        "reshard_after_forward": settings.reshard_after_forward,
        "offload_policy": CPUOffloadPolicy() if offloaded else OffloadPolicy(),
    }
    for layer in layers:
        fully_shard(layer, ignored_params=trained & set(layer.parameters()), **options)
    # Of the stack itself nothing is sharded: it orders the layers, so that the next is gathered while one computes.
    inside = {p for layer in layers for p in layer.parameters()}
    fully_shard(
        backbone.decoder, ignored_params=trained | (set(backbone.decoder.parameters()) - inside), **options
    )
    # Said outright. By default FSDP2 goes by the order of the passes since the last backward pass; drawing adds passes to that,
    # of which every process has its own number, and a process would gather what no other gathers.
    for layer, before, after in zip(layers, [layers[0], *layers], [*layers[1:], layers[-1]]):
        layer.set_modules_to_forward_prefetch([after])
        layer.set_modules_to_backward_prefetch([before])
    policy.conditioned.weights_stay = False
    parallel.in_step = True
    return ShardedBase(layers, settings.reshard_after_forward)
