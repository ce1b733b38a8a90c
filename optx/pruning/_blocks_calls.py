"""How a model calls its blocks: hidden states from one to the next, and what each is given beside."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError
from optx.inject._nested import tensors_in
from optx.pruning._calibration import Batch


class Reached(BaseException):
    """The model has come as far as it is needed; no `Exception`, which a model might catch."""


@dataclass(frozen=True)
class Call:
    """What a block is called with beside hidden states.

    Attributes:
        key: the keyword that hidden states have; None: they are the first positional argument.
        args: positional arguments after them.
        kwargs: the other keyword arguments.
    """

    key: str | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Any:
        """The block's output on hidden states."""
        if self.key is None:
            return block(hidden, *self.args, **self.kwargs)
        return block(*self.args, **{self.key: hidden}, **self.kwargs)

    def around(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Its arguments, with hidden states."""
        if self.key is None:
            return (hidden, *self.args), dict(self.kwargs)
        return self.args, {self.key: hidden, **self.kwargs}

    def is_as(self, other: Call) -> bool:
        """Whether both are given the very same: the same tensors, and equal plain values."""
        return (
            self.key == other.key
            and len(self.args) == len(other.args)
            and self.kwargs.keys() == other.kwargs.keys()
            and all(map(_is_same, self.args, other.args))
            and all(_is_same(value, other.kwargs[key]) for key, value in self.kwargs.items())
        )


def split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call] | None:
    """Hidden states and the rest; None if there are no hidden states.

    Caches of keys and values are left out: a block that is called twice would add to them twice.
    """
    plain = {key: None if _is_cache(value) else value for key, value in kwargs.items()}
    rest = tuple(None if _is_cache(value) else value for value in args)
    if rest:
        return (rest[0], Call(None, rest[1:], plain)) if isinstance(rest[0], Tensor) else None
    for key, value in plain.items():
        if isinstance(value, Tensor):
            return value, Call(key, (), {other: one for other, one in plain.items() if other != key})
    return None


def hidden_of(output: Any) -> Tensor | None:
    """The hidden states that a block hands on: its output, or the first of several."""
    first = output[0] if isinstance(output, tuple | list) and output else output  # pyright: ignore[reportUnknownVariableType]
    return first if isinstance(first, Tensor) else None


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    plain = (bool, int, float, str)
    return isinstance(a, plain) and type(a) is type(b) and a == b


def look(value: Any) -> Any:
    """Kinds and shapes of what is nested in arguments, to tell calls of one kind."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((key, look(one)) for key, one in value.items())  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, tuple | list):
        return tuple(look(one) for one in value)  # pyright: ignore[reportUnknownVariableType]
    return value if isinstance(value, bool | int | float | str) else type(value)


@contextmanager
def hooked(
    before: Mapping[nn.Module, Callable[..., Any]],
    after: Mapping[nn.Module, Callable[..., Any]] | None = None,
) -> Generator[None]:
    """Hooks on modules for a while; ``before`` gets (module, args, kwargs), ``after`` the output too."""
    with ExitStack() as stack:
        for module, hook in before.items():
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for module, hook in (after or {}).items():
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def run(model: nn.Module, batch: Batch) -> None:
    """Call the model, as far as it is needed."""
    try:
        model(*batch.args, **batch.kwargs)
    except Reached:
        return


class Capture:
    """Hidden states at the first of a row of blocks, and what every block of it is given, batch by batch.

    Where all blocks are given the same, as is seen in one whole run, later batches of the same shapes are run
    to the first block only.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.model, self.blocks = model, list(blocks)
        self.alike: dict[Any, bool] = {}

    def __call__(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        """One batch's.

        Raises:
            OptxError: the first block is not reached.
        """
        hidden: list[Tensor] = []
        calls: list[Call] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = split(args, kwargs)
            assert found is not None
            calls.append(found[1])
            if len(calls) == 1:
                hidden.append(found[0].clone())  # a block may write to what it is given
            kind = look(found[1].around(hidden[0]))
            if len(calls) == len(self.blocks) or (len(calls) == 1 and self.alike.get(kind)):
                raise Reached

        with hooked(dict.fromkeys(self.blocks, enter)):
            run(self.model, batch)
        if len(calls) not in (1, len(self.blocks)):
            raise OptxError(
                f"prune: a batch reaches {len(calls)} of {len(self.blocks)} blocks that another reaches all "
                "of; give batches that all go the same way."
            )
        if len(calls) == len(self.blocks):
            kind = look(calls[0].around(hidden[0]))
            self.alike[kind] = all(calls[0].is_as(call) for call in calls)
            return hidden[0], calls
        return hidden[0], calls * len(self.blocks)


def depends_on_hidden(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> bool:
    """Whether what blocks are given beside hidden states changes with these, so that it can't be kept."""
    seen: list[list[Tensor]] = [[], []]

    def turn(which: int) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found = split(args, kwargs)
            assert found is not None
            hidden, call = found
            seen[which].extend(tensors_in((call.args, call.kwargs)))
            if module is blocks[-1]:
                raise Reached
            if which and module is blocks[0]:
                return call.around(hidden * 1.25 + 0.01)
            return None

        with hooked(dict.fromkeys(blocks, enter)):
            run(model, batch)

    turn(0)
    turn(1)
    return len(seen[0]) != len(seen[1]) or not all(map(torch.equal, *seen))
