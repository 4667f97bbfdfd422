"""`python -m bench collect`: a round's results go where they belong, and README.md and docs/gpu.md say what was measured."""

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.core import schema, targets
from bench.pages import collect, gpu_page, readme

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ENVIRONMENT = {
    "device": "NVIDIA H200", "device_type": "cuda", "threads": 8, "date": "2026-11-28", "commit": COMMIT,
    "versions": {"torch": "2.11.0"},
}  # fmt: skip


def variant(name, seconds):
    times = {"median": seconds, "q1": seconds, "q3": seconds, "min": seconds, "max": seconds, "runs": 9}
    return {"name": name, "status": "ok", "times": times}


def group_file(ours=1.0e-3, **environment):
    """A result of the group multi_lora whose one case bears on a target."""
    shape, floor = (
        {"T": 8192, "N": 4096, "K": 4096},
        {"flops": 5e11, "bytes": 1e8, "exps": 0.0, "seconds": 7e-4},
    )
    case = {
        "id": "multi_lora / forward+backward", "group": "multi_lora", "op": "multi_lora_linear",
        "title": "forward+backward", "shape": shape, "dtype": "bfloat16", "bare": "bare library products",
        "variants": [variant("bare library products", 0.95e-3), variant("clp-engine", ours), variant("torch", 2e-3)],
        "floor": {**floor, "bound": "compute"},
    }  # fmt: skip
    result = schema.read({
        "version": 1, "environment": {**ENVIRONMENT, **environment}, "settings": {"left_out": {}},
        "ceilings": {"matmul_flops": {"bfloat16": 7.9e14}, "matmul_side": 8192, "copy_bytes": 4.3e12, "read_bytes": 4e12,
                     "exp_rate": 4e12},
        "peers": [], "cases": [case],
    })  # fmt: skip
    record = result.cases[0]
    record.verdicts = targets.verdicts(("multi-lora-4096",), record, result.ceilings, result.environment)
    return dataclasses.asdict(result)


def counters_file():
    percents = dict.fromkeys(
        ("dram_percent", "l2_percent", "l2_hit_percent", "sm_percent", "tensor_percent"), 66.0
    )
    kernel = {
        "name": "_linear_described", "launches": 2, "seconds": 8e-4, "dram_bytes": 2e8, **percents, "occupancy_percent": 12.5,
        "registers": 168.0, "shared_bytes": 2e5, "grid": "(132, 1, 1)", "block": "(256, 1, 1)", "bound": "tensor cores",
    }  # fmt: skip
    case = {
        "id": "multi_lora / forward+backward",
        "group": "multi_lora",
        "op": "multi_lora_linear",
        "title": "fwd+bwd",
    }
    return {"environment": ENVIRONMENT, "cases": [{**case, "seconds": 9e-4, "kernels": [kernel]}]}


PROFILE = {
    "model": "qwen2.5-0.5b", "shape": {"batch": 64}, "environment": ENVIRONMENT, "engine_share": 0.021, "step": 1.5,
}  # fmt: skip
TOKENS = {
    "environment": ENVIRONMENT, "model": "qwen2.5-0.5b", "tokens": 20, "span": 0.05, "busy": 0.04,
    "kernels": [{"name": "_linear_described", "seconds": 0.03, "launches": 480}],
}  # fmt: skip


@pytest.fixture
def round_folder(tmp_path):
    """What bench/gpu.sh leaves, and beside it the parts of a repository that collect writes to."""
    folder, repository = tmp_path / "out", tmp_path / "repository"
    folder.mkdir()
    (repository / "docs").mkdir(parents=True)
    (repository / "bench" / "results").mkdir(parents=True)
    (repository / "docs" / "benchmarks").mkdir()
    for page in ("README.md", "docs/gpu.md", "docs/benchmarks/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = [part for part in text.split("<!-- bench:")[1:] if part.startswith(("gpu/", "figures"))]
        (repository / page).write_text(
            "".join(f"<!-- bench:{part.split('-->')[0]}-->\n<!-- /bench -->\n" for part in blocks)
        )
    demo = json.loads((ROOT / "bench" / "results" / "docsum_demo.json").read_text())
    demo["setup"]["device"] = "cuda:0"
    from bench.gpu import fronts
    from clp_engine.evaluation.report import ParetoReport

    one, other = (
        ParetoReport.load(ROOT / "bench" / "results" / "docsum_demo.json"),
        ParetoReport.from_dict(demo),
    )
    files = {
        "multi_lora.json": group_file(), "ceilings.json": {**group_file(), "cases": []}, "counters.json": counters_file(),
        "qwen2.5-0.5b.profile.json": PROFILE, "docsum_demo.json": demo, "counters.manifest.json": {"cases": []},
        "memcheck.slerp.record.json": {"ops": []}, "fronts.json": fronts.to_dict(one, other, fronts.compare(one, other)),
        "tune.json": {"environment": ENVIRONMENT}, "figures.tokens.json": TOKENS, "smoke.decode.json": {"checks": []},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "fronts.png").write_bytes(b"picture")
    for stage, code, last in (("tests", 0, "== 120 passed in 60 s =="), ("multi_lora", 0, "done")):
        (folder / f"{stage}.rc").write_text(f"{code} 61\n")
        (folder / f"{stage}.log").write_text(f"first\n{last}\n\n")
    return folder, repository


def test_results_go_where_they_belong_and_the_pages_say_so(round_folder, capsys):
    folder, repository = round_folder
    results = repository / "bench" / "results"
    assert main(["collect", str(folder), "--to", str(results)]) == 0
    written = {str(p.relative_to(results)) for p in results.rglob("*.json")}
    assert written == {
        "h200_multi_lora.json", "h200_docsum_demo.json", "counters/h200.json", "fronts/h200.json", "tune_h200.json",
        "rounds/h200.json", "profiles/h200_qwen2.5-0.5b.json", "tokens/h200.json",
    }  # fmt: skip
    assert (repository / "docs" / "h200_front.png").read_bytes() == b"picture"
    page = (repository / "docs" / "gpu.md").read_text()
    row = next(line for line in page.split("\n") if line.startswith("| multi-LoRA fwd+bwd 4096x4096"))
    assert (
        "<= 1.08 | 1.05 | met | 70% | compute (floor); `_linear_described`: tensor cores | NVIDIA H200" in row
    )
    assert (
        "| multi-LoRA fwd+bwd 896x896, T=8192, over the frozen linear alone | <= 1.35 | not measured" in page
    )
    assert "== 120 passed in 60 s ==" in page and "bfloat16 790" in page and "| 2.1% |" in page
    assert "20 tokens of qwen2.5-0.5b: 50.0 ms, of which kernels run 40.0 ms" in page
    assert "Of 26 comparisons 0 differ" in page and "![Both fronts](h200_front.png)" in page
    assert gpu_page.NOTHING not in page
    assert "1.05 | met" in (repository / "docs" / "benchmarks" / "README.md").read_text()
    front = (repository / "README.md").read_text()
    assert "NVIDIA H200 | [h200_multi_lora.json](bench/results/h200_multi_lora.json) |" in front
    assert gpu_page.NOTHING not in front
    assert "NVIDIA H200" in (repository / "docs" / "benchmarks" / "chart.svg").read_text()
    assert readme.update(check=True, root=repository) == 0  # nothing is left to do


def test_an_archive_is_as_good_as_the_folder(round_folder, tmp_path):
    folder, repository = round_folder
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with tarfile.open(elsewhere / "all.tgz", "w:gz") as archive:
        archive.add(folder, arcname=".")
    results = repository / "bench" / "results"
    for given in (elsewhere, elsewhere / "all.tgz"):
        assert main(["collect", str(given), "--to", str(results)]) == 0
        assert (results / "h200_multi_lora.json").exists()
        shutil.rmtree(results)
        results.mkdir()


def test_a_target_that_is_missed_is_said_to_be(round_folder):
    folder, repository = round_folder
    (folder / "multi_lora.json").write_text(json.dumps(group_file(ours=1.2e-3)))
    main(["collect", str(folder), "--to", str(repository / "bench" / "results")])
    assert "| <= 1.08 | 1.26 | **not met** | 58% |" in (repository / "docs" / "gpu.md").read_text()


def test_a_stage_that_failed_and_cases_left_out_are_said(round_folder, capsys):
    folder, repository = round_folder
    result = group_file()
    result["settings"]["left_out"] = {"x": "the group's budget of 40 s was used up"}
    (folder / "multi_lora.json").write_text(json.dumps(result))
    (folder / "tests.rc").write_text("1 61\n")
    assert main(["collect", str(folder), "--to", str(repository / "bench" / "results")]) == 1
    said = capsys.readouterr().out
    assert (
        "stage tests ended with 1: == 120 passed" in said
        and "h200_multi_lora.json: 1 cases were not measured" in said
    )
    assert "| tests | exit code 1 |" in (repository / "docs" / "gpu.md").read_text()


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("decode.json", group_file(device="NVIDIA H100 80GB HBM3"), "not of one device"),
        ("decode.json", group_file(commit="f" * 40), "not of one commit"),
        ("decode.json", {"version": 1}, "decode.json is no result of a round: .*is missing"),
        ("counters.json", {"environment": ENVIRONMENT}, "counters.json is no result"),
        ("multi_lora.json", group_file(commit=COMMIT + "-dirty"), "not of one commit"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(round_folder, name, content, complaint):
    folder, repository = round_folder
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=complaint):
        main(["collect", str(folder), "--to", str(repository / "bench" / "results")])
    assert not list((repository / "bench" / "results").rglob("*.json"))


def test_a_tree_that_nobody_else_has_is_refused(tmp_path):
    folder, results = tmp_path / "out", tmp_path / "repository" / "bench" / "results"
    folder.mkdir()
    results.mkdir(parents=True)
    (tmp_path / "repository" / "README.md").write_text("")
    (folder / "multi_lora.json").write_text(json.dumps(group_file(commit=COMMIT + "-dirty")))
    with pytest.raises(SystemExit, match="a tree that nobody else has"):
        main(["collect", str(folder), "--to", str(results)])
    assert main(["collect", str(folder), "--to", str(results), "--dirty"]) == 0
    (folder / "multi_lora.json").write_text(json.dumps(group_file(commit=None)))
    with pytest.raises(SystemExit, match="name no commit"):
        main(["collect", str(folder), "--to", str(results)])


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no result of a round|there is no"):
        main(["collect", str(tmp_path), "--to", str(tmp_path / "bench" / "results")])


@pytest.mark.parametrize(
    "device, name",
    [
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("Intel(R) Xeon(R) Processor", "intel-r"),
        ("AMD Instinct MI300X", "instinct-mi300x"),
    ],
)  # fmt: skip
def test_devices_have_short_names(device, name):
    assert collect.short_name(device) == name


def test_without_results_every_target_of_a_gpu_is_listed_as_not_measured(tmp_path):
    lines = gpu_page.view("targets", tmp_path)
    assert lines[0] == gpu_page.NOTHING
    on_gpu = [t for t in targets.TARGETS.values() if t.on == gpu_page.GPU]
    assert len(on_gpu) >= 10
    assert sum("| not measured |" in line for line in lines) == len(on_gpu)
    assert gpu_page.view("summary", tmp_path) == [gpu_page.NOTHING]


def test_the_summary_gives_the_worst_case_of_each_target(tmp_path):
    for name, seconds in (("h200_a", 1.2e-3), ("h200_b", 1.0e-3)):
        (tmp_path / f"{name}.json").write_text(json.dumps(group_file(ours=seconds)))
    rows = [
        line for line in gpu_page.view("summary", tmp_path) if line.startswith("| multi-LoRA fwd+bwd 4096")
    ]
    assert len(rows) == 1 and "| 1.26 | **not met** |" in rows[0]
    every = [
        line for line in gpu_page.view("targets", tmp_path) if line.startswith("| multi-LoRA fwd+bwd 4096")
    ]
    assert len(every) == 2


def test_an_unknown_view_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such view; known: summary"):
        readme.render("<!-- bench:gpu/nonesuch -->\n<!-- /bench -->", tmp_path)


def test_results_of_a_cpu_are_none_of_a_gpu():
    assert not [stem for stem in gpu_page.found(ROOT / "bench" / "results") if stem.startswith("cpu")]
