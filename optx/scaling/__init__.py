"""Functions for tuning a narrow model and training a wide one with the same numbers."""

from optx.scaling._compare import shapes as shapes
from optx.scaling._rules_of_width import Parametrization as Parametrization
from optx.scaling._rules_of_width import Scale as Scale
from optx.scaling._shapes import Shapes as Shapes
from optx.scaling._width import Width as Width

__all__ = ["Parametrization", "Scale", "Shapes", "Width", "shapes"]
