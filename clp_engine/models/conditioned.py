"""A base model whose layers carry deltas, blended per row: what decoders, scoring and packing take.

    theta(c) = theta_ref + sum_d c_d Delta_d

What Delta_d is, and on which layers, `forms` says. Rows of one batch may have different coefficients c; a row of zeros is the
base model, and so is every row where no blend is in force. Nothing here knows what an objective is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from clp_kernels import HeadLoRA, TokenStats, linear_logprob
from torch import nn
from transformers import PreTrainedModel

from clp_engine.core.errors import ConfigError
from clp_engine.core.positions import Room
from clp_engine.models.backbones.base import find_head
from clp_engine.models.backbones.causal import CausalBackbone
from clp_engine.models.backbones.choice import make_backbone
from clp_engine.models.blend import Blend, ConditionedLayer, place
from clp_engine.models.forms import Conditioning
from clp_engine.models.low_rank_layers import ConditionedLinear
from clp_engine.models.memory import Memory
from clp_engine.models.targets import attach, is_tied


class ConditionedModel(nn.Module):
    """A frozen language model, wrapped in place, with D deltas. It is always in evaluation mode: with dropout the log-probs of
    rollout and training would be those of different networks.

    targets: names of the layers with low-rank factors; ranks, scalings: one of each delta; seed: of the factors' start.
    model: transformers' module. backbone: how its hidden states are computed. layers: those with deltas, by name. blend: the
    coefficients in force, of each thread its own. room: how many tokens it reads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        conditioning: Conditioning,
        targets: Sequence[str],
        ranks: Sequence[int],
        scalings: Sequence[float],
        seed: int = 0,
    ):
        super().__init__()
        self.conditioning, self.deltas = conditioning, len(ranks)
        self.blend = Blend()
        self.model = model.requires_grad_(False).eval()
        self.backbone = make_backbone(model)
        self.room = Room.of(model)
        self.layers = attach(model, conditioning, targets, ranks, scalings, seed, self.blend)
        self.backbone.head = find_head(model)  # it may have been wrapped

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def train(self, mode: bool = True) -> ConditionedModel:
        """Keeps the model in evaluation mode (no dropout); the adapters have no mode of their own."""
        self.training = mode
        return self

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The deltas, trainable parameters by '<layer>.<part>': lora_a, lora_b, delta or delta_bias; one that several layers
        share under the first one's name."""
        parameters: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for name, layer in self.layers.items():
            for part, parameter in layer.deltas_by_name().items():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    parameters[f"{name}.{part}"] = parameter
        return parameters

    def load_adapters(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set every adapter parameter; raises ConfigError where names or shapes differ from this policy's."""
        own = self.adapter_parameters()
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise ConfigError(f"adapters do not fit this policy: {len(odd)} names differ, such as {odd[0]!r}")
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != tensors[name].shape:
                    raise ConfigError(
                        f"adapter {name}: shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
                    )
                parameter.copy_(tensors[name])

    @property
    def moves_hidden(self) -> bool:
        """Whether hidden states depend on the blend: not where the output projection alone is conditioned."""
        head = self.backbone.head.module
        return self.conditioning.prompt or any(layer is not head for layer in self.layers.values())

    @property
    def conditions_output(self) -> bool:
        """Whether the output projection has low-rank factors, so that a statistic of a token needs its row's blend."""
        return isinstance(self.backbone.head.module, ConditionedLinear)

    @property
    def shares_prompts(self) -> bool:
        """Whether the completions of a prompt share its computation; else transformers' generate writes each from its start."""
        return self.backbone.shares_prompts

    @property
    def joins_reference(self) -> bool:
        """Whether scoring without gradients computes policy and reference in one pass. On a CPU the base model alone is cheaper
        for the reference's rows than a blend of zeros, and there are no launches to save."""
        return self.backbone.packing_fault is None and self.device.type != "cpu"

    @property
    def memory(self) -> Memory:
        """What stays allocated while this policy is trained."""
        base = sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad)
        return Memory(base, sum(p.numel() for p in self.adapter_parameters().values()))

    def checkpoint_layers(self) -> None:
        """Trade time for memory in training: see `CausalBackbone.checkpoint_layers`. Raises ConfigError for a model that does
        not take packed tokens."""
        if not isinstance(self.backbone, CausalBackbone):
            raise ConfigError(f"gradient_checkpointing: {self.backbone.packing_fault}")

        def in_force() -> Callable[[], contextlib.AbstractContextManager]:
            return functools.partial(self.blend.use, self.blend.coefficients, self.blend.index)

        self.backbone.checkpoint_layers(in_force)

    def stats_under(
        self,
        blend: torch.Tensor | None,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *,
        ref_hidden: torch.Tensor | None = None,
        temperature: float = 1.0,
        outputs: Sequence[str] = ("logprob",),
        differentiable: Sequence[str] | None = None,
    ) -> TokenStats:
        """`linear_logprob` through this model's output projection; hidden (rows, H), targets (rows,).

        blend: (rows, D), needed only where the output projection itself is conditioned; None for the base model's.
        """
        head = self.backbone.head
        lora = None
        if self.conditions_output and blend is not None:
            with self.blend.use(blend):
                gate = self.blend.gate(head.module.ranks, head.module.scalings)
            lora = HeadLoRA(head.module.lora_a.to(hidden.dtype), head.module.lora_b.to(hidden.dtype), gate)
        return linear_logprob(
            hidden,
            head.module.weight,
            targets,
            bias=head.bias,
            temperature=temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            ref_hidden=ref_hidden,
            lora=lora,
            outputs=tuple(outputs),
            differentiable=differentiable,
        )

    @property
    def splits_tied_head(self) -> bool:
        """Whether the output projection is changed apart from the input embedding that it shares its weight with."""
        return "logit" in self.conditioning.carriers and is_tied(self.model)

    def plain_copy(self, shared: bool = False) -> PreTrainedModel:
        """A copy of the base model, without deltas; shared: its modules are new, its weights the same."""
        layers = {
            name: module
            for name, module in self.model.named_modules(remove_duplicate=False)
            if isinstance(module, ConditionedLayer)
        }
        place(self.model, {name: layer.base for name, layer in layers.items()})
        try:
            tensors = [*self.model.parameters(), *self.model.buffers()] if shared else []
            copied = copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})
        finally:
            place(self.model, layers)
        for (
            module
        ) in copied.modules():  # a forward of `checkpoint_layers` would run the layer it was made for
            if hasattr(module.__dict__.get("forward"), "changes_no_numbers"):
                del module.forward
        return copied
