"""Measures what closed_form.md reports: trained policies against optima that are known exactly.

    python docs/results/closed_form.py           train (two to three minutes on one core), then write the three files
    python docs/results/closed_form.py --draw    figure and tables anew from closed_form.json

Writes closed_form.json and closed_form.png beside this file, and the tables of closed_form.md, which stand there between
`<!-- measured:NAME -->` and `<!-- /measured -->`. matplotlib draws (`pip install -e .[plot]`).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean

import torch

from clp_engine.core.conditions import KL_CONDITIONING
from clp_engine.core.files import write_text
from clp_engine.core.provenance import source_commit, versions
from clp_engine.objectives.weightings import build_sampler, simplex_lattice
from clp_engine.tasks.closed_form import dilemma
from clp_engine.tasks.closed_form.policies import Network, Tables, TabularMixture, soup
from clp_engine.tasks.closed_form.task import TabularTask
from clp_engine.tasks.closed_form.training import Trained, combine, train, train_specialist

HERE = Path(__file__).parent
PROMPTS, GROUP = 128, 4  # of every step of every run
# By number of objectives: the KL coefficient, points per edge of the weightings evaluated, seeds, and how runs are made.
ALPHA = {2: 0.1, 3: 0.2}
EDGE = {2: 11, 3: 7}
SEEDS = {2: 6, 3: 5}
TRAINING = {2: {"steps": 200, "learning_rate": 0.05}, 3: {"steps": 400, "learning_rate": 0.03}}
TABLE_LEARNING_RATE = 0.2
# Of networks trained for one weighting: of 0.01, 0.02, 0.03 and 0.05 it brings them closest to their own optima.
SPECIALIST_LEARNING_RATE = 0.02
CORNERS = {2: 0.3, 3: 0.5}
WIDTH = 16
ALPHAS = [round(0.1 * 6 ** (i / 8), 3) for i in range(9)]  # 0.1 to 0.6, evenly in its logarithm
ARRIVED = 0.02  # a run whose shortfall stays below at every weighting has found every optimum

NAMES = {
    "clp": "CLP, network",
    "specialists": "specialist per weighting, network",
    "soup": "Rewarded Soup, network",
    "mixed logits": "specialists' logits mixed, network",
    "table soup": "Rewarded Soup, tables",
    "clp output": "CLP, output layer only",
    "clp tables": "CLP, tables",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="measure nothing; from closed_form.json")
    path = HERE / "closed_form.json"
    if not parser.parse_args().draw:
        torch.set_num_threads(1)  # tables of a few hundred numbers: more threads only get in each other's way
        write_text(path, compact(measure()))
    result = json.loads(path.read_text(encoding="utf-8"))  # as rounded there
    page = HERE / "closed_form.md"
    write_text(page, with_tables(page.read_text(encoding="utf-8"), result))
    draw(result, HERE / "closed_form.png")


# --- measuring -----------------------------------------------------------------------------------------------


def measure() -> dict:
    start, commit = time.process_time(), source_commit()
    settings = {
        "prompts": PROMPTS,
        "group_size": GROUP,
        "alpha": ALPHA,
        "training": TRAINING,
        "table_learning_rate": TABLE_LEARNING_RATE,
        "specialist_learning_rate": SPECIALIST_LEARNING_RATE,
        "corner_probability": CORNERS,
        "width": WIDTH,
        "seeds": SEEDS,
        "arrived": ARRIVED,
    }
    result = {
        "settings": settings,
        "dilemma": {k: measure_dilemma(k) for k in (2, 3)},
        "conditions": measure_conditions(),
        "dependence": measure_dependence(),
    }
    made = {
        "seconds": round(time.process_time() - start, 1),
        "versions": versions(),
        "commit": commit,
    }
    return result | made


def network(seed: int, width: int = WIDTH, **options) -> Callable[[TabularTask], Network]:
    return partial(Network.of, width=width, seed=seed, **options)


def measure_dilemma(objectives: int) -> dict:
    """Every policy of every seed over the lattice of weightings: shortfall (seeds, W) and log-odds of commit (seeds, W)."""
    task, alpha, grid = (
        dilemma.dilemma(objectives),
        ALPHA[objectives],
        simplex_lattice(objectives, EDGE[objectives]),
    )
    uniform = torch.full((objectives,), 1 / objectives)
    optimal = [dilemma.optimal_commit_probability(task, w, alpha) for w in grid]
    best = [
        task.objective(task.reference, w, alpha) + alpha * task.kl_to_optimum(task.reference, w, alpha)
        for w in grid
    ]
    policies: dict[str, dict[str, list]] = {}
    anywhere = []
    for seed in range(SEEDS[objectives]):
        for name, logits in dilemma_policies(task, objectives, seed):
            rows = [logits(w) for w in grid]
            into = policies.setdefault(name, {"shortfall": [], "log_odds": []})
            into["shortfall"].append([alpha * task.kl_to_optimum(z, w, alpha) for z, w in zip(rows, grid)])
            into["log_odds"].append([log_odds(dilemma.commit_probability(z)) for z in rows])
            if name == "soup":
                anywhere.append(min(alpha * task.kl_to_optimum(z, uniform, alpha) for z in rows))
    return {
        "alpha": alpha,
        "weights": grid.tolist(),
        "optimum": {"objective": best, "log_odds": [log_odds(p) for p in optimal]},
        "reference": {"objective": [task.objective(task.reference, w, alpha) for w in grid]},
        "bounds": {
            "interpolation": dilemma.interpolation_shortfall(task, alpha),
            "affine": dilemma.affine_shortfall(task, alpha),
        },
        "policies": policies,
        # At the uniform weighting, with the coefficients on the lattice that suit it best.
        "soup_with_any_coefficients": anywhere,
    }


def dilemma_policies(
    task: TabularTask, objectives: int, seed: int
) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """(name, weighting -> logits (P, V)) of every policy of one seed. All of them draw equally many completions per run."""
    alpha, options = (
        ALPHA[objectives],
        {**TRAINING[objectives], "prompts": PROMPTS, "group_size": GROUP, "seed": seed},
    )
    sampler = build_sampler(objectives, "uniform", corner_probability=CORNERS[objectives], kl=alpha)
    starts = {"clp": network(seed), "clp output": network(seed, output_only=True), "clp tables": Tables.of}
    for_tables = options | {"learning_rate": TABLE_LEARNING_RATE}
    for_one = options | {"learning_rate": SPECIALIST_LEARNING_RATE}
    for name, start in starts.items():
        chosen = for_tables if name == "clp tables" else options
        yield name, at(train(task, sampler, start=start, **chosen), alpha)
    corners = torch.eye(objectives)
    alone = [train_specialist(task, w, alpha, start=network(seed), **for_one) for w in corners]
    yield "soup", at(combine(task, alone, soup), alpha)
    yield "mixed logits", at(combine(task, alone, TabularMixture.of), alpha)
    tables = [train_specialist(task, w, alpha, **for_tables) for w in corners]
    yield "table soup", at(combine(task, tables, soup), alpha)
    if objectives == 2:  # with three there are 28 weightings
        yield "specialists", partial(specialist_logits, task, alpha, for_one)


def specialist_logits(task: TabularTask, alpha: float, options: dict, weights: torch.Tensor) -> torch.Tensor:
    start = network(options["seed"])
    return train_specialist(task, weights, alpha, start=start, **options).logits(torch.ones(1), alpha)


def at(trained: Trained, alpha: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weights: trained.logits(weights, alpha)


def log_odds(p: float) -> float:
    return torch.logit(torch.tensor(p, dtype=torch.float64)).item()


def measure_conditions() -> dict:
    """KL to the optimum over (alpha, w), (seeds, A, W), one run for all conditions, by form of the KL conditioning."""
    settings = {
        "one token": {"steps": 1000, "prompts": 64, "learning_rate": 0.2, "corners": 0.0, "seeds": 3},
        "dilemma": {
            "steps": 600,
            "prompts": PROMPTS,
            "learning_rate": 0.05,
            "corners": CORNERS[2],
            "seeds": 3,
        },
    }
    grid, distance = simplex_lattice(2, 11), {}
    for name, chosen in settings.items():
        options = {k: chosen[k] for k in ("steps", "prompts", "learning_rate")}
        sampler = build_sampler(
            2, "uniform", corner_probability=chosen["corners"], kl=(ALPHAS[0], ALPHAS[-1])
        )
        distance[name] = {}
        for form in KL_CONDITIONING:
            runs = []
            for seed in range(chosen["seeds"]):
                # One token: another task for every seed.
                task = dilemma.dilemma() if name == "dilemma" else TabularTask.random(8, 1, 2, seed=seed)
                start = network(seed) if name == "dilemma" else Tables.of
                trained = train(task, sampler, start=start, kl_conditioning=form, seed=seed, **options)
                runs.append([[trained.kl_to_optimum(w, alpha) for w in grid] for alpha in ALPHAS])
            distance[name][form] = runs
    return {"alphas": ALPHAS, "weights": grid.tolist(), "settings": settings, "distance": distance}


def measure_dependence() -> list[dict]:
    """The largest shortfall of every seed's network, one thing at a time changed from the settings above."""
    cells = [
        {},
        *({"corners": c} for c in (0.0, 0.1)),
        *({"width": w} for w in (4, 32)),
        {"learning_rate": 0.01},
        {"scale": 3.0},
        {"alpha": 0.05},
        {"objectives": 3},
        {"objectives": 3, "alpha": 0.1},
    ]
    return [{"changed": changed, "worst": worst_by_seed(**changed)} for changed in cells]


def worst_by_seed(
    objectives: int = 2,
    corners: float | None = None,
    width: int = WIDTH,
    scale: float = 1.0,
    learning_rate: float | None = None,
    alpha: float | None = None,
) -> list[float]:
    task, grid = dilemma.dilemma(objectives), simplex_lattice(objectives, EDGE[objectives])
    alpha = alpha or ALPHA[objectives]
    options = {**TRAINING[objectives], "prompts": PROMPTS, "group_size": GROUP}
    options |= {} if learning_rate is None else {"learning_rate": learning_rate}
    corners = CORNERS[objectives] if corners is None else corners
    sampler = build_sampler(objectives, "uniform", corner_probability=corners, kl=alpha)
    worst = []
    for seed in range(SEEDS[objectives]):
        trained = train(task, sampler, start=network(seed, width, scale=scale), seed=seed, **options)
        worst.append(max(alpha * trained.kl_to_optimum(w, alpha) for w in grid))
    return worst


# --- the page ------------------------------------------------------------------------------------------------


def compact(result: dict) -> str:
    """JSON with lists of numbers on one line, and no digits beyond float32's."""
    text = json.dumps(
        json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.6g}")), indent=1
    )
    flat = re.compile(r"\[\s+([^][{}]*?)\s+\]")
    return flat.sub(lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text) + "\n"


def tables(result: dict) -> dict[str, str]:
    """By name, the Markdown that closed_form.md holds."""
    return {
        "two": dilemma_table(result["dilemma"]["2"]),
        "three": dilemma_table(result["dilemma"]["3"]),
        "conditions": conditions_table(result["conditions"]),
        "dependence": dependence_table(result),
        "made": made(result),
    }


def made(result: dict) -> str:
    software = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"Made in {result['seconds']:.0f} s of one core with {software}; commit {result['commit']}."


def spread(values: list[float], digits: int = 3) -> str:
    return f"{mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def dilemma_table(result: dict) -> str:
    """Shortfalls: mean over seeds [least, largest]."""
    weights, bounds = result["weights"], result["bounds"]
    corners = [i for i, w in enumerate(weights) if max(w) == 1]
    uniform = min(range(len(weights)), key=lambda i: max(weights[i]))
    rows = []
    for name, label in NAMES.items():
        if name not in result["policies"]:
            continue
        runs = result["policies"][name]["shortfall"]
        proved = "none"
        if name in ("mixed logits", "table soup"):
            proved = f"uniform >= {bounds['interpolation']:.3f}"
        elif name in ("clp output", "clp tables"):
            proved = f"worst >= {bounds['affine']:.3f}"
        columns = [
            [mean(run) for run in runs],
            [max(run[i] for i in corners) for run in runs],
            [run[uniform] for run in runs],
            [max(run) for run in runs],
        ]
        rows.append([label, *map(spread, columns), proved])
    header = [
        "policy",
        "mean over w",
        "worst corner",
        "uniform w",
        "worst w",
        "proved, for optimal specialists or any affine policy",
    ]
    best = (
        f"The soup of networks at the uniform weighting, with whichever coefficients of a lattice with {len(weights)} points "
        f"suit it best: {spread(result['soup_with_any_coefficients'])}."
    )
    return f"{markdown(header, rows)}\n\n{best}"


def conditions_table(result: dict) -> str:
    rows = []
    for form in KL_CONDITIONING:
        row = [form]
        for name in ("one token", "dilemma"):
            runs = [[d for at_alpha in run for d in at_alpha] for run in result["distance"][name][form]]
            row += [spread([mean(run) for run in runs], 4), spread([max(run) for run in runs])]
        rows.append(row)
    header = ["kl_conditioning", "one token: mean KL", "worst KL", "dilemma, network: mean KL", "worst KL"]
    return markdown(header, rows)


def dependence_table(result: dict) -> str:
    rows = []
    for cell in result["dependence"]:
        worst, limit = cell["worst"], result["settings"]["arrived"]
        changed = ", ".join(f"{name} {value:g}" for name, value in cell["changed"].items())
        arrived = sum(w < limit for w in worst)
        rows.append(
            [
                changed or "as above",
                f"{arrived} of {len(worst)}",
                f"{sorted(worst)[len(worst) // 2]:.3f}",
                f"{max(worst):.3f}",
            ]
        )
    return markdown(["changed", "runs that arrive", "worst w: median over seeds", "largest"], rows)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def with_tables(page: str, result: dict) -> str:
    """The page's text with the tables of `result` in their places."""
    for name, table in tables(result).items():
        opened, closed = f"<!-- measured:{name} -->\n", "<!-- /measured -->"
        before, found, rest = page.partition(opened)
        if not found or closed not in rest:
            raise ValueError(f"closed_form.md: no {opened.strip()} with a {closed} after it")
        page = f"{before}{opened}\n{table}\n\n{rest[rest.index(closed) :]}"
    return page


# --- the figure ----------------------------------------------------------------------------------------------

STYLES = {
    "clp": {"color": "#2b7bba", "lw": 2.2, "marker": "o", "ms": 5},
    "specialists": {"color": "#2a9d5c", "lw": 0, "marker": "D", "ms": 7, "mfc": "none"},
    "soup": {"color": "#d1495b", "lw": 1.8, "marker": "s", "ms": 4},
    "mixed logits": {"color": "#b8860b", "lw": 1.8, "ls": "--", "marker": "^", "ms": 4},
    "clp tables": {"color": "#7b4fa3", "lw": 1.4, "ls": ":", "marker": "v", "ms": 4},
}
FORMS = {"none": "#8a8a8a", "linear": "#d1495b", "odds": "#2b7bba"}


def draw(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.9), layout="constrained")
    objective, odds, distance = figure.subplots(1, 3)
    two = result["dilemma"]["2"]
    across = [w[0] for w in two["weights"]]

    def curves(axis, values: Callable[[str], list[list[float]]], names: tuple[str, ...]) -> None:
        for name in names:
            runs = values(name)
            centre = [mean(column) for column in zip(*runs)]
            axis.plot(across, centre, label=NAMES[name], zorder=3, **STYLES[name])
            low, high = ([pick(column) for column in zip(*runs)] for pick in (min, max))
            axis.fill_between(across, low, high, color=STYLES[name]["color"], alpha=0.18, lw=0)

    best = two["optimum"]["objective"]
    objective.plot(
        across, best, color="black", lw=5, alpha=0.25, label="optimum, exact", solid_capstyle="round"
    )
    objective.plot(across, two["reference"]["objective"], color="#8a8a8a", lw=1, label="before training")
    curves(
        objective,
        lambda name: [[b - s for b, s in zip(best, run)] for run in two["policies"][name]["shortfall"]],
        tuple(STYLES),
    )
    objective.set_ylabel(f"objective J, exact (alpha = {two['alpha']:g})")
    objective.set_title("What each policy reaches", loc="left", fontsize=11)

    odds.plot(across, two["optimum"]["log_odds"], color="black", lw=5, alpha=0.25, solid_capstyle="round")
    curves(
        odds, lambda name: two["policies"][name]["log_odds"], ("clp", "soup", "mixed logits", "clp tables")
    )
    odds.axhline(0, color="#8a8a8a", lw=0.8, zorder=1)
    odds.set_ylabel("log-odds of committing at the first token")
    odds.set_title("Why: commit at both ends, but not between", loc="left", fontsize=11)
    for axis in (objective, odds):
        axis.set_xlabel("weight of the first objective")

    conditions = result["conditions"]
    for name, style in (("one token", "-"), ("dilemma", "--")):
        for form, colour in FORMS.items():
            runs = conditions["distance"][name][form]
            worst = [[max(at_alpha) for at_alpha in run] for run in runs]
            label = f"{form}, {'one token' if name == 'one token' else 'dilemma, network'}"
            centre = [mean(column) for column in zip(*worst)]
            distance.plot(conditions["alphas"], centre, style, color=colour, marker="o", ms=3.5, label=label)
            low, high = ([pick(column) for column in zip(*worst)] for pick in (min, max))
            distance.fill_between(conditions["alphas"], low, high, color=colour, alpha=0.12, lw=0)
    distance.set_xscale("log")
    distance.set_yscale("log")
    ticks = [0.1, 0.15, 0.2, 0.3, 0.4, 0.6]
    distance.set_xticks(ticks, [f"{t:g}" for t in ticks])
    distance.minorticks_off()
    distance.set_xlabel("alpha")
    distance.set_ylabel("KL to the optimum, worst weighting (nats)")
    distance.set_title("One run for all (w, alpha), by form of the blend", loc="left", fontsize=11)
    for axis in (objective, odds, distance):
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = objective.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    distance.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
