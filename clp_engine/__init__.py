"""clp-engine: one language model, steerable at inference time between several rewards."""

from importlib import import_module

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
    "Reference": "objectives.reference",
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
