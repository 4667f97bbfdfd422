"""Replacements for the log-prob code of TRL, verl, OpenRLHF and Liger, and context managers that put them in place.

    with patch_trl():
        GRPOTrainer(...).train()

Each module has functions with the signatures of its library, computed by `linear_logprob` and `logits_logprob`; they can also
be called directly. No library is imported before its patch is applied, and none is needed for `import clp_kernels`.
"""

from clp_kernels.integrations.liger import patch_liger
from clp_kernels.integrations.openrlhf import patch_openrlhf
from clp_kernels.integrations.patching import Replacement
from clp_kernels.integrations.trl import patch_trl
from clp_kernels.integrations.verl import patch_verl

__all__ = ["Replacement", "patch_liger", "patch_openrlhf", "patch_trl", "patch_verl"]
