"""Whether a model's coordinates keep their size as it is made wider.

Source: Yang and Hu, "Feature Learning in Infinite-Width Neural Networks", arXiv 2011.14522; Yang et al.,
    "Tensor
Programs V", arXiv 2203.03466, appendix D.1 (coordinate checking).
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optx._batches import on_device_of
from optx._errors import OptxError, check_choice, check_range, check_whole
from optx._no_trace import randomness_kept
from optx.delta._input_stats import call
from optx.scaling._coordinate_probe import Probe, Reading, main_tensor
from optx.scaling._coordinate_result import CoordinateCheck, LayerSizes, judged
from optx.scaling._coordinate_runs import Maker, Run, prepare
from optx.scaling._rules_of_width import Parametrization

Loss = Callable[[Any, Any], Tensor]


def coordinate_check(
    make: Maker,
    widths: Sequence[float],
    batches: Any,
    *,
    optimizer: str | Callable[[nn.Module], Optimizer] | None = None,
    lr: float = 1e-3,
    parametrization: str | Parametrization | None = None,
    loss_fn: Loss | None = None,
    steps: int = 3,
    seeds: int = 3,
    norm: str = "l1",
    tolerance: float = 0.25,
    sample: int = 4096,
) -> CoordinateCheck:
    """Train a model for some steps at several widths, and name the layers whose coordinates grow or vanish.

    Under a width-independent parametrisation (muP) the coordinates of every layer, and what each step
    changes of them, keep their size however wide the model is made. ``print(check)`` shows the slopes of
    log size on log width; ``check.ok`` is the verdict, ``check.failures`` names layers and says why,
    ``check.picture("out.png")`` draws it.

    A layer that gets inputs of the wrong size is not blamed for it: it is judged by its output against its
    input, and by what its own change of weights does to its output, for which it is called once more on
    the same input with its first weights. A layer below 0 in both is as wrong as one above: it stops
    learning.

    Args:
        make: ``make(width)`` gives a new model, or a new (model, optimizer); called once a width and seed,
            and trained. Modules have the same names at every width.
        widths: two or more different ones; a factor of 8 between the ends, and three or more, say more.
        batches: one, or a list of them, taken in turn; sizes are read on the first. A mapping is passed by
            keyword; (inputs, target) is a pair, whose inputs are a tensor, a mapping or a tuple of arguments.
        optimizer: where ``make`` gives a model alone: ``"adamw"``, ``"adam"``, ``"sgd"``, or a function of
            the model.
        lr: learning rate of an optimizer that is given by name.
        parametrization: ``"mup"`` or what else `optx.scaling.mup` takes: models get its first weights, param
            groups, multipliers and attention, with that of the smallest width as the base, whose ``lr`` is
            given. None: they stay as they are made, with one learning rate.
        loss_fn: ``loss_fn(output, batch)`` gives a scalar. None: the output's ``loss``, or for a pair the
            cross-entropy over the last dimension of class numbers, or the squared error of floats.
        steps: of training; sizes are read before each and after the last.
        seeds: runs at each width, whose sizes are averaged: `torch.manual_seed` of 0, 1, ...
        norm: ``"l1"``, the mean of magnitudes, or ``"l2"``, the root of the mean square.
        tolerance: the slope from which on a layer fails: half of the smallest that a wrong exponent makes. It
            must be passed by twice the slope's standard error over the seeds, too.
        sample: how many of a module's output coordinates are kept to see how they change; all others are
            reduced to sums at once. Changes of larger outputs are estimates; everything else is exact.

    Returns:
        A `CoordinateCheck`.

    Paper values:
        ``steps=3`` (the default): t = 1, 2, 3 (the mup package); ``norm="l1"`` (the default).

    Limits: Attention logits are computed between modules and not seen: a 1/sqrt(d) there passes. Under SGD,
        where heads get wider (not more), separate query and key projections move as width^-0.5 to -0.7 in the
        first steps of muP too, and fail, the package mup's as well: a logit's gradient sums over the head's
        values, which don't yet agree with what is asked of them. Let the number of heads grow to check. Small
        widths bend the lines: slopes are not those of the limit. With more tokens in the batch than the
        narrowest is wide, Adam's first updates shrink in muP too (as width^-0.3): take fewer, or wider
        models. Of a tuple of outputs the first is read.

    Keywords: muP, mu transfer, coord check, width, parametrization, hyperparameter transfer, diagnostics.

    Evidence: ``test_coordinate_check.py``, ``test_coordinate_sizes.py``,
        ``test_coordinate_models.py``; no recipe.

    Raises:
        OptxError: an argument is out of range; a width can't be built, or its modules or parameters have
            other names than the first's; ``make`` gave one object twice; there is no optimizer, no loss,
            or a loss that is no scalar.

    Example:
        >>> import torch, optx
        >>> from torch import nn
        >>> def make(width):
        ...     return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        ...                          nn.Linear(width, 1))
        >>> batch = (torch.randn(16, 8), torch.randn(16, 1))
        >>> check = optx.scaling.coordinate_check(make, [64, 128, 256], batch, optimizer="adam", seeds=2)
        >>> check.ok, list(check.failures)  # one learning rate for all is too large for wide layers
        (False, ['2', '4'])
        >>> mup = optx.scaling.coordinate_check(
        ...     make, [64, 128, 256], batch, optimizer="adam", parametrization="mup", seeds=2
        ... )
        >>> mup.ok
        True

    Source: Tensor Programs V, arXiv 2203.03466, appendix D.1; Tensor Programs IV, arXiv 2011.14522.
    """
    several = _several(batches)
    _check_arguments(widths, steps, seeds, sample, lr, tolerance, norm)
    ordered = sorted(widths)
    readings: dict[tuple[int, int], list[dict[str, Reading]]] = {}
    facts = _Facts()
    with randomness_kept(), torch.inference_mode(False), torch.enable_grad():
        runs = prepare(make, ordered, optimizer, lr, parametrization)
        for seed in range(seeds):
            for at, width in enumerate(ordered):
                _seed(seed)
                with runs.start(width) as run:
                    probe = Probe(run.model, 1 if norm == "l1" else 2, sample)
                    readings[seed, at] = _train(run, probe, several, loss_fn, steps, seed)
                facts.note(probe)
    return judged(ordered, tolerance, _layers(readings, facts, (seeds, len(ordered), steps + 1)))


@dataclass
class _Facts:
    """What is so of a module in any of the runs."""

    order: dict[str, None] = field(default_factory=dict[str, None])
    owners: set[str] = field(default_factory=set[str])
    sampled: set[str] = field(default_factory=set[str])

    def note(self, probe: Probe) -> None:
        self.order |= dict.fromkeys(probe.order_called)
        self.owners |= set(probe.owners)
        self.sampled |= probe.sampled


def _train(
    run: Run, probe: Probe, batches: Sequence[Any], loss_fn: Loss | None, steps: int, seed: int
) -> list[dict[str, Reading]]:
    """Read, step, read, ...: one more reading than steps, but none after a loss that is not finite."""
    model, optimizer = run
    batches = [on_device_of(model, batch) for batch in batches]
    options = {"use_cache": False} if _takes_use_cache(model) else {}  # a cache would be filled twice
    found: list[dict[str, Reading]] = []
    for step in range(steps + 1):
        with randomness_kept():
            _seed(seed)  # the same dropout in each reading
            found.append(probe.read(lambda: _forward(model, batches[0], options)))
        if step == steps:
            break
        batch = batches[step % len(batches)]
        optimizer.zero_grad()
        loss = _loss(_forward(model, batch, options), batch, loss_fn)
        if not bool(loss.isfinite()):
            break
        loss.backward()
        optimizer.step()
    return found


def _forward(model: nn.Module, batch: Any, options: Mapping[str, Any]) -> Any:
    if isinstance(batch, Mapping):
        return model(**{**options, **cast("Mapping[str, Any]", batch)})
    inputs = batch[0]
    if isinstance(inputs, Mapping):
        return model(**{**options, **cast("Mapping[str, Any]", inputs)})
    return call(model, inputs)


def _loss(output: Any, batch: Any, loss_fn: Loss | None) -> Tensor:
    if loss_fn is not None:
        loss = loss_fn(output, batch)
    elif isinstance(batch, tuple | list):
        loss = _pair_loss(main_tensor(output), cast("Sequence[Any]", batch)[1])
    else:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        said = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss).__name__)
        raise OptxError(
            f"coordinate_check: there is no loss to train with (it is {said}); it must be one number with a "
            "gradient: give loss_fn(output, batch), or batches with labels."
        )
    return loss.reshape(())


def _pair_loss(output: Tensor | None, target: Any) -> Tensor | None:
    if output is None or not isinstance(target, Tensor):
        return None
    if target.is_floating_point():
        if output.shape != target.shape:
            raise OptxError(
                f"coordinate_check: the output has shape {tuple(output.shape)} and the target "
                f"{tuple(target.shape)}; give loss_fn(output, batch)."
            )
        return nn.functional.mse_loss(output, target)
    return nn.functional.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))


def _layers(
    readings: Mapping[tuple[int, int], Sequence[Mapping[str, Reading]]],
    facts: _Facts,
    shape: tuple[int, int, int],
) -> dict[str, LayerSizes]:
    """Readings by module, as arrays."""
    found: dict[str, LayerSizes] = {}
    for name in facts.order:
        sizes = {what: np.full(shape, math.nan) for what in ("output", "input", "update", "change")}
        counts: set[tuple[int, int]] = set()
        for (seed, at), steps in readings.items():
            for t, step in enumerate(steps):
                if (one := step.get(name)) is not None:
                    for what, array in sizes.items():
                        array[seed, at, t] = getattr(one, what)
                    if t == 0:
                        counts.add((at, one.out_numel))
        # With experts the number of tokens varies from run to run, which then count as growing with width.
        finite = len({n for _, n in counts}) == 1
        found[name] = LayerSizes(
            **sizes, finite_output=finite, has_weights=name in facts.owners, sampled=name in facts.sampled
        )
    return found


def _several(batches: Any) -> list[Any]:
    """A list of batches; a pair or a mapping is one."""
    several: list[Any] = list(batches) if isinstance(batches, list) else [batches]
    if not several:
        raise OptxError("coordinate_check: batches is empty.")
    for one in several:
        if not (
            isinstance(one, Mapping) or (isinstance(one, tuple) and len(cast("tuple[Any, ...]", one)) == 2)
        ):
            raise OptxError(
                f"coordinate_check: a batch is a {type(one).__name__}; it must be a mapping of keyword "
                "arguments or a pair (inputs, target)."
            )
    return several


def _check_arguments(
    widths: Sequence[float], steps: int, seeds: int, sample: int, lr: float, tolerance: float, norm: str
) -> None:
    owner = "coordinate_check"
    if not isinstance(widths, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(f"{owner}: widths is {widths!r}; it must be two or more of them.")
    for width in widths:
        check_range(owner, "a width", width, 1)
    if len(set(widths)) < 2 or len(set(widths)) < len(widths):
        raise OptxError(
            f"{owner}: widths are {list(widths)!r}; there must be two different ones at least, each once."
        )
    for name, value in (("steps", steps), ("seeds", seeds), ("sample", sample)):
        check_whole(owner, name, value, 1)
    check_range(owner, "lr", lr, 0)
    check_range(owner, "tolerance", tolerance, 0)
    check_choice(owner, "norm", norm, ("l1", "l2"))


def _takes_use_cache(model: nn.Module) -> bool:
    return "use_cache" in inspect.signature(model.forward).parameters


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
