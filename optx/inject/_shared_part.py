"""What `optx.StableRPS` adds to a module: its place in the shared array, which the first part holds."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from optx._errors import OptxError
from optx._names import RESERVED, is_dtensor
from optx.inject._part import Part, Weights, hidden_of
from optx.inject._shared_read import gathered, linear, unsaved, weight
from optx.inject._stand_in import called_with
from optx.kernels.shared.mapping import Place

MAPPINGS = ("fold", "roast", "hashed")


_FORWARD = nn.Linear.forward


class SharedWeight(Part):
    """W = scale * sign * psi[slot], made while the module computes.

    The part of the first served module has ``psi`` (m,), which the others read there: the model's root may be
    an nn.Sequential, whose children are its computation. ``place`` (10,) int64 says what `Place` says; the
    scale is in it as the bits of a float64, so that no cast of the model changes it.
    """

    inside = in_place = True

    place: Tensor
    psi: nn.Parameter
    kept: nn.Parameter | None
    """The module's own weight while the module has none, without values."""

    def __init__(self, place: Place, shape: torch.Size, holder: SharedWeight | None) -> None:
        super().__init__()
        self.__dict__["_holder"] = holder  # no submodule: its tensors are another module's
        self.shape = shape
        self.at = place
        """What ``place`` says, as Python's numbers."""
        self.revision = 0
        self.__dict__["kept"] = None
        self.__dict__["replaced"] = []  # on the holder: every module's weight
        self.register_buffer("place", as_numbers(place))

    @property
    def holder(self) -> SharedWeight:
        """The part that has the array."""
        return self.__dict__["_holder"] or self

    @property
    def array(self) -> Tensor:
        """psi, wherever it is."""
        psi = self.holder.psi
        if psi.is_meta:
            raise OptxError(
                "StableRPS: the shared array is on the meta device, or offloaded with the module that holds "
                "it, while another module computes. Keep the modules that share it on one device."
            )
        if is_dtensor(psi):
            raise OptxError(
                "StableRPS: the shared array is sharded (FSDP2) with the module that holds it, and another "
                "module reads it. Shard the model as one unit, fully_shard(model) alone, or use DDP."
            )
        return psi

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The module's weight as it is now; autograd follows it to psi."""
        return weight(self.array, self.at, dtype).view(self.shape)

    # ---- the call -----------------------------------------------------------------------------------

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's call with that weight, which is gone when the call ends."""
        psi, place = self.array, self.at
        if self._is_plain(module) and len(args) == 1:
            output = linear(args[0], psi, module._parameters["bias"], place, self.shape)  # pyright: ignore
            if output is not None:
                return output
        dtype = self._dtype(module, hidden_of(args, kwargs))
        W = self.weight(dtype)

        def again() -> Tensor:
            wide = psi.detach().to(torch.promote_types(psi.dtype, torch.float32))
            return gathered(wide, place, dtype)

        with unsaved(W, again, psi):
            return called_with(lambda: {"weight": W}, call, module, args, kwargs)

    def _is_plain(self, module: nn.Module) -> bool:
        """Whether the call is nn.Linear's own, and this alone goes around it."""
        container: Any = module._modules[RESERVED]  # pyright: ignore[reportPrivateUsage]
        alone = len(container._modules) == 1 and container._forward is None
        return alone and type(module) is nn.Linear and nn.Linear.forward is _FORWARD

    def _dtype(self, module: nn.Module, x: Tensor) -> torch.dtype:
        """What the module computes in; of an embedding, whose input says nothing, what it is kept in."""
        if not x.is_floating_point():
            own = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
            return self.array.dtype if own is None else own.dtype
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    # ---- the rest -----------------------------------------------------------------------------------

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """W in the place of the module's own."""
        return Weights(self.weight(now.weight.dtype), now.bias)

    def retired(self, module: nn.Module) -> list[nn.Parameter]:
        """The module's own weight, which takes no part."""
        own = self.kept if self.kept is not None else module._parameters.get("weight")  # pyright: ignore
        return [] if own is None else [own]

    def settings_of(self, name: str) -> list[Tensor]:
        """The array takes the place of all the weights that are read from it."""
        return list(self.__dict__["replaced"])

    def note(self) -> str:
        """How many weights on how many slots."""
        return f"{self.at.numel:,} weights read from {self.at.slots:,}, {self.at.mapping}"

    def reread(self) -> None:
        """Take the place from its numbers, which were loaded.

        Raises:
            OptxError: they are of another module, or of an array of another length.
        """
        found = from_numbers(self.place)
        if found.numel != self.at.numel or found.slots != self.at.slots:
            raise OptxError(
                f"StableRPS: the state is of {found.numel:,} weights on {found.slots:,} slots, and the "
                f"module has {self.at.numel:,} on {self.at.slots:,}. Attach with the same options."
            )
        if found != self.at:
            self.at = found
            self.revision += 1

    def _load_from_state_dict(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super()._load_from_state_dict(*args)  # pyright: ignore[reportUnknownMemberType]
        try:
            self.reread()
        except OptxError as error:
            args[-1].append(str(error))


def as_numbers(place: Place) -> Tensor:
    """(10,) int64."""
    (scale,) = struct.unpack("q", struct.pack("d", place.scale))
    mapping = MAPPINGS.index(place.mapping)
    return torch.tensor(
        [
            *(mapping, place.slots, place.offset, place.numel, place.seed, scale),
            *(place.order, place.cols, place.tall, place.wide),
        ]
    )


def from_numbers(numbers: Tensor) -> Place:
    """What `as_numbers` wrote."""
    plain = cast("list[int]", numbers.tolist())  # pyright: ignore[reportUnknownMemberType]
    mapping, slots, offset, numel, seed, bits, *rest = plain
    (scale,) = struct.unpack("d", struct.pack("q", bits))
    if not 0 <= mapping < len(MAPPINGS):
        raise OptxError(f"StableRPS: the state has a mapping {mapping}, which this version does not know.")
    return Place(MAPPINGS[mapping], slots, offset, numel, seed, scale, *rest)
