"""Which bases make the same step of a gradient and of twice that gradient."""

from __future__ import annotations

from torch.optim import Optimizer

# They divide by the gradient's own size, take its sign or make it orthogonal; by class name, also of
# subclasses and of other libraries. What has Adam in its name is one of his kin: NAdam, Adam8bit, FusedAdam.
_NAMES = (
    *("Adagrad", "Adadelta", "RMSprop", "Rprop", "Adafactor", "Muon", "Lion", "Lamb", "LAMB", "LARS"),
    *("AdaBelief", "Yogi", "NovoGrad", "Adan", "AdEMAMix", "Prodigy"),
)


def is_scale_free(base: Optimizer) -> bool:
    """Whether a factor on all of a parameter's gradients, the same in every step, changes nothing but for
    eps."""
    return any("Adam" in kind.__name__ or kind.__name__ in _NAMES for kind in type(base).__mro__)
