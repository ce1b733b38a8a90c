"""What one forward pass of a model says about the sizes of its coordinates, read by hooks that keep
numbers only.

Besides how large inputs and outputs are, a layer is asked what its own training has done: it is called once
more on the very input that it is given, with its first weights in place of those of now. The difference is
the layer's doing alone, whatever has become of the layers before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from optx._no_trace import buffers_kept
from optx.inject._nested import tensors_in

# A layer asked twice with the same weights may differ by rounding: no update that is to be judged.
_ROUNDING = 1e-6


@dataclass
class Reading:
    """Of one module, in one forward pass: means over all coordinates and calls.

    Attributes:
        output: size of the output's coordinates: exact. If the module gave no floating tensor, all are nan.
        input: of the input's; 1 if it took no floating tensor (an embedding).
        update: size of (output - output with the module's first own weights, on the same input): exact; 0 in
            the first pass, where there are no own weights, and below a millionth of the output, which is
            rounding.
        change: size of (output - output in the first pass): exact, or from a sample of its coordinates.
        out_numel: coordinates of the output over all calls.
        in_numel: of the input.
    """

    output: float = math.nan
    input: float = math.nan
    update: float = math.nan
    change: float = 0.0
    out_numel: int = 0
    in_numel: int = 0


@dataclass
class _Sums:
    """Of one module in the pass that is under way: sums on the device, so that none is waited for."""

    sums: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict[str, list[tuple[Tensor, int]]])
    change: tuple[Tensor, int] | None = None
    calls: int = 0

    def add(self, what: str, x: Tensor | None, order: int) -> None:
        if x is not None and x.numel():
            # Not its mean: calls of different sizes are weighted by their coordinates.
            self.sums.setdefault(what, []).append((_power_sum(x, order), x.numel()))

    def mean(self, what: str, order: int, none: float) -> float:
        pairs = self.sums.get(what, [])
        count = sum(n for _, n in pairs)
        return _root(sum(float(s) for s, _ in pairs) / count, order) if count else none

    def numel(self, what: str) -> int:
        return sum(n for _, n in self.sums.get(what, []))


class Probe:
    """Reads a model's coordinates, pass by pass.

    Args:
        model: as it is at the start: its weights of now are the first ones. They are copied.
        order: 1: mean of magnitudes; 2: root of the mean of squares.
        sample: coordinates of each module's first output that are kept, at fixed random places.

    Attributes:
        order_called: paths of modules in the order in which their first calls ended.
        owners: by the path of a module that is called, its own weights: name within it -> name in the model.
            Weights of modules that are never called (torch's attention uses its ``out_proj`` so) are those of
            the nearest module around them that is.
    """

    def __init__(self, model: nn.Module, order: int, sample: int) -> None:
        self.model, self.order, self.sample = model, order, sample
        self.paths = dict(_layers(model))
        self.order_called: list[str] = []
        self.owners: dict[str, dict[str, str]] = {}
        copies: dict[int, Tensor] = {}
        self.first: dict[str, Tensor] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            if id(p) not in copies:
                copies[id(p)] = p.detach().clone()
                vars(copies[id(p)]).update(vars(p))  # the peer package's layers read their width from there
            self.first[name] = copies[id(p)]
        self.sampled: set[str] = set()  # modules whose change is an estimate, from a sample
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}  # places, values
        self._now: dict[str, _Sums] = {}
        self._given: dict[str, list[tuple[Any, Any, list[Tensor]]]] = {}
        self._again = False  # a layer is being asked a second time: hooks look away

    def read(self, forward: Callable[[], Any]) -> dict[str, Reading]:
        """Run ``forward`` and read it; hooks are taken off, and buffers and random numbers put back."""
        first = not self.order_called
        self._now, self._given = {path: _Sums() for path in self.paths}, {}
        hooks: list[Any] = []
        # With gradients, though none is used: torch's attention takes another way without, past its
        # submodules.
        with buffers_kept(self.model), torch.enable_grad():
            try:
                for path, module in self.paths.items():
                    # Before all others, and after all others: what hooks do is part of the module.
                    before, after = self._before(path), self._after(path)
                    hooks.append(
                        module.register_forward_pre_hook(cast(Any, before), prepend=True, with_kwargs=True)
                    )
                    hooks.append(module.register_forward_hook(cast(Any, after), with_kwargs=True))
                forward()
            finally:
                for hook in hooks:
                    hook.remove()
                self._given = {}
        if first:
            self.owners = self._find_owners()
        return {path: self._reading(path) for path in self.order_called}

    def _reading(self, path: str) -> Reading:
        now, order, change = self._now[path], self.order, self._now[path].change
        if not now.numel("output"):
            return Reading()
        output, update = now.mean("output", order, math.nan), now.mean("update", order, 0.0)
        return Reading(
            output=output,
            input=now.mean("input", order, 1.0),
            update=0.0 if update <= _ROUNDING * output else update,
            change=_root(float(change[0]) / change[1], order) if change else math.nan,
            out_numel=now.numel("output"),
            in_numel=now.numel("input"),
        )

    def _before(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._again:
                states = _random_states(module) if path in self.owners else []
                self._given.setdefault(path, []).append((args, kwargs, states))

        return hook

    def _after(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            if self._again:
                return
            args, kwargs, states = self._given[path].pop()
            y, now = main_tensor(output), self._now[path]
            now.add("input", main_tensor((args, kwargs)), self.order)
            now.add("output", y, self.order)
            if path not in self.order_called:
                self.order_called.append(path)
            if y is not None and y.numel():
                if not now.calls:
                    now.change = self._change(path, y)
                if path in self.owners:
                    with_first = self._with_first_weights(path, module, args, kwargs, states)
                    now.add("update", y.detach() - with_first.detach(), self.order)
            now.calls += 1

        return hook

    def _change(self, path: str, y: Tensor) -> tuple[Tensor, int] | None:
        """Against the first pass, at the places that are kept."""
        flat = y.detach().reshape(-1)
        if path not in self._kept:
            n = flat.numel()
            if n <= self.sample:
                places = torch.arange(n)
            else:  # random: an even stride that divides the width would see one feature only
                places = torch.randint(n, (self.sample,), generator=torch.Generator().manual_seed(n))
                self.sampled.add(path)
            places = places.to(flat.device)
            self._kept[path] = (places, flat[places])
        places, values = self._kept[path]
        if int(places.max()) >= flat.numel():  # another shape than at first: an expert with other tokens
            return None
        return _power_sum(flat[places] - values, self.order), places.numel()

    def _with_first_weights(
        self, path: str, module: nn.Module, args: Any, kwargs: Any, states: list[Tensor]
    ) -> Tensor:
        weights = {within: self.first[name] for within, name in self.owners[path].items()}
        buffers = {name: b.clone() for name, b in module.named_buffers()}  # which the call may move
        after = _random_states(module)
        self._again = True
        try:
            _set_random_states(module, states)
            output = functional_call(module, {**weights, **buffers}, args, kwargs, tie_weights=False)
        finally:
            self._again = False
            _set_random_states(module, after)
        found = main_tensor(output)
        assert found is not None  # it gave one a moment ago
        return found

    def _find_owners(self) -> dict[str, dict[str, str]]:
        called, owners = set(self.order_called), dict[str, dict[str, str]]()
        for path, module in self.model.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                owner = path
                while owner not in called and owner:
                    owner = owner.rpartition(".")[0]
                full = f"{path}.{name}" if path else name
                owners.setdefault(owner, {})[full.removeprefix(f"{owner}." if owner else "")] = full
        return owners


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but those that make weights of others (weight_norm): these are part of what they make."""
    for path, module in model.named_modules():
        if "parametrizations" not in path.split("."):
            yield path, module


def main_tensor(value: Any) -> Tensor | None:
    """The tensor that a module's input or output is about.

    The first floating one with a dimension (a loss has none) in tuples, lists and mappings, in order.
    """
    return next((t for t in tensors_in(value) if t.is_floating_point() and t.ndim), None)


def _power_sum(x: Tensor, order: int) -> Tensor:
    """Sum of magnitudes or squares, in float32 or wider; half-precision squares would overflow."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(x, order)
    return norm if order == 1 else norm.square()


def _root(mean: float, order: int) -> float:
    return mean if order == 1 else math.sqrt(mean)


def _random_states(module: nn.Module) -> list[Tensor]:
    """Of the CPU, and of the GPU that the module is on."""
    states = [torch.get_rng_state()]
    if (device := _gpu(module)) is not None:
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_states(module: nn.Module, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1 and (device := _gpu(module)) is not None:
        torch.cuda.set_rng_state(states[1], device)


def _gpu(module: nn.Module) -> torch.device | None:
    p = next(module.parameters(), None)
    return p.device if p is not None and p.is_cuda else None
