"""Forward passes of a model at rest, in which derivatives are taken at chosen modules' outputs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from optx._batches import on_device_of
from optx._errors import OptxError, near
from optx._module_paths import paths_of
from optx._no_trace import evaluating, randomness_kept
from optx.analysis.interaction._padding import mask_of, warn_of_a_mask
from optx.delta._input_stats import call
from optx.inject._nested import tensors_in
from optx.inject._part import output_of, with_output
from optx.inject._weights import is_conv

Change = Callable[[Tensor], Tensor]
Output = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Seen:
    """One call of a module.

    Attributes:
        given: the first tensor that it was called with.
        value: its output f, (B, ..., d): what derivatives are taken with respect to.
        passed: a copy of it, which went on into the model; operations in place change that one.
    """

    given: Tensor | None
    value: Tensor
    passed: Tensor


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        output: of the model, (B, ..., D).
        seen: calls of the chosen modules by path, in the order in which they ended.
        mask: (B, T) bool, False at padding; None: there is none.
    """

    output: Tensor
    seen: Mapping[str, Seen]
    mask: Tensor | None

    def kept(self, x: Tensor) -> Tensor | None:
        """The mask, if x (B, T, d) has a row for each of its positions."""
        return self.mask if self.mask is not None and x.shape[:-1] == self.mask.shape else None

    def rows(self, x: Tensor) -> Tensor:
        """x (B, ..., d) as rows of float64, without padding."""
        kept = self.kept(x)
        return wide(x.detach().flatten(0, -2) if kept is None else x.detach()[kept])


def wide(x: Tensor) -> Tensor:
    """In float64, where the device has that."""
    return (x.cpu() if x.device.type == "mps" else x).double()


class _Reached(Exception):
    """Ends a forward pass of which the rest is not asked for; hooks that are always called see it."""


class Passes:
    """A model that is run over the batches of a loader as often as is asked.

    Args:
        owner: whose errors they are.
        model: it stays as it is.
        loader: batches: tensors, mappings (passed by keyword) or pairs of inputs and targets.
        output: which tensor of the model's output counts; None: the first floating one with axes.
    """

    def __init__(self, owner: str, model: nn.Module, loader: Iterable[Any], output: Output | None) -> None:
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(f"{owner}: model is a {type(model).__name__}; it must be a torch.nn.Module.")
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            raise OptxError(
                f"{owner}: this is a compiled model, which ignores hooks. Give the module itself "
                "(model._orig_mod)."
            )
        if isinstance(loader, Tensor | Mapping) or not isinstance(loader, Iterable):  # pyright: ignore
            raise OptxError(
                f"{owner}: loader is a {type(loader).__name__}; it must be a list of batches or a DataLoader."
            )
        if isinstance(loader, Iterator):
            raise OptxError(
                f"{owner}: loader is a {type(loader).__name__}, which can be read once only; it is read once "
                "for each layer. Give a list of batches or a DataLoader."
            )
        self.owner, self.model, self.loader, self._output = owner, model, loader, output
        self.paths = paths_of(model)
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            raise OptxError(f"{owner}: the model is on the meta device, where weights have no values.")

    def module(self, path: str) -> nn.Module:
        """A module by its name.

        Raises:
            OptxError: there is none; near names are told.
        """
        if path not in self.paths.modules or not path:
            raise OptxError(f"{self.owner}: no module is called {path!r}. {near(path, self.paths.modules)}")
        return self.paths.modules[path]

    @contextmanager
    def at_rest(self) -> Generator[None]:
        """The model in eval mode and frozen; modes, flags and random numbers are put back afterwards."""
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            with (
                randomness_kept(),
                torch.inference_mode(False),
                torch.enable_grad(),
                evaluating(self.model),
            ):
                for p, _ in flags:
                    p.requires_grad_(False)
                yield
        finally:
            for p, wanted in flags:
                p.requires_grad_(wanted)

    def batches(self) -> Iterator[Any]:
        """The batches, where the model is.

        Raises:
            OptxError: there is none.
        """
        empty = True
        for batch in self.loader:
            empty = False
            yield on_device_of(self.model, batch)
        if empty:
            raise OptxError(f"{self.owner}: loader has no batch.")

    def run(
        self, batch: Any, paths: Sequence[str], *, until: str | None = None, change: Change | None = None
    ) -> Pass:
        """One forward pass.

        Args:
            batch: of `batches`.
            paths: the modules whose outputs derivatives are taken at.
            until: the last of them, whose output is the pass's; what comes later is not computed. None: all.
            change: makes of the first module's output the one that goes on.

        Raises:
            OptxError: a module is not called, or more than once, or gives no floating tensor of features.
        """
        seen: dict[str, Seen] = {}
        hooks: list[Any] = []
        try:
            for path in paths:
                look = self._look(path, seen, change if path == paths[0] else None, path == until)
                hooks.append(self.module(path).register_forward_hook(look, with_kwargs=True))
            inputs = self._inputs(batch)
            output = self._output_of(inputs, seen, until)
        finally:
            for hook in hooks:
                hook.remove()
        for path in paths:
            if path not in seen:
                raise OptxError(
                    f"{self.owner}: {path!r} is not called by this {type(self.model).__name__} on the batch."
                )
            if len(seen[path].value) != len(output):
                raise OptxError(
                    f"{self.owner}: {path!r} gives {tuple(seen[path].value.shape)} and the model "
                    f"{tuple(output.shape)}; the first dimension of both must be the batch."
                )
        return Pass(output, seen, mask_of(self.owner, inputs))

    def _output_of(self, inputs: Any, seen: Mapping[str, Seen], until: str | None) -> Tensor:
        try:
            found = call(self.model, inputs)
        except _Reached:
            assert until is not None
            return seen[until].value
        return self._main(found)

    def unfit(self, batch: Any, paths: Sequence[str]) -> dict[str, str]:
        """Why `run` would not take these modules, for those that it would not."""
        shapes: dict[str, list[tuple[int, ...]]] = {path: [] for path in paths}
        hooks: list[Any] = []

        def look(path: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                shapes[path].append(tuple(output_of(output).shape))

            return hook

        try:
            hooks += [self.module(path).register_forward_hook(look(path)) for path in paths]
            size = len(self._main(call(self.model, self._inputs(batch))))
        finally:
            for hook in hooks:
                hook.remove()
        why = {path: _why(found, size) for path, found in shapes.items()}
        return {path: said for path, said in why.items() if said}

    def _look(self, path: str, seen: dict[str, Seen], change: Change | None, last: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            f: Any = output_of(output)
            self._check(path, module, f)
            if path in seen:
                raise OptxError(
                    f"{self.owner}: {path!r} is called more than once in a forward pass, so that its output "
                    "is no single place. Name modules that are called once."
                )
            if change is not None:
                f = change(f)
            value = f.clone() if f.requires_grad else f.detach().clone().requires_grad_()
            given = next(tensors_in((args, kwargs)), None)
            seen[path] = Seen(given, value, value.clone())
            if last:
                raise _Reached
            return with_output(output, seen[path].passed)

        return hook

    def _check(self, path: str, module: nn.Module, f: Any) -> None:
        what = f"{self.owner}: {path!r} ({type(module).__name__})"
        if not isinstance(f, Tensor) or not f.is_floating_point():
            kind = f"a {f.dtype} tensor" if isinstance(f, Tensor) else f"a {type(f).__name__}"
            raise OptxError(f"{what} gives {kind}; it must give a floating tensor. Name another module.")
        if f.ndim not in (2, 3) or is_conv(module):
            raise OptxError(
                f"{what} gives a tensor of shape {tuple(f.shape)}; it must be (batch, features) or (batch, "
                "positions, features). Name a module after the features are flattened."
            )

    def _main(self, output: Any) -> Tensor:
        if self._output is not None:
            found: Any = self._output(output)
        else:
            found = next((t for t in tensors_in(output) if t.is_floating_point() and t.ndim), None)
        if not isinstance(found, Tensor) or not found.is_floating_point() or not found.ndim:
            raise OptxError(
                f"{self.owner}: the model's output has no floating tensor with a batch "
                f"({type(output if found is None else found).__name__}). Pass output=, a function that takes "
                "one from what the model returns."
            )
        return found.unsqueeze(-1) if found.ndim == 1 else found

    def _inputs(self, batch: Any) -> Any:
        """What the model is called with: of inputs and targets, the inputs."""
        if not isinstance(batch, tuple | list):
            return batch
        parts = cast("Sequence[Any]", batch)
        if len(parts) not in (1, 2):
            raise OptxError(
                f"{self.owner}: a batch is a {type(batch).__name__} of {len(parts)}; it must be a tensor, a "
                "mapping of keyword arguments or a pair (inputs, target)."
            )
        if len(parts) == 2:
            warn_of_a_mask(self.owner, *parts)
        return parts[0]


def _why(shapes: Sequence[tuple[int, ...]], size: int) -> str:
    if len(shapes) != 1:
        return f"called {len(shapes)} times" if shapes else "not called"
    fits = len(shapes[0]) in (2, 3) and shapes[0][0] == size
    return "" if fits else f"gives {shapes[0]}, which does not begin with the batch of {size}"
