"""Networks whose Lipschitz constant is known: activations that keep norms, what describes an implicit net, and
chains of layers that have a constant by construction (`optx.LDLT`)."""

from optx.lipschitz.activations import GroupSort as GroupSort
from optx.lipschitz.activations import Householder as Householder
from optx.lipschitz.activations import MaxMin as MaxMin

__all__ = ["GroupSort", "Householder", "MaxMin"]
