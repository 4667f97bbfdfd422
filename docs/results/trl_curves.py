"""Measures what trl_curves/README.md reports: the same problem given to TRL's GRPOTrainer and to CLPTrainer, over seeds.

    python docs/results/trl_curves.py              what is missing of the runs (`pip install -e .[bench]`), then the page
    python docs/results/trl_curves.py --report     the page anew from the runs that are there
    python docs/results/trl_curves.py --seeds 2    the first two seeds only

Writes into trl_curves/: records/<library>-<seed>.json as each run ends, so that the script goes on where it was stopped;
curves.json, curves.png and README.md from all of them. matplotlib draws (`pip install -e .[plot]`).

A seed gives both trainers the same prompts in the same order; adapters and completions are drawn by each for itself. So the
difference of two runs of one seed is a pair, and a mean difference over seeds is judged by Student's t-test for pairs,
t = m / (s / sqrt(n)).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import random
import re
import statistics
import tempfile
import time
from pathlib import Path

from clp_engine.core.files import write_text
from clp_engine.core.provenance import source_commit, versions
from clp_engine.core.statistics import CONFIDENCE, Estimate, t_probability

HERE = Path(__file__).with_suffix("")
LIBRARIES = {"clp": "CLPTrainer", "trl": "TRL GRPOTrainer with PEFT"}
COLOURS = {"clp": "#2b7bba", "trl": "#d1495b"}
SEEDS = tuple(range(1, 9))
PROMPTS, PROMPT_TOKENS = 512, 80  # rows of the training split, and the most tokens of one
ENDS = 5  # steps at either end of a run whose mean is taken
# Names and values that both configurations take.
SHARED = {
    "max_steps": 24,
    "per_device_train_batch_size": 32,
    "num_generations": 8,
    "max_completion_length": 32,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
    "beta": 0.04,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "temperature": 1.0,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "shuffle_dataset": False,  # the seed has done it
}
RANK, LORA_ALPHA = 16, 32
# What TRL does without being asked, in our names. Its k3 is multiplied by the ratio, and at ratio 1 the gradient is k2's.
AS_TRL = {"kl_estimator": "k2", "baseline": "group_mean", "conditioning": "none"}
RECORDED = {  # by our name, what both trainers log
    "reward": "reward",
    "kl": "kl",
    "entropy": "entropy",
    "length": "completions/mean_length",
    "clipped": "completions/clipped_ratio",
    "grad_norm": "grad_norm",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the seeds")
    options = parser.parse_args()
    if not options.report:
        commit = source_commit()  # of what is imported from here on, whatever happens to the tree meanwhile
        for seed in SEEDS[: options.seeds]:
            for library in LIBRARIES:
                measure(library, seed, commit)
    result = summarise(load_runs(HERE))
    write_text(HERE / "curves.json", as_json(result))
    write_text(HERE / "README.md", page(result))
    draw(result, HERE / "curves.png")


# --- measuring -----------------------------------------------------------------------------------------------


def measure(library: str, seed: int, commit: str | None) -> None:
    """Train once and write the run's record, unless it is there."""
    path = HERE / "records" / f"{library}-{seed}.json"
    if path.exists():
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        history = {"trl": train_trl, "clp": train_ours}[library](seed, folder)
    seconds = time.perf_counter() - start
    steps = [entry for entry in history if "reward" in entry]
    if len(steps) != SHARED["max_steps"]:
        raise RuntimeError(f"{library}, seed {seed}: {len(steps)} steps were logged of {SHARED['max_steps']}")
    record = {
        "library": library,
        "seed": seed,
        "curves": {ours: [entry[logged] for entry in steps] for ours, logged in RECORDED.items()},
        "step_seconds": [entry["step_time"] for entry in steps],
        "seconds": round(seconds, 1),
        "settings": settings(library),
        "versions": {**versions(), **{p: importlib.metadata.version(p) for p in ("trl", "peft", "datasets")}},
        "commit": commit,
    }
    write_text(path, as_json(record))


def settings(library: str) -> dict:
    return {
        **(AS_TRL if library == "clp" else {}),
        **SHARED,
        "rank": RANK,
        "lora_alpha": LORA_ALPHA,
        "prompts": PROMPTS,
        "prompt_tokens": PROMPT_TOKENS,
        "reward": "brevity",
    }


def problem(seed: int):
    """(model, tokenizer, rows): the shipped model in float32, and the prompts in the seed's order."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from clp_engine.tasks.docsum import checkpoint_path, load_dataset

    model = AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    rows = load_dataset("train", PROMPTS, tokenizer=tokenizer, max_prompt_tokens=PROMPT_TOKENS)
    random.Random(seed).shuffle(rows)
    return model, tokenizer, rows


def train_trl(seed: int, folder: str) -> list[dict]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from clp_engine.tasks.docsum import brevity

    model, tokenizer, rows = problem(seed)
    config = GRPOConfig(
        output_dir=folder, seed=seed, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, **SHARED,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=brevity,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    return trainer.state.log_history


def train_ours(seed: int, folder: str) -> list[dict]:
    from clp_engine import CLPConfig, CLPTrainer
    from clp_engine.tasks.docsum import brevity

    model, tokenizer, rows = problem(seed)
    config = CLPConfig(
        output_dir=folder, seed=seed, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        rank=RANK, lora_alpha=LORA_ALPHA, **AS_TRL, **SHARED,
    )  # fmt: skip
    trainer = CLPTrainer(model, brevity, config, rows, processing_class=tokenizer)
    trainer.train()
    return trainer.state.log_history


# --- what came out -------------------------------------------------------------------------------------------


def load_runs(folder: Path) -> list[dict]:
    """Every record, by library and seed. Raises ValueError where records have other settings than this script."""
    runs = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "records").glob("*.json"))
    ]
    for run in runs:
        if run["settings"] != settings(run["library"]):
            raise ValueError(
                f"{run['library']}, seed {run['seed']}: measured with other settings; remove its record"
            )
    return sorted(runs, key=lambda run: (run["library"], run["seed"]))


def summarise(runs: list[dict]) -> dict:
    """Means of every curve by library with intervals over seeds, and the tests of their differences."""
    by_library = {name: [run for run in runs if run["library"] == name] for name in LIBRARIES}
    curves = {
        library: {
            name: [band([run["curves"][name][step] for run in of]) for step in range(SHARED["max_steps"])]
            for name in RECORDED
        }
        for library, of in by_library.items()
    }
    pairs = [
        (ours, theirs)
        for ours in by_library["clp"]
        for theirs in by_library["trl"]
        if ours["seed"] == theirs["seed"]
    ]
    return {
        "settings": {library: settings(library) for library in LIBRARIES},
        "seeds": [ours["seed"] for ours, _ in pairs],
        "curves": curves,
        "comparisons": {
            name: compared([(value(ours), value(theirs)) for ours, theirs in pairs])
            for name, value in COMPARED.items()
        },
        "gain": {
            library: band([final(run, "reward") - first(run, "reward") for run in of])
            for library, of in by_library.items()
        },
        "seconds": {library: sum(run["seconds"] for run in of) for library, of in by_library.items()},
        "median_step_seconds": {
            library: statistics.median(s for run in of for s in run["step_seconds"][1:])
            for library, of in by_library.items()
        },
        "versions": runs[0]["versions"],
        "commits": sorted({str(run["commit"]) for run in runs}),
    }


def first(run: dict, name: str) -> float:
    return statistics.fmean(run["curves"][name][:ENDS])


def final(run: dict, name: str) -> float:
    return statistics.fmean(run["curves"][name][-ENDS:])


COMPARED = {
    "reward, area under the curve": lambda run: statistics.fmean(run["curves"]["reward"]),
    f"reward, last {ENDS} steps": lambda run: final(run, "reward"),
    f"tokens of a completion, last {ENDS} steps": lambda run: final(run, "length"),
    f"entropy per token, last {ENDS} steps": lambda run: final(run, "entropy"),
    f"KL per token, last {ENDS} steps": lambda run: final(run, "kl"),
    f"gradient norm, first {ENDS} steps": lambda run: first(run, "grad_norm"),
}


def band(values: list[float]) -> list[float]:
    """[mean, low, high] over seeds."""
    estimate = Estimate.of(values)
    return [estimate.mean, estimate.low, estimate.high]


def compared(pairs: list[tuple[float, float]]) -> dict:
    """(ours, theirs) by seed, and their differences: mean, interval, t, and the p of a mean as far from 0 by chance."""
    ours, theirs = zip(*pairs)
    differences = [o - t for o, t in pairs]
    difference, low, high = band(differences)
    error = statistics.stdev(differences) / math.sqrt(len(pairs))
    t = difference / error
    return {
        "clp": list(ours),
        "trl": list(theirs),
        "difference": difference,
        "standard_error": error,
        "low": low,
        "high": high,
        "t": t,
        "p": 1 - t_probability(abs(t), len(pairs) - 1),
    }


def as_json(result: dict) -> str:
    """Lists of numbers on one line, and no digits beyond float32's."""
    rounded = json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.6g}"))
    flat = re.compile(r"\[\s+([^][{}]*?)\s+\]")
    text = flat.sub(lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", json.dumps(rounded, indent=1))
    return text + "\n"


# --- the page ------------------------------------------------------------------------------------------------


def page(result: dict) -> str:
    steps, seeds, compared = SHARED["max_steps"], len(result["seeds"]), result["comparisons"]
    verdicts = [
        f"{name}: the difference is {c['difference']:+.4f}, {abs(c['t']):.1f} standard errors (p = {c['p']:.2f}), "
        + ("**within** seed noise" if c["p"] > 1 - CONFIDENCE else "**not** within seed noise")
        for name, c in list(compared.items())[:2]
    ]
    rows = [
        f"| {name} | {statistics.fmean(c['clp']):.3f} | {statistics.fmean(c['trl']):.3f} "
        f"| {c['difference']:+.4f} [{c['low']:+.4f}, {c['high']:+.4f}] | {c['t']:+.2f} | {c['p']:.2f} |"
        for name, c in compared.items()
    ]
    gains = {name: f"{m:+.3f} [{low:+.3f}, {high:+.3f}]" for name, (m, low, high) in result["gain"].items()}
    shared = "\n".join(f"    {name} = {value!r}" for name, value in SHARED.items())
    ours = ", ".join(f"`{name}={value!r}`" for name, value in AS_TRL.items())
    software = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    seconds = {name: f"{s:.2f} s" for name, s in result["median_step_seconds"].items()}
    return f"""# Learning curves: TRL's GRPOTrainer and CLPTrainer on the same problem

![Reward, length and KL by step: mean over seeds with intervals](curves.png)

One reward (brevity on DocSum), {seeds} seeds each, {steps} steps. A seed gives both trainers the same prompts in the same
order; adapters and completions are drawn by each for itself. From the first {ENDS} to the last {ENDS} steps the reward
grows by {gains["clp"]} here and by {gains["trl"]} in TRL (95 % intervals over seeds).

Do the two agree within seed noise (a t-test for pairs over seeds, at 5 %)?

- {verdicts[0]}.
- {verdicts[1]}.

| mean over seeds | here | TRL | difference [95 % interval] | t | p |
|---|---|---|---|---|---|
{chr(10).join(rows)}

"KL per token" is the exact KL here and the mean of k3 over the sampled tokens in TRL, which estimates it without bias. That a
difference is within seed noise does not say that there is none: the intervals say how large it could be. What can be compared
without noise is: for the same adapters, completions and rewards both compute the same gradient (`tests/peers`).

## The problem

Both are given

{shared}

and LoRA of rank {RANK} with lora_alpha {LORA_ALPHA} on all linear layers but the output projection, the shipped model in
float32, and {PROMPTS} prompts of at most {PROMPT_TOKENS} tokens. What TRL does without being asked has names here:
{ours}.
TRL multiplies k3 by the ratio to the policy that sampled (`use_bias_correction_kl`), and the gradient of that is k2's where
the ratio is 1, as in every step here. It is biased (`clp_engine.objectives.estimators`): chosen to have TRL's problem,
not to solve it well.

Made with {software}
(commits {", ".join(commit[:12] for commit in result["commits"])}). Median step on one thread of a busy machine, for
orientation only (bench/ measures speed): {seconds["clp"]} here, {seconds["trl"]} TRL. `python docs/results/trl_curves.py`
makes this page.
"""


def draw(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    shown = {
        "reward": "reward (brevity)",
        "length": "tokens of a completion",
        "kl": "KL to the reference, per token",
    }
    for axis, (name, label) in zip(figure.subplots(1, len(shown)), shown.items()):
        for library, title in LIBRARIES.items():
            centre, low, high = zip(*result["curves"][library][name])
            steps = range(1, len(centre) + 1)
            axis.plot(steps, centre, color=COLOURS[library], lw=2, label=title)
            axis.fill_between(steps, low, high, color=COLOURS[library], alpha=0.18, lw=0)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.axes[0].set_title(f"Mean of {len(result['seeds'])} seeds, 95 % intervals", loc="left", fontsize=11)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
