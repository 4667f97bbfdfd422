"""A GPU that is not there, for rehearsing on the CPU what will run on one: CLP_PRETEND_GPU=1 python -m pytest -m gpu

Tensors on device "cuda" are wrappers around CPU tensors that do as a GPU's would in what goes wrong most easily:

    devices         an operator that mixes them raises, as does numpy() of a tensor that was not brought to the host
    Triton          launchers see a GPU of capability 9.0; their kernels run in the interpreter on the tensors inside. A launch
                    while another device is current raises (`second_gpu`)
    CUDA graphs     what is launched while one is captured is noted, and done again on the same memory when it is replayed;
                    whatever would wait for the device meanwhile raises, as do launches by side streams that nobody joined
    generators      a CPU generator draws nothing on the device

It shows nothing about speed, accuracy, races, or anything in bfloat16. The CUDA C++ back-end is not there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_aten = torch.ops.aten
# Operands that a GPU takes from the host: sources of copies, indices. The derivative of an index is put into zeros that C++
# makes where it believes that it is.
_MIXES = {_aten.copy_.default, _aten.set_.source_Tensor, _aten.index_put.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default,
             _aten._unsafe_index.Tensor}  # fmt: skip
# What the host has to wait for: the shape of the result, or a number, is known to the device alone.
_WAITS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.unique_dim.default,
          _aten._unique2.default, _aten.equal.default, _aten.repeat_interleave.Tensor}  # fmt: skip
_capturing: list[_Graph] = []
_sync_errors = [False]


class OnGpu(torch.Tensor):
    """A tensor of the GPU; `inner` is its memory."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=_CPU, requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> OnGpu:
        return self.detach()

    @data.setter
    def data(self, other: OnGpu) -> None:
        torch.Tensor.data.__set__(self, other)
        self.inner = other.inner

    def get_device(self) -> int:
        return CUDA.index

    def __repr__(self) -> str:
        return f"OnGpu({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "clp_kernels":
            for operand, argument in zip(args, func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    torch.autograd.graph.increment_version(operand)
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        _refuse_mixing(func, args, kwargs)
        inside, named = tree_map(_inner, (args, kwargs))
        if named.get("device") is not None:
            named["device"] = _CPU
        if func in _WAITS or func is _aten.repeat_interleave.self_Tensor and named.get("output_size") is None:
            wait(func)
        if func in _INDEXING and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in inside[1]
        ):
            wait(func)
        for graph in _capturing:
            graph.remember(inside, named)
        out = func(*inside, **named)
        for graph in _capturing:
            graph.note(func, inside, named, out)
        wrapped = tree_map(_wrap, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _inner(value):
    return value.inner if isinstance(value, OnGpu) else value


def _wrap(value):
    return OnGpu(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) else value


def _refuse_mixing(func, args, kwargs) -> None:
    if func in _MIXES:
        return
    operands = (args[:1], args[2:], kwargs) if func in _INDEXING else (args, kwargs)
    for value in tree_flatten(operands)[0]:
        if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) and value.dim():
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu "
                f"({list(value.shape)}, {value.dtype})"
            )


def wait(what) -> None:
    """The host waits for the device: not while a graph is captured, or torch.cuda.set_sync_debug_mode("error") is in force."""
    if _capturing:
        raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
    if _sync_errors[0]:
        raise RuntimeError(f"{what}: called a synchronizing CUDA operation")


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx, host):
        return OnGpu(host.detach().clone())

    @staticmethod
    def backward(ctx, grad):
        return grad.inner


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx, device):
        return device.inner.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return OnGpu(grad)


def up(tensor: torch.Tensor, waits: bool = True) -> torch.Tensor:
    if isinstance(tensor, OnGpu):
        return tensor
    # A graph would read pinned memory again when it is replayed, whatever has become of it.
    if waits or _capturing:
        wait("a copy from the host")
    return _Up.apply(tensor)


def down(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, OnGpu):
        return tensor
    wait("a copy to the host")
    return _Down.apply(tensor)


def _is_gpu(device) -> bool:
    return device is not None and (type(device) is int or torch.device(device).type == "cuda")


# -- what Python calls before an operator is dispatched: transfers and factories -----------------------------------------


def _default_device() -> torch.device:
    """torch.get_default_device(), which makes a tensor to find out."""
    contexts = (
        mode for mode in reversed(_get_current_function_mode_stack()) if isinstance(mode, DeviceContext)
    )
    return next((mode.device for mode in contexts), _CPU)


def _factory(made_by):
    """A factory of torch's that makes tensors of the GPU where it is asked to, by `device` or by torch.device("cuda")."""

    @functools.wraps(made_by)
    def factory(*args, **kwargs):
        device = kwargs.get("device")
        if not _is_gpu(_default_device() if device is None else device):
            return made_by(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and not isinstance(generator, Generator):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        requires_grad = kwargs.pop("requires_grad", False)
        kwargs |= {"device": _CPU, "pin_memory": False} if "pin_memory" in kwargs else {"device": _CPU}
        made = made_by(*args, **kwargs)
        for graph in _capturing:
            graph.note(made_by, args, kwargs, made)
        return OnGpu(made).requires_grad_(requires_grad)

    return factory


def _like(made_by):
    """zeros_like and its kin, and new_zeros and its: of the device of their first argument, unless they are told."""

    @functools.wraps(made_by)
    def like(tensor, *args, **kwargs):
        device = kwargs.pop("device", None)
        if device is None or _is_gpu(device) == isinstance(tensor, OnGpu):
            return made_by(tensor, *args, **kwargs)
        if isinstance(tensor, OnGpu):
            return made_by(tensor.inner, *args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        return OnGpu(made_by(tensor, *args, **kwargs)).requires_grad_(requires_grad)

    return like


def _to(convert):
    @functools.wraps(convert)
    def to(tensor, *args, **kwargs):
        target, rest = kwargs.pop("device", None), []
        for value in (*args, *([kwargs.pop("other")] if "other" in kwargs else ())):
            if isinstance(value, torch.Tensor):
                target, kwargs["dtype"] = value.device, value.dtype
            elif isinstance(value, (str, torch.device)) or type(value) is int:
                target = value
            elif isinstance(value, torch.dtype):
                rest.append(value)
        behind = kwargs.pop("non_blocking", False) or args[1:2] == (True,) or args[2:3] == (True,)
        if target is not None:
            tensor = (
                up(tensor, waits=not (behind and hasattr(tensor, "is_pretended_pinned")))
                if _is_gpu(target)
                else down(tensor)
            )
        return convert(tensor, *rest, **kwargs) if rest or kwargs else tensor

    return to


def _tensor(make):
    """torch.tensor and torch.as_tensor."""
    factory = _factory(make)

    @functools.wraps(make)
    def tensor(data, *args, **kwargs):
        device = kwargs.get("device")
        if isinstance(data, OnGpu):
            kept = data if make.__name__ == "as_tensor" else data.detach().clone()
            return kept.to(device=device or CUDA, dtype=kwargs.get("dtype"))
        if isinstance(data, (list, tuple)) and any(isinstance(v, OnGpu) for v in tree_flatten(data)[0]):
            wait("a number of the device's")
            data = tree_map(lambda v: v.inner.tolist() if isinstance(v, OnGpu) else v, data)
        device = _default_device() if device is None else device
        if _is_gpu(device):
            wait("a copy from the host")
        return factory(data, *args, **kwargs)

    return tensor


def _on_host(read):
    @functools.wraps(read)
    def on_host(tensor, *args, **kwargs):
        if isinstance(tensor, OnGpu):
            wait(read.__name__)
        return read(_inner(tensor), *args, **kwargs)

    return on_host


def _numpy(read):
    @functools.wraps(read)
    def numpy(tensor, *args, **kwargs):
        if isinstance(tensor, OnGpu):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        return read(tensor, *args, **kwargs)

    return numpy


def _memory(read):
    return functools.wraps(read)(lambda tensor, *args, **kwargs: read(_inner(tensor), *args, **kwargs))


def _pin(pin):
    def pinned(tensor, *args, **kwargs):
        if isinstance(tensor, OnGpu):
            raise RuntimeError("cannot pin a tensor of the device's; only dense CPU tensors can be pinned")
        copy = tensor.clone()
        copy.is_pretended_pinned = True
        return copy

    return pinned


_FACTORIES = ("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "arange", "range",
              "linspace", "logspace", "eye", "tril_indices", "triu_indices")  # fmt: skip
_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
_NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")
_FUNCTIONS = {
    **dict.fromkeys(_FACTORIES, _factory),
    **dict.fromkeys(_LIKE, _like),
    "tensor": _tensor,
    "as_tensor": _tensor,
}
_METHODS = {
    **dict.fromkeys(_NEW, _like),
    "to": _to,
    "cpu": lambda _: lambda tensor, *args, **kwargs: down(tensor),
    "cuda": lambda _: lambda tensor, *args, **kwargs: up(tensor),
    "tolist": _on_host,
    "numpy": _numpy,
    "__array__": _numpy,
    "data_ptr": _memory,
    "untyped_storage": _memory,
    "pin_memory": _pin,
}


_HostGenerator = torch.Generator


class Generator(_HostGenerator):
    """A generator of the device's."""

    device = property(lambda self: CUDA)


class _EitherGenerator(type):
    def __call__(cls, device="cpu"):
        return Generator() if _is_gpu(device) else _HostGenerator(device)

    def __instancecheck__(cls, value):
        return isinstance(value, _HostGenerator)


class _Generator(metaclass=_EitherGenerator):
    """torch.Generator"""


class _Graph:
    """torch.cuda.CUDAGraph: what was launched, in order."""

    def __init__(self) -> None:
        self._done: list = []
        self._made: list[torch.Tensor] = []  # by what was captured
        self._before: dict[int, tuple] = {}  # the memory that was there, and what it held

    def remember(self, *operands) -> None:
        """What the operands hold, before anything is done to them: to capture a launch is not to launch it."""
        mine = {t.untyped_storage().data_ptr() for t in self._made}
        for tensor in tree_flatten(operands)[0]:
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()).nbytes():
                if (at := storage.data_ptr()) not in mine and at not in self._before:
                    self._before[at] = storage, storage.clone()

    def finish(self) -> None:
        """Memory that was there is as it was, and nothing was written to what was made."""
        for storage, held in self._before.values():
            storage.copy_(held)
        with torch.no_grad():
            for tensor in self._made:
                tensor.fill_(torch.nan if tensor.is_floating_point() else tensor.dtype is torch.bool)
        self._before.clear()

    def note(self, func, args, kwargs, out) -> None:
        operands = [
            t.untyped_storage().data_ptr()
            for t in tree_flatten((args, kwargs))[0]
            if isinstance(t, torch.Tensor)
        ]
        results = [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
        if operands and all(t.untyped_storage().data_ptr() in operands for t in results):
            results = []  # a view, or done in place
        self._made += results
        self._done.append((func, args, kwargs, results))

    def launch(self, run, *operands) -> None:
        self.remember(*operands)
        self._done.append((run, (), {}, []))

    def replay(self) -> None:
        if not self._done:
            raise RuntimeError("a graph that holds nothing was replayed")
        with torch.no_grad():
            for func, args, kwargs, results in self._done:
                again = func(*args, **kwargs)
                for old, new in zip(results, tree_flatten(again)[0]):
                    old.copy_(new)

    def reset(self) -> None:
        self._done = []


@contextlib.contextmanager
def _graph(graph, *args, **kwargs):
    _capturing.append(graph)
    try:
        yield
    finally:
        _capturing.pop()
        graph.finish()


class _Stream:
    cuda_stream = 0
    device = CUDA

    def __init__(self, *args, **kwargs) -> None: ...

    def wait_stream(self, other) -> None: ...

    def wait_event(self, event) -> None: ...

    def record_event(self, event=None):
        return event or _Event()

    def synchronize(self) -> None:
        wait("synchronize")


class _Event:
    def __init__(self, *args, **kwargs) -> None:
        self._at = time.perf_counter()

    def record(self, stream=None) -> None:
        self._at = time.perf_counter()

    def wait(self, stream=None) -> None: ...

    def synchronize(self) -> None:
        wait("synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return (other._at - self._at) * 1e3


class _Nothing(contextlib.AbstractContextManager):
    def __init__(self, *args) -> None: ...

    def __exit__(self, *error) -> None: ...


_current = [0]  # the device that is current, by its number


class _Device(contextlib.AbstractContextManager):
    """torch.cuda.device"""

    def __init__(self, device) -> None:
        index = device if type(device) is int else torch.device(device).index
        self._index = _current[0] if index is None else index

    def __enter__(self) -> None:
        self._before, _current[0] = _current[0], self._index

    def __exit__(self, *error) -> None:
        _current[0] = self._before


def _device_of(tensor) -> _Device:
    return _Device(tensor.device if isinstance(tensor, OnGpu) else _current[0])


@contextlib.contextmanager
def second_gpu():
    """In the block there are two, device 0 is current, and tensors are made on device 1."""
    with (
        mock.patch.dict(globals(), CUDA=torch.device("cuda", 1)),
        mock.patch.object(torch.cuda, "device_count", lambda: 2),
    ):
        yield


PROPERTIES = SimpleNamespace(
    name="pretended GPU", major=9, minor=0, multi_processor_count=132, total_memory=1 << 37, L2_cache_size=1 << 20,
    shared_memory_per_block_optin=227 * 1024, warp_size=32, max_threads_per_multi_processor=2048, gcnArchName="",
)  # fmt: skip
_NOTHING = lambda *args, **kwargs: None  # noqa: E731
_CUDA_FUNCTIONS = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": _NOTHING,
    "_lazy_init": _NOTHING,
    "device_count": lambda: 1,
    "current_device": lambda: _current[0],
    "set_device": lambda device: _Device(device).__enter__(),
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: PROPERTIES,
    "synchronize": lambda device=None: wait("synchronize"),
    "empty_cache": _NOTHING,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": _NOTHING,
    "mem_get_info": lambda device=None: (1 << 37, 1 << 37),
    "is_bf16_supported": lambda including_emulation=True: True,
    "get_sync_debug_mode": lambda: 2 * _sync_errors[0],
    "set_sync_debug_mode": lambda mode: _sync_errors.__setitem__(0, mode in ("error", 2)),
    "is_current_stream_capturing": lambda: bool(_capturing),
    "manual_seed": _NOTHING,
    "manual_seed_all": _NOTHING,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "current_stream": lambda device=None: _Stream(),
    "default_stream": lambda device=None: _Stream(),
    "stream": _Nothing,
    "device": _Device,
    "device_of": _device_of,
    "Stream": _Stream,
    "Event": _Event,
    "CUDAGraph": _Graph,
    "graph": _graph,
}


def _apply(module: torch.nn.Module, change, recurse: bool = True) -> torch.nn.Module:
    """torch.nn.Module._apply: a tensor of the host's cannot become one of the device's in place. Tied parameters stay tied."""
    changed: dict[int, torch.Tensor] = {}
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in changed:
                with torch.no_grad():
                    new = torch.nn.Parameter(change(parameter), parameter.requires_grad)
                    new.__dict__.update(
                        {k: v for k, v in parameter.__dict__.items() if k not in ("inner", "_is_param")}
                    )
                    new.grad = None if parameter.grad is None else change(parameter.grad)
                changed[id(parameter)] = new
            part._parameters[name] = changed[id(parameter)]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else change(buffer)
    return module


def _unwrapped_launches(stack: contextlib.ExitStack) -> None:
    """The interpreter is given the tensors inside, and graphs are told of its launches."""
    from triton.runtime import interpreter

    launch, unwrap = interpreter.GridExecutor.__call__, interpreter._unwrap_tensor

    def noted(self, *args, **kwargs):
        operands = [t.base if hasattr(t, "base") and hasattr(t, "block_shape") else t for t in args]
        for operand in operands:
            if isinstance(operand, OnGpu) and operand.device.index != _current[0]:
                raise RuntimeError(f"a launch on cuda:{_current[0]} whose arguments are on {operand.device}")
        for graph in _capturing:
            graph.launch(lambda: launch(self, *args, **kwargs), tree_map(_inner, (operands, kwargs)))
        return launch(self, *args, **kwargs)

    stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", noted))
    stack.enter_context(mock.patch.object(interpreter, "_unwrap_tensor", lambda t: unwrap(_inner(t))))
    # flex_attention is compiled, for a GPU that generates code.
    from clp_kernels.triton_kernels import prefix_attention

    refusal = lambda **call: "flex_attention is not on the pretended GPU"  # noqa: E731
    stack.enter_context(mock.patch.object(prefix_attention, "unsupported", refusal))


@contextlib.contextmanager
def installed():
    """In the block, torch has a GPU."""
    importlib.import_module(
        "torch._dynamo.trace_rules"
    )  # makes a table of torch's functions: of those that are there at its import
    with contextlib.ExitStack() as stack:
        for name, function in _CUDA_FUNCTIONS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(torch, "get_default_device", _default_device))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        _unwrapped_launches(stack)
        for name, patched in _FUNCTIONS.items():
            stack.enter_context(mock.patch.object(torch, name, patched(getattr(torch, name))))
        for name, patched in _METHODS.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, patched(getattr(torch.Tensor, name))))
        yield
