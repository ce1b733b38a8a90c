"""RF8Linear: linear modules that compute with a byte for each weight.

Source: arXiv 2506.00486v3, section 4 (the numbers); packing and products are optx's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TargetError, warn
from optx._rf8 import Packed, pack_tensor
from optx.inject._handle import Handle
from optx.inject._injection import Injection
from optx.inject._part import RESERVED, Part, Weights, attached, hidden_of
from optx.inject._rf8_product import product
from optx.inject._served import Served
from optx.inject._trained_whole import Saved


class PackedLinear(Part):
    """A module's weight in RF8.

    Attributes:
        codes: uint8, of the weight's shape.
        e_max: int8, one number.
    """

    inside = in_place = True

    codes: Tensor
    e_max: Tensor

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.dtype = packed.dtype
        self.register_buffer("codes", packed.codes)
        self.register_buffer(
            "e_max", torch.tensor(packed.e_max, dtype=torch.int8, device=packed.codes.device)
        )
        self._known: tuple[Tensor, int, int] | None = None  # that number on the host, and of which tensor

    def retired(self, module: nn.Module) -> Sequence[nn.Parameter]:
        """The float weight, which nothing is computed with."""
        return [module.weight] if isinstance(module.weight, nn.Parameter) else []

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The product with the packed weight, and the module's own bias."""
        x = hidden_of(args, kwargs)
        bias: Any = module.bias
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = product(x, self.codes, self.e_max, self._exponent())
        return y if bias is None else y + bias.to(y.dtype)

    def _exponent(self) -> int | None:
        """The exponent on the host, read once; None while a graph is made."""
        if torch.compiler.is_compiling():
            return None
        version = self.e_max._version  # pyright: ignore[reportPrivateUsage]
        if self._known is None or self._known[0] is not self.e_max or self._known[1] != version:
            self._known = (self.e_max, version, int(self.e_max))
        return self._known[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}

    def packed(self) -> Packed:
        """What it holds."""
        return Packed(self.codes, int(self.e_max), self.dtype)

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """RF8's numbers in the weight's place."""
        return Weights(self.packed().unpack(torch.float32).to(now.weight.dtype), now.bias)

    def note(self) -> str:
        """Bytes that it keeps."""
        return f"{self.codes.numel() + 1:,} bytes"


class ReleasedLinear(PackedLinear):
    """The same for a module whose float weight is given up."""

    fold = Part.fold

    def release(self, module: Any) -> _Released:
        """Free the weight's memory; the model's keys, and what it saves and loads, stay as they are."""
        return _Released(self, module)

    def tell(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """What a state dict has in the weight's place."""
        weight: Any = module.weight
        state_dict[f"{prefix}weight"] = self.packed().unpack(torch.float32).to(weight.dtype)

    def take(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Pack the weight of a state dict that is loaded."""
        name = f"{prefix}weight"
        weight: Any = module.weight
        if name not in state_dict:
            return
        given: Tensor = state_dict[name]
        if given.shape == self.codes.shape:  # else torch says which shapes differ
            packed = pack_tensor(given.to(weight.dtype), "load_state_dict", repr(name))
            self.codes.copy_(packed.codes)
            self.e_max.fill_(packed.e_max)
            own = f"{prefix}{RESERVED}.{self.adapter}."
            state_dict.update({f"{own}codes": self.codes, f"{own}e_max": self.e_max})
            state_dict[name] = weight.data


class _Released:
    """A weight that is given up, until `remove` fills it with RF8's numbers."""

    def __init__(self, part: ReleasedLinear, module: Any) -> None:
        self._part, self._weight = part, module.weight
        self._hooks = [
            module.register_state_dict_post_hook(partial(part.tell)),
            module.register_load_state_dict_pre_hook(part.take),
        ]
        self._weight.data = self._weight.data.new_empty(0)

    def remove(self) -> None:
        """A weight again."""
        for hook in self._hooks:
            hook.remove()
        self._weight.data = self._part.packed().unpack(torch.float32).to(self._weight.dtype)


@dataclass(frozen=True)
class RF8Linear(Injection):
    """Linear modules that compute with a byte for each weight (RF8): inference, and adapters on top.

    y = x W' + b, where W' is W rounded to RF8's numbers (`optx.rf8`). For few vectors the bytes become
    numbers in registers; for many, a tile of rows is unpacked and multiplied by torch. The weights are
    frozen: gradients flow through them to what was before, as adapters need it.

    Args:
        release: free the float weights, so that a byte for each weight is all that stays. The model's keys
            and saves are as before, with RF8's numbers; loading packs. `Handle.remove` can't give the old
            weights back then: it leaves RF8's numbers in their place, with a warning. Without it they are
            kept, and nothing is saved yet.

    Serves nn.Linear. By default: all linear modules of the blocks, in the families that optx knows, without
    the head; ``targets="all-linear"`` in any other model.

    Paper values:
        None: there is nothing to set.

    Limits: A weight that other modules use too (an embedding that is the head) can't be released, nor one
        that is sharded, quantised or offloaded be served. Weights are rounded by 4 % of themselves each (root
        mean square), which a linear module's output shows as about 4 % of its own size.

    Keywords: quantisation, quantization, weight-only, 8 bits, inference, compression, memory, QLoRA.

    Evidence: ``test_rf8_linear.py``; no recipe, but ``optx bench rf8``.

    Raises:
        TargetError: a module that is not torch's own Linear, or a weight that can't be packed; names it.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> handle = optx.attach(model, optx.RF8Linear(release=True), targets="0")
        >>> model[0].weight.numel(), sum(t.nbytes for t in handle.state_dict().values())
        (0, 4097)
        >>> list(model.state_dict())[:2]
        ['0.weight', '0.bias']

    Source: arXiv 2506.00486v3, section 4.
    """

    name: ClassVar[str] = "rf8"
    role: ClassVar[str] = "linears"
    serves: ClassVar[str] = "Linear modules"

    release: bool = False

    @property
    def needs_weight(self) -> bool:
        """It packs it."""
        return True

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's weight, packed."""
        weight: Any = getattr(module, "weight", None)
        if type(module) is not nn.Linear or type(weight) is not nn.Parameter:
            kind = type(module).__name__
            what = (
                kind if type(module) is not nn.Linear else f"{kind} with a weight of {type(weight).__name__}"
            )
            raise TargetError(
                f"attach: RF8Linear serves torch's own Linear modules with a plain weight; {path!r} is a "
                f"{what}. Leave it out of targets."
            )
        container = attached(module)
        if container is not None and container.originals:
            raise TargetError(
                f"attach: something is merged into {path!r}, whose weight would be packed with it and change "
                "again. Call merge_and_unload(), or unmerge(), first."
            )
        try:
            packed = pack_tensor(weight, "attach", f"the weight of {path!r}")
        except OptxError as error:
            raise TargetError(str(error)) from None
        return ReleasedLinear(packed) if self.release else PackedLinear(packed)

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> Handle:
        """What `optx.attach` returns."""
        if self.release:
            check_alone(model, served)
            for one in served:
                if isinstance(one.part, ReleasedLinear):
                    one.hooks.append(one.part.release(one.module))
        made = Handle(model, injection, served, saved)
        if self.release:
            made.on_removal(_tell_of_rounding)
        return made


def check_alone(model: nn.Module, served: Sequence[Served]) -> None:
    """Raise if another module uses a weight that is to be given up.

    Raises:
        TargetError: names both.
    """
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    for one in served:
        names = owners.get(id(one.module.weight), [])
        if len(names) > 1:
            raise TargetError(
                f"attach: {one.path}.weight is tied ({', '.join(names)} are one tensor), so its floats can't "
                "be released. Leave it out of targets, or attach it with release=False."
            )


def _tell_of_rounding(handle: Handle) -> None:
    warn(
        f"RF8Linear(release=True): the {len(handle.served)} weights that were released have RF8's numbers "
        "now, rounded by 4 % of themselves; the floats that they were are gone. A checkpoint has those."
    )
