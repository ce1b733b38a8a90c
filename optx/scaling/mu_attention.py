"""MuAttention: attention logits that fall as 1/d with the width d of a head.

Source: Tensor Programs V, arXiv 2203.03466, section 5 and appendix B.1 (definition 4.1 and table 8).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from optx._errors import TargetError, near
from optx._module_paths import bare_path, paths_of
from optx.inject._anatomy import attentions_of
from optx.inject._attention import Attention, AttentionPart, Heads
from optx.inject._call_locks import lock_of
from optx.inject._injection import Injection
from optx.inject._part import Part
from optx.scaling._shapes import Shapes
from optx.scaling.mu_readout import check_once, check_shapes

if TYPE_CHECKING:
    from typing_extensions import Self

    from optx.scaling._width import HeadWidth


class Scaled:
    """What all parts of MuAttention have in common."""

    scale: float
    base: str

    def note(self) -> str:
        """The factor, with where it is from."""
        return f"logits times {self.scale:.6g} ({self.base})"


class ScaledAttribute(Scaled, Part):
    """The number that the module multiplies its logits with, for the length of a call."""

    def __init__(self, attribute: str, head: HeadWidth) -> None:
        super().__init__()
        self.attribute, self.scale, self.base = attribute, head.scale, _told(head)

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's call."""
        if torch.compiler.is_compiling():
            return self._scaled(call, module, args, kwargs)
        with lock_of(module):
            return self._scaled(call, module, args, kwargs)

    def _scaled(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        own = getattr(module, self.attribute)
        setattr(module, self.attribute, self.scale)
        try:
            return call(*args, **kwargs)
        finally:
            setattr(module, self.attribute, own)


class ScaledCall(Scaled, AttentionPart):
    """The call of ``scaled_dot_product_attention``, where that chooses the scale (timm)."""

    what: ClassVar[str] = "MuAttention"

    def __init__(self, path: str, head: HeadWidth) -> None:
        super().__init__(path, Heads(0, head.width))
        self.scale, self.base = head.scale, _told(head)

    def attend(self, call: Attention) -> Tensor:
        """With another scale.

        Raises:
            TargetError: the module has its own, whatever it says of its heads.
        """
        if not math.isclose(call.factor(), self.heads.width**-0.5, rel_tol=1e-6):
            raise TargetError(
                f"MuAttention on {self.path!r} expects torch's own scale there, of heads {self.heads.width} "
                f"wide, and the module multiplies by {call.factor():.6g}, or its queries before. Leave it "
                "out of targets, and divide there by hand."
            )
        return call._replace(scale=self.scale).run()


class ScaledQueries(Scaled, Part):
    """The queries of torch's MultiheadAttention, through the rows of its weight and bias that make them."""

    def __init__(self, head: HeadWidth) -> None:
        super().__init__()
        self.scale, self.base = head.scale, _told(head)
        self.factor = head.scale * head.width**0.5

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nothing; but that there is a hook keeps nn.TransformerEncoderLayer from going past the module."""

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's call."""
        mode = _Queries(self.factor)
        with mode:
            output = call(*args, **kwargs)
        if not mode.calls:
            raise TargetError(
                f"MuAttention on a {type(module).__name__} did nothing: its call did not reach torch's "
                "multi_head_attention_forward. Use torch's own class."
            )
        return output


class _Queries(TorchFunctionMode):
    """While it is entered, torch's attention gets its queries times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.calls = factor, 0

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """One call of a function of torch."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            self.calls += 1
            width = args[3]
            rows = (self._first(args[5], width), self._first(args[6], width))  # in_proj_weight and its bias
            args = (*args[:5], *rows, *args[7:])
            if kwargs.get("q_proj_weight") is not None:
                kwargs = {**kwargs, "q_proj_weight": kwargs["q_proj_weight"] * self.factor}
        return func(*args, **kwargs)

    def _first(self, rows: Tensor | None, width: int) -> Tensor | None:
        return None if rows is None else torch.cat([rows[:width] * self.factor, rows[width:]])


def _told(head: HeadWidth) -> str:
    return f"heads {head.width} wide, {head.base_width} in base"


@dataclass(frozen=True)
class MuAttention(Injection):
    """Attention logits times sqrt(d_base) / d, where d is the width of a head: muP's attention.

    softmax(s q k') v with s = s_base d_base / d, and s_base what the base model has: 1 / sqrt(d_base) in most
    families. GPT-2's division by the layer's number stays, and T5, which has no scale, gets d_base / d. At
    the base's width of heads nothing changes: a model with more heads of the same width keeps its scale.

    By default it serves every attention module of the model: those of transformers with a scale of their
    own (eager, sdpa and flex attention; flash attention gets the same number, untried), torch's
    MultiheadAttention, also in TransformerEncoderLayer, and timm's.

    Args:
        shapes: of this model, from `optx.scaling.shapes`, which has the widths of heads in both models.

    Paper values:
        There is nothing to set. The package's examples take 8 / d, which is 1 / sqrt(d) at d = 64.

    Limits: It is no change of weights, so there is no ``merge()``. An attention module that says neither its
        scale nor how wide its heads are is refused by name, and one whose own scale does not go with them.

    Keywords: muP, muTransfer, Maximal Update Parametrization, 1/d attention, softmax scale.

    Evidence: ``test_mu_attention.py``, ``test_own_scales.py``: equal to attention written by hand; no recipe
    yet.

    Raises:
        TargetError: at attach, an attention module can't be served, isn't in the shapes, or is served
            already.

    Example:
        >>> import torch, optx
        >>> def make(width):
        ...     return torch.nn.TransformerEncoderLayer(width, 2, 2 * width)
        >>> model = make(64)
        >>> handle = optx.attach(model, optx.MuAttention(optx.scaling.shapes(model, base=make(16))))
        >>> handle.report().rows[0].note
        'logits times 0.0883883 (heads 32 wide, 8 in base)'

    Source: arXiv 2203.03466, definition 4.1.
    """

    name: ClassVar[str] = "mu_attention"
    role: ClassVar[str] = "width"
    serves: ClassVar[str] = "attention modules"

    shapes: Shapes = field(repr=False)

    def __post_init__(self) -> None:
        check_shapes("MuAttention", self.shapes)

    def places(self, model: nn.Module) -> Collection[str]:
        """All attention."""
        self.shapes.check(model)
        paths = paths_of(model)
        return {paths.here[path] for path in attentions_of(paths.modules)}

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's scale."""
        path = bare_path(path)
        check_once(module, path, Scaled, "a scale of width")  # pyright: ignore[reportArgumentType]
        head = self.shapes.heads.get(path)
        if head is None:
            raise TargetError(
                f"attach: MuAttention's shapes don't have the width of heads in {path!r}, a "
                f"{type(module).__name__}. {near(path, self.shapes.heads)}"
            )
        if isinstance(module, nn.MultiheadAttention):
            return ScaledQueries(head)
        fused = getattr(module, "fused_attn", None) is True
        name = next((name for name in ("scaling", "scale") if not fused and _reads(module, name)), None)
        if fused or name is not None:
            _check_own(path, module, getattr(module, name or "scale", None), head)
            return ScaledCall(path, head) if name is None else ScaledAttribute(name, head)
        raise TargetError(
            f"attach: MuAttention can't tell where {path!r}, a {type(module).__name__}, scales its logits. "
            "Leave it out of targets, and divide there by hand."
        )

    def options(self) -> dict[str, Any]:
        """As plain data."""
        return {"shapes": self.shapes.as_data()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """What `options` described."""
        return super().from_options({**options, "shapes": Shapes.from_data(options.get("shapes"))})

    def __str__(self) -> str:
        return "MuAttention()"


def _check_own(path: str, module: nn.Module, own: Any, head: HeadWidth) -> None:
    """Raise unless the own scale is to the base model's as the widths of heads say: else they are not it."""
    base = head.base_width**-0.5 if head.base_scale is None else head.base_scale
    ratio = head.base_width / head.width
    if own is None or any(math.isclose(own, base * ratio**power, rel_tol=1e-6) for power in (0.0, 0.5, 1.0)):
        return
    raise TargetError(
        f"attach: MuAttention finds that {path!r}, a {type(module).__name__}, multiplies its logits by "
        f"{own:.6g} and its base's by {base:.6g}, which does not go with heads {head.width} wide and "
        f"{head.base_width} in base. Leave it out of targets, and divide there by hand."
    )


def _reads(module: nn.Module, attribute: str) -> bool:
    """Whether a module's forward multiplies by this number of its own."""
    if not isinstance(getattr(module, attribute, None), int | float):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and attribute in code.co_names
