"""A base model whose layers carry deltas, blended per row. Decoders, scoring and packing work with this model.

    theta(c) = theta_ref + sum_d c_d Delta_d

`forms` defines Delta_d and the layers that carry it. Rows of one batch may have different coefficients c. A row of zeros is the
base model, and so is every row if no blend is in force. This module does not know about objectives.
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
from clp_engine.data.positions import Room
from clp_engine.models.backbones.base import find_head
from clp_engine.models.backbones.causal import CausalBackbone
from clp_engine.models.backbones.choice import make_backbone
from clp_engine.models.blend import Blend, ConditionedLayer, place
from clp_engine.models.forms import Conditioning
from clp_engine.models.low_rank_layers import ConditionedLinear
from clp_engine.models.memory import Memory
from clp_engine.models.targets import attach, is_tied


class ConditionedModel(nn.Module):
    """A frozen language model with D deltas, wrapped in place.

    The model is always in evaluation mode: with dropout, rollout and training would take log-probs from different networks.

    targets: names of the layers with low-rank factors. ranks, scalings: one per delta. seed: seed of the initial factors.
    model: the transformers module. backbone: computes its hidden states. layers: the layers with deltas, by name.
    blend: the coefficients in force, separate for each thread. room: the limits of the model's input.
    token_statistics: `linear_logprob`, or a function of the same arguments where the output projection is cut over processes.
    weights_stay: the base weights lie where they are. False where they are gathered for a pass (a sharded base): decoders that
        keep their addresses, or copies of them, do not serve the model then.
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
        self.weights_stay = True
        self.token_statistics: Callable[..., TokenStats] = linear_logprob
        self.model = model.requires_grad_(False).eval()
        self.backbone = make_backbone(model)
        self.room = Room.of(model)
        self.layers = attach(model, conditioning, targets, ranks, scalings, seed, self.blend)
        self.backbone.head = find_head(model)  # attaching may have wrapped the output projection

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def train(self, mode: bool = True) -> ConditionedModel:
        """Keeps the model in evaluation mode, without dropout. Adapters behave alike in both modes."""
        self.training = mode
        return self

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The deltas: trainable parameters by '<layer>.<part>', with part lora_a, lora_b, delta or delta_bias.

        A parameter that several layers share appears once, under the first layer's name.
        """
        parameters: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for name, layer in self.layers.items():
            for part, parameter in layer.deltas_by_name().items():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    parameters[f"{name}.{part}"] = parameter
        return parameters

    def load_adapters(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set every adapter parameter. Raises ConfigError if names or shapes differ from this policy's."""
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
        """Whether hidden states depend on the blend. False if only the output projection is conditioned."""
        head = self.backbone.head.module
        return self.conditioning.prompt or any(layer is not head for layer in self.layers.values())

    @property
    def conditions_output(self) -> bool:
        """Whether the output projection has low-rank factors, so that token statistics need the row's blend."""
        return isinstance(self.backbone.head.module, ConditionedLinear)

    @property
    def shares_prompts(self) -> bool:
        """Whether completions share their prompt's computation. Otherwise transformers' generate computes each on its own."""
        return self.backbone.shares_prompts

    @property
    def joins_reference(self) -> bool:
        """Whether scoring without gradients computes policy and reference in one pass.

        False on a CPU: the base model alone is cheaper for the reference's rows than a blend of zeros, and one pass saves no
        kernel launches.
        """
        return self.backbone.packing_fault is None and self.device.type != "cpu"

    @property
    def memory(self) -> Memory:
        """The memory that stays allocated while this policy is trained."""
        base = sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad)
        return Memory(base, sum(p.numel() for p in self.adapter_parameters().values()))

    def checkpoint_layers(self) -> None:
        """Trade time for memory in training, see `CausalBackbone.checkpoint_layers`.

        Raises ConfigError for a model that does not take packed tokens.
        """
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

        blend: (rows, D), needed only if the output projection itself is conditioned. None means the base model.
        """
        head = self.backbone.head
        lora = None
        if self.conditions_output and blend is not None:
            with self.blend.use(blend):
                gate = self.blend.gate(head.module.ranks, head.module.scalings)
            lora = HeadLoRA(head.module.lora_a.to(hidden.dtype), head.module.lora_b.to(hidden.dtype), gate)
        return self.token_statistics(
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
        """Whether the output projection has deltas but the input embedding, which shares its weight, has none."""
        return "logit" in self.conditioning.carriers and is_tied(self.model)

    def plain_copy(self, shared: bool = False) -> PreTrainedModel:
        """A copy of the base model without deltas. shared: new modules with the same weight tensors."""
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
        ) in copied.modules():  # a forward of `checkpoint_layers` would otherwise run the original layer
            if hasattr(module.__dict__.get("forward"), "changes_no_numbers"):
                del module.forward
        return copied
