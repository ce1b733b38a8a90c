"""Networks whose Lipschitz constant is known: activations that keep norms, chains with a constant by
construction (`optx.LDLT`), and what describes an implicit net."""

from optx.lipschitz.activations import GroupSort as GroupSort
from optx.lipschitz.activations import Householder as Householder
from optx.lipschitz.activations import MaxMin as MaxMin
from optx.lipschitz.implicit import Implicit as Implicit

__all__ = ["GroupSort", "Householder", "Implicit", "MaxMin"]
