"""Checkpoint operations: what fine-tuning changed, pruned, compressed, merged and patched."""
