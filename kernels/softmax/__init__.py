"""Kernels of softmax in two passes: exponentials as pairs, whose sums can not overflow."""
