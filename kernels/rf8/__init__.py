"""Kernels of RF8, floats of 8 bits with a residual code: packed, unpacked, multiplied as they are."""
