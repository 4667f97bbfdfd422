"""Rollouts from vLLM: a stack of the policy's adapters is published for each version, and each draw says its own weighting.

    engine.py      `VllmEngine`, a RolloutEngine: publishes what has moved, and turns requests into draws
    stacks.py      the versions in their folder: written, served, removed
    draws.py       what is asked of vLLM, and what comes back
    colocated.py   vLLM in this process
    server.py      `vllm serve` elsewhere, over its OpenAI API

vLLM blends by the plug-in `serving.vllm_plugin`. Importing this package imports no vllm.
"""
