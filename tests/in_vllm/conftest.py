"""Tests of the plug-in and of rollouts in vLLM itself, which `make vllm` installs apart. Nothing here is pretended."""

import os

# Read when vllm is imported, and by the processes that it starts.
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    # The engine in the tests' own process loads three times as fast. test_server.py has it in others.
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def _no_process_group_is_left():
    """vLLM's own group of processes lives as long as the engine that the tests of a file share."""
    yield
