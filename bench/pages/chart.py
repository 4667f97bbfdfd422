"""Everything that was measured, in one chart and one table: python -m bench.pages.chart OUT.svg [--results FOLDER]

A figure says how many times as fast as its yardstick this project is in one case: the ratio of two medians of one result file.
`figures` reads them from bench/results/*.json. `svg` draws all of them. `table` is the README's table of the main ones, with
the volumes of fronts from docs/results. Files without cases are passed over. A case has no figure where the variant of this
project or the yardstick is wrong or missing. Where two files have the same case on the same processor, the newer one counts.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from clp_engine.core import tables

RESULTS = Path(__file__).parents[2] / "bench" / "results"
# The variant of this project, the first that a case has. Of a rollout it is the one with the most weightings.
_OURS = ("clp-engine, one objective", "clp-engine")
_WEIGHTINGS = re.compile(r"clp-engine, (\d+) weightings?")
# What a case is compared with, the first that it has, and how a reader would call it.
_YARDSTICKS = {
    "trl + peft": "TRL with PEFT",
    "transformers generate, merged model": "transformers' generate",
    "torch": "torch",
    "torch, full logits": "torch, full logits",
}
_SECTIONS = {
    "e2e": "Training step",
    "rollout": "Decode step of a rollout",
    "linear_logprob": "Log-prob, entropy, KL from hidden states",
    "logits_logprob": "Log-prob, entropy, KL from logits",
    "multi_lora": "Linear layer with a blend of adapters",
    "decode": "Decoding, per token",
    "sampling": "Sampling",
    "interpolate": "Arithmetic on weights",
}
_COLOURS = ("#1f6f8b", "#e0a458", "#7a5195", "#5b8c5a", "#bc5090", "#6b6b6b")
_FRONTS = Path("docs") / "results" / "docsum_two"


@dataclass(frozen=True)
class Figure:
    """One case of one result file: `faster` is yardstick's median over ours, `memory` our extra peak over the yardstick's."""

    group: str
    what: str
    against: str
    faster: float
    memory: float | None
    processor: str
    file: str  # its name in bench/results
    date: str


def figures(results: Path = RESULTS) -> list[Figure]:
    """In the order of the sections, files by name, cases as in their file."""
    newest: dict[tuple[str, str], Figure] = {}
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for case in content.get("cases", []):
            if figure := _figure(case, content["environment"], path.name):
                known = newest.setdefault((case["id"], figure.processor), figure)
                if known.date < figure.date:
                    newest[case["id"], figure.processor] = figure
    order = [*_SECTIONS, *(f.group for f in newest.values())]
    return sorted(newest.values(), key=lambda f: order.index(f.group))


def _figure(case: dict, environment: dict, file: str) -> Figure | None:
    right = {v["name"]: v for v in case["variants"] if v["status"] == "ok" and v.get("times")}
    weightings = {int(m[1]): name for name in right if (m := _WEIGHTINGS.fullmatch(name))}
    names = [weightings[max(weightings)]] if weightings else _OURS
    ours = next((right[name] for name in names if name in right), None)
    yardstick = next((right[name] for name in _YARDSTICKS if name in right), None)
    if ours is None or yardstick is None:
        return None
    peaks = ours.get("extra_peak_bytes"), yardstick.get("extra_peak_bytes")
    return Figure(
        group=case["group"],
        what=_what(case),
        against=_YARDSTICKS[yardstick["name"]],
        faster=yardstick["times"]["median"] / ours["times"]["median"],
        memory=peaks[0] / peaks[1] if all(peaks) else None,
        processor=_processor(environment),
        file=file,
        date=environment["date"],
    )


def _what(case: dict) -> str:
    """The case in few words: the model of a step or a rollout, else its title, and the sizes."""
    sizes = dict(case["shape"])
    if case["group"] == "e2e":
        return f"model {case['options']['model']}, {sizes['batch']} completions of {sizes['new']} tokens"
    if case["group"] == "rollout":
        return f"model {case['options']['model']}, {sizes['rows']} rows in groups of {sizes['group']}"
    title = case["title"].replace("fwd+bwd", "forward+backward").replace("logprob", "log-prob")
    return ", ".join([title, " ".join(f"{name}={size}" for name, size in sizes.items())])


def _processor(environment: dict) -> str:
    name = str(environment["device"])
    if cores := environment.get("instruction_set"):
        name += f" ({cores})"
    if environment.get("device_type") != "cuda" and environment.get("threads") and "thread" not in name:
        name += f", {environment['threads']} thread{'' if environment['threads'] == 1 else 's'}"
    return name


def svg(found: list[Figure]) -> str:
    """A bar for each figure, its length the logarithm of `faster`; left of the line at 1x the yardstick is faster."""
    if not found:
        raise ValueError("no result has a case beside its yardstick: there is nothing to draw")
    left, width, line, right = 30 + 7.0 * max(len(f.what) for f in found), 420, 19, 250
    low = min(0.5, *(f.faster for f in found))
    high = max(2.0, *(f.faster for f in found))

    def x(ratio: float) -> float:
        return left + width * math.log(ratio / low) / math.log(high / low)

    processors = list(dict.fromkeys(f.processor for f in found))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(processors)}
    parts, y = [], 52.0
    for group in dict.fromkeys(f.group for f in found):
        y += 8
        parts.append(_text(16, y + 13, _SECTIONS.get(group, group), weight="bold"))
        y += line + 3
        for f in (f for f in found if f.group == group):
            start, end = sorted((x(1.0), x(f.faster)))
            parts += [
                _text(left - 10, y + 13, f.what, anchor="end"),
                f'<rect x="{start:.1f}" y="{y + 2:.1f}" width="{max(end - start, 1):.1f}" height="{line - 5}" '
                f'fill="{colours[f.processor]}"/>',
                _text(end + 6, y + 13, f"{f.faster:.2f}x as fast as {f.against}"),
            ]
            y += line
    bottom = y + 6
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
    grid = [
        f'<line x1="{x(t):.1f}" y1="52" x2="{x(t):.1f}" y2="{bottom:.1f}" stroke="{"#444" if t == 1 else "#ddd"}"/>'
        for t in ticks
    ]
    labels = [_text(x(t), bottom + 16, f"{t:g}x", anchor="middle") for t in ticks]
    legend = []
    for i, name in enumerate(processors):
        place = bottom + 30 + i * line
        legend.append(f'<rect x="16" y="{place + 2:.1f}" width="14" height="14" fill="{colours[name]}"/>')
        files = ", ".join(dict.fromkeys(f"{f.file} of {f.date}" for f in found if f.processor == name))
        legend.append(_text(38, place + 13, f"{name} ({files})"))
    height = math.ceil(bottom + 40 + line * len(processors))
    total = math.ceil(left + width + right)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" width="{total}" height="{height}" '
            'font-family="sans-serif" font-size="12" fill="#222" role="img">',
            "<title>clp-engine beside other libraries</title>",
            f'<rect width="{total}" height="{height}" fill="#fff"/>',
            _text(
                16,
                24,
                "clp-engine beside other libraries: ratio of median times, logarithmic scale",
                weight="bold",
                size=15,
            ),
            *grid,
            *parts,
            *labels,
            *legend,
            "</svg>",
            "",
        ]
    )


def _text(
    x: float, y: float, words: str, anchor: str = "start", weight: str = "normal", size: int = 12
) -> str:
    style = "".join(
        f' {name}="{value}"'
        for name, value, usual in (
            ("text-anchor", anchor, "start"),
            ("font-weight", weight, "normal"),
            ("font-size", size, 12),
        )
        if value != usual
    )
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(words)}</text>'


def table(results: Path = RESULTS) -> list[str]:
    """Lines of Markdown for the README: the main figures, the processor and the file of each. Links start at the repository."""
    rows = [("Volume of the front, " + what, *rest) for what, *rest in _volumes(results.parents[1])]
    for f in _main(figures(results)):
        memory = f", with {f.memory:.2f} times the memory" if f.group == "e2e" and f.memory else ""
        what = f"{_SECTIONS.get(f.group, f.group)}: {f.what}"
        source = f"[{f.file}](bench/results/{f.file})"
        rows.append((what, f"{f.faster:.1f} times as fast{memory}", f.against, f.processor, source))
    return tables.compact(["what", "figure", "compared with", "processor", "from"], rows) if rows else []


def _main(found: list[Figure]) -> list[Figure]:
    """Every training step, and of each file the first case of the other groups that tell most."""
    firsts: dict[tuple[str, str], Figure] = {}
    for f in found:
        if f.group in ("rollout", "linear_logprob", "multi_lora"):
            firsts.setdefault((f.file, f.group), f)
    return [f for f in found if f.group == "e2e" or f in firsts.values()]


def _volumes(root: Path) -> list[tuple[str, str, str, str, str]]:
    """LoRA-CLP's hypervolume over another method's at the same weightings: mean and 95 % interval over seeds."""
    path = root / _FRONTS / "comparison.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    source = f"[comparison]({(_FRONTS / 'comparison.md').as_posix()})"
    wanted = {
        "Rewarded Soups": "as many generated tokens",
        "specialists": "a fifth of the generated tokens",
    }
    rows = []
    for contrast in content["contrasts"]:
        if contrast["method"] == "LoRA-CLP" and contrast["reference"] in wanted:
            ratio = contrast["volume_ratio_matched"]
            value = f"{ratio['mean']:.2f} ± {(ratio['high'] - ratio['low']) / 2:.2f} times"
            what = f"one run of LoRA-CLP with {wanted[contrast['reference']]}"
            rows.append((what, value, contrast["reference"], content["machine"]["processor"], source))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pages.chart", description="draw every measured ratio as SVG"
    )
    parser.add_argument("out", metavar="OUT.svg", type=Path)
    parser.add_argument("--results", metavar="FOLDER", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(svg(figures(options.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
