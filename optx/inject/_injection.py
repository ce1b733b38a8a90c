"""The protocol of an injection: options, which modules it serves, and the part it makes for each."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from torch import Tensor, nn

from optx._errors import OptxError, TargetError, near
from optx._expression import expression
from optx.inject._part import Part
from optx.step.transform import Transform

if TYPE_CHECKING:
    from typing_extensions import Self

Targets: TypeAlias = (
    str | type[nn.Module] | Sequence[str | type[nn.Module]] | Callable[[str, nn.Module], bool]
)
"""A regex (full match), a module type, a list of names or types, or a predicate on (name, module)."""


@dataclass(frozen=True)
class Site:
    """One module to be served, or some parameters of it; ``swept`` if ``"all-linear"`` found it, unnamed."""

    path: str
    module: nn.Module
    swept: bool = False
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Injection(ABC):
    """What `optx.attach` adds to modules. A subclass is a frozen dataclass: its fields are its options.

    Attributes:
        name: under which its parts live on a module (``module.optx.<name>``); one per module.
        role: what it serves where no targets are given. By name, in models whose names optx knows:
            ``"linears"`` (every linear module of a block), ``"query_value"`` and ``"key_value"`` (those
            projections), ``"ffn_out"`` and ``"attention_out"`` (the last linear module of each),
            ``"sublayers"`` (both of these), ``"ia3"`` (key_value and ffn_out), ``"attention"`` and ``"ffn"``
            (the sub-layer itself), ``"branches"`` (both of these), ``"block"`` (a layer of the stack) or
            ``"convolutions"`` (of a ResNet's blocks). In any model: ``"biased"`` (what has a bias) or
            ``"weighted"`` (every linear module and convolution).
        serves: in words, the modules that it can serve, for errors.
        serves_parameters: whether targets may name parameters too (experts in one 3-D tensor).
        serves_one: what it serves a single one of (``"head"``); empty: any number of modules.
    """

    name: ClassVar[str]
    role: ClassVar[str]
    serves: ClassVar[str]
    serves_parameters: ClassVar[bool] = False
    serves_one: ClassVar[str] = ""

    @abstractmethod
    def part(self, module: nn.Module, path: str) -> Part:
        """The part for one module, which is not touched.

        Raises:
            TargetError: the module is not one that this injection can serve.
        """

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """The parts for all sites, in their order; for injections whose parts know of each other.

        Raises:
            TargetError: there are several, of what serves one.
        """
        if self.serves_one and len(sites) > 1:
            raise TargetError(
                f"attach: {type(self).__name__} serves one {self.serves_one}, and targets match {len(sites)} "
                f"modules ({sites[0].path!r}, {sites[1].path!r}, ...). Name one; attach again for another."
            )
        return [self.part(site.module, site.path) for site in sites]

    def places(self, model: nn.Module) -> Collection[str] | None:
        """The paths of the modules that it serves by default, if it knows them; None: those of its role."""
        return None

    def expanded(self, sites: Sequence[Site]) -> list[Site]:
        """The modules that stand for those that were found, where one can't be served itself."""
        return list(sites)

    def companions(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Injection, list[Site]]]:
        """What else the same handle attaches beside its own sites, and where."""
        return []

    def transforms(self, handle: Any) -> Sequence[Transform]:
        """New transforms for what the method does in a step or after it.

        ``optx.wrap(optimizer, handle)`` takes them on, until the handle is removed.
        """
        return ()

    def metrics(self, handle: Any) -> Mapping[str, float | Tensor]:
        """Numbers of its own for `Handle.metrics`; ``handle`` is the one that asks."""
        return {}

    @property
    def trains_biases(self) -> bool:
        """Whether it is to train every bias of the model, so that those which it can't are told."""
        return False

    def as_stored(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Injection:
        """Itself, with what the tensors of a file that it was read from say beyond its options."""
        return self

    @property
    def needs_weight(self) -> bool:
        """Whether it works with a module's weight, and does not only add to what the module computes."""
        return False

    def role_in(self, model: nn.Module) -> str:
        """The role whose modules are served by default, where it depends on the options."""
        return self.role

    def options(self) -> dict[str, Any]:
        """The options as plain data, for a file's metadata."""
        return dataclasses.asdict(self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """What `options` described.

        Raises:
            OptxError: an option that this version does not know.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                raise OptxError(f"{cls.__name__}: no option is called {key!r}. {near(key, known)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})

    def arguments(self) -> dict[str, Any]:
        """All its fields as they are, also those that no file has; ``repr`` and `to_config` write them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # The dataclass that a subclass is made into would write one that can't be typed again.
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):
            cls.__repr__ = Injection.__repr__

    def __repr__(self) -> str:
        return expression(type(self), self.arguments())

    def __str__(self) -> str:
        defaults = {field.name: _default(field) for field in dataclasses.fields(self)}
        changed = [f"{name}={value!r}" for name, value in values_of(self).items() if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(changed)})"


def values_of(injection: Injection) -> dict[str, Any]:
    """Its options by name, as they are; `Injection.options` gives plain copies of them.

    A field without ``repr`` is none: it is not told and not saved.
    """
    return {
        field.name: getattr(injection, field.name) for field in dataclasses.fields(injection) if field.repr
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


class Composite(Injection):
    """Several injections under one handle."""

    role: ClassVar[str] = ""
    serves: ClassVar[str] = ""

    @abstractmethod
    def members(self) -> dict[str, Injection]:
        """The injections by a name that ``targets={name: ...}`` may use."""

    def part(self, module: nn.Module, path: str) -> Part:
        """Not asked: its members make the parts."""
        raise NotImplementedError
