"""clp-engine export: write a policy at a weighting, or each of its objectives, as PEFT adapters or whole models."""

from __future__ import annotations

import argparse
from pathlib import Path

from clp_engine.cli.arguments import RUN_HELP, WEIGHTS_HELP, add_kl, add_number
from clp_engine.core import files
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import check_folder
from clp_engine.core.ranges import COMMANDS, parse_assignments
from clp_engine.training import running

HELP = "write weightings or objectives as ordinary PEFT adapters or models"
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--weights", help=WEIGHTS_HELP)
    add_kl(parser)
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--merged", action="store_true", help="a transformers model instead of an adapter")
    parser.add_argument(
        "--each",
        action="store_true",
        help="one adapter per objective instead of a blend, and clp_blend.json, which says how they are blended",
    )
    parser.add_argument(
        "--stack",
        action="store_true",
        help="one adapter of all objectives, unblended, for vLLM with clp-engine's plug-in, with weights per request; "
        "--weights and --kl are those of a request that names none",
    )
    add_number(
        parser,
        COMMANDS,
        "rank",
        "of the adapter, at most: cuts deltas to their largest singular values and reports the error",
        metavar="R",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write into DIR though it is not empty: replaces files of the same names, others stay",
    )


def run(arguments: argparse.Namespace) -> None:
    weights = None if arguments.weights is None else parse_assignments(arguments.weights, "weights")
    target = Path(arguments.to)
    files.refuse_overlap(target, [running.policy_directory(arguments.run_folder)])
    if target.exists() and not arguments.overwrite and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            f"{target} exists and is not empty; give --overwrite to write into it, or another folder"
        )
    if arguments.merged and (arguments.rank is not None or arguments.each or arguments.stack):
        raise ConfigError(
            "--rank, --each and --stack are of adapters; --merged writes whole weights, leave one out"
        )
    if arguments.each and arguments.stack:
        raise ConfigError("--each writes an adapter per objective, --stack one of all; leave one out")
    if arguments.each and (weights is not None or arguments.kl is not None):
        raise ConfigError("--each writes every objective's adapter unblended; leave out --weights and --kl")
    check_folder("to", target.parent)
    policy = running.load_policy(arguments.run_folder, "cpu")
    base = f"  (base model: {policy.spec.base_model})"
    if arguments.each:
        for name, error in policy.save_adapters(target, rank=arguments.rank).items():
            print(f"adapter: {target / name}{base}{_adapter_notes(target / name, arguments.rank, error)}")
        print(f"blend: {target}/clp_blend.json")
        return
    if arguments.stack:
        error = policy.export_stack(target, rank=arguments.rank, weights=weights, kl=arguments.kl)
        print(f"stack: {target}{base}{_adapter_notes(target, arguments.rank, error)}")
        if policy.conditioning.prompt:
            print("its prompts need the text of prompt_template in them (see clp_blend.json)")
        return
    if weights is None and len(policy.objectives) > 1:
        raise ConfigError(f"--weights is missing; the objectives are {', '.join(policy.objectives)}")
    policy.conditions(weights, arguments.kl)
    if arguments.merged:
        files.refuse_overlap(target, policy.read_from)
        model = policy.merge(weights, arguments.kl)
        with files.write_directory(target) as temporary:
            model.save_pretrained(temporary)
            if policy.tokenizer is not None:
                policy.tokenizer.save_pretrained(temporary)
            superseded = _superseded(target, temporary)
        for path in superseded:
            path.unlink()
        print(f"model: {target}")
    else:
        error = policy.export_adapter(target, weights, arguments.kl, rank=arguments.rank)
        print(f"adapter: {target}{base}{_adapter_notes(target, arguments.rank, error)}")
    if text := policy.prompt_text(weights, arguments.kl):
        print(f"its prompts need this text in them (see blend.json): {text!r}")


def _superseded(target: Path, new: Path) -> list[Path]:
    """Files of an earlier export in `target` that transformers would load with, or instead of, the new weights.

    Raises ConfigError where `target` holds an adapter that clp-engine did not write.
    """
    adapter = [target / name for name in ("adapter_config.json", "adapter_model.safetensors", "blend.json")]
    if adapter[0].exists() and not adapter[2].exists():
        raise ConfigError(
            f"{target} holds an adapter (adapter_config.json), which transformers would load with the merged model; remove it, "
            "or give another folder"
        )
    weights = [*target.glob("model.safetensors*"), *target.glob("model-*.safetensors")]
    return [path for path in [*adapter, *weights] if path.is_file() and not (new / path.name).exists()]


def _adapter_notes(path: Path, asked: int | None, error: float) -> str:
    """Lines of text about an adapter: its rank, the error of the cut to that rank, and the setting that vLLM needs for it."""
    from clp_engine.policy.peft.writing import read_rank, vllm_rank

    rank = read_rank(path)
    lost = "" if asked is None else f", relative error of the deltas {error:.3g}"
    needed = vllm_rank(rank)
    served = "more than vLLM takes" if needed is None else f"for vLLM: --max-lora-rank {needed}"
    return f"\nrank: {rank}{lost} ({served})"
