"""C++ kernels on the CPU (csrc/cpu), around the matrix products that torch's BLAS does."""
