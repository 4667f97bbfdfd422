"""The accuracy criterion of every kernel: as good as what plain torch does in the same dtype."""

import torch


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
