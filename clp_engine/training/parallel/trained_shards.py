"""Trained parameters of which each process keeps and steps one piece: the whole-weight deltas of a sharded layer.

    gradient    of a pass, summed over the processes in float32, to each its own piece (fully_shard's reduce-scatter)
    norm        sqrt(sum over processes of |piece's gradient|^2), one number summed over the processes
    step        the optimiser's moments lie beside the piece, and are no larger

A checkpoint has whole tensors, and so does not know how many processes wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from clp_engine.training.parallel.processes import Parallel

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class TrainedShard:
    """One parameter and this process's piece of it.

    parameter: what the layer holds between passes. local: the piece, in the same memory; what an optimiser steps.
    """

    parameter: DTensor
    local: nn.Parameter

    @classmethod
    def of(cls, parameter: DTensor) -> TrainedShard:
        return cls(parameter, nn.Parameter(parameter.to_local().detach()))

    def take_gradient(self) -> None:
        """Give the piece the gradient that the passes of this step have left; zeros where there was no pass."""
        grad = self.parameter.grad
        self.local.grad = torch.zeros_like(self.local) if grad is None else grad.to_local()

    def joined(self, piece: torch.Tensor) -> torch.Tensor:
        """The whole tensor of which every process gives its piece, on the processes' device; one collective."""
        from torch.distributed.tensor import DTensor

        mesh = self.parameter.device_mesh
        shape, stride = self.parameter.shape, self.parameter.stride()
        pieces = DTensor.from_local(
            piece.to(mesh.device_type), mesh, self.parameter.placements, shape=shape, stride=stride
        )
        return pieces.full_tensor()

    def piece(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's piece of a whole tensor, a view."""
        (placement,), rank = self.parameter.placements, self.parameter.device_mesh.get_local_rank()
        # As fully_shard cuts: pieces of one size, of which the last ones may be shorter or empty.
        size, length = whole.shape[placement.dim], self.local.shape[placement.dim]
        each = -(-size // self.parameter.device_mesh.size())
        return whole.narrow(placement.dim, min(rank * each, size), length)


def norm(shards: Iterable[TrainedShard], parallel: Parallel, device: torch.device) -> torch.Tensor:
    """The norm of the gradients of all pieces of all processes, a scalar on the device."""
    total = torch.zeros((), device=device)
    for shard in shards:
        total += torch.linalg.vector_norm(shard.local.grad, dtype=torch.float32).square().to(device)
    parallel.sum_([total])
    return total.sqrt()
