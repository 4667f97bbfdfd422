"""Triton kernels for CUDA and ROCm.

`multi_lora`, `token_stats` and `sampling` are what the ops import; each lists what it and the modules under it compile in
`aot_specs()`.
"""
