"""The figures of README.md and of the pages in docs/, from the committed results.

Between `<!-- bench:NAME -->` and `<!-- /bench -->` stand the tables of bench/results/NAME.json; NAME/targets is its targets,
NAME/rollouts is a line for each rollout, NAME/GROUP the cases of one group, NAME/GROUP/1 the first of them. gpu/VIEW is of all
results from GPUs (bench/pages/gpu_page.py). `figures` is the README's table of the main figures, from all files, and
docs/benchmarks/chart.svg, drawn anew with the pages, shows every figure (bench/pages/chart.py).
"""

from __future__ import annotations

import re
from pathlib import Path

from bench.core import schema
from bench.pages import chart, gpu_page, report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
_BLOCK = re.compile(r"(<!-- bench:(?P<name>\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def render(text: str, results: Path = RESULTS) -> str:
    """The text with every block's inside made anew. Raises ValueError for a block that has no end or no result."""
    opened, closed = len(re.findall(r"<!-- bench:\S+ -->", text)), text.count("<!-- /bench -->")
    if opened != closed:
        raise ValueError(f"{opened} <!-- bench:NAME --> and {closed} <!-- /bench -->; expected as many")
    return _BLOCK.sub(lambda m: f"{m[1]}{_block(m['name'], results)}\n{m[3]}", text)


def _block(name: str, results: Path) -> str:
    stem, *view = name.split("/")
    if stem == "gpu" and len(view) == 1:
        return "\n".join(["", *gpu_page.view(view[0], results), ""])
    if name == "figures":
        nothing = [] if gpu_page.found(results) else ["", gpu_page.NOTHING]
        return "\n".join(["", *chart.table(results), *nothing, ""])
    path = results / f"{stem}.json"
    if not path.exists():
        raise ValueError(f"<!-- bench:{name} -->: there is no {path}")
    result = schema.load(path)
    cases = result.cases
    caption = f"{report.provenance(result)} (`bench/results/{stem}.json`)."
    if view == ["targets"]:
        body = report.targets(cases)
    elif view == ["rollouts"]:
        body = report.decode_table(cases)
    else:
        if view:
            cases = [case for case in cases if case.group == view[0]]
        if len(view) == 2:
            cases = cases[: int(view[1])]
        body = [
            line
            for case in cases
            for line in (f"{case.group}: {report.heading(case)}", "", *report.case_table(case), "")
        ]
    if not body:
        raise ValueError(f"<!-- bench:{name} -->: {path} has nothing of the kind")
    return "\n".join(["", *body, "", caption, ""]).replace("\n\n\n", "\n\n")


def pages(root: Path = ROOT) -> list[Path]:
    """README.md, and those in docs/ and docs/benchmarks/ that have figures."""
    docs = root / "docs"
    found = (
        path
        for path in sorted([*docs.glob("*.md"), *docs.glob("benchmarks/*.md")])
        if "<!-- bench:" in path.read_text("utf-8")
    )
    return [root / "README.md", *found]


def update(check: bool = False, root: Path = ROOT) -> int:
    """Makes pages and chart anew, or with `check` names those that are not up to date; returns 1 where there are such."""
    results = root / "bench" / "results"
    made = {path: render(path.read_text(encoding="utf-8"), results) for path in pages(root)}
    picture = root / "docs" / "benchmarks" / "chart.svg"
    if picture.parent.is_dir() and (found := chart.figures(results)):
        made[picture] = chart.svg(found)
    stale = 0
    for path, after in made.items():
        if path.exists() and path.read_text(encoding="utf-8") == after:
            continue
        stale = 1
        if check:
            print(f"{path} is not up to date with bench/results; run python -m bench readme")
        else:
            path.write_text(after, encoding="utf-8")
            print(f"{path} brought up to date")
    return stale if check else 0
