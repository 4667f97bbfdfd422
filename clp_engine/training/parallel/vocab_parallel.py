"""Token statistics of the update over an output projection that is cut by tokens of the vocabulary (`vocab_parallel: true`).

The passes of N processes meet at the projection. Process r has n_r rows, and V / N tokens; L is the largest n_r, T = N L:

    n       sizes, all-gathered; a GPU's host waits for them
    h       (T, H) hidden states of all processes, padded; all-gathered, and so are the reference's, targets and gates
    stats   (T,) each: vocab_parallel_linear_logprob over the pieces; a process takes its own n_r
    g       (T,) each: gradients of the statistics, all-gathered
    d_h     (T, H): every piece's term of the gradient, added up in float32 by a reduce-scatter

The gradients of the projection's own factors and deltas are terms of the sum over processes: for factors with a row for each
token, complete for a process's tokens and zero for the others. `Optimisation.add_up` sums what lies whole in every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from clp_kernels import HeadLoRA, TokenStats, vocab_parallel_linear_logprob
from clp_kernels.token_stats import DIFFERENTIABLE
from torch.distributed.tensor import DTensor
from torch.nn import functional


@dataclass(frozen=True)
class SplitProjection:
    """`linear_logprob` for tensors of V rows that are cut over the processes, or of which each process reads its share.

    group: the processes. vocabulary: V. Process r has the rows from r * ceil(V / N), as `fully_shard` cuts them.
    """

    group: dist.ProcessGroup
    vocabulary: int

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def share(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's rows of a tensor (V, ...)."""
        if isinstance(whole, DTensor):
            return whole.to_local()
        each = -(-self.vocabulary // self.count)
        return whole[self.rank * each : (self.rank + 1) * each]

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        ref_hidden: torch.Tensor | None = None,
        lora: HeadLoRA | None = None,
        outputs: Sequence[str] = ("logprob",),
        differentiable: Sequence[str] | None = None,
        **options,
    ) -> TokenStats:
        """hidden (n, H), targets (n,), ref_hidden (n, H), lora.gate: of this process's rows. Every process makes the call, with
        the same outputs, and as many backward passes through it."""
        rows = _Rows.met(self, hidden)
        if lora is not None:
            gate = lora.gate.expand(rows.own, -1)
            lora = HeadLoRA(lora.a, self.share(lora.b), rows.of_all(gate))
        found = vocab_parallel_linear_logprob(
            _Gathered.apply(rows, hidden),
            self.share(weight),
            rows.of_all(targets, -100),
            group=self.group,
            vocab_start=min(self.rank * -(-self.vocabulary // self.count), self.vocabulary),
            vocab_size=self.vocabulary,
            reduce_gradients=False,
            bias=None if bias is None else self.share(bias),
            ref_hidden=None if ref_hidden is None else rows.of_all(ref_hidden),
            lora=lora,
            outputs=outputs,
            differentiable=differentiable,
            **options,
        )
        wanted = DIFFERENTIABLE if differentiable is None else differentiable
        with_gradient = [name for name in outputs if name in wanted]
        own = dict(zip(with_gradient, _Own.apply(rows, *(getattr(found, name) for name in with_gradient))))
        for name in outputs:
            if name not in own:
                own[name] = rows.own_of(getattr(found, name))
        return TokenStats(**own)


@dataclass(frozen=True)
class _Rows:
    """The rows of one call: `own` of this process, `longest` of any."""

    split: SplitProjection
    own: int
    longest: int

    @classmethod
    def met(cls, split: SplitProjection, hidden: torch.Tensor) -> _Rows:
        sizes = torch.empty(split.count, 1, dtype=torch.int64, device=hidden.device)
        dist.all_gather([*sizes], sizes.new_tensor([len(hidden)]), group=split.group)
        return cls(split, len(hidden), max(int(sizes.max()), 1))

    def of_all(self, values: torch.Tensor, padding: int = 0) -> torch.Tensor:
        """(N L, ...) from every process's (n, ...)."""
        padded = [0, 0] * (values.dim() - 1) + [0, self.longest - len(values)]
        mine = functional.pad(values.detach(), padded, value=padding).contiguous()
        every = mine.new_empty(self.split.count, *mine.shape)
        dist.all_gather([*every], mine, group=self.split.group)
        return every.flatten(0, 1)

    def own_of(self, values: torch.Tensor) -> torch.Tensor:
        start = self.split.rank * self.longest
        return values[start : start + self.own]


class _Gathered(torch.autograd.Function):
    """hidden of all processes. Backward: the sum over processes of the gradient of this process's rows."""

    @staticmethod
    def forward(ctx, rows: _Rows, hidden: torch.Tensor) -> torch.Tensor:
        ctx.rows, ctx.dtype = rows, hidden.dtype
        return rows.of_all(hidden)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        wide = gradient if gradient.dtype is torch.float64 else gradient.float()
        summed = wide.new_empty(ctx.rows.longest, *wide.shape[1:])
        named = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        getattr(dist, named)(summed, wide.contiguous(), group=ctx.rows.split.group)  # renamed by torch 2.13
        return None, summed[: ctx.rows.own].to(ctx.dtype)


class _Own(torch.autograd.Function):
    """This process's rows of statistics. Backward: the gradients of all processes' rows."""

    @staticmethod
    def forward(ctx, rows: _Rows, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.rows = rows
        return tuple(rows.own_of(value).clone() for value in values)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.rows.of_all(torch.stack(gradients, 1)).unbind(1)
