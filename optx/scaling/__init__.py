"""Functions for tuning a narrow model and training a wide one with the same numbers."""

from optx.scaling._compare import shapes as shapes
from optx.scaling._fit_step_law import fit_step_law as fit_step_law
from optx.scaling._non_embedding import non_embedding_params as non_embedding_params
from optx.scaling._rules_of_width import Parametrization as Parametrization
from optx.scaling._rules_of_width import Scale as Scale
from optx.scaling._shapes import Shapes as Shapes
from optx.scaling._step_law import StepLaw as StepLaw
from optx.scaling._step_law import StepLawResult as StepLawResult
from optx.scaling._step_law import step_law as step_law
from optx.scaling._width import Width as Width

__all__ = [
    "Parametrization",
    "Scale",
    "Shapes",
    "StepLaw",
    "StepLawResult",
    "Width",
    "fit_step_law",
    "non_embedding_params",
    "shapes",
    "step_law",
]
