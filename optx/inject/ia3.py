"""IA3: learned scales of keys, values and the FFN's hidden activations.

Source: (IA)^3, arXiv 2205.05638, section 3.3. Shapes of the tensors are those of PEFT 0.21, whose files it
reads and writes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TargetError, near
from optx._module_paths import bare_path
from optx.inject._families import FAMILIES
from optx.inject._injection import Injection, Site
from optx.inject._part import Arguments, Part, Weights, hidden_of, new_tensor
from optx.inject._targets import check_each_matches, matcher
from optx.inject._weights import features, is_conv, is_linear, is_transposed, shape_of


class Scale(Part):
    """The learned vector, one number per channel, and where the channels are."""

    def __init__(self, module: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.scale = nn.Parameter(new_tensor(module, *shape) + 1)
        self.trailing = len(shape) - 2 if is_conv(module) else 0

    def scaled(self, values: Tensor) -> Tensor:
        """Activations times the vector, in the wider of both precisions and rounded once."""
        vector = self.scale.view(-1, *(1 for _ in range(self.trailing)))
        return (values * vector).to(values.dtype)

    def suffixes(self) -> dict[str, str]:
        """PEFT's key."""
        return {"scale": "ia3_l"}


class ScaledOutput(Scale):
    """l * (W x + b); l has the shape (out, 1) for matrices and (1, out, 1, ...) for convolutions."""

    def __init__(self, module: Any) -> None:
        super().__init__(
            module, _along(module, module.out_channels) if is_conv(module) else (_out(module), 1)
        )

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Scale what comes out, bias and all."""
        return self.scaled(output)

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """Rows of the weight, and the bias."""
        vector = self.scale.flatten().to(now.weight.dtype)
        rows = vector if is_transposed(module) else vector.view(-1, *(1 for _ in now.weight.shape[1:]))
        return Weights(now.weight * rows, None if now.bias is None else now.bias * vector)

    def note(self) -> str:
        """Which side."""
        return f"scale of {self.scale.numel()} outputs"


class ScaledInput(Scale):
    """W (l * x) + b; l has the shape (1, in), with ones behind it for convolutions."""

    folds_input: ClassVar[bool] = True

    def __init__(self, module: Any) -> None:
        super().__init__(module, _along(module, module.in_channels if is_conv(module) else _in(module)))

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Scale what goes in."""
        x = hidden_of(args, kwargs)
        scaled = self.scaled(x)
        swapped = tuple(scaled if value is x else value for value in args)
        return swapped, {name: scaled if value is x else value for name, value in kwargs.items()}

    def fold(self, module: Any, now: Weights, base: Weights) -> Weights:
        """Columns of the weight; each group of a convolution has its own."""
        vector = self.scale.flatten().to(now.weight.dtype)
        if is_transposed(module):
            return Weights(now.weight * vector[:, None], now.bias)
        groups: int = getattr(module, "groups", 1)
        columns = vector.view(groups, -1).repeat_interleave(len(now.weight) // groups, dim=0)
        return Weights(
            now.weight * columns.view(*columns.shape, *(1 for _ in now.weight.shape[2:])), now.bias
        )

    def note(self) -> str:
        """Which side."""
        return f"scale of {self.scale.numel()} inputs"


@dataclass(frozen=True)
class IA3(Injection):
    """Infused adapter by inhibiting and amplifying: one trained scale per key, value and FFN channel.

    y = l * (W x) for keys and values, y = W (l * x) in the FFN, with l the scales.

    Args:
        feedforward: which of the targets are feed-forward modules: their input is scaled, where that of the
            others is their output. A regex that a whole module name must match, or names (whole, or the last
            parts of a path); ``()`` for none. None: the last linear module of the FFN in the families that
            optx knows, by name.

    Serves nn.Linear, transformers' Conv1D and nn.Conv1d/2d/3d. By default: the projections to keys and
    values, and the last linear module of the FFN, in the families of "Families and methods" in
    recipes/README.md but those whose experts are one parameter (Mixtral, Qwen2-MoE, Qwen3-MoE), DeepSeek and
    Mamba, which need ``targets=``. Where one module computes queries, keys and values
    together (GPT-2, Phi-3, GPT-NeoX, Bloom, Falcon, ModernBERT, timm), all three are scaled, as in PEFT.
    Scales start at one: no output changes. One vector per module: (out, 1), or (1, in) for
    feed-forward modules; float32 on half-precision weights.

    Paper values:
        ``feedforward=None``: keys, values and the FFN's inner activation, as in the paper's T0 (the default).
            The authors' code trains at lr 3e-3 for 1000 steps.

    Limits: It scales what is there and adds nothing: the smallest budget, and the least room.

    Keywords: (IA)³, (IA)^3, T-Few, PEFT, parameter-efficient fine-tuning.

    Evidence: ``test_ia3.py``, ``test_peft_io.py``; no recipe.

    Raises:
        OptxError: ``feedforward`` is not a regex or a list of names.
        TargetError: at attach, ``feedforward`` names none of the targets, or one of its names does.

    Example:
        >>> import torch, optx
        >>> ffn = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> handle = optx.attach(ffn, optx.IA3(feedforward="2"), targets="2")
        >>> ffn[2].optx.ia3.scale.shape
        torch.Size([1, 32])

    Source: arXiv 2205.05638, section 3.3.
    """

    name: ClassVar[str] = "ia3"
    role: ClassVar[str] = "ia3"
    serves: ClassVar[str] = "Linear, Conv1D or Conv1d/2d/3d modules"

    feedforward: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        given: Any = self.feedforward
        if isinstance(given, str):
            try:
                re.compile(given)
            except re.error as error:
                raise OptxError(
                    f"IA3: feedforward={given!r} is not a regular expression ({error})."
                ) from None
        elif isinstance(given, list | tuple) and all(isinstance(name, str) for name in given):
            object.__setattr__(self, "feedforward", tuple(given))
        elif given is not None:
            raise OptxError(f"IA3: feedforward is {given!r}; it must be a regex or a tuple of names.")

    def is_feedforward(self, path: str, module: nn.Module) -> bool:
        """Whether the module's input is scaled, and not its output."""
        bare = bare_path(path)
        if self.feedforward is None:
            return any(re.fullmatch(rf"{family.block}\.(?:{family.ffn_inner})", bare) for family in FAMILIES)
        return matcher(self.feedforward)(bare, module)

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's scale."""
        if not (is_linear(module) or is_conv(module)):
            raise TargetError(f"attach: IA3 serves {self.serves}; {path!r} is a {type(module).__name__}.")
        return (ScaledInput if self.is_feedforward(path, module) else ScaledOutput)(module)

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per site."""
        if self.feedforward and not any(self.is_feedforward(site.path, site.module) for site in sites):
            raise TargetError(
                f"attach: IA3's feedforward={self.feedforward!r} is none of the targets. "
                f"{near(str(self.feedforward), [site.path for site in sites])}"
            )
        if isinstance(self.feedforward, tuple):
            named = [(bare_path(site.path), site.module) for site in sites]
            check_each_matches(self.feedforward, named, "attach: IA3's feedforward")
        return super().parts(sites)


def _in(module: nn.Module) -> int:
    return features(module)[0]


def _out(module: nn.Module) -> int:
    return features(module)[1]


def _along(module: Any, channels: int) -> torch.Size:
    """(1, channels), with a one for each axis of a kernel."""
    return torch.Size((1, channels, *(1 for _ in shape_of(module)[2:])))
