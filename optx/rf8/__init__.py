"""RF8: weights in floats of 8 bits, rounded to a signed power of two and a second one (weight-only).

A number w becomes ``d1 + d2``: d1 is the power of two that is nearest in log2, d2 that which is nearest to
what is left, and dropped where it is more than 2**4 times smaller. So each octave has seven magnitudes, 1,
17/16, 9/8, 5/4, 3/2, 7/4 and 15/8 times a power of two, and a tensor has 15 octaves, from its largest
magnitude down: a byte for each weight, and one exponent. Rounding is in log2 (not to the nearest value), and
there are no ties: the breakpoints are irrational. Nothing is off by more than 10.83 %; 4 % is typical.

    >>> import torch, optx
    >>> small = optx.rf8.pack(torch.nn.Linear(64, 8).state_dict())
    >>> small["weight"].nbytes, small["bias"].dtype
    (513, torch.float32)
    >>> optx.rf8.quantise(torch.tensor([1.05, 1.3, 1.4, -3.3]))
    tensor([ 1.0625,  1.2500,  1.5000, -3.5000])

A model takes them by ``model.load_state_dict(optx.rf8.unpack(small))``, or from a file by
`optx.rf8.load_into`; `optx.RF8Linear` computes with packed weights.

Source: arXiv 2506.00486v3, section 4; the authors' ``rf8.py``. It only rounds; the byte is optx's.
"""

from optx._rf8 import Packed as Packed
from optx.rf8._files import load as load
from optx.rf8._files import load_into as load_into
from optx.rf8._files import save as save
from optx.rf8._pack import pack as pack
from optx.rf8._pack import quantise as quantise
from optx.rf8._pack import unpack as unpack

__all__ = ["Packed", "load", "load_into", "pack", "quantise", "save", "unpack"]
