"""Fused step kernels: one generator, two compilers (Triton and Numba), and their audit."""
