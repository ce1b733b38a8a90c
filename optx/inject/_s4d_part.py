"""S4D in the place of an attention module, or beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optx._errors import OptxError, ShapeError
from optx._names import RESERVED
from optx.inject._part import Part, output_of, with_output
from optx.inject._s4d_cache import layer_in
from optx.inject._s4d_call import Call, Reader
from optx.inject._s4d_layer import S4DLayer


class Mixer(Part):
    """What both have: the layer, and how a call of the module becomes a call of it."""

    own: ClassVar[bool]

    def __init__(self, path: str, layer: S4DLayer, reader: Reader) -> None:
        super().__init__()
        self.path, self.layer, self.reader = path, layer, reader

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nothing; but that there is a hook keeps nn.TransformerEncoderLayer from going past the module."""

    def mix(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The layer's output for the call's input, in its dtype and with its axes."""
        call = self.reader.read(self.path, module, args, kwargs, self.layer.bidirectional)
        if call.hidden.shape[-1] != self.layer.width:
            raise ShapeError(
                f"S4D on {self.path!r}: the module was called with hidden states of shape "
                f"{tuple(call.hidden.shape)}; it was attached for a width of {self.layer.width}. Attach "
                f"optx.S4D(width={call.hidden.shape[-1]})."
            )
        y = self._from_cache(module, call) if call.cache is not None else self._whole(call)
        return y.transpose(0, 1) if call.turned else y

    def _whole(self, call: Call) -> Tensor:
        if call.real is None:
            return self.layer(call.hidden)
        real = call.real if call.hidden.ndim == 3 else call.real[0]
        return self.layer(call.hidden, mask=real)

    def _from_cache(self, module: nn.Module, call: Call) -> Tensor:
        if self.layer.bidirectional:
            raise OptxError(
                f"S4D on {self.path!r}: the module was called with a cache, and a mixer that sees both ways "
                "has no state to keep there. Attach optx.S4D(bidirectional=False), or use_cache=False."
            )
        mixer = f"{self.path}, {self.adapter}"
        index = getattr(module, "layer_idx", getattr(module, "layer_id", None))  # GPT-Neo's name
        kept = layer_in(call.cache, index, self.path, mixer, own=self.own)
        hidden, before = call.hidden, kept.state
        if before is None:
            kept.put_off(self.layer, hidden, call.real, None)
            return self._whole(call)
        if call.real is not None and not bool(call.real.all()):
            raise OptxError(
                f"S4D on {self.path!r}: there is padding behind tokens that the cache has already, so that "
                "it would stand within a sequence. Pad on the left, at the first call."
            )
        if hidden.shape[1] == 1:
            y, new = self.layer.step(hidden[:, 0], before)
            kept.put(new, 1)
            return y.unsqueeze(1)
        kept.put_off(self.layer, hidden, None, before)
        return self.layer(hidden, state=before)

    def note(self) -> str:
        """What it is, and which way it sees."""
        way = "both ways" if self.layer.bidirectional else "causal"
        return f"{self.layer.init}, N = {self.layer.d_state}, {way}"


class InPlace(Mixer):
    """It computes, and attention rests."""

    replaces: ClassVar[bool] = True
    own: ClassVar[bool] = True

    def __init__(self, path: str, layer: S4DLayer, reader: Reader) -> None:
        super().__init__(path, layer, reader)
        self._form: Any = None

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The layer's output, in the form that the module's has."""
        y = self.mix(module, args, kwargs)
        if self._form is None:
            self._form = self._look(call, args, kwargs, y.shape)
        return with_output(self._form, y)

    def _look(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], shape: torch.Size
    ) -> Any:
        """The form of the module's output, from one call of its own, which nothing else comes of."""
        if torch.compiler.is_compiling():
            raise OptxError(
                f"S4D on {self.path!r}: the form of the module's output is not known before its first call. "
                "Call the model once before torch.compile."
            )
        quiet = {name: None if name in _STATEFUL else value for name, value in kwargs.items()}
        with torch.no_grad(), torch.random.fork_rng(devices=_devices(self)):  # pyright: ignore
            output = call(*args, **quiet)
        found = output_of(output).shape
        if found != shape:
            raise ShapeError(
                f"S4D on {self.path!r}: the module turns {tuple(shape)} into {tuple(found)}; it must "
                "keep the shape for S4D to take its place. Target other modules."
            )
        return _blank(output)

    def retired(self, module: nn.Module) -> Sequence[nn.Parameter]:
        """All of the module's own."""
        return [p for name, p in module.named_parameters() if RESERVED not in name.split(".")]


def _blank(output: Any) -> Any:
    """An output's form, for `with_output`."""
    if not isinstance(output, (tuple, list)):
        return True  # one tensor
    items: Any = output  # pyright: ignore[reportUnknownVariableType]
    blank = [None for _ in items]
    return type(items)(*blank) if hasattr(items, "_fields") else type(items)(blank)


_STATEFUL = ("cache", "past_key_values", "past_key_value", "layer_past")


def _devices(module: nn.Module) -> list[torch.device]:
    return [p.device for p in module.parameters() if p.device.type == "cuda"][:1]


class Beside(Mixer):
    """It is added to what attention gives."""

    own: ClassVar[bool] = False

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The sum."""
        added = self.mix(module, args, kwargs)  # first, in case the module works in place
        output = call(*args, **kwargs)
        y = output_of(output)
        if y.shape != added.shape:
            raise ShapeError(
                f"S4D on {self.path!r}: attention turns {tuple(added.shape)} into {tuple(y.shape)}; it must "
                "keep the shape for something to be added. Target other modules."
            )
        return with_output(output, y + added.to(y.dtype))

    @property
    def adds(self) -> bool:
        """Whether all it does is add: it does."""
        return True
