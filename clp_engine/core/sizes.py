"""Numbers of bytes: in readable form, and compared with a machine's memory."""

from __future__ import annotations

import os

import torch

from clp_engine.core.errors import ConfigError

# Bytes that a rollout keeps for each token it may draw: seed, token, log-prob, validity flag, last-token flag.
BOOKKEEPING = 8 + 8 + 4 + 1 + 1


_LARGEST = 2**44  # more memory than any machine has


def size(count: int) -> str:
    """A number of bytes in readable form, such as 12.3 MiB."""
    value: float = min(count, 10**30)
    units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:.0f} {units[0]}"


def check_size(what: str, needed: int, device: torch.device | str | None = None) -> None:
    """Raises ConfigError if `needed` bytes exceed the device's memory, or any machine's if the device's is unknown."""
    room, where = _LARGEST, "any machine has"
    if device is not None:
        device = torch.device(device)
        if device.type == "cuda":
            where = f"{device} has"
            room = torch.cuda.get_device_properties(device).total_memory
        elif device.type == "cpu" and hasattr(os, "sysconf"):
            where = "this machine has"
            room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > room:
        raise ConfigError(
            f"{what}: that takes {size(needed)} of memory, more than {where} ({size(room)}); ask for less"
        )
