"""Kernels of an optimizer's step: one generator of rules, two compilers (Numba and Triton)."""
