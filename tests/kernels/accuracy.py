"""The accuracy criterion of every kernel: as good as what plain torch does in the same dtype."""

import torch
from clp_kernels.backends import interpreting

# Triton's interpreter computes bfloat16 products wrongly; a GPU does not.
TRITON_HALVES = [torch.float16] if interpreting() else [torch.float16, torch.bfloat16]
TRITON_DTYPES = [torch.float32, *TRITON_HALVES]


def half_of(backend):
    """The 16-bit type that a back-end is tested with where one is enough."""
    return torch.float16 if backend == "triton" and interpreting() else torch.bfloat16


def here(value):
    """A tensor that was made before the test, where the test's tensors are."""
    return value.to(torch.get_default_device()) if isinstance(value, torch.Tensor) else value


def assert_as_accurate(got, plain, exact, what="", factor=1.5, slack=0.0):
    """max |got - exact| <= factor * max |plain - exact|, plus one rounding (torch may happen to be exact) and `slack`.

    got: the kernel's; plain: torch's in the same dtype; exact: the float64 computation on the same inputs.
    """
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{what}: not finite"
    error = (got.double() - exact).abs().max().item()
    allowed = (
        factor * (plain.double() - exact).abs().max().item()
        + torch.finfo(got.dtype).eps * exact.abs().max().item()
        + slack
    )
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
