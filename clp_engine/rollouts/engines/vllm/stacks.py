"""The versions of a policy's stack: one folder and one name for each, as vLLM caches by name and path."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Stack:
    """name: under which vLLM serves it. path: its folder, absolute. number: of the version, from 1."""

    name: str
    path: Path
    number: int

    @property
    def rank(self) -> int:
        """The rank it was written with, one of vLLM's max_lora_rank."""
        return json.loads((self.path / "adapter_config.json").read_text(encoding="utf-8"))["r"]

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """Equal for equal parameters: a policy that has not moved is not written again."""
    found = hashlib.sha256()
    for name, parameter in parameters.items():
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()
