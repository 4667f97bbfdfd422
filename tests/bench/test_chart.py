"""The chart and the README's table say what bench/results says: ratios, processors, files."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench.pages import chart, report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
SVG = "{http://www.w3.org/2000/svg}"


def variant(name, seconds, status="ok", peak=None):
    return {"name": name, "status": status, "times": {"median": seconds}, "extra_peak_bytes": peak}


def case(group, *variants, title="t", shape=None, **options):
    shape = shape or {"T": 8}
    case = {"group": group, "title": title, "shape": shape, "options": options, "variants": list(variants)}
    return {"id": str(case), **case}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)

    def write(name, *cases, device="one <chip>", **environment):
        environment = {
            "device": device,
            "device_type": "cpu",
            "threads": 2,
            "date": "2026-01-02",
            **environment,
        }
        (folder / name).write_text(json.dumps({"environment": environment, "cases": cases}))
        return folder

    return write


def words(picture):
    return ["".join(text.itertext()) for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_a_figure_is_the_yardsticks_median_over_ours(results):
    step = {"batch": 32, "group": 8, "prompt": 120, "new": 40}
    folder = results(
        "a.json",
        case(
            "multi_lora",
            variant("bare library products", 0.5),
            variant("clp-engine", 1.0),
            variant("torch", 3.0),
        ),
        case(
            "e2e",
            variant("trl + peft", 10.0, peak=400),
            variant("clp-engine, two objectives", 1.0, peak=1),
            variant("clp-engine, one objective", 2.0, peak=100),
            shape=step,
            model="m",
        ),
    )
    one, other = chart.figures(folder)
    assert (one.group, one.faster, one.memory, one.against) == ("e2e", 5.0, 0.25, "TRL with PEFT")
    assert one.what == "model m, 32 completions of 40 tokens" and one.processor == "one <chip>, 2 threads"
    assert (other.group, other.faster, other.memory) == ("multi_lora", 3.0, None)


def test_yardsticks_are_those_of_the_tables():
    assert set(chart._YARDSTICKS) == set(report.YARDSTICKS)


def test_of_two_measurements_of_one_case_on_one_processor_the_newer_counts(results):
    bar = case("multi_lora", variant("clp-engine", 1.0), variant("torch", 2.0))
    results("a.json", bar, date="2026-02-01")
    results("b.json", bar, date="2026-01-01")
    folder = results("c.json", bar, date="2026-01-01", device="another")
    assert [f.file for f in chart.figures(folder)] == ["a.json", "c.json"]


def test_a_rollouts_figure_is_that_of_its_most_weightings(results):
    folder = results(
        "a.json",
        case(
            "rollout",
            *[
                variant(f"clp-engine, {n} weighting{'s' * (n > 1)}", s)
                for n, s in ((1, 1.0), (16, 4.0), (2, 2.0))
            ],
            variant("transformers generate, merged model", 8.0),
            shape={"rows": 64, "group": 4},
            model="m",
        ),
    )
    assert [(f.what, f.faster) for f in chart.figures(folder)] == [("model m, 64 rows in groups of 4", 2.0)]


def test_what_is_wrong_or_missing_has_no_figure(results):
    folder = results(
        "a.json",
        case("sampling", variant("clp-engine", 1.0, status="wrong"), variant("torch", 2.0)),
        case("sampling", variant("clp-engine", 1.0), variant("torch", 2.0, status="wrong")),
        case("sampling", variant("clp-engine", 1.0), variant("liger", 2.0)),
    )
    (folder / "other.json").write_text("{}")  # of another kind
    assert chart.figures(folder) == [] and chart.table(folder) == []
    with pytest.raises(ValueError, match="nothing to draw"):
        chart.svg([])


def test_bars_are_as_long_as_the_logarithm_of_the_ratio(results):
    ours = [case("multi_lora", variant("clp-engine", 1.0), variant("torch", r)) for r in (2.0, 4.0, 0.5)]
    picture = chart.svg(chart.figures(results("a.json", *ours)))
    bars = [
        r
        for r in ElementTree.fromstring(picture).iter(f"{SVG}rect")
        if r.get("height") == "14" and r.get("x") != "16"
    ]
    two, four, half = (float(bar.get("width")) for bar in bars)
    assert four == pytest.approx(2 * two, abs=0.2) and half == pytest.approx(two, abs=0.2)
    one = float(bars[0].get("x"))
    assert float(bars[1].get("x")) == one and float(bars[2].get("x")) == pytest.approx(one - half, abs=0.2)


def test_each_processor_has_a_colour_and_its_files(results):
    bar = case("multi_lora", variant("clp-engine", 1.0), variant("torch", 2.0))
    results("a.json", bar)
    results("b.json", case("multi_lora", variant("clp-engine", 1.0), variant("torch", 3.0)))
    folder = results("c.json", bar, device="another", instruction_set="avx2", threads=1)
    picture = chart.svg(chart.figures(folder))
    assert "one <chip>, 2 threads (a.json of 2026-01-02, b.json of 2026-01-02)" in words(picture)
    assert "another (avx2), 1 thread (c.json of 2026-01-02)" in words(picture)
    assert len(set(re.findall(r'height="14" fill="(#\w+)"', picture))) == 2


def test_the_committed_results_are_all_in_the_chart(tmp_path):
    chart.main([str(tmp_path / "folder" / "chart.svg")])
    drawn = words((tmp_path / "folder" / "chart.svg").read_text(encoding="utf-8"))
    committed = json.loads((RESULTS / "cpu_kernels.json").read_text())["cases"]
    for measured in committed:
        times = {v["name"]: v["times"]["median"] for v in measured["variants"] if v["status"] == "ok"}
        torch = times.get("torch") or times["torch, full logits"]
        assert any(text.startswith(f"{torch / times['clp-engine']:.2f}x as fast as torch") for text in drawn)


def test_the_readmes_figures_name_their_processor_and_lead_to_their_file():
    lines = chart.table(RESULTS)
    assert len({line.count("|") for line in lines}) == 1 and len(lines) > 6
    for line in lines[2:]:
        *_, processor, source, _ = (cell.strip() for cell in line.split("|"))
        assert processor
        assert (ROOT / re.fullmatch(r"\[.*\]\((.*)\)", source)[1]).is_file()


def test_the_volumes_are_those_of_the_comparison():
    page = (ROOT / "docs" / "results" / "docsum_two" / "comparison.md").read_text(encoding="utf-8")
    values = [
        re.search(r"[\d.]+ ± [\d.]+ times", line)[0] for line in chart.table(RESULTS) if "Volume" in line
    ]
    short = next(line for line in page.split("\n") if line.startswith("- **LoRA-CLP**: against"))
    assert len(values) == 2 and all(f"{value} the volume at the same weightings" in short for value in values)
