"""optx: training-time methods for PyTorch, one line each."""

from optx import analysis as analysis
from optx import ops as ops
from optx._checkpoint import load_optimizer as load_optimizer
from optx._checkpoint import save_optimizer as save_optimizer
from optx._errors import FusedError as FusedError
from optx._errors import OptxError as OptxError
from optx._errors import ShapeError as ShapeError
from optx._errors import TransformError as TransformError
from optx._plan import Plan as Plan
from optx._rules import rule as rule
from optx._transform import Moments as Moments
from optx._transform import Slot as Slot
from optx._transform import Transform as Transform
from optx._transform import like_weight as like_weight
from optx._transform import per_tensor as per_tensor
from optx._wrap import Wrapped as Wrapped
from optx._wrap import wrap as wrap
from optx.signal.stablemax import StableMaxCrossEntropy as StableMaxCrossEntropy
from optx.signal.stablemax import stablemax_cross_entropy as stablemax_cross_entropy
from optx.transforms.adamr import AdamR as AdamR
from optx.transforms.hft import HFT as HFT
from optx.transforms.perpgrad import PerpGrad as PerpGrad
