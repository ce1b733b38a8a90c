"""IAA, inside and alongside adapters: a trained path beside the layers, from the first to the last.

Source: Inside and Alongside Adapters, arXiv 2208.09847. Of the paper only the idea was at hand (trained parts
that no frozen layer separates, so that each gets the whole gradient); the equations of `Aside` realise it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from optx._errors import TargetError, check_choice, check_range
from optx.inject._aside import (
    AsideOptions,
    Form,
    Highway,
    Layerwise,
    Narrow,
    Stream,
    Streamed,
    Variant,
)
from optx.inject._hidden_delta_options import FORMS
from optx.inject._injection import Composite, Injection, Site
from optx.inject._part import RESERVED, Part
from optx.inject._weights import features, is_conv, is_linear
from optx.inject.adapters import SequentialAdapter


@dataclass(frozen=True)
class Aside(AsideOptions, Injection):
    """Small modules alongside the layers, joined into one trained path from the first layer to the last.

    Rebuilt from the paper's idea: its own equations were not at hand, so don't take numbers made with this
    for the paper's.

    Adapters inside layers get their gradient through all frozen layers above. These don't: at the start,
    every one of them gets the gradient of the last layer's output, as it is.

    Args:
        rank: width of each module's bottleneck.
        variant: with x_l the input of layer l, F_l the layer with all that is attached in it,
            S(x) = f(x W_down + b_down) W_up + b_up and z_0 = 0:
            ``"highway"``: z_{l+1} = z_l + S_l(x_l + z_l), and the last layer returns x_L + z_L; the layers
            see nothing of z. ``"layerwise"``: x_{l+1} = F_l(x_l) + S_l(x_l). ``"bottleneck"``: a stream of
            ``rank`` numbers per token, z_{l+1} = z_l + f(x_l D_l + z_l C_l), and the last layer returns
            x_L + z_L U: the fewest parameters.
        form: f: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or ``"linear"``.
        dropout: of f's output, while training.
        width: of the hidden states; None: what the first linear module or norm in each layer takes.

    Serves the layers of a stack, whose input and output have one shape (..., width); of a tuple that a layer
    returns, the first item changes. Targets whose names differ in their last number only are one stack, with
    one stream, and must run in the model's order. By default: the layers of the families that
    optx knows. W_up, b_up and U start at zero: no output changes. Half-precision weights get float32 modules,
    computed in the activations' dtype. Numbers per layer of width d: 2 d rank + rank + d; in the bottleneck
    variant d rank + rank², with d rank once on top and rank² less in the first layer. It can't be merged.

    The stream goes with the tensors from layer to layer: several forwards before a backward, threads, caches
    of keys and values, checkpointing with ``use_reentrant=False`` and ``torch.compile`` of the whole model
    are safe. Mean pooling should leave padding out: the stream adds to its tokens too.

    Paper values:
        The paper gives a budget, less than 1 % of the model's numbers (abstract); its widths could not be
        checked. ``rank=16`` (the default) is 0.3 % of BERT-base.

    Limits: The wiring is rebuilt from the paper's idea: its own equations were not at hand. Not linear, so it
    can't be merged.

    Keywords: IAA, side tuning, PEFT, parameter-efficient fine-tuning.

    Evidence: ``test_iaa.py``, ``test_aside_stream.py``; no recipe.

    Raises:
        OptxError: an option out of range; at a call, the tensor between two layers was exchanged.
        TargetError: at attach, a module whose width can't be told, or several widths in one stack.
        ShapeError: at a call, hidden states of another width, or a layer that changes their shape.

    Example:
        >>> import torch, optx
        >>> layers = [torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3)]
        >>> model = torch.nn.Sequential(*layers)
        >>> handle = optx.attach(model, optx.Aside(rank=2), targets=torch.nn.TransformerEncoderLayer)
        >>> print(handle.report().rows[-1].note)
        highway, rank 2, relu, 3 of 3

    Source: arXiv 2208.09847.
    """

    name: ClassVar[str] = "aside"
    role: ClassVar[str] = "block"
    serves: ClassVar[str] = "the layers of a stack"

    def __post_init__(self) -> None:
        check_range("Aside", "rank", self.rank, 1)
        check_range("Aside", "dropout", self.dropout, 0, 1)
        if self.width is not None:
            check_range("Aside", "width", self.width, 1)
        check_choice("Aside", "variant", self.variant, ["highway", "layerwise", "bottleneck"])
        check_choice("Aside", "form", self.form, [form for form in FORMS if form != "softmax"])

    def part(self, module: nn.Module, path: str) -> Part:
        """One layer's, as a stack of its own."""
        return self.parts([Site(path, module)])[0]

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per site, with one stream per stack."""
        stacks: dict[str, list[Site]] = {}
        for site in sites:
            stacks.setdefault(_stack(site.path), []).append(site)
        made = {path: part for stack in stacks.values() for path, part in self._beside(stack).items()}
        return [made[site.path] for site in sites]

    def _beside(self, stack: Sequence[Site]) -> dict[str, Part]:
        """The parts of one stack, by path."""
        widths = [self.width or _width(site) for site in stack]
        if self.variant == "layerwise":
            pairs = zip(stack, widths, strict=True)
            return {site.path: Layerwise(self, site, width) for site, width in pairs}
        for site, width in zip(stack, widths, strict=True):
            if width != widths[0]:
                raise TargetError(
                    f"attach: {stack[0].path!r} has hidden states of width {widths[0]} and {site.path!r} of "
                    f"{width}, which Aside can't join into one stream. Attach to each width by itself."
                )
        stream, made = Stream(), dict[str, Part]()
        for index, site in enumerate(stack):
            part = self._streamed(site, widths[0], first=index == 0, last=index == len(stack) - 1)
            part.stream, part.index, part.last = stream, index, index == len(stack) - 1
            stream.add(site.module, part)
            made[part.path] = part
        return made

    def _streamed(self, site: Site, width: int, *, first: bool, last: bool) -> Streamed:
        if self.variant == "highway":
            return Highway(self, site, width)
        return Narrow(self, site, width, first=first, last=last)


@dataclass(frozen=True)
class IAA(Composite):
    """Inside and alongside adapters: `optx.SequentialAdapter` in the layers, `optx.Aside` beside them.

    The part beside the layers is rebuilt from the paper's idea: its own equations were not at hand, so don't
    take numbers made with this for the paper's.

    Args:
        rank: width of the bottlenecks inside, behind attention and behind the FFN.
        aside: width of those alongside.
        variant: how those alongside are joined; see `optx.Aside`.
        form: f of both: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or ``"linear"``.
        dropout: of f's output in both, while training.

    Other adapters inside: attach them and `optx.Aside`, in either order. Members are ``"inside"`` and
    ``"aside"``, for ``targets={"inside": ..., "aside": ...}``. No output changes at the start.
    `optx.analysis.grad_norms` shows what gradient reaches which depth.

    Paper values:
        The paper gives a budget, less than 1 % of the model's numbers (abstract); its widths could not be
        checked. ``rank=16, aside=16`` (the defaults) are 0.8 % of BERT-base.

    Limits: As of `optx.Aside`: the wiring is rebuilt from the paper's idea, and it can't be merged.

    Keywords: PEFT, adapters, parameter-efficient fine-tuning.

    Evidence: ``test_iaa.py``, ``test_aside_stream.py``; no recipe.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, as its members.

    Example:
        >>> import torch, optx
        >>> layers = [torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)]
        >>> targets = {"inside": "[01].linear2", "aside": "[01]"}
        >>> handle = optx.attach(torch.nn.Sequential(*layers), optx.IAA(rank=4, aside=2), targets)
        >>> [(row.module, row.trainable) for row in handle.report().rows]
        [('0.linear2', 76), ('1.linear2', 76), ('0', 42), ('1', 42)]

    Source: arXiv 2208.09847.
    """

    name: ClassVar[str] = "iaa"

    rank: int = 16
    aside: int = 16
    variant: Variant = "highway"
    form: Form = "relu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_range("IAA", "aside", self.aside, 1)
        self.members()  # which check the rest

    def members(self) -> dict[str, Injection]:
        """Inside and alongside."""
        inside = SequentialAdapter(rank=self.rank, form=self.form, dropout=self.dropout)
        aside = Aside(rank=self.aside, variant=self.variant, form=self.form, dropout=self.dropout)
        return {"inside": inside, "aside": aside}


def _stack(path: str) -> str:
    """What the names of one stack's layers have in common."""
    numbered = re.fullmatch(r"(.*?)\d+(\D*)", path)
    return "#".join(numbered.groups()) if numbered else f"{path.rpartition('.')[0]}.#"


def _width(site: Site) -> int:
    """The width of a layer's hidden states, from what it computes with first."""
    if is_linear(site.module):
        into, out = features(site.module)
        if into != out:
            raise TargetError(
                f"attach: {site.path!r} turns a width of {into} into {out}. Aside serves layers that keep it."
            )
    for path, module in site.module.named_modules():
        if RESERVED in path.split("."):
            continue
        if is_linear(module):
            return features(module)[0]
        if is_conv(module):
            break
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1 and "norm" in type(module).__name__.lower():
            return len(weight)
    raise TargetError(
        f"attach: {site.path!r} is a {type(site.module).__name__} that begins with neither a linear module "
        "nor a norm, so Aside can't tell the width of its hidden states. Pass optx.Aside(width=...)."
    )
