"""One-shot pruning: which weights go, in one pass over the model."""
