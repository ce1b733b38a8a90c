"""Kernels of what a mask has of a tensor: its numbers gathered, and put back."""
