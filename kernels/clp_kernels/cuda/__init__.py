"""CUDA C++ kernels (csrc/cuda), where they are better than Triton's: few rows, in one launch."""
