"""MuReadout: the factors that a parametrization asks for in the forward pass, without an edit of the model.

Source: Tensor Programs V, arXiv 2203.03466, table 8 and appendix B.1; the package mup's ``MuReadout``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from optx._errors import OptxError, TargetError, check_range, near, warn
from optx._module_paths import bare_path, paths_of
from optx.inject._injection import Injection
from optx.inject._part import Arguments, Part, Weights, attached, hidden_of
from optx.inject._weights import is_conv, is_linear
from optx.scaling._rules_of_width import Parametrization, at_first, parametrization_of
from optx.scaling._shapes import Shapes
from optx.scaling._width import Width

if TYPE_CHECKING:
    from typing_extensions import Self

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Multiplier(Part):
    """W (f x) + b for a module that multiplies its input by a weight.

    A bias with a factor of its own is multiplied by that.
    """

    folds_input: ClassVar[bool] = True

    def __init__(self, factor: float, of_bias: float, of_width: float) -> None:
        super().__init__()
        self.factor, self.of_bias = factor, of_bias
        self.of_width = of_width  # what of the factor is width's, which a learning rate may count on

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Scale what goes in: exactly, and of no effect on the bias."""
        if self.factor == 1.0:
            return None
        x = hidden_of(args, kwargs)
        scaled = x * self.factor
        swapped = tuple(scaled if value is x else value for value in args)
        return swapped, {name: scaled if value is x else value for name, value in kwargs.items()}

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """Into the weight, whose learning rate then is another."""
        if module.training:
            warn(
                f"merge: the weight of a {type(module).__name__} has its multiplier {self.factor:.6g} in it "
                "now, and is no longer what its learning rate was made for. Unmerge before training on."
            )
        bias = now.bias if now.bias is None or self.of_bias == 1.0 else now.bias * self.of_bias
        return Weights(now.weight * self.factor, bias)

    def note(self) -> str:
        """The factors."""
        return f"times {self.factor:.6g}" + (
            "" if self.of_bias == 1.0 else f", bias times {self.of_bias:.6g}"
        )


class BiasedMultiplier(Multiplier):
    """With a bias that has a factor of its own."""

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """What the bias lacks."""
        trailing = output.ndim - 2 if is_conv(module) or isinstance(module, _TRANSPOSED) else 0
        bias: Any = module.bias
        lacking = bias * (self.of_bias - 1.0)
        return output + lacking.view(-1, *(1 for _ in range(trailing))).to(output.dtype)


class OutputMultiplier(Multiplier):
    """f E[i] for an embedding, whose input are indices."""

    folds_input: ClassVar[bool] = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nothing."""

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Scale what comes out."""
        return output * self.factor


@dataclass(frozen=True)
class MuReadout(Injection):
    """The factors of width that belong into the forward pass: for muP, 1/m where the model reads out.

    y = W (s x / m) + b, with m how much wider the fan-in is than the base's and s ``output_mult``. The bias
    is not multiplied. At the base's width nothing changes but by ``output_mult``.

    By default it serves every module that reads out (its fan-in is width and its fan-out is not: the head,
    the router of a mixture of experts, a classifier) and all others for whose weight the parametrization has
    a factor. A head that shares the embedding's weight is scaled and the embedding is not. T5, which itself
    multiplies by the inverse square root of the width there, gets what is lacking of 1/m; embeddings that are
    multiplied by its square root (Gemma's, BART's with ``scale_embedding``) lose what that grew by.

    Args:
        shapes: of this model, from `optx.scaling.shapes`.
        output_mult: a factor of every readout that is served, to be tuned at the base's width.
        parametrization: ``"mup"``, ``"mup-table3"``, ``"mup-table9"``, ``"standard"``, ``"ntk"``,
            ``"mean_field"`` or what `optx.scaling.abc` returns; the same as for optimizer and initialisation.

    Paper values:
        ``output_mult=1.0``: the package's (the default). The paper tunes it on the proxy.

    Limits: ``merge()`` writes the factor into the weight, for which the learning rate then is another: it is
        for inference. A parameter that no known module multiplies its input with (experts in one tensor,
        norms) has no place for a factor and is refused if the parametrization asks for one.

    Keywords: muP, muTransfer, Maximal Update Parametrization, output multiplier, tensor programs.

    Evidence: ``test_mu_readout.py``: equal to the package's module; ``optx run transfer``.

    Raises:
        OptxError: ``output_mult`` is not positive, or the parametrization is none.
        TargetError: at attach, a module has a multiplier already (the package's ``MuReadout`` too), is not in
            the shapes, or can't have a factor.

    Example:
        >>> import torch, optx
        >>> def make(width):
        ...     return torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.Linear(width, 3))
        >>> model = make(64)
        >>> shapes = optx.scaling.shapes(model, base=make(16))
        >>> handle = optx.attach(model, optx.MuReadout(shapes))
        >>> print(handle.report().rows[0].module, handle.report().rows[0].note)
        1 times 0.25

    Source: arXiv 2203.03466, table 8 and appendix B.1.
    """

    name: ClassVar[str] = "mu_readout"
    role: ClassVar[str] = "width"
    serves: ClassVar[str] = "Linear, Conv1D, convolutions, embeddings and routers"

    shapes: Shapes = field(repr=False)
    output_mult: float = 1.0
    parametrization: str | Parametrization = "mup"

    def __post_init__(self) -> None:
        check_shapes("MuReadout", self.shapes)
        check_range("MuReadout", "output_mult", self.output_mult, 0.0)
        if not self.output_mult > 0:
            raise OptxError(f"MuReadout: output_mult is {self.output_mult!r}; it must be greater than 0.")
        parametrization_of("MuReadout", self.parametrization)

    def places(self, model: nn.Module) -> Collection[str]:
        """What reads out, and whatever else has a factor."""
        self.shapes.check(model)
        found: list[str] = []
        for path, module in paths_of(model).modules.items():
            for leaf, _ in module.named_parameters(recurse=False):
                name = f"{path}.{leaf}".removeprefix(".")
                width = self._use(module, name)
                if width.kind == "output" or self._factor(path, width) != 1.0:
                    self._check_place(module, path, leaf)
                    found.append(path)
        here = paths_of(model).here
        return {here[path] for path in found}

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's factors."""
        path = bare_path(path)
        check_once(module, path, Multiplier, "a multiplier")
        weight = f"{path}.weight"
        if weight not in self.shapes:
            names = [name.rpartition(".")[0] for name in self.shapes if name.endswith(".weight")]
            raise TargetError(
                f"attach: MuReadout's shapes have no {weight!r}, so that {path!r} can't be served. "
                f"{near(path, names)}"
            )
        self._check_place(module, path, "weight")
        width = self._use(module, weight)
        factor = self._factor(path, width)
        bias = self.shapes.get(f"{path}.bias")
        of_bias = 1.0 if bias is None else self._forward(bias)
        if factor == of_bias == 1.0 != width.m and width.kind != "output":
            raise TargetError(
                f"attach: {path!r} is {width.kind!r}, for which {self} has no factor. Leave it out of "
                "targets, or say by shapes.set(output=...) that it reads out."
            )
        if isinstance(module, nn.Embedding):
            return OutputMultiplier(factor, 1.0, self._forward(width))
        return (Multiplier if of_bias == 1.0 else BiasedMultiplier)(factor, of_bias, self._forward(width))

    def _use(self, module: nn.Module, name: str) -> Width:
        """A parameter as this module uses it."""
        width = self.shapes[name]
        reads_out = width.is_table and bool(width.tied) and not isinstance(module, nn.Embedding)
        return width.read_out() if reads_out else width

    def _factor(self, path: str, width: Width) -> float:
        wanted = self._forward(width) * (self.output_mult if width.kind == "output" else 1.0)
        return wanted / self.shapes.readouts.get(path, 1.0)

    def _forward(self, width: Width) -> float:
        return at_first(parametrization_of("MuReadout", self.parametrization), width).forward

    def _check_place(self, module: nn.Module, path: str, leaf: str) -> None:
        """Raise unless a factor of this parameter is one of the module's input or output."""
        known = is_linear(module) or is_conv(module) or isinstance(module, (nn.Embedding, *_TRANSPOSED))
        routes = type(module).__name__.endswith(("Router", "Gate", "TopKGate"))
        biased = leaf == "bias" and (is_linear(module) or is_conv(module))
        if not ((leaf == "weight" and (known or routes)) or biased):
            raise TargetError(
                f"attach: MuReadout serves {self.serves}; {f'{path}.{leaf}'!r} of a {type(module).__name__} "
                "has a factor too, for which it has no place. Pass targets= of other modules, or say by "
                "shapes.set() what this parameter is."
            )

    def options(self) -> dict[str, Any]:
        """As plain data."""
        if not isinstance(self.parametrization, str):
            raise TypeError("a parametrization that has no name")
        data = {"output_mult": self.output_mult, "parametrization": self.parametrization}
        return {"shapes": self.shapes.as_data(), **data}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """What `options` described."""
        return super().from_options({**options, "shapes": Shapes.from_data(options.get("shapes"))})

    def __str__(self) -> str:
        named = self.parametrization if isinstance(self.parametrization, str) else self.parametrization.name
        return f"MuReadout(output_mult={self.output_mult!r}, parametrization={named!r})"


def check_shapes(owner: str, shapes: Any) -> None:
    """Raise unless it is `Shapes`."""
    if not isinstance(shapes, Shapes):
        raise OptxError(
            f"{owner}: shapes is a {type(shapes).__name__}; it must be what optx.scaling.shapes returns."
        )


def check_once(module: nn.Module, path: str, kind: type[Part], what: str) -> None:
    """Raise if a module has such a part already, or is the package's own, which has it built in."""
    container = attached(module)
    names = [] if container is None else [n for n, part in container.parts.items() if isinstance(part, kind)]
    if names:
        raise TargetError(
            f"attach: {path!r} has {what} already ({names[0]!r}), and a second would be multiplied with it. "
            "Remove that handle first."
        )
    if any(one.__module__.startswith("mup.") for one in type(module).__mro__):
        raise TargetError(
            f"attach: {path!r} is the package mup's {type(module).__name__}, which has {what} already. Use a "
            "plain module, or leave it out of targets."
        )
