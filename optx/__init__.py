"""optx: training-time methods for PyTorch, one line each."""
