"""A base model that is sharded over the processes, by torch's fully_shard (FSDP2), where it does not fit in each of them.

Each decoder layer's weights are cut into as many pieces as there are processes, gathered before the layer runs and dropped
after it, in the forward and in the backward pass. Whole-weight deltas of a layer are cut with it, and each process steps its
own piece (`trained_shards`). Low-rank factors stay whole in every process, and so do embeddings, norms outside the layers and
the output projection, with the deltas of these: the kernels read them out of their module. With `vocab_parallel` the output
projection is cut by tokens of the vocabulary, and is not gathered in the update (`vocab_parallel`).

Gathering is a collective, so that all processes have to run the same number of passes through the layers:

    drawing, scoring, evaluating    lengths differ by process. By default the layers are gathered once and stay whole meanwhile
                                    (`whole`); with gather_for_generation: false they are gathered for each pass, and a process
                                    with no pass to make takes part in the gathering (`own_pace`)
    the update                      a process with fewer micro-batches than the others adds passes with gradients of zero
                                    (`stepping.update.keep_pace`)

A base model is read into the host's memory and moved to the GPU layer by layer, each cut before the next comes.

accelerate 1.15 falls back to DDP without a word where its FSDP settings meet a CPU. Its settings are read here instead, so that
the tests on CPUs run what GPUs run. Source: torch's documentation of torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from clp_kernels import linear_logprob
from torch import nn

from clp_engine.core.errors import ConfigError, shown
from clp_engine.core.files import read_json
from clp_engine.models import fingerprint
from clp_engine.models.backbones.causal import CausalBackbone
from clp_engine.policy.references import FrozenReference, Reference
from clp_engine.training.parallel.own_pace import own_pace
from clp_engine.training.parallel.processes import TRUE, Parallel, asked
from clp_engine.training.parallel.trained_shards import TrainedShard

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Shard

    from clp_engine.policy.policy import ConditionedPolicy
    from clp_engine.training.parallel.vocab_parallel import SplitProjection

# accelerate's variables, by the names that transformers' fsdp_config has for them.
_VARIABLES = {
    "version": "FSDP_VERSION",
    "reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD",
    "cpu_offload": "FSDP_OFFLOAD_PARAMS",
    "activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
}
FACTORS = ("lora_a", "lora_b")  # parts of adapters that stay whole
# Those that describe what is done here anyway, or only FSDP1.
_WITHOUT_EFFECT = frozenset(
    """auto_wrap_policy transformer_layer_cls_to_wrap state_dict_type cpu_ram_efficient_loading sync_module_states
    use_orig_params backward_prefetch forward_prefetch limit_all_gathers min_num_params xla xla_fsdp_v2
    xla_fsdp_grad_ckpt""".split()
)


@dataclass(frozen=True)
class ShardSettings:
    """reshard_after_forward: drop a layer's weights after its forward pass, too, and gather them again for the backward pass.
    cpu_offload: keep the pieces of layers in the host's memory. activation_checkpointing: as gradient_checkpointing.
    vocab_parallel: cut the output projection, too, and compute token statistics over its pieces. gather_for_generation: hold
    the whole base model in every process while completions are drawn, scored and evaluated; False gathers it layer by layer in
    each pass, for a base that does not fit. It has the meaning of TRL's ds3_gather_for_generation."""

    reshard_after_forward: bool = True
    cpu_offload: bool = False
    activation_checkpointing: bool = False
    vocab_parallel: bool = False
    gather_for_generation: bool = True

    @classmethod
    def of(cls, fsdp: str | None, config: Mapping[str, Any] | str | None) -> ShardSettings | None:
        """From transformers' fields `fsdp` and `fsdp_config` (settings, or the path of a JSON file with them), else from
        accelerate's environment; None: nothing is sharded.

        Raises ConfigError for what cannot be honoured.
        """
        words = (fsdp or "").split()
        if odd := [w for w in words if w not in ("full_shard", "shard_grad_op", "offload", "auto_wrap")]:
            raise ConfigError(
                f"fsdp={shown(fsdp)}: {odd[0]} is not here; expected full_shard, shard_grad_op, offload, auto_wrap"
            )
        config = read_json(config) if isinstance(config, str) else config
        given = {str(name).removeprefix("fsdp_"): value for name, value in (config or {}).items()}
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
    """A policy whose base model is sharded.

    layers: of the decoder, in their order. projection: the output projection, where it is cut. trained: the deltas among the
    sharded weights, by name. split: token statistics over the pieces of the output projection, or None.
    """

    policy: ConditionedPolicy
    settings: ShardSettings
    parallel: Parallel
    layers: list[FSDPModule]
    trained: dict[str, TrainedShard]
    projection: list[FSDPModule] = field(default_factory=list)
    split: SplitProjection | None = None
    _inside: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside the block every process has all weights, and passes need no collective. Every process must enter it.

        What the block changes of trained parameters is kept; every process must change the same.
        Raises ConfigError inside `at_own_pace`, where layers are gathered for each pass.
        """
        if self._inside == ["at own pace"]:
            raise ConfigError(
                "whole_base() inside at_own_pace(), where no process has the whole base model (gather_for_generation: false); "
                "use whole_base() after the block, or trainer.save_model()"
            )
        with self._gathering("whole", [*self.layers, *self.projection]) as entered:
            try:
                yield
            finally:
                if entered:
                    self._keep_changes()

    @contextlib.contextmanager
    def at_own_pace(self) -> Iterator[None]:
        """Inside the block a process makes as many passes without gradients as it likes. Every process must enter it, and
        exchange things by `Parallel` alone. As `whole`, or a layer at a time, see `gather_for_generation`."""
        if self.settings.gather_for_generation:
            with self.whole():
                yield
            return
        with self._gathering("at own pace", self.projection) as entered:
            if entered:
                with own_pace(self.policy.conditioned.backbone.decoder, self.layers, self.parallel):
                    yield
            else:
                yield

    @contextlib.contextmanager
    def _gathering(self, name: str, kept: Sequence[FSDPModule]) -> Iterator[bool]:
        """Inside the block the modules `kept` are whole, and layers that are not among them are dropped after a forward pass.
        Gives whether this block changed that, or one around it has done so already."""
        if self._inside:
            yield False
            return
        with self.parallel.waiting():
            for module in (*self.layers, *self.projection):
                module.set_reshard_after_forward(module not in kept)
            for module in kept:
                module.unshard()
            self._read_pieces(False)
            self._inside.append(name)
            try:
                yield True
            finally:
                self._inside.clear()
                for module in kept:
                    module.reshard()
                for module in (*self.layers, *self.projection):
                    module.set_reshard_after_forward(self.settings.reshard_after_forward)
                self._read_pieces(True)

    @contextlib.contextmanager
    def whole_deltas(self, everywhere: bool = False) -> Iterator[None]:
        """Inside the block the policy's deltas are whole, in the host's memory: those of the main process, which writes them,
        or with `everywhere` those of all, and then changes are kept. Every process must enter, and none may make a pass inside.

        They are gathered one by one, and the base model's weights are not.
        """
        if not self.trained or self._inside == ["whole"]:
            yield
            return
        self.parallel.meet()
        wholes = {}
        with self.parallel.waiting():
            for shard_ in self.trained.values():
                found = shard_.joined(shard_.local.detach())
                if everywhere or self.parallel.is_main:
                    wholes[id(shard_.parameter)] = nn.Parameter(found.cpu())
        places = [
            (held, name, parameter)
            for held in (module._parameters for module in self.policy.model.modules())
            for name, parameter in held.items()
            if id(parameter) in wholes
        ]
        for held, name, parameter in places:
            held[name] = wholes[id(parameter)]
        try:
            yield
            if everywhere:
                self._keep_changes()
        finally:
            for held, name, parameter in places:
                held[name] = parameter

    def _read_pieces(self, pieces: bool) -> None:
        """Whether token statistics are computed over the pieces of the output projection."""
        if self.split is not None:
            self.policy.conditioned.token_statistics = self.split if pieces else linear_logprob

    @torch.no_grad()
    def _keep_changes(self) -> None:
        whole = self.policy.adapter_parameters() if self.trained else {}
        for name, shard_ in self.trained.items():
            shard_.local.copy_(shard_.piece(whole[name]))


def shard(policy: ConditionedPolicy, settings: ShardSettings, parallel: Parallel) -> ShardedBase:
    """Shard the weights of the policy's decoder layers, the frozen ones and whole-weight deltas, in place, and move the policy
    to the device of this process.

    Raises ConfigError for a model whose layers are not driven one stack at a time (encoder-decoders), and for one that does not
    fit in the GPU where `gather_for_generation` wants it whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    from torch.distributed.tensor import DTensor
    from transformers.modeling_layers import GradientCheckpointingLayer

    backbone = policy.conditioned.backbone
    if not isinstance(backbone, CausalBackbone):
        raise ConfigError(
            f"fsdp: {type(policy.model).__name__} is no decoder of one stack; leave fsdp out (DDP), or use a smaller model"
        )
    device = parallel.accelerator.device
    if device.type == "cuda" and settings.gather_for_generation:
        check_fits(policy, torch.cuda.get_device_properties(device).total_memory)
    # Low-rank factors are small, and are trained where they are.
    factors = {p for n, p in policy.adapter_parameters().items() if n.rpartition(".")[2] in FACTORS}
    layers = [m for m in backbone.decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {p for layer in layers for p in layer.parameters()}
    _move([p for p in policy.conditioned.parameters() if p not in inside], device)
    _move(policy.conditioned.buffers(), device)
    offloaded = settings.cpu_offload and device.type != "cpu"  # else they are there already
    options = {
        "mesh": init_device_mesh(device.type, (parallel.count,)),
        "reshard_after_forward": settings.reshard_after_forward,
        "offload_policy": CPUOffloadPolicy() if offloaded else OffloadPolicy(),
    }
    base = fingerprint.parameters(policy.model)
    found_of = {n: fingerprint.tensor(p) for n, p in base.items() if p not in inside}
    for layer in layers:
        _move(layer.parameters(), device)
        of_layer = set(layer.parameters())
        found_of |= {n: fingerprint.tensor(p) for n, p in base.items() if p in of_layer}
        own = factors & of_layer
        fully_shard(layer, ignored_params=own, shard_placement_fn=partial(_cut, parallel.count), **options)
        # The gradient is the sum of the processes', not their mean.
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)
    fingerprint.keep(policy.model, {name: found_of[name] for name in base})
    # Of the stack itself nothing is sharded: it orders the layers, so that the next is gathered while one computes.
    inside = {p for layer in layers for p in layer.parameters()}
    fully_shard(backbone.decoder, ignored_params=set(backbone.decoder.parameters()) - inside, **options)
    # Said outright. By default FSDP2 goes by the order of the passes since the last backward pass; drawing adds passes to that,
    # of which every process has its own number, and a process would gather what no other gathers.
    for layer, before, after in zip(layers, [layers[0], *layers], [*layers[1:], layers[-1]]):
        layer.set_modules_to_forward_prefetch([after])
        layer.set_modules_to_backward_prefetch([before])
    cut, split = [], None
    if settings.vocab_parallel:
        # Imported late: it needs torch.distributed, which a torch without it lacks.
        from clp_engine.training.parallel.vocab_parallel import SplitProjection

        split = SplitProjection(options["mesh"].get_group(), backbone.head.module.weight.shape[0])
        cut = _cut_projection(policy, options)
    policy.conditioned.weights_stay = False
    parallel.in_step = True
    pieces = {n: TrainedShard.of(p) for n, p in policy.adapter_parameters().items() if isinstance(p, DTensor)}
    found = ShardedBase(policy, settings, parallel, layers, pieces, cut, split)
    found._read_pieces(True)
    return found


def _move(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """In place: modules and optimisers keep the tensors that they hold."""
    for tensor in tensors:
        tensor.data = tensor.data.to(device)


def check_fits(policy: ConditionedPolicy, room: int) -> None:
    """Raises ConfigError for a policy whose weights take more than `room` bytes."""
    size = sum(p.numel() * p.element_size() for p in policy.conditioned.parameters())
    if size > room:
        raise ConfigError(
            f"the policy's weights take {size / 1e9:.0f} GB, more than the {room / 1e9:.0f} GB of a GPU, and fsdp holds them "
            "whole while completions are drawn; set fsdp_config: {gather_for_generation: false}, which gathers layer by layer"
        )


def _cut_projection(policy: ConditionedPolicy, options: dict[str, Any]) -> list[FSDPModule]:
    """Cut the tensors of the output projection that have a row for each token, but for those that the input embedding shares,
    which has to be whole. The pieces are read where they lie, and so are never offloaded."""
    from torch.distributed.fsdp import OffloadPolicy, fully_shard

    module = policy.conditioned.backbone.head.module
    inside = set(module.modules())
    elsewhere = {p for m in policy.model.modules() if m not in inside for p in m.parameters(recurse=False)}
    kept = {p for name, p in module.named_parameters() if name == "lora_a" or p in elsewhere}
    if kept >= set(module.parameters()):
        return []
    return [fully_shard(module, ignored_params=kept, **{**options, "offload_policy": OffloadPolicy()})]


def _cut(count: int, parameter: nn.Parameter) -> Shard | None:
    """Deltas of D objectives along a later dimension that `count` divides, where there is one: D may be less than `count`.
    None: along the first."""
    from torch.distributed.tensor import Shard

    later = range(1, parameter.dim()) if parameter.requires_grad else ()
    return next((Shard(dim) for dim in later if parameter.shape[dim] % count == 0), None)


def check_own(
    sharded: ShardedBase | None, optimizer: torch.optim.Optimizer | None, reference: Reference | None
) -> None:
    """Raises ConfigError for a user's own parts that read or step deltas which are cut over the processes."""
    if sharded is None or not sharded.trained:
        return
    if optimizer is not None:
        raise ConfigError(
            "optimizers: an optimiser of your own was made over whole deltas, and fsdp cuts them over the processes; leave it "
            "out (AdamW, by learning_rate and the adam_ settings), or leave fsdp out"
        )
    if reference is not None and not isinstance(reference, FrozenReference):
        raise ConfigError(
            f"reference={type(reference).__name__}: a reference that reads or exchanges deltas would find pieces of them, as "
            "fsdp cuts them over the processes; leave it out (the base model), or leave fsdp out"
        )
