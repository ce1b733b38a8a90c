"""What the GPU kernels compile to, read without a GPU, and the bytes that a program must move."""
