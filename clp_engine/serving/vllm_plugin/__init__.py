"""A plug-in of vLLM: each request has its own weighting of a stack that `ConditionedPolicy.export_stack` wrote.

    y = x W^T + ((x A^T) * gate) B^T

vLLM computes x A^T of an adapter (`add_shrink`) and multiplies by B (`add_expand`). The plug-in multiplies by the gate between
the two. A batch may hold any weightings, plain adapters and the base model.

    stack.py      the stack's clp_blend.json, and what a request's weights become: the gate's coefficients
    admission.py  in the process that takes requests: a request's weights are checked, and its prefix cache is kept apart
    gate.py       in the process that computes: the gate of every token of a step
    patching.py   which versions of vLLM were tested, and whether the functions that are replaced are the ones that were read

vLLM calls `register` (entry point `vllm.general_plugins`) in each of its processes. Importing this package imports no vllm.
"""

from __future__ import annotations


def register() -> None:
    """Put the plug-in into the vLLM of this process. Calling it again does nothing.

    Raises RuntimeError for a version of vLLM that was not tested, and for a function of vLLM with another signature.
    """
    from clp_engine.serving.vllm_plugin import admission, gate, patching

    patching.check()
    patching.apply([*admission.patches(), *gate.patches()])
