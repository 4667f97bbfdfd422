"""Benchmarks of the kernels and of whole training steps, beside every peer that runs. See bench/README.md."""
