"""Kernels of ternary vectors: bit masks, their Golomb codes, and the dense tensors made of them."""
