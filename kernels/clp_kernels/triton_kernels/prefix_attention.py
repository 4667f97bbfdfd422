"""prefix_attention on a GPU: torch's flex_attention, which inductor compiles to Triton, with a block mask made from the layout.

    mask(i, j) = same sequence and i >= j, or j in the parent of i's sequence [, and position_j > position_i - window]

The blocks of the mask are found on the host from the layout's own numbers (`block_lists`): N^2 of nothing is ever formed, and
no device is waited for. A layout keeps its block masks, one for each device and window, so that all layers use one.

flex_attention has an autograd of its own: this module has `attention` where the others have forward and backward. Softcap and
window are tensors of the device: inductor cannot compile a Python number that a score or mask function captures, once it has
made it a symbol. Token counts are symbols. Everything else that differs (dtype, heads, a softcap or none, gradients or none)
is a compilation of its own, at most LIMIT of them in a process; beyond it the call raises, since flex_attention uncompiled
forms all N^2 scores. The output is tested on the CPU, uncompiled and through inductor, where there is no backward pass; no GPU
has run it yet.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from clp_kernels.prefix_layout import PrefixLayout
from clp_kernels.triton_kernels.tuning import Tunable

BLOCK = 128  # tokens, of the mask
LIMIT = 128  # compilations in a process; dynamo's own limit of 8 is that of two or three models
_LEAST_HEAD = 16  # the smallest head that flex_attention compiles for a GPU


class Options(NamedTuple):
    """Of the mask's blocks and of the forward kernel, whose blocks have to divide them; None is inductor's own choice."""

    block: int
    queries: int | None
    keys: int | None
    num_warps: int | None
    num_stages: int | None


_DEFAULT = Options(BLOCK, None, None, None, None)
ATTENTION = Tunable(
    "attention",
    ("head_dim",),
    {
        "any": (
            _DEFAULT,
            (64, None, None, None, None),
            (128, 128, 64, 8, 3),
            (128, 128, 128, 8, 2),
            (128, 64, 64, 4, 3),
        )
    },
    Options._make,
)


def unsupported(*, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"flex_attention is compiled for CUDA tensors here, not {device.type}: the cpu back-end serves them"
    if dtype is torch.float64:
        return "flex_attention is compiled for float32, float16 and bfloat16, not float64"
    return None


def visible(layout: PrefixLayout, window: int | None) -> Tensor:
    """(N, 2, 2) int64 on the host: the tokens [from, to) that each token attends to, of its parent and of its own sequence."""
    sequence, token = layout.sequences, torch.arange(layout.tokens, device="cpu")
    parent = layout.parents[sequence]
    inside = parent.clamp_min(0)
    first, last = layout.starts[:-1], layout.starts[1:]
    own = torch.stack([first[sequence], token + 1], 1)
    others = torch.where(parent[:, None] >= 0, torch.stack([first[inside], last[inside]], 1), 0)
    if window is not None:
        lowest = layout.positions() - window + 1  # the lowest position that is seen
        before = others[:, 1] - others[:, 0]
        own[:, 0] += (lowest - before).clamp_min(0)
        others[:, 0] = torch.minimum(others[:, 0] + lowest.clamp_min(0), others[:, 1])
    return torch.stack([others, own], 1)


def block_lists(layout: PrefixLayout, window: int | None, size: int) -> tuple[Tensor, Tensor]:
    """(partial, full): (blocks, blocks) bool on the host, whether a block of queries sees some of a block of keys, or all of it
    with each of its queries. Blocks that two ranges make full together count as partial, which costs a mask, not a result."""
    blocks = -(-layout.tokens // size)
    rows = torch.arange(layout.tokens, device="cpu") // size
    some, whole = (torch.zeros(blocks, blocks + 1, dtype=torch.int32, device="cpu") for _ in range(2))
    ranges = visible(layout, window)
    for first, last in (ranges[:, 0].unbind(1), ranges[:, 1].unbind(1)):
        for counts, begin, end in (
            (some, first // size, (last - 1) // size + 1),
            (whole, -(-first // size), last // size),
        ):
            kept = (last > first) & (end > begin)
            ones = torch.ones(int(kept.sum()), dtype=torch.int32, device="cpu")
            counts.index_put_((rows[kept], begin[kept]), ones, accumulate=True)
            counts.index_put_((rows[kept], end[kept]), -ones, accumulate=True)
    full = whole.cumsum(1)[:, :-1] == size
    return (some.cumsum(1)[:, :-1] > 0) & ~full, full


def block_mask(
    layout: PrefixLayout, window: int | None, device: torch.device, size: int = BLOCK
) -> BlockMask:
    """The layout's mask for flex_attention, made at the first call for a device, a window and a size of blocks."""
    key = ("flex_attention", device, window, size)
    if key not in layout.device_cache:
        sequence = layout.sequences.to(device)
        parent = layout.parents[layout.sequences].to(device)
        position = layout.positions(device)
        width = None if window is None else torch.full((), window, device=device)

        def mask(batch, head, query, token):
            seen = (sequence[query] == sequence[token]) & (query >= token) | (
                parent[query] == sequence[token]
            )
            return seen if width is None else seen & (position[token] > position[query] - width)

        lists = []
        for blocks in block_lists(layout, window, size):
            counts = blocks.sum(1, dtype=torch.int32)
            order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
            lists += [counts[None, None].to(device), order[None, None].to(device)]
        layout.device_cache[key] = BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=size, mask_mod=mask, seq_lengths=(layout.tokens, layout.tokens)
        )
    return layout.device_cache[key]


@functools.cache
def _compiled(backend: str = "inductor"):
    # Token counts differ from step to step. fullgraph: an error, where dynamo would run what it does not compile.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)


def _call(*arguments, **options) -> Tensor:
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        return _compiled()(*arguments, **options)


def _kernel_options(options: Options) -> dict[str, int | bool]:
    names = ("fwd_BLOCK_M", "fwd_BLOCK_N", "fwd_num_warps", "fwd_num_stages")
    found = {name: value for name, value in zip(names, options[1:]) if value is not None}
    # Few tokens would otherwise get another kernel, made for decoding.
    return {"FORCE_USE_FLEX_ATTENTION": True, **found}


def _softcap(layout: PrefixLayout, value: float, device: torch.device) -> Tensor:
    key = ("softcap", device, value)
    if key not in layout.device_cache:
        layout.device_cache[key] = torch.full((), value, dtype=torch.float32, device=device)
    return layout.device_cache[key]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    scale: float,
    softcap: float | None,
    window: int | None,
    compiled: bool = True,
) -> Tensor:
    """As prefix_attention, which has checked the arguments. compiled=False runs anywhere, slowly: for tests."""
    if layout.tokens == 0:
        return q * 1.0
    score = None
    if softcap is not None:
        cap = _softcap(layout, softcap, q.device)

        def score(z, batch, head, query, token):
            return cap * torch.tanh(z / cap)

    size = q.shape[2]
    q, k, v = (pad(t, (0, _LEAST_HEAD - size)) if size < _LEAST_HEAD else t for t in (q, k, v))
    tracing = torch.compiler.is_compiling()
    function = _call if compiled and not tracing else flex_attention
    # A trace is made once for all shapes, and takes the default.
    options = (None if tracing else ATTENTION.choice("any", q, size)) or _DEFAULT
    out = function(
        *(tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v)),
        score_mod=score,
        block_mask=block_mask(layout, window, q.device, options.block),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=_kernel_options(options),
    )
    return out[0, :, :, :size].transpose(0, 1).contiguous()
