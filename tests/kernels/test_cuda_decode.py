"""multi_lora_linear's CUDA decode kernel: run as it is written on a CPU, and on a GPU where there is one."""

import contextlib
import ctypes
import functools
import subprocess
import sys
from types import SimpleNamespace

import clp_kernels
import pytest
import torch
from accuracy import assert_as_accurate
from clp_kernels import multi_lora_linear, use_backend
from clp_kernels.backends import select
from clp_kernels.reference.multi_lora import forward
from cuda_emulation import Call, build, decode, decode_layers, library, workspace_bytes

ROWS = (1, 2, 8, 16, 17, 64, 100, 256)


@pytest.fixture(scope="module")
def native():
    return library()


def inputs(rows, n, k, rank, groups=1, dtype=torch.bfloat16, gate_dtype=torch.float32, device="cpu"):
    shapes = dict(
        x=(rows, k), weight=(n, k), lora_a=(rank, k), lora_b=(n, rank), gate=(groups, rank), bias=(n,)
    )
    made = {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}
    return made | {"gate": made["gate"].to(gate_dtype)}


def cancelling(t):
    """Half of each contraction cancels the other half, so that what is left is what the order of the sums makes of it.

    Otherwise the rounding of y to 16 bits hides a sum in another order, nearly always.
    """
    half = t["x"].shape[1] // 2
    t["x"][:, half:] = -t["x"][:, :half]
    for name in ("weight", "lora_a"):
        t[name][:, half:] = t[name][:, :half]
    return t | {"bias": None}


def reference(t, gate_index=None):
    return forward(*(t[name] for name in ("x", "weight", "bias", "lora_a", "lora_b", "gate")), gate_index)[0]


def assert_right(got, tensors, gate_index=None):
    exact = reference({name: None if t is None else t.double() for name, t in tensors.items()}, gate_index)
    assert_as_accurate(got, reference(tensors, gate_index), exact, "y")


@pytest.mark.parametrize("aligned", [True, False], ids=["16-byte loads", "masked"])
@pytest.mark.parametrize("rows", ROWS)
def test_accurate_for_every_number_of_rows(native, rows, aligned):
    # Nothing here is a multiple of a tile: 128 columns, 64 of the contraction, 16 of the rank.
    for seed, (n, k, rank, sms) in enumerate([(200, 301, 5, 3), (131, 200, 48, 2)]):
        t = inputs(rows, n, k, rank, groups=rows)
        assert_right(decode(native, **t, sms=sms, order=seed, aligned=aligned), t)


@pytest.mark.parametrize("rank", [0, 5, 8, 48, 88, 130, 300])
def test_any_rank(native, rank):
    for rows in (3, 40):
        t = inputs(rows, 150, 200, rank, groups=rows)
        assert_right(decode(native, **t, sms=2), t)


@pytest.mark.parametrize("n, k", [(896, 896), (300, 1937), (7, 9), (1, 1), (128, 64), (129, 65), (2000, 40)])
def test_any_shape(native, n, k):
    t = inputs(9, n, k, 16)
    for aligned in (True, False):
        assert_right(decode(native, **t, sms=5, aligned=aligned), t)


@pytest.mark.parametrize("sms", [1, 2, 3, 4, 6, 7, 11, 20])
def test_any_number_of_multiprocessors(native, sms):
    # 3 tiles of 17 steps: tiles shared by many blocks, blocks with several tiles, and neither.
    t = inputs(12, 380, 1050, 24, groups=3)
    index = torch.randint(0, 3, (12,))
    assert native.grid(380, 1050, 24, sms) == min(sms, 12)
    assert_right(decode(native, **t, gate_index=index, sms=sms, order=sms), t, index)


@pytest.mark.parametrize("aligned", [True, False], ids=["16-byte loads", "masked"])
@pytest.mark.parametrize(
    "rows, rank, sms", [(1, 16, 2), (5, 48, 30), (9, 130, 12), (40, 24, 5), (100, 48, 30), (3, 0, 30)]
)
def test_layers_of_one_launch_are_right_each(native, rows, rank, sms, aligned):
    # One tile and several, blocks with parts of two layers, every way to exchange sums: hidden, at once, each block for itself.
    made = [inputs(rows, n, 300, rank, groups=rows) for n in (290, 60, 131)]
    x, gate = made[0]["x"], made[0]["gate"]
    made[1]["bias"] = None
    names = ("weight", "lora_a", "lora_b", "bias")
    for count in (2, 3):
        layers = [tuple(t[name] for name in names) for t in made[:count]]
        ys = decode_layers(native, x, layers, gate, sms=sms, order=rows, aligned=aligned)
        for y, t in zip(ys, made[:count], strict=True):
            assert_right(y, t | {"x": x, "gate": gate})


def test_layers_of_one_launch_have_the_bits_of_any_rows_and_order(native):
    for sms in (4, 30):
        made = [cancelling(inputs(70, n, 600, 48, groups=70)) for n in (140, 300)]
        layers = [(t["weight"], t["lora_a"], t["lora_b"], None) for t in made]
        x, gate = made[0]["x"], made[0]["gate"]
        whole = decode_layers(native, x, layers, gate, sms=sms)
        for rows in (1, 9, 20, 70):
            ys = decode_layers(native, x[:rows], layers, gate[:rows], sms=sms, order=rows)
            assert all(torch.equal(y, of_all[:rows]) for y, of_all in zip(ys, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_forms_of_the_gate(native, dtype):
    for gate_dtype in (torch.float32, dtype):
        for groups, index in ((1, None), (3, None), (12, None), (5, torch.arange(12) * 7 % 5)):
            t = inputs(12, 140, 90, 12, groups, dtype, gate_dtype)
            for form in (torch.int32, torch.int64) if index is not None else (None,):
                chosen = None if index is None else index.to(form)
                assert_right(decode(native, **t, gate_index=chosen), t, index)
    without = {**t, "bias": None}
    assert_right(decode(native, **without, gate_index=index), without, index)


def test_a_gate_index_out_of_range_makes_its_row_nan(native):
    t = inputs(20, 140, 90, 12, groups=6)
    index = torch.zeros(20, dtype=torch.int64)
    index[3], index[17] = 4, -1
    y = decode(native, **t, gate_index=index, groups=4)  # gate row 4 exists, and is not to be used
    assert y[[3, 17]].isnan().all() and y.isnan().any(-1).sum() == 2


def test_a_row_does_not_depend_on_the_others_nor_on_their_number(native):
    t = cancelling(inputs(256, 140, 600, 24, groups=256))
    whole = decode(native, **t, sms=5)
    for rows in (1, 5, 9, 30, 64, 65, 130):
        for first in {0, 256 - rows}:
            part = {**t, **{name: t[name][first : first + rows] for name in ("x", "gate")}}
            for aligned in (True, False) if rows in (5, 65) else (True,):
                y = decode(native, **part, sms=5, order=rows, aligned=aligned)
                assert torch.equal(y, whole[first : first + rows]), f"{rows} rows from {first}"


def test_a_zero_gate_is_the_frozen_layer_bit_for_bit(native):
    for sms in (1, 3, 16):
        t = cancelling(inputs(48, 600, 700, 20, groups=48))
        zero = torch.arange(48) % 2 == 0
        t["gate"][zero] = 0
        frozen = t | {"lora_a": t["lora_a"][:0], "lora_b": t["lora_b"][:, :0], "gate": t["gate"][:, :0]}
        y, base = decode(native, **t, sms=sms), decode(native, **frozen, sms=sms)
        assert torch.equal(y[zero], base[zero]) and not torch.equal(y[~zero], base[~zero])


def test_the_same_bits_in_whatever_order_the_warps_go(native):
    t = cancelling(inputs(40, 300, 700, 20, groups=40))
    first = decode(native, **t, sms=7)
    assert all(torch.equal(first, decode(native, **t, sms=7, order=order)) for order in (1, 2, 3))


def test_rounding_of_the_emulation_is_torch_s(native):
    sizes = 10.0 ** torch.arange(-9, 6).repeat(200)
    values = torch.cat([torch.randn(3000) * sizes, torch.tensor([65519.9, 65520, 1e-8, 0.0, -0.0])])
    for number, dtype in enumerate((torch.bfloat16, torch.float16)):
        bits = torch.tensor([native.narrowed(number, v) for v in values.tolist()], dtype=torch.int32)
        assert torch.equal(bits.to(torch.int16).view(dtype), values.to(dtype))


SANITIZED = [  # rows n k rank groups sms aligned layers: every size of the kernel, tiles shared and not
    (1, 300, 300, 5, 1, 3, 1, 1), (12, 260, 190, 20, 4, 2, 1, 1), (17, 260, 256, 88, 3, 7, 1, 1),
    (40, 200, 300, 20, 2, 4, 1, 1), (100, 140, 200, 9, 3, 3, 1, 1), (200, 130, 130, 8, 1, 3, 1, 1),
    (5, 300, 301, 48, 2, 3, 0, 1), (33, 129, 77, 3, 1, 2, 0, 1), (70, 130, 133, 8, 2, 3, 0, 1), (2, 384, 128, 0, 1, 3, 1, 1),
    (3, 260, 600, 20, 2, 20, 1, 3), (40, 200, 600, 130, 2, 20, 1, 2), (12, 260, 190, 20, 4, 3, 1, 3),
]  # fmt: skip


def run_sanitized(binary, cases=SANITIZED):
    process = subprocess.run(
        [binary, *(str(v) for case in cases for v in case)], capture_output=True, text=True
    )
    if "unexpected memory mapping" in process.stderr:
        pytest.skip("this g++'s thread sanitizer does not run on this Linux (vm.mmap_rnd_bits)")
    return process


def sanitized(kind, **patch):
    try:
        return build("-O1", "-g", f"-fsanitize={kind}", "-fno-sanitize-recover=all", **patch)
    except AssertionError as error:
        if "cannot find" in str(error):
            pytest.skip(f"g++ has no -fsanitize={kind} here")
        raise


@pytest.mark.check
@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_no_access_outside_of_buffers_and_no_race(kind):
    process = run_sanitized(sanitized(kind))
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.count("worst") == len(SANITIZED)


ONE_BLOCK_HAS_SEVERAL_TILES, EXCHANGED_ONCE = (12, 260, 400, 20, 4, 2, 1, 1), (40, 260, 400, 130, 4, 20, 1, 1)
GATED_ALONE = (3, 260, 400, 20, 3, 20, 1, 2)
MISTAKES = {
    "no barrier before a stage is read": {"sync_threads();  // the unit": "// the unit"},
    "waits for one copy too few": {"copy_wait<kStages - 2>();": "copy_wait<kStages - 1>();"},
    "h is read before all of it is there": {
        "            grid_wait(token);\n            gate_share();": "            gate_share();"
    },
    "shared tiles are read before they are there": {
        "exchanged = true;\n          grid_wait(grid_arrive());\n": "exchanged = true;\n"
    },
    "shares of s are read before they are there": {
        "            gate_share();\n            grid_wait(grid_arrive());\n": "            gate_share();\n"
    },
    "another layer's s is written over": {
        "    sync_threads();  // nobody reads the last unit, or another layer's s\n": ""
    },
    "a block's own s is read before it is there": {
        "to[element - first] = s; });\n    sync_threads();": "to[element - first] = s; });"
    },
    "a stage is filled too early": {
        "    sync_threads();  // the unit is there, and nobody still reads the stage that is filled next\n    fetch();":
        "    fetch();\n    sync_threads();"
    },
}  # fmt: skip


@pytest.mark.check
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_kernel_are_noticed(mistake):
    cases = [ONE_BLOCK_HAS_SEVERAL_TILES, EXCHANGED_ONCE, GATED_ALONE]
    process = run_sanitized(sanitized("thread", patch=MISTAKES[mistake]), cases)
    assert process.returncode != 0
    assert "data race" in process.stderr or "expected" in process.stdout or "waits for ever" in process.stderr


def test_what_the_back_end_refuses(monkeypatch):
    cuda = pytest.importorskip("clp_kernels.cuda.multi_lora")
    gpu = torch.device("cuda", 0)
    call = dict(device=gpu, dtype=torch.bfloat16, decode=True)
    properties = dict(monkeypatch=monkeypatch, cuda=cuda)

    def on(major, minor, shared=227 * 1024):
        monkeypatch.setattr(properties["cuda"], "_properties", lambda index: (major, minor, 132, shared))
        return cuda.unsupported(**call)

    assert on(8, 0, 163 * 1024) is on(9, 0) is on(10, 3) is None
    assert "capabilities 8, 9 and 10, not 7.5" in on(7, 5) and "not 12.0" in on(12, 0)
    assert "needs 160 KB" in on(8, 9, 99 * 1024)
    assert "not cpu" in cuda.unsupported(**call | {"device": torch.device("cpu")})
    assert "Triton's take float32" in cuda.unsupported(**call | {"dtype": torch.float32})
    assert "no gradient, of at most 256 rows" in cuda.unsupported(**call | {"decode": False})


def test_the_kernel_s_shared_memory_is_what_the_back_end_asks_for(native):
    cuda = pytest.importorskip("clp_kernels.cuda.multi_lora")
    assert max(native.shared_bytes(columns) for columns in (1, 2, 4, 8, 16, 32)) == cuda._SHARED


def test_forcing_it_elsewhere_says_why_not():
    status = clp_kernels.backends()["cuda"]
    if status.available:
        with use_backend("cuda"), pytest.raises(RuntimeError, match="CUDA tensors, not cpu"):
            multi_lora_linear(*[torch.ones(2, 2)] * 5)
    else:
        with pytest.raises(RuntimeError, match="CUDA"):
            with use_backend("cuda"):
                pass


def test_few_rows_choose_it_on_a_gpu_and_other_calls_choose_triton(monkeypatch):
    cuda, triton = (
        pytest.importorskip(f"clp_kernels.{name}.multi_lora") for name in ("cuda", "triton_kernels")
    )
    there = {name: clp_kernels.Backend(name, True, "") for name in clp_kernels.backends()}
    backends = sys.modules[select.__module__]
    monkeypatch.setattr(backends, "_AVAILABLE", there)
    monkeypatch.setattr(backends, "_CHOSEN", {})
    monkeypatch.setattr(cuda, "_properties", lambda index: (9, 0, 132, 227 * 1024))
    monkeypatch.setattr("clp_kernels.triton_kernels.launch.interpreting", lambda: False)

    def chosen(op="multi_lora_linear", dtype=torch.bfloat16, **call):
        table = clp_kernels.multi_lora._TABLE if op == "multi_lora_linear" else {"triton": triton.__name__}
        return select(op, table, torch.device("cuda", 0), dtype=dtype, **call)

    assert chosen(decode=True) is chosen(dtype=torch.float16, decode=True) is cuda
    assert chosen() is chosen(decode=False) is chosen(dtype=torch.float32, decode=True) is triton
    monkeypatch.setattr(backends, "forced_backend", lambda: "cuda")
    with pytest.raises(RuntimeError, match="cuda: the CUDA C.. kernel takes calls that need no gradient"):
        chosen()
    with pytest.raises(RuntimeError, match="cuda: has no another_op"):
        chosen("another_op")


def test_what_python_hands_to_the_kernel(native, monkeypatch):
    """The back-end's forward with the emulation in place of the launch: arguments in order, strides, every form of x."""
    cuda = pytest.importorskip("clp_kernels.cuda.multi_lora")

    def launch(*arguments):
        *fields, dtype, device, sms, stream = arguments
        assert (device, sms, stream) == (None, 3, 17)
        native.decode(ctypes.byref(Call.of(*fields)), dtype, sms, 0)

    workspace = functools.partial(workspace_bytes, native)
    stub = SimpleNamespace(multi_lora_decode=launch, multi_lora_decode_workspace=workspace)
    monkeypatch.setattr(cuda, "_native", stub)
    monkeypatch.setattr(cuda, "_properties", lambda index: (9, 0, 3, 227 * 1024))
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=17))
    cuda._workspace.cache_clear()
    for dtype in (torch.bfloat16, torch.float16):
        t = inputs(12, 140, 90, 12, 3, dtype, dtype)
        wide = {
            name: torch.randn(400, 400).to(dtype)[: v.shape[0], : v.shape[1]]
            for name, v in t.items()
            if name != "bias"
        }
        wide["bias"] = torch.randn(280).to(dtype)[::2]
        for x, index in (
            (wide["x"], torch.arange(12).int() % 3),
            (wide["x"].reshape(3, 4, 90), None),
            (wide["x"].t().contiguous().t(), torch.arange(12) % 3),
            (torch.randn(12, 5, 90).to(dtype)[:, -1:], torch.arange(12).reshape(12, 1) % 3),
        ):
            tensors = wide | {"x": x}
            y, _ = cuda.forward(
                *(tensors[name] for name in ("x", "weight", "bias", "lora_a", "lora_b", "gate")),
                index,
                keep_h=False,
            )
            assert y.is_contiguous()
            assert_right(y, tensors, index)
        others = [
            (torch.randn(n, 90).to(dtype), None, t["lora_a"], torch.randn(n, 12).to(dtype)) for n in (40, 1)
        ]
        layers = [(wide["weight"], wide["bias"], wide["lora_a"], wide["lora_b"]), *others]
        ys = cuda.forward_layers(wide["x"].reshape(4, 3, 90), layers, wide["gate"], torch.arange(12) % 3)
        for y, (weight, bias, a, b) in zip(ys, layers, strict=True):
            given = dict(
                x=wide["x"].reshape(4, 3, 90), weight=weight, bias=bias, lora_a=a, lora_b=b, gate=wide["gate"]
            )
            assert_right(y, given, torch.arange(12) % 3)
        assert cuda.forward(x[:0], t["weight"], None, t["lora_a"], t["lora_b"], t["gate"][:0], None)[
            0
        ].shape == (0, 1, 140)
    cuda._workspace.cache_clear()


def test_only_calls_without_gradients_few_rows_and_dense_rows_decode():
    decodes = clp_kernels.multi_lora._decodes
    w, a, b = torch.zeros(5, 4), torch.zeros(2, 4), torch.zeros(5, 2)
    assert decodes(torch.Size((256, 4)), w, a, b) and decodes(torch.Size((8, 32, 4)), w, a, b)
    assert not decodes(torch.Size((257, 4)), w, a, b)
    assert not decodes(torch.Size((3, 4)), torch.zeros(4, 5).t(), a, b)
    assert decodes(torch.Size((3, 4)), w, a[:0], b[:, :0])


# ---- on a GPU ----


@pytest.fixture
def on_gpu():
    status = clp_kernels.backends()["cuda"]
    if not status.available:
        pytest.skip(status.reason)
    with use_backend("cuda"):
        yield


def call(t, gate_index=None):
    return multi_lora_linear(
        t["x"], t["weight"], t["lora_a"], t["lora_b"], t["gate"], bias=t["bias"], gate_index=gate_index
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
def test_gpu_is_accurate(on_gpu, rows, dtype):
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN: y and the workspace
    try:
        for n, k, rank in (
            (896, 896, 48),
            (1937, 1937, 5),
            (4096, 4096, 88),
            (4864, 896, 0),
            (300, 1936, 300),
        ):
            t = inputs(rows, n, k, rank, groups=rows, dtype=dtype, device="cuda")
            t["weight"] /= k**0.5
            assert_right(call(t), t)
            index = torch.randint(0, rows, (rows,), device="cuda")
            assert_right(call(t, index), t, index)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [(896, 128, 128), (4864, 4864), (3584, 512, 512)], ids=str)
def test_gpu_layers_of_one_launch_are_right_each(on_gpu, columns, monkeypatch):
    depth = 3584 if 3584 in columns else 896
    made = [inputs(64, n, depth, 48, groups=64, device="cuda") for n in columns]
    for t in made:
        t |= {"x": made[0]["x"], "gate": made[0]["gate"], "weight": t["weight"] / depth**0.5}
    launched = []
    forward_layers = clp_kernels.cuda.multi_lora.forward_layers
    monkeypatch.setattr(
        clp_kernels.cuda.multi_lora,
        "forward_layers",
        lambda *call: launched.append(1) or forward_layers(*call),
    )
    layers = [tuple(t[name] for name in ("weight", "lora_a", "lora_b", "bias")) for t in made]
    for rows in (1, 8, 64):
        x, gate = made[0]["x"][:rows], made[0]["gate"][:rows]
        with torch.no_grad():
            ys = clp_kernels.multi_lora.multi_lora_linears(x, layers, gate)
        for y, t in zip(ys, made, strict=True):
            assert_right(y, t | {"x": x, "gate": gate})
    assert len(launched) == 3


@pytest.mark.gpu
def test_gpu_is_batch_invariant_repeats_itself_and_freezes_rows_of_gate_zero(on_gpu):
    for n, k in ((4096, 4096), (896, 4864), (1937, 1937)):
        t = inputs(256, n, k, 48, groups=256, device="cuda")
        t = t if k % 2 else cancelling(t)
        t["gate"][::2] = 0
        whole = call(t)
        assert all(torch.equal(whole, call(t)) for _ in range(20))
        frozen = call(t | {"lora_a": t["lora_a"][:0], "lora_b": t["lora_b"][:, :0], "gate": t["gate"][:, :0]})
        assert torch.equal(whole[::2], frozen[::2])
        for rows in (1, 7, 16, 33, 64, 128, 200):
            assert torch.equal(call(t | {name: t[name][:rows] for name in ("x", "gate")}), whole[:rows])


@pytest.mark.gpu
def test_gpu_runs_in_a_cuda_graph_and_on_two_streams(on_gpu):
    t = inputs(16, 4096, 4096, 48, groups=16, device="cuda")
    expected = call(t)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(t)
    for _ in range(10):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)
    t["x"].copy_(torch.randn_like(t["x"]))
    expected = call(t)
    graph.replay()
    assert torch.equal(y, expected)
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(50):
        for stream in streams:
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                results.append(call(t))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.gpu
def test_gpu_a_gate_index_out_of_range_is_nan(on_gpu):
    t = inputs(20, 500, 512, 24, groups=4, device="cuda")
    index = torch.zeros(20, dtype=torch.int64, device="cuda")
    index[3], index[17] = 4, -1
    y = call(t, index)
    assert y[[3, 17]].isnan().all() and y.isnan().any(-1).sum() == 2


@pytest.mark.gpu
def test_gpu_training_and_many_rows_are_refused_when_forced_and_go_elsewhere_when_not(on_gpu):
    t = inputs(300, 128, 128, 16, device="cuda")
    with pytest.raises(RuntimeError, match="at most 256 rows"):
        call(t)
    t["x"] = t["x"][:4].requires_grad_()
    with pytest.raises(RuntimeError, match="need no gradient"):
        call(t)
    with use_backend("auto"):
        call(t).sum().backward()
    assert t["x"].grad is not None
