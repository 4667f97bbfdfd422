"""Where tests make their tensors: on a GPU where there is one and the back-end is one of its, pretended or not.

Imported before anything that imports Triton: without a GPU its kernels run in its interpreter, which has to be asked for.
"""

import contextlib
import os

import torch

PRETENDED = os.environ.get("CLP_PRETEND_GPU") == "1"
if PRETENDED or not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_pretending = contextlib.ExitStack()
if PRETENDED:
    import pretend_gpu

    _pretending.enter_context(pretend_gpu.installed())
ON_GPU = ("triton", "cuda") if torch.cuda.is_available() else ()


def default_device(backend):
    """A context in which tensors that name no device are made where the back-end wants them."""
    return torch.device("cuda") if backend in ON_GPU else contextlib.nullcontext()


def stop_pretending():
    _pretending.close()
