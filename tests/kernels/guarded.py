"""Every tensor of a call in memory of its own, with something on both sides that tells when it is touched.

    with Pages(at_end=True): ...          between pages that may not be touched: reading or writing there ends the process
    with Margins() as margins: ...        between margins full of NaN: what was read shows in the results, and
        margins.check()                   this says what was written

A dispatch mode, so that whatever torch allocates in the block is moved, be it made by the caller, by a back-end or by
autograd; memory that torch leaves uninitialised is full of NaN. Tensors without elements stay where they are.
"""

import ctypes
import mmap
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MODULES = {
    "multi_lora_linear": "multi_lora",
    "sample_tokens": "sampling",
}  # where an op's module is not named like it
_UNINITIALISED = ("empty", "empty_like", "empty_strided", "new_empty")


def _python_of(func):
    """The Python function behind one of the package's own ops, or None."""
    if func.namespace != "clp_kernels":
        return None
    name = func._opname
    op = name.removesuffix("_backward")
    module = sys.modules[f"clp_kernels.{_MODULES.get(op, op)}"]
    if op == "sample_tokens":
        return module._sample
    return module._forward if name == op else module._backward


class _Surrounded(TorchDispatchMode):
    def memory(self, size):
        """`size` bytes as a uint8 tensor."""
        raise NotImplementedError

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (function := _python_of(func)) is not None:
            with self:  # torch has taken the mode off while it is here
                return function(*args, **kwargs)
        result = func(*args, **kwargs)
        if any(returned.alias_info is not None for returned in func._schema.returns):
            return result
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        poisoned = func._schema.name.removeprefix("aten::") in _UNINITIALISED
        return tree_map(lambda value: self._moved(value, known, poisoned), result)

    def _moved(self, value, known, poisoned):
        if not isinstance(value, torch.Tensor) or value.numel() == 0 or value.device.type != "cpu":
            return value
        if value.untyped_storage().data_ptr() in known:  # a view of an argument that does not say so
            return value
        elements = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()))
        memory = self.memory(elements * value.element_size())
        memory.fill_(0xFF)  # NaN in every floating-point format
        moved = memory.view(value.dtype).as_strided(value.shape, value.stride())
        return moved if poisoned else moved.copy_(value)


def _tensors(tree):
    found = []
    tree_map(lambda value: found.append(value) if isinstance(value, torch.Tensor) else None, tree)
    return found


class Pages(_Surrounded):
    """at_end: the last byte touches the page behind; otherwise the first byte touches the page before."""

    def __init__(self, at_end):
        super().__init__()
        self.at_end = at_end

    def memory(self, size):
        page = mmap.PAGESIZE
        inside = -(-size // page) * page
        region = mmap.mmap(-1, inside + 2 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(region))
        for guard in (address, address + page + inside):
            if _LIBC.mprotect(guard, page, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        first = page + (inside - size if self.at_end else 0)
        return torch.frombuffer(region, dtype=torch.uint8, count=size, offset=first)


class Margins(_Surrounded):
    WIDTH = 4096  # bytes: more than a tile is wide

    def __init__(self):
        super().__init__()
        self.regions = []

    def memory(self, size):
        whole = torch.full((size + 2 * self.WIDTH,), 0xFF, dtype=torch.uint8)
        self.regions.append(whole)
        return whole[self.WIDTH : self.WIDTH + size]

    def check(self):
        for whole in self.regions:
            assert (whole[: self.WIDTH] == 0xFF).all() and (whole[-self.WIDTH :] == 0xFF).all(), (
                "written outside"
            )
