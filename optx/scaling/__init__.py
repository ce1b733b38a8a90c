"""Functions for tuning a narrow model and training a wide one with the same numbers."""

from optx.scaling._abc import ABC as ABC
from optx.scaling._abc import Classification as Classification
from optx.scaling._abc import abc as abc
from optx.scaling._compare import shapes as shapes
from optx.scaling._coordinate_check import coordinate_check as coordinate_check
from optx.scaling._coordinate_result import CoordinateCheck as CoordinateCheck
from optx.scaling._coordinate_result import LayerSizes as LayerSizes
from optx.scaling._feature_change import FeatureChange as FeatureChange
from optx.scaling._feature_change import feature_change as feature_change
from optx.scaling._fit_step_law import fit_step_law as fit_step_law
from optx.scaling._gain_fit import GainFit as GainFit
from optx.scaling._gain_fit import GainRun as GainRun
from optx.scaling._gain_fit import fit_gains as fit_gains
from optx.scaling._gain_monitor import GainMonitor as GainMonitor
from optx.scaling._gain_monitor import GainRecord as GainRecord
from optx.scaling._infinite_width import InfiniteWidthLinear as InfiniteWidthLinear
from optx.scaling._infinite_width import infinite_width_linear as infinite_width_linear
from optx.scaling._infinite_width import relu_kernel as relu_kernel
from optx.scaling._infinite_width import relu_network_kernel as relu_network_kernel
from optx.scaling._infinite_width import step_kernel as step_kernel
from optx.scaling._init import init_ as init_
from optx.scaling._mup import group_lrs as group_lrs
from optx.scaling._mup import mup as mup
from optx.scaling._non_embedding import non_embedding_params as non_embedding_params
from optx.scaling._rules_of_width import Parametrization as Parametrization
from optx.scaling._rules_of_width import Scale as Scale
from optx.scaling._shapes import Shapes as Shapes
from optx.scaling._singular import TopValue as TopValue
from optx.scaling._step_law import StepLaw as StepLaw
from optx.scaling._step_law import StepLawResult as StepLawResult
from optx.scaling._step_law import step_law as step_law
from optx.scaling._sublayer_gain import SublayerGains as SublayerGains
from optx.scaling._sublayer_gain import sublayer_gain as sublayer_gain
from optx.scaling._width import Width as Width

__all__ = [
    "ABC",
    "Classification",
    "CoordinateCheck",
    "FeatureChange",
    "GainFit",
    "GainMonitor",
    "GainRecord",
    "GainRun",
    "InfiniteWidthLinear",
    "LayerSizes",
    "Parametrization",
    "Scale",
    "Shapes",
    "StepLaw",
    "StepLawResult",
    "SublayerGains",
    "TopValue",
    "Width",
    "abc",
    "coordinate_check",
    "feature_change",
    "fit_gains",
    "fit_step_law",
    "group_lrs",
    "infinite_width_linear",
    "init_",
    "mup",
    "non_embedding_params",
    "relu_kernel",
    "relu_network_kernel",
    "shapes",
    "step_kernel",
    "step_law",
    "sublayer_gain",
]
