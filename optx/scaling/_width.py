"""One parameter beside its twin in the base model: which of its dimensions are width, and how much wider."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

KINDS = ("matrix", "input", "vector", "output", "scalar")
"""What a parameter can be, by the dimensions that grow with width."""


@dataclass(frozen=True)
class Width:
    """One parameter, as compared with the base model.

    Attributes:
        name: in the bare model, without what torch.compile or DDP put before it.
        shape: in this model.
        base_shape: in the base model.
        kind: ``"matrix"`` (hidden: fan-in and fan-out grow), ``"input"`` (embedding, first layer, position
            table: fan-out alone), ``"vector"`` (bias, gain of a norm: one number a channel), ``"output"``
            (readout: fan-in alone) or ``"scalar"`` (nothing grows).
        fan_in: how much wider the fan-in is than the base's; 1.0 where it is finite.
        fan_out: the same of the fan-out. Embeddings and weights that are stored as (in, out) are turned.
        tied: other names of the same tensor.
        base_fans: the base's fan-in and fan-out themselves, from which another target is compared.
    """

    name: str
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    kind: str
    fan_in: float = 1.0
    fan_out: float = 1.0
    tied: tuple[str, ...] = ()
    base_fans: tuple[int, int] = field(default=(1, 1), repr=False)

    @property
    def ninf(self) -> int:
        """How many of its dimensions are width."""
        return {"matrix": 2, "scalar": 0}.get(self.kind, 1)

    @property
    def m(self) -> float:
        """The width multiplier, mup's ``width_mult``: of the fan-in where that grows, else of the fan-out."""
        if self.kind == "scalar":
            return 1.0
        return self.fan_in if self.kind in ("matrix", "output") else self.fan_out

    def of_kind(self, kind: str) -> Width:
        """As another kind; a ratio that it has on one side alone goes to the side where this kind has one."""
        if {kind, self.kind} in ({"input", "output"}, {"vector", "output"}):
            return replace(self.turned(), kind=kind)
        grown = self.m
        fan_in = {"matrix": self.fan_in, "output": grown}.get(kind, 1.0)
        fan_out = {"matrix": self.fan_out, "input": grown, "vector": grown}.get(kind, 1.0)
        return replace(self, kind=kind, fan_in=fan_in, fan_out=fan_out)

    @property
    def is_table(self) -> bool:
        """Whether rows are looked up in it, so that a head that shares it reads out."""
        rows = len(self.base_shape) == 2 and self.base_fans == (1, self.base_shape[1])
        return self.kind == "input" and rows

    def read_out(self) -> Width:
        """A table of embeddings as the head that shares it uses it."""
        return replace(self, kind="output", fan_in=self.fan_out, fan_out=1.0)

    def turned(self) -> Width:
        """With fan-in and fan-out exchanged: stored as (in, out), and taken for (out, in), or the reverse."""
        kind = {"input": "output", "output": "input"}.get(self.kind, self.kind)
        fans = (self.base_fans[1], self.base_fans[0])
        return replace(self, kind=kind, fan_in=self.fan_out, fan_out=self.fan_in, base_fans=fans)


@dataclass(frozen=True)
class HeadWidth:
    """The width of one attention module's heads.

    Attributes:
        width: in this model.
        base_width: in the base model.
        base_scale: what the base model's logits are multiplied by; None if that is for torch to choose,
            the inverse square root of the width.
    """

    width: int
    base_width: int
    base_scale: float | None = None

    @property
    def scale(self) -> float:
        """What logits are multiplied with: as in base at its width, and from there as 1 / width."""
        own = self.base_width**-0.5 if self.base_scale is None else self.base_scale
        return own * (self.base_width / self.width)
