"""Triton kernels for CUDA and ROCm. Each module lists what it compiles in `aot_specs()`."""
