"""Losses and sample weights: one method per file."""
