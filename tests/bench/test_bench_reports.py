"""compare, plot and readme: regressions are found, charts are drawn, README.md says what was measured."""

import copy
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.core import schema
from bench.pages import readme, report

ROOT = Path(__file__).parents[2]


def measured(**seconds):
    """A result of one case; each variant's spread is 5% around its median."""
    variants = [
        {
            "name": name.replace("_", "-"),
            "status": "ok",
            "times": {
                "median": s, "q1": 0.95 * s, "q3": 1.05 * s, "min": 0.9 * s, "max": 1.1 * s, "runs": 9,
            },
        }
        for name, s in seconds.items()
    ]  # fmt: skip
    case = {
        "id": "g / t / T=8", "group": "g", "op": "o", "title": "t", "shape": {"T": 8}, "dtype": "float32",
        "variants": variants, "floor": {"flops": 1.0, "bytes": 1.0, "exps": 0.0, "seconds": 0.5, "bound": "compute"},
    }  # fmt: skip
    environment = {
        "device": "a|b", "device_type": "cpu", "instruction_set": "avx2", "threads": 2, "date": "2026-01-01",
        "commit": "0123456789-dirty", "versions": {"torch": "2.13"},
    }  # fmt: skip
    return schema.read(
        {
            "version": 1,
            "environment": environment,
            "settings": {},
            "ceilings": {},
            "peers": [],
            "cases": [case],
        }
    )


@pytest.fixture
def compared(tmp_path, capsys):
    def call(before, after, *arguments):
        for name, result in (("a", before), ("b", after)):
            schema.save(result, tmp_path / f"{name}.json")
        code = main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *arguments])
        return code, capsys.readouterr().out

    return call


def test_compare_fails_on_a_slow_down_beyond_spread_and_tolerance(compared):
    code, text = compared(measured(clp_engine=1.0, torch=2.0), measured(clp_engine=1.5, torch=1.0))
    assert code == 1 and "1.500" in text and "REGRESSION g / t / T=8: clp-engine: slower" in text
    assert "0.500 | faster" in text


@pytest.mark.parametrize("after, arguments", [(1.08, ()), (1.2, ("--tolerance", "0.3")), (0.5, ())])
def test_compare_passes_within_the_spread_within_the_tolerance_and_when_faster(compared, after, arguments):
    code, text = compared(measured(clp_engine=1.0), measured(clp_engine=after), *arguments)
    assert code == 0 and "REGRESSION" not in text


def test_a_slower_peer_is_no_regression_unless_asked(compared):
    before, after = measured(clp_engine=1.0, torch=1.0), measured(clp_engine=1.0, torch=3.0)
    assert compared(before, after)[0] == 0
    assert compared(before, after, "--all")[0] == 1


def test_what_was_right_and_is_wrong_is_a_regression(compared):
    after = measured(clp_engine=0.5)
    after.cases[0].variants[0].status, after.cases[0].variants[0].reason = "wrong", "y: error"
    code, text = compared(measured(clp_engine=1.0), after)
    assert code == 1 and "no longer ok: wrong" in text


def test_a_table_gives_ratios_to_torch_the_bare_products_and_the_floor():
    result = measured(bare=0.8, clp_engine=1.0, torch=2.0)
    case = result.cases[0]
    case.bare = "bare"
    row = next(line for line in report.case_table(case) if line.startswith("| clp-engine"))
    assert "2.00x" in row and "1.25x" in row and "50%" in row
    assert "commit 0123456-dirty" in report.provenance(result) and "(avx2), 2 threads" in report.provenance(
        result
    )


def test_readme_and_docs_are_up_to_date_with_the_committed_results():
    pages = readme.pages()
    assert {"README.md", "gpu.md"} <= {path.name for path in pages}
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert "<!-- bench:" in text
        assert readme.render(text) == text, f"{path}: run python -m bench readme"


def test_a_stale_page_is_named_by_check_and_mended_without_it(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("no figures")
    page = tmp_path / "docs" / "gpu.md"
    page.write_text("<!-- bench:gpu/targets -->\nstale\n<!-- /bench -->\n")
    assert readme.update(check=True, root=tmp_path) == 1 and "stale" in page.read_text()
    assert f"{page} is not up to date" in capsys.readouterr().out
    assert readme.update(root=tmp_path) == 0 and "stale" not in page.read_text()
    assert readme.update(check=True, root=tmp_path) == 0


def test_readme_blocks_are_made_anew(tmp_path):
    schema.save(measured(clp_engine=1.0, torch=2.0), tmp_path / "r.json")
    for view in ("r", "r/g", "r/g/1"):
        text = f"before\n<!-- bench:{view} -->\nstale\n<!-- /bench -->\nafter\n"
        once = readme.render(text, tmp_path)
        assert (
            "stale" not in once
            and "2.00x" in once
            and once.startswith("before\n")
            and once.endswith("after\n")
        )
        assert readme.render(once, tmp_path) == once
    changed = copy.deepcopy(measured(clp_engine=1.0, torch=3.0))
    schema.save(changed, tmp_path / "r.json")
    assert readme.render(once, tmp_path) != once


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("<!-- bench:none -->\n<!-- /bench -->", "there is no"),
        ("<!-- bench:r/h -->\n<!-- /bench -->", "nothing of the kind"),
        ("<!-- bench:r -->\n", "expected as many"),
    ],
)
def test_a_block_without_result_or_end_is_an_error(tmp_path, text, complaint):
    schema.save(measured(clp_engine=1.0), tmp_path / "r.json")
    with pytest.raises(ValueError, match=complaint):
        readme.render(text, tmp_path)


def test_plot_draws_a_picture_for_each_group(tmp_path):
    pytest.importorskip("matplotlib")
    schema.save(measured(clp_engine=1.0, torch=2.0), tmp_path / "r.json")
    assert main(["plot", str(tmp_path / "r.json"), "--to", str(tmp_path / "charts")]) == 0
    assert (tmp_path / "charts" / "r_g.png").read_bytes().startswith(b"\x89PNG")
