"""clp-engine: one language model, steerable at inference time between several rewards."""

import re
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

# The public names, imported when first used: `clp-engine --help` should not wait for torch.
_WHERE = {
    "CLPConfig": "training.settings.config",
    "CLPTrainer": "training.trainer",
    "ConditionSampler": "objectives.weightings",
    "ConditionedPolicy": "policy.policy",
    "Conditions": "core.conditions",
    "ConfigError": "core.errors",
    "LogitMixture": "policy.logit_mixture",
    "Objective": "objectives.objective",
    "ParetoReport": "evaluation.report",
    "Reference": "policy.references",
    "RewardSet": "data.rewards",
    "Rollout": "rollouts.types",
    "RolloutEngine": "rollouts.types",
    "Samplable": "rollouts.types",
    "SamplingParams": "rollouts.types",
    "Weighting": "objectives.weightings",
    "evaluate": "evaluation.evaluate",
    "rollout": "rollouts.rollout",
    "score": "rollouts.scoring",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'clp_engine' has no attribute {name!r}")
    return getattr(import_module(f"clp_engine.{_WHERE[name]}"), name)


def _compare_kernels() -> None:
    """Say so where the kernels are of another version: those of a clp-kernels that was installed after this package.

    Their version is read from the source, as importing them means importing torch.
    """
    spec = find_spec("clp_kernels")
    if spec is None or spec.origin is None:
        return
    found = re.search(r'^__version__ = "(.+?)"', Path(spec.origin).read_text(encoding="utf-8"), re.MULTILINE)
    kernels = found[1] if found else "unknown"
    if kernels != __version__:
        warnings.warn(
            f"clp-engine {__version__} finds clp_kernels {kernels} in {Path(spec.origin).parent}, of a clp-kernels installed "
            f"beside it; expected {__version__}: pip install --force-reinstall --no-deps clp-engine",
            RuntimeWarning,
            stacklevel=2,
        )


_compare_kernels()
