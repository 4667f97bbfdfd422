"""Measured choices: the nearest entry of a device's table is what a launcher takes, and what is compiled ahead of time."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys

import pytest
import torch
from clp_kernels import batch_invariant
from clp_kernels.backends import interpreting
from test_multi_lora import inputs, run

pytest.importorskip("triton")

import aot_choices  # noqa: E402
import clp_kernels.triton_kernels  # noqa: E402
from clp_kernels.triton_kernels import base_product, launch, low_rank, multi_lora, tuned, tuning  # noqa: E402
from clp_kernels.triton_kernels import multi_lora_strategy as strategy  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

SIMULATED = tuning.SIMULATED
pytestmark = pytest.mark.skipif(not interpreting(), reason="launches in Triton's interpreter, on the CPU")


def table(choices, name=SIMULATED, capability=SIMULATED):
    return {name: {"capability": capability, "source": "a test", "choices": choices}}


def installed_tunables():
    found = {}
    for module in pkgutil.iter_modules(clp_kernels.triton_kernels.__path__):
        contents = vars(importlib.import_module(f"clp_kernels.triton_kernels.{module.name}"))
        found |= {id(value): value for value in contents.values() if isinstance(value, tuning.Tunable)}
    return {tunable.kernel: tunable for tunable in found.values()}


@pytest.fixture
def launches(monkeypatch):
    """(kernel, tile constants) of every launch in the interpreter."""
    seen, inner = [], InterpretedFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        seen.append((self.fn.__name__, {name: v for name, v in kwargs.items() if name.startswith("BLOCK")}))
        return inner(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return seen


def tiles_of(launches, kernel):
    return [constants for name, constants in launches if name == kernel]


# --- which entry


def test_the_nearest_shape_within_reach_is_taken_and_the_first_of_equals():
    entries = {(64, 64): "a", (256, 64): "b", (4096, 4096): "c"}
    assert [tuning.nearest(entries, sizes) for sizes in ((64, 64), (200, 80), (128, 64))] == ["a", "b", "a"]
    assert tuning.nearest(entries, (1024, 4096)) == "c"  # a factor of REACH is within it
    assert tuning.nearest(entries, (1023, 4096)) is None and tuning.nearest(entries, (64, 1024)) is None
    assert tuning.nearest({}, (1, 1)) is None and tuning.nearest({(1,): "d"}, (0,)) == "d"


@pytest.mark.parametrize(
    "name, shared, expected",
    [
        ("GPU A", True, "a"),
        ("GPU B", True, "b"),
        ("GPU C", True, "a"),
        ("GPU C", False, None),
        ("GPU A", False, "a"),
    ],
)
def test_a_device_takes_its_own_choices_and_tiles_of_its_kind(monkeypatch, name, shared, expected):
    tunable = tuning.Tunable("k", ("rows",), {"f": ("a", "b")}, shared=shared)
    key = ("k", "f", 4)
    devices = {
        **table({key: {(8,): "a"}}, "GPU A", "sm_90"),
        **table({key: {(8,): "b"}}, "GPU B", "sm_90"),
        **table({key: {(8,): "x"}}, "GPU D", "sm_100"),
    }
    monkeypatch.setattr(tuning, "identity", lambda device: (name, "sm_90"))
    with tuning.installed(devices):
        assert tunable.choice("f", torch.zeros(1), 8) == expected
        assert tunable.choice("f", torch.zeros(1, dtype=torch.float16), 8) is None
        assert tunable.choice("g", torch.zeros(1), 8) is None


def test_tensors_without_memory_and_an_empty_table_leave_the_default():
    with tuning.installed(table({("linear", "tma", 2): {(8192, 64, 64): (64, 64, 128, 4, 4)}})):
        meta = torch.empty(1, dtype=torch.float16, device="meta")
        assert base_product.LINEAR.choice("tma", meta, 8192, 64, 64) is None
        assert base_product.LINEAR.choice("tma", meta.new_empty(1, device="cpu"), 8192, 64, 64) is not None
    with tuning.installed({}):
        assert base_product.LINEAR.choice("tma", torch.zeros(1, dtype=torch.float16), 8192, 64, 64) is None


def test_a_choice_is_looked_up_once_for_a_shape(monkeypatch):
    looked, inner = [], tuning.nearest
    monkeypatch.setattr(tuning, "nearest", lambda *args: looked.append(args) or inner(*args))
    x = torch.zeros(1, dtype=torch.float16)
    with tuning.installed(table({("linear", "tma", 2): {(80, 48, 64): (64, 64, 128, 4, 4)}})):
        for _ in range(3):
            assert base_product.LINEAR.choice("tma", x, 80, 48, 64) == launch.Tile(64, 64, 128, 4, 4)
    assert len(looked) == 1


# --- the launchers


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_an_entry_of_the_table_is_what_is_launched(backend, launches):
    choices = {
        ("linear", "tma", 2): {(80, 45, 96): (64, 64, 128, 4, 4)},
        ("linear", "tma across", 2): {(80, 96, 48): (128, 64, 64, 4, 5)},
        ("skinny", "half", 2): {(80, 96, 16): (32, 64, 128, 4, 4), (80, 48, 16): (64, 64, 64, 4, 5)},
        ("rank_grad", "half", 2): {(80, 96, 16): (64, 64, 128, 4, 4)},
        ("both", "half", 2): {(80, 48, 16): (32, 512, 16, 8, 3)},
    }
    tensors = inputs((80,), k=96, n=48, ranks=(16,), groups=80, dtype=torch.float16)
    plain = run(tensors, torch.ones(80, 48).half(), ("x", "lora_a", "lora_b"))
    before = [constants for _, constants in launches]
    launches.clear()
    with tuning.installed(table(choices)), strategy.force(dy="once"):
        chosen = run(tensors, torch.ones(80, 48).half(), ("x", "lora_a", "lora_b"))
    described = [(c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"]) for c in tiles_of(launches, "_linear_described")]
    assert described == [(64, 64, 128), (128, 64, 64)]
    assert {c["BLOCK_M"] for c in tiles_of(launches, "_skinny")} == {32}
    assert tiles_of(launches, "_both") == [{"BLOCK_M": 32, "BLOCK_N": 512, "BLOCK_R": 16}]
    assert {c["BLOCK_N"] for c in tiles_of(launches, "_rank_grad")} == {64}
    assert before != [constants for _, constants in launches]
    for name, grad in plain.items():
        torch.testing.assert_close(chosen[name], grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_tile_made_for_a_smaller_rank_is_not_taken(backend, launches):
    choices = {("both", "half", 2): {(80, 48, 16): (32, 512, 16, 8, 3)}}
    tensors = inputs((80,), k=96, n=48, ranks=(32,), groups=80, dtype=torch.float16)
    with tuning.installed(table(choices)), strategy.force(dy="once"):
        run(tensors, torch.ones(80, 48).half(), ("x", "lora_a", "lora_b"))
    assert [c["BLOCK_R"] for c in tiles_of(launches, "_both")] == [32]


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_choices_between_kernels_are_taken_from_the_table(backend, monkeypatch):
    called = []
    for module, name in ((base_product, "linear"), (low_rank, "both")):
        inner = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, inner=inner, name=name, **k: called.append(name) or inner(*a, **k)
        )
    choices = {
        ("multi_lora_product", "tma", 2): {(80, 48, 96, 16): "blas", (80, 96, 48, 16): "blas"},
        ("multi_lora_dy", "half", 2): {(80, 48, 16): "once"},
    }
    tensors = inputs((80,), k=96, n=48, ranks=(16,), groups=80, dtype=torch.float16)
    with tuning.installed(table(choices)):
        run(tensors, torch.ones(80, 48).half(), ("x", "lora_a", "lora_b"))
        assert called == ["both"]
        with strategy.force(product="fused"), batch_invariant():
            run(tensors, torch.ones(80, 48).half(), ("x", "lora_a", "lora_b"))
    assert called == ["both", "linear", "linear"]


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_do_not_feel_their_batch_whatever_the_table_has_for_other_numbers_of_rows(backend, dtype):
    family, size = ("half", 2) if dtype is torch.float16 else ("plain", 4)
    tall, flat = (64, 64, 64, 4, 3), (16, 64, 32, 4, 3)
    choices = {
        ("linear", kind, size): {
            (200, 48, 320): tall,
            (8, 48, 320): flat,
            (200, 320, 48): tall,
            (8, 320, 48): flat,
        }
        for kind in ("tma", "tma across", family)
    }
    choices |= {
        ("skinny", family, size): {(200, depth, 24): tall for depth in (48, 320)} | {(8, 320, 24): flat}
    }
    tensors = inputs((140,), k=320, n=48, ranks=(8, 16), groups=140, dtype=dtype)
    dy = torch.randn(140, 48).to(dtype)

    def some(rows):
        part = {name: t[:rows] if name in ("x", "gate") else t for name, t in tensors.items()}
        return run(part, dy[:rows], ("x", "gate"))

    with tuning.installed(table(choices)):
        plain = [some(rows)["y"] for rows in (140, 17)]
        with batch_invariant():
            whole, part = some(140), some(17)
    for name in ("y", "x", "gate"):
        assert torch.equal(part[name], whole[name][:17]), name
    if dtype is torch.float32:
        assert not torch.equal(plain[0][:17], plain[1]), (
            "the entry for few rows makes no difference: choose sizes that do"
        )


# --- what is compiled ahead of time


@pytest.fixture(scope="module")
def compiled_ahead():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, aot_choices.__file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.check
def test_an_entry_of_the_table_is_compiled_ahead_for_its_devices_generation(compiled_ahead):
    assert compiled_ahead["entry"] == [["sm_80", 32, 32, 2]]


@pytest.mark.check
@pytest.mark.parametrize("kernel", aot_choices.PLACES)
def test_a_modules_aot_specs_launch_every_candidate(kernel, compiled_ahead):
    asked, missing = compiled_ahead[kernel]
    assert asked and not missing


def test_every_kernel_with_tiles_is_among_them():
    of_tiles = {name for name, tunable in installed_tunables().items() if tunable.shared}
    assert of_tiles == {*aot_choices.PLACES, "attention"}  # which inductor compiles


def test_a_choice_that_is_forced_is_nested_and_undone():
    tile, other = (64, 64, 128, 4, 4), (128, 64, 64, 4, 5)
    x = torch.zeros(1, dtype=torch.float16)
    with tuning.force("linear", "tma", tile), tuning.force("skinny", "half", other):
        assert base_product.LINEAR.choice("tma", x, 1, 1, 1) == launch.Tile(*tile)
        assert low_rank.SKINNY.choice("half", x, 1, 1, 1) == launch.Tile(*other)
        assert low_rank.SKINNY.choice("plain", x, 1, 1, 1) is None
    assert base_product.LINEAR.choice("tma", x, 1, 1, 1) is None or tuned.DEVICES
    assert multi_lora.strategy is strategy
