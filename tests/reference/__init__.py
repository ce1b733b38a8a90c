"""Optimizers and transforms as their papers write them, in float64 and without any care for speed.

Nothing here is shared with optx: tests compare the two.
"""

from reference.adamr import gradient_scale as gradient_scale
from reference.adamr import pull as pull
from reference.dsp_reg import DSPReference as DSPReference
from reference.dsp_reg import normalised as normalised
from reference.loop import Reference as Reference
from reference.moments import Acted as Acted
from reference.moments import Part as Part
from reference.perpgrad import perp as perp
from reference.rounding import spacing as spacing
from reference.torch_bases import adam_moments as adam_moments
from reference.torch_bases import adam_move as adam_move
from reference.torch_bases import sgd as sgd
