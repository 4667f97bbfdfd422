"""bench/gpu/counters.py: ncu's table becomes records, and what bounds a kernel follows from its percentages."""

import json

import pytest

from bench.gpu import counters

# As `ncu --csv --page raw` writes it: lines of progress, names, units, a row for each launch. Two of the metrics are known by
# other names here, one is not available.
NAMES = [
    "ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size", "Device",
    "CC", "dram__bytes_read.sum", "dram__bytes_write.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__time_duration.sum", "launch__registers_per_thread", "launch__shared_mem_per_block_dynamic",
    "lts__t_sector_hit_rate.pct", "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
]  # fmt: skip
UNITS = [""] * 11 + ["Mbyte", "Mbyte", "%", "us", "register/thread", "Kbyte/block", "%", "%", "%", "%", "%"]
GEMM = "void at::native::elementwise_kernel<(int)128, (int)4, T1>(int, T2)"


def line(values):
    return ",".join(f'"{value}"' for value in values)


def launch(number, name, grid, *metrics):
    return line(
        [
            number,
            77,
            "python3.12",
            "127.0.0.1",
            name,
            1,
            7,
            "(256, 1, 1)",
            f"({grid}, 1, 1)",
            0,
            "9.0",
            *metrics,
        ]
    )


MARK = ("0.001", "0.002", "0.1", "2.1", "16", "0", "50", "0.1", "0", "0.1", "12")
TABLE = "\n".join([
    "==PROF== Connected to process 77 (/usr/bin/python3.12)",
    '==PROF== Profiling "_case_marker": 0%....50%....100% - 9 passes',
    line(NAMES),
    line(UNITS),
    launch(0, "_case_marker", 1, *MARK),
    launch(1, "_linear_forward", 132, "1,205.00", "5.50", "31.5", "11,300.00", "232", "196.61", "81.2", "40.1", "88.4",
           "91.0", "12.5"),
    launch(2, "_combine", 64, "0.52", "0.13", "4.2", "6.10", "40", "0", "n/a", "3", "0", "8.8", "22"),
    launch(3, "_case_marker", 2, *MARK),
    launch(4, "_blend", 99, "6,000.00", "2,000.00", "91.7", "2,000.00", "64", "0", "1.5", "35", "0", "20", "70"),
    launch(5, "_blend", 99, "2,000.00", "0.00", "61.7", "1,000.00", "64", "0", "4.5", "35", "0", "20", "40"),
    launch(6, GEMM, 9, "0.4", "0.4", "10", "30.00", "16", "0", "50", "10", "0", "20", "40"),
    "==PROF== Disconnected from process 77",
])  # fmt: skip
MANIFEST = {
    "environment": {"device": "NVIDIA H200", "device_type": "cuda", "commit": "0" * 40},
    "cases": [
        {"id": "a", "group": "linear_logprob", "op": "linear_logprob", "title": "scoring"},
        {"id": "b", "group": "interpolate", "op": "interpolate", "title": "interpolate"},
    ],
}


def test_a_table_is_read_case_by_case():
    first, second = counters.read(TABLE, MANIFEST)["cases"]
    assert [k["name"] for k in first["kernels"]] == ["_linear_forward", "_combine"]
    kernel = first["kernels"][0]
    assert kernel["seconds"] == pytest.approx(11.3e-3) and kernel["dram_bytes"] == pytest.approx(1210.5e6)
    assert (kernel["registers"], kernel["grid"], kernel["bound"]) == (232, "(132, 1, 1)", "tensor cores")
    assert kernel["shared_bytes"] == pytest.approx(196.61e3) and kernel["occupancy_percent"] == 12.5
    assert first["kernels"][1]["l2_hit_percent"] is None and first["kernels"][1]["bound"] == "latency"
    assert second["seconds"] == pytest.approx(3.03e-3)


def test_launches_of_one_kernel_are_put_together():
    blend = counters.read(TABLE, MANIFEST)["cases"][1]["kernels"][0]
    assert (blend["name"], blend["launches"]) == ("_blend", 2)
    assert blend["dram_bytes"] == pytest.approx(10e9)
    assert blend["dram_percent"] == pytest.approx((2 * 91.7 + 61.7) / 3)  # by time
    assert blend["bound"] == "memory"


def test_a_kernel_of_a_library_goes_by_its_short_name():
    assert counters.read(TABLE, MANIFEST)["cases"][1]["kernels"][1]["name"] == "elementwise_kernel"


@pytest.mark.parametrize(
    "percents, bound",
    [
        ({"dram_percent": 92.0, "tensor_percent": 70.0, "sm_percent": 71.0}, "memory"),
        ({"dram_percent": 20.0, "tensor_percent": 85.0, "sm_percent": 90.0}, "tensor cores"),
        ({"dram_percent": 20.0, "tensor_percent": 30.0, "sm_percent": 80.0}, "instructions"),
        ({"dram_percent": 20.0, "l2_percent": 75.0, "sm_percent": 40.0}, "L2"),
        ({"dram_percent": 59.0, "tensor_percent": 59.0, "sm_percent": 59.0}, "latency"),
        ({"dram_percent": None}, "unknown"),
    ],
)
def test_what_bounds_a_kernel(percents, bound):
    assert counters.bound(percents) == bound


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("==ERROR== ERR_NVGPUCTRPERM - no permission", "no table of ncu: ==ERROR== ERR_NVGPUCTRPERM"),
        ("", "printed nothing of the kind"),
        (line([*NAMES[:11], "Section Name", "Metric Name", "Metric Unit", "Metric Value"]) + '\n"0"', "give it --page raw"),
        ("\n".join(row for row in TABLE.split("\n") if "_case_marker" not in row), "before the first marker"),
        (TABLE.replace('"(2, 1, 1)"', '"(3, 1, 1)"'), "marks case 3; the manifest has 2"),
        ("\n".join(row for row in TABLE.split("\n") if "_case_marker" in row or '"ID"' in row or "Mbyte" in row), "no kernels"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        counters.read(text, MANIFEST)


def test_the_command_writes_json_and_prints_a_table(tmp_path, capsys):
    (tmp_path / "t.csv").write_text(TABLE)
    (tmp_path / "m.json").write_text(json.dumps(MANIFEST))
    arguments = ["--manifest", str(tmp_path / "m.json"), "--out", str(tmp_path / "c.json")]
    assert counters.main(["read", str(tmp_path / "t.csv"), *arguments]) == 0
    row = next(line for line in capsys.readouterr().out.split("\n") if "_linear_forward" in line)
    assert "tensor cores" in row and "88%" in row and "232" in row and "192 KiB" in row
    assert json.loads((tmp_path / "c.json").read_text())["environment"]["device"] == "NVIDIA H200"
    (tmp_path / "t.csv").write_text("==ERROR== no device")
    assert counters.main(["read", str(tmp_path / "t.csv"), *arguments]) == 1
    assert "no device" in capsys.readouterr().err


def test_every_kind_of_every_kernel_group_is_called(tmp_path):
    out = tmp_path / "m.json"
    assert counters.main(["run", "--device", "cpu", "--sizes", "tiny", "--out", str(out)]) == 0
    cases = json.loads(out.read_text())["cases"]
    assert {case["group"] for case in cases} == set(counters.GROUPS)
    assert {"slerp", "ema_", "interpolated_linear", "multi_lora_linear"} <= {case["op"] for case in cases}
    kinds = [(case["group"], case["op"], case["title"]) for case in cases]
    assert len(kinds) == len(set(kinds)) >= 18


def test_the_metrics_are_asked_for_by_their_first_names(capsys):
    assert counters.main(["metrics"]) == 0
    assert capsys.readouterr().out.strip().split(",")[0] == "gpu__time_duration.sum"
