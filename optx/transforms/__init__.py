"""What a step does to weights: one method per file."""
