"""What a kernel raises that cannot be compiled or launched, for code that then takes another way."""

from __future__ import annotations


def launch_errors() -> tuple[type[Exception], ...]:
    """RuntimeError, which torch, its compiler and CUDA raise (out of memory, too), and Triton's errors, which are none.

    For `except launch_errors()`: Triton's are OutOfResources and CompilationError among others; without Triton there are none.
    """
    try:
        from triton.errors import TritonError
    except ImportError:
        return (RuntimeError,)
    return RuntimeError, TritonError
