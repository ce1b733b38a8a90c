"""BitFit: train the biases and nothing else.

Source: BitFit, arXiv 2106.10199.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from optx._errors import TargetError, warn
from optx.inject._injection import Injection
from optx.inject._metrics import wide
from optx.inject._own_call import adds_bias, bias_axes
from optx.inject._part import RESERVED, Part, Weights, new_tensor
from optx.inject._served import Served
from optx.inject._weights import is_biased


class BiasShift(Part):
    """y + delta, where delta (out,) is what the bias has moved by; along the second axis or the last."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        assert isinstance(module.bias, Tensor)
        self.delta = nn.Parameter(new_tensor(module, *module.bias.shape))
        self.second = bias_axes(module) == 1

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Add the shift where the bias is added."""
        ones = (1,) * (output.ndim - 2 if self.second else 0)
        return output + self.delta.to(output.dtype).view(*self.delta.shape, *ones)

    @property
    def adds(self) -> bool:
        """Whether all it does is add: a shift."""
        return True

    def change_sq(self) -> Tensor | None:
        """That of the shift."""
        return wide(self.delta).square().sum()

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """The bias is the only thing that changes."""
        assert now.bias is not None
        return Weights(now.weight, now.bias + self.delta.to(now.bias.dtype))


def warn_of_biases(model: nn.Module, served: Sequence[Served], whole: Sequence[str]) -> None:
    """Say which biases are left out where all were to be trained.

    Args:
        model: whose.
        served: what will be attached.
        whole: paths of modules that are trained whole.
    """
    trained = {id(getattr(one.module, "bias", None)) for one in served}
    left = [
        name
        for name, p in model.named_parameters()
        if _is_bias(name)
        and id(p) not in trained
        and RESERVED not in name.split(".")
        and not any(name.startswith(f"{path}.") for path in whole)
    ]
    if left:
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        warn(
            f"{served[-1].injection}: {len(left)} biases are left as they are (no call of a module adds "
            f"them, or another handle has them): {', '.join(left[:4])}{more}."
        )


def _is_bias(name: str) -> bool:
    """A bias by its name: of nn.MultiheadAttention, recurrent and parametrized modules too.

    A table of T5's or Swin's relative positions is a module's weight, whatever the module is called.
    """
    parts = name.split(".")[-2:]
    return parts[-1] != "weight" and any(re.fullmatch(r"bias|bias_\w+|\w+_bias", part) for part in parts)


@dataclass(frozen=True)
class BitFit(Injection):
    """Bias-only fine-tuning: every bias of the model is trained, as a difference to what it was.

    y = W x + b + d, with d trained from 0.

    By default it serves every Linear, convolution and norm that has a bias. The gradient is the bias's own;
    weight decay pulls towards the pretrained bias, not towards zero.

    Paper values:
        There is nothing to set: all biases are trained. The authors' code, BERT on GLUE: AdamW, lr 1e-3, 16
        epochs, batches of 8.

    Limits: A model without biases (Llama) has nothing to train.

    Keywords: PEFT, bias, sparse, memory, parameter-efficient fine-tuning.

    Evidence: ``optx run adapt``; ``test_adapters.py``, ``test_attach.py``.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
        >>> handle = optx.attach(model, optx.BitFit())
        >>> [name for name, _ in handle.named_parameters()]
        ['0.optx.bitfit.delta', '1.optx.bitfit.delta']

    Source: arXiv 2106.10199.
    """

    name: ClassVar[str] = "bitfit"
    role: ClassVar[str] = "biased"
    serves: ClassVar[str] = "modules with a bias: Linear, Conv1D, Conv1d/2d/3d and norms"

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's shift."""
        if not is_biased(module):
            raise TargetError(
                f"attach: BitFit serves {self.serves}; {path!r} is a {type(module).__name__} without."
            )
        if not adds_bias(module):
            raise TargetError(
                f"attach: {path!r} is a {type(module).__name__} that does more after its bias is added, so a "
                "shift of its output would not be one of its bias. Leave it out of targets."
            )
        return BiasShift(module)
