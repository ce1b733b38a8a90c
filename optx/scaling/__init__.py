"""Tune a narrow model, train a wide one with the same learning rate and weight decay, see whether it holds.

The whole path, in this order; ``narrow`` is the config (or model) that ``lr`` and ``decay`` are right for::

    model = LlamaForCausalLM(wide)
    shapes = optx.scaling.shapes(model, base=narrow)  # print(shapes); shapes.save("shapes.json")
    optx.scaling.init_(model, shapes)  # first weights: not those of a checkpoint
    optx.attach(model, optx.MuReadout(shapes))
    optx.attach(model, optx.MuAttention(shapes))  # of a model with attention
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    optimizer = optx.wrap(optimizer, optx.MuAdamW(shapes))  # SGD, others: optx.scaling.mup(optimizer, shapes)
    scheduler = CosineAnnealingLR(optimizer, steps)  # last; or Trainer(..., optimizers=(optimizer, None))

Tune ``narrow`` without decay of its embeddings, head, norms and biases, as MuAdamW trains. These lines do for
it too: with ``delta=``, a config of a third width, they change nothing there but that. To resume, run all of
them again and load the state dicts of model, optimizer and scheduler; a model by ``from_pretrained`` does
without `init_`, and its shapes are ``shapes(model, base="shapes.json")``.

Whether it holds: `coordinate_check` trains a few steps at some widths and names the layers out of scale (try
``parametrization="mup"`` and None); `GainMonitor` follows top singular values, which should be alike at all
widths. Where there is no narrow model to tune: `step_law`, and `fit_step_law` for runs of your own. What
other exponents would do: `abc`; a ``parametrization=`` is the same for `init_`, MuReadout and the optimizer.
"""

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
from optx.scaling._small_init import small_init_ as small_init_
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
    "small_init_",
    "step_kernel",
    "step_law",
    "sublayer_gain",
]
