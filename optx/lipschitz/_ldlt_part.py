"""What `optx.LDLT` adds to a layer, and the chain that makes every layer's weight at once."""

# Letters are those of the paper.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from optx._errors import OptxError
from optx._names import is_dtensor
from optx.inject._part import Part, Weights, hidden_of, new_tensor
from optx.inject._stand_in import called_with
from optx.inject._weights import is_conv
from optx.lipschitz._ldlt_order import Form
from optx.lipschitz._ldlt_passes import Make, weights
from optx.lipschitz._ldlt_weights import Link, around_identity, residual, sequential, spread

_MAKE: dict[Form, Make] = {
    "sequential": sequential,
    "residual": residual,
    "identity": around_identity,
}


class LDLTWeight(Part):
    """V, a and, where a chain's weights were kept, the logarithms of its multipliers' roots.

    ``bound`` (1,) int64 is L as the bits of a float64, so that no cast of the model changes it; it is on the
    chain's first layer.
    """

    inside = in_place = alone = True

    V: nn.Parameter | None
    a: nn.Parameter | None
    gauge: Tensor | None
    bound: Tensor | None
    chain: Chain

    def __init__(self, module: Any, path: str, keeps: bool) -> None:
        super().__init__()
        V = new_tensor(module, *module.weight.shape)
        V.copy_(module.weight.detach())
        self.path = path
        self.V = nn.Parameter(V)
        self.a = nn.Parameter(new_tensor(module, len(V) if is_conv(module) else 1))
        self.register_buffer("gauge", new_tensor(module, len(V)) if keeps else None)
        self.register_buffer("bound", None)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(p.device for p in (*self.parameters(), *self.buffers()))

    # ---- the call -----------------------------------------------------------------------------------

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's call with the chain's weight."""
        x = hidden_of(args, kwargs)
        W = self.chain.take(self)
        if not torch.is_autocast_enabled(x.device.type):
            W = W.to(x.dtype)
        return called_with(lambda: {"weight": W}, call, module, args, kwargs)

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """The weight that the call computes with."""
        with torch.no_grad():
            made = self.chain.weights()
        return Weights(made[self.chain.parts.index(self)].to(now.weight.dtype), now.bias)

    def retired(self, module: Any) -> Sequence[nn.Parameter]:
        """The module's own weight, which takes no part."""
        return (module.weight,)

    def note(self) -> str:
        """Its place in the chain, and L."""
        chain = self.chain
        return f"{chain.parts.index(self) + 1} of {len(chain.parts)}, {chain.form}, L={chain.L:g}"

    def _load_from_state_dict(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        before = None if self.bound is None else self.chain.L
        super()._load_from_state_dict(*args)  # pyright: ignore[reportUnknownMemberType]
        if before is not None and self.chain.fixed and before != self.chain.L:
            args[-1].append(
                f"LDLT: the state is of a chain of L={self.chain.L:g}, and this one was attached with "
                f"L={before:g}."
            )


def decoded(bound: Tensor) -> float:
    """L, of its float64 bits."""
    (found,) = struct.unpack("d", struct.pack("q", int(bound)))
    return found


class _Same:
    """A tensor that is equal to itself alone."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.tensor is other.tensor

    __hash__ = object.__hash__


class Chain:
    """A chain's weights, made all at once when its first layer computes, and handed out one by one.

    What was made is for one forward pass: each weight is handed out once, to the thread that had it made,
    while V and a are the same tensors with the same values; any other call makes them anew. Within
    `torch.nn.utils.parametrize.cached` they are made once for all calls.
    """

    def __init__(self, parts: Sequence[LDLTWeight], links: Sequence[Link], form: Form, fixed: bool) -> None:
        self.parts = list(parts)
        self.links = list(links)
        self.form: Form = form
        self.fixed = fixed
        """Whether L is what a person said, and not what was found."""
        self._L, self._stamp = 0.0, (0, -1)
        self.made = dict[int, tuple[Any, list[Tensor | None]]]()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "made": {}, "_stamp": (0, -1)}  # what one forward pass made is nobody else's

    @property
    def L(self) -> float:
        """The Lipschitz constant of the whole, as ``bound`` has it; torch.compile: as it was read last."""
        if torch.compiler.is_compiling():
            return self._L
        bound = self.parts[0].bound
        assert bound is not None
        stamp = id(bound), bound._version  # pyright: ignore[reportPrivateUsage]
        if stamp != self._stamp:
            self._L = decoded(bound)
            self._stamp = stamp
        return self._L

    @L.setter
    def L(self, value: float) -> None:
        (bits,) = struct.unpack("q", struct.pack("d", value))
        self.parts[0].bound = torch.tensor([bits], dtype=torch.int64, device=self.parts[0].device)
        assert value == self.L

    def parameters(self) -> list[nn.Parameter]:
        """Every V, then every a."""
        parts = self.parts
        return [p for p in (*(one.V for one in parts), *(one.a for one in parts)) if p is not None]

    def free(self) -> tuple[list[Tensor], list[Tensor]]:
        """V and a of every layer that has them.

        Raises:
            OptxError: they are sharded, or elsewhere.
        """
        V = [part.V for part in self.parts if part.V is not None]
        a = [part.a for part in self.parts if part.a is not None]
        for one in (*V, *a):
            if is_dtensor(one) or one.is_meta or one.device != V[0].device:
                raise OptxError(
                    "LDLT: the layers of a chain are sharded (FSDP2), offloaded, or on several devices, and "
                    "each weight depends on those before it. Keep a chain whole on one device, or use DDP; "
                    "or merge."
                )
        return [*V], [*a]

    def weights(self) -> list[Tensor]:
        """Of every part, in their order; autograd follows them to V and a."""
        V, a = self.free()
        made = weights(_MAKE[self.form], V, a, self.links, self.L)
        ends = len(self.parts) - (
            2 if self.form == "residual" else 1
        )  # layers with an activation behind them
        found: list[Tensor] = []
        for k, (one, part, link) in enumerate(zip(made, self.parts, self.links, strict=True)):
            before = self.parts[k - 1].gauge if 0 < k <= ends else None
            if before is not None:
                one = one * spread(before.to(one.dtype).exp(), one, link)
            if part.gauge is not None and k < ends:
                one = one * (-part.gauge).to(one.dtype).exp().view(-1, *(1 for _ in one.shape[1:]))
            found.append(one)
        return found

    def multipliers(self) -> list[Tensor] | None:
        """LipSDP's, of each activation, in float64."""
        ends = len(self.parts) - (2 if self.form == "residual" else 1)
        gauges = [part.gauge for part in self.parts[:ends]]
        return [(2.0 * one.double()).exp() for one in gauges if one is not None] or None

    def take(self, part: LDLTWeight) -> Tensor:
        """A layer's weight for one call."""
        k = self.parts.index(part)
        if torch.compiler.is_compiling():
            return self._take(0, None, k)
        if getattr(parametrize, "_cache_enabled", 0):
            return self._cached()[k]
        return self._take(threading.get_ident(), self._key(), k)

    def _take(self, thread: int, key: Any, k: int) -> Tensor:
        empty: list[Tensor | None] = []
        known, made = self.made.get(thread, (None, empty))
        if not made or made[k] is None or known != key:
            fresh: list[Tensor | None] = [*self.weights()]
            made = fresh
        found = made[k]
        assert found is not None
        made[k] = None
        if any(one is not None for one in made):
            self.made[thread] = (key, made)
        else:
            self.made.pop(thread, None)
        return found

    def _key(self) -> list[Any]:
        """What the weights depend on: the tensors themselves, which so are kept alive, and their versions."""
        given = self.parameters()
        modes = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self.L]
        return [*modes, *map(_Same, given), *(p._version for p in given)]  # pyright: ignore[reportPrivateUsage]

    def _cached(self) -> list[Tensor]:
        """What `parametrize.cached` keeps until it ends."""
        kept: Any = parametrize._cache  # pyright: ignore
        key = (id(self), f"LDLT {torch.is_grad_enabled()} {torch.is_inference_mode_enabled()}")
        if kept.get(key) is None:
            kept[key] = self.weights()
        return kept[key]
