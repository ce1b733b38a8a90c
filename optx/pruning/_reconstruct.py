"""`optx.reconstruct`: prune a model block by block, and fit what is left of each block to what it was.

Source: PERP, arXiv 2312.15230, reconstruction of layers' outputs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TargetError, check_range, check_whole, shown
from optx._masks import Masks
from optx._module_paths import paths_of
from optx.inject._attach import attach
from optx.inject._handle import Handle
from optx.inject._injection import Targets
from optx.inject.perp import Perp
from optx.pruning._blocks import Fed, Sums, Walk, units_of
from optx.pruning._blocks_plan import Chain, Step, Unit
from optx.pruning._calibration import Batch, batches_of
from optx.pruning._calibration_sums import InputSums
from optx.pruning._method import PruneMethod
from optx.pruning._prune import Bar, bar_of, unwrapped
from optx.pruning._prune_layers import Layer, layers_of

_WARM_UP = 0.1


@dataclass(frozen=True)
class Rebuilt:
    """One block.

    Attributes:
        block: its path.
        pruned: the squared error of its output once it was pruned, over the squares of the dense one's output
            on the same inputs.
        rebuilt: the same in the end; never more.
        trained: how many numbers were.
        seconds: that it took.
    """

    block: str
    pruned: float
    rebuilt: float
    trained: int
    seconds: float


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` did.

    Attributes:
        masks: which weights are kept.
        blocks: one row for each.
    """

    masks: Masks
    blocks: tuple[Rebuilt, ...]

    def __str__(self) -> str:
        width = max(len("block"), *(len(row.block) for row in self.blocks))
        lines = [f"{'block':<{width}}  pruned   rebuilt  trained  seconds"]
        lines += [
            f"{row.block:<{width}}  {row.pruned:7.2%}  {row.rebuilt:7.2%}  {row.trained:>7,}  "
            f"{row.seconds:7.1f}"
            for row in self.blocks
        ]
        return "\n".join(lines)


def reconstruct(
    model: nn.Module,
    method: PruneMethod | Masks,
    perp: Perp,
    data: Any,
    *,
    steps: int = 100,
    lr: float = 1e-3,
    targets: Targets | None = None,
    exclude: Targets | None = None,
    seed: int = 0,
    progress: bool | Bar = True,
) -> Reconstruction:
    """Prune a model block by block, and fit the few parameters of PERP in each to the dense block's output.

    Blocks are gone through in order, as `optx.prune` does: each is fed what the finished blocks before it
    make of the data; what the dense block makes of that is its target; it is pruned, ``perp`` is attached to
    it alone, trained by AdamW on the mean squared error, and merged under the mask. A block that this
    doesn't bring nearer to its target is left as it was pruned. No labels are needed, and gradients are
    those of one block.

    Args:
        model: the dense model; pruned in place.
        method: which weights go, as in `optx.prune`; or their masks.
        perp: what is trained: biases, norms, adapters. A head, which is in no block, is left out.
        data: calibration data, as in `optx.prune`; one batch a step, in order.
        steps: of AdamW in each block; the learning rate rises over the first tenth and falls to 0.
        lr: the highest learning rate.
        targets: which modules are pruned, as in `optx.prune`; with masks None.
        exclude: what is left out of these.
        seed: of the adapters' first values; the process's own random numbers go on as they would have.
        progress: as in `optx.prune`.

    Returns:
        A `Reconstruction`: the masks, and each block's error before and after; ``print`` shows them.

    Paper values:
        None at hand: rates and steps are tuned for each model there.

    Limits: Beside what `optx.prune` holds, the targets of one block are, as large as its activations. Blocks
    follow one another and are called once each; layers outside of them are refused. A bfloat16 model's block
    computes in bfloat16. A run that was killed begins anew.

    Keywords: PERP, layer-wise reconstruction, block-wise reconstruction, calibration, pruning, distillation.

    Evidence: ``optx run prune``; ``test_reconstruct.py``.

    Raises:
        TargetError: there is nothing to train or to prune in a block, or a layer is in no row of blocks.
        OptxError: as `optx.prune`; or the masks' weights are 0 already, so that the dense block is not there.

    Example:
        >>> import torch, optx
        >>> _ = torch.manual_seed(0)
        >>> layers = [torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16)]
        >>> model, data = torch.nn.Sequential(*layers), [torch.randn(64, 16)]
        >>> done = optx.reconstruct(model, optx.Magnitude(0.5), optx.Perp(adapter="mask", rank=4), data)
        >>> done.masks.verify(model)
        >>> done.blocks[0].rebuilt < done.blocks[0].pruned
        True

    Source: arXiv 2312.15230, section on layer-wise reconstruction.
    """
    perp = _checked(perp, steps, lr, seed)
    model = unwrapped(model)
    known = method if isinstance(method, Masks) else None
    if not isinstance(method, PruneMethod | Masks):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(
            f"reconstruct: method is {shown(method)}; it must be one as optx.Wanda(), or optx.Masks."
        )
    way = method if isinstance(method, PruneMethod) else PruneMethod()
    if known is not None:
        targets = _of_masks(model, known, targets)
    layers = layers_of(model, way, targets, exclude)
    _check_all_layers(known, layers, exclude)
    batches = batches_of(model, data, "reconstruct")
    walk = _Rebuild(model, way, batches, known, perp, (steps, lr, seed))
    walk(layers, bar_of("reconstruct", progress))
    masks = Masks(walk.bits, {layer.name: layer.weight.shape for layer in layers})
    masks.apply_(model)
    return Reconstruction(masks, tuple(walk.rows))


def _checked(perp: Any, steps: int, lr: float, seed: int) -> Perp:
    """What is trained in blocks."""
    if torch.is_inference_mode_enabled():
        raise OptxError("reconstruct: it trains, which inference_mode forbids; call it outside of that.")
    check_whole("reconstruct", "seed", seed)
    check_whole("reconstruct", "steps", steps, 1)
    check_range("reconstruct", "lr", lr, 0.0)
    if not isinstance(perp, Perp):
        raise OptxError(f"reconstruct: perp is {shown(perp)}; it must be optx.Perp(...).")
    if perp.adapter == "lora":
        raise OptxError(
            "reconstruct: Perp's adapter='lora' fills zeros in when it is merged; use 'mask', 'scale' or "
            "'lora_prune'."
        )
    if perp.masks is not None:
        raise OptxError("reconstruct: Perp has masks of its own; pass them in the place of the method.")
    return replace(perp, head=False)


def _of_masks(model: nn.Module, masks: Masks, targets: Targets | None) -> Targets:
    """The modules whose weights masks are for, which have to be dense still."""
    if targets is not None:
        raise OptxError("reconstruct: masks say themselves which weights are pruned; leave targets out.")
    found = masks.parameters_of(model)
    if all(bool((p.detach().cpu()[~masks[name]] == 0).all()) for name, p in found.items()):
        raise OptxError(
            "reconstruct: this model is pruned by these masks already, and what its dense blocks make of "
            "the data is the target; pass the dense model."
        )
    owners = {name.rpartition(".")[0] for name in found}
    return lambda path, module: path in owners


def _check_all_layers(known: Masks | None, layers: Sequence[Layer], exclude: Targets | None) -> None:
    """Raise if masks are of weights that are no layers': these would stay dense in silence."""
    names = {layer.name for layer in layers}
    odd = [name for name in known or () if name not in names]
    if odd and not exclude:
        raise TargetError(
            f"reconstruct: masks have {odd[0]!r} ({len(odd)} such in all), the weight of no linear layer or "
            "convolution; give masks without it."
        )


class _Rebuild(Walk):
    """Prunes a block, and fits it."""

    def __init__(
        self,
        model: nn.Module,
        method: PruneMethod,
        batches: Sequence[Batch],
        known: Masks | None,
        perp: Perp,
        training: tuple[int, float, int],
    ) -> None:
        super().__init__(model, method, batches)
        self.known, self.perp = known, perp
        self.count, self.lr, self.seed = training
        self.rows: list[Rebuilt] = []

    def check(self, steps: Sequence[Step]) -> None:
        """Every layer is in a block by itself, and there is something to train."""
        for step in steps:
            if not isinstance(step, Chain):
                raise TargetError(
                    f"reconstruct: {step.path!r} is in no row of blocks each of which is called once and "
                    "hands its output to the next; leave it out with exclude=, or use optx.prune."
                )
        if self.perp.adapter == "none":
            places, plain = self.perp.places(self.model), paths_of(self.model).plain
            units = [unit.path for step in steps for unit in units_of(step)]
            if not any(_inside(plain[place], unit) for place in places for unit in units):
                raise TargetError(f"reconstruct: {self.perp} leaves no trainable parameter in any block.")
        for unit in (unit for step in steps for unit in units_of(step) if unit.layers):
            handle = self._attached(
                unit, {one.name: torch.ones_like(one.weight).bool() for one in unit.layers}
            )
            if handle is not None:  # what it refuses, as a rank, it refuses here
                handle.remove()

    def prune(self, layer: Layer, sums: InputSums | None) -> tuple[Tensor, Tensor]:
        """By the method, or by masks that are given."""
        if self.known is None:
            return super().prune(layer, sums)
        kept = self.known[layer.name].to(layer.weight.device)
        return kept, layer.weight.detach().masked_fill(~kept, 0)

    def block(self, unit: Unit, fed: Fed) -> None:
        """Prune it by what its dense layers are given, and fit it to what the dense block makes of that."""
        start = time.perf_counter()
        wanted: list[Tensor] = []

        def feed(sums: Sums) -> None:
            for i, batch in enumerate(fed.batches):
                sums.batch = batch
                wanted.append(fed.output(i))

        self.finish(unit, feed)
        fit = _Fit(unit, fed, wanted)
        size = sum(float(one.float().square().sum()) for one in wanted) or 1.0
        before = fit.error()
        after, trained = self._fit(unit, fit, before)
        seconds = time.perf_counter() - start
        self.rows.append(Rebuilt(unit.path, before / size, after / size, trained, seconds))

    def _attached(self, unit: Unit, masks: Mapping[str, Tensor]) -> Handle | None:
        """PERP on a block alone; None: it has nothing to train there."""
        perp = self.perp.having(masks)
        plain = paths_of(self.model).plain
        own = {place for place in perp.places(self.model) if _inside(plain[place], unit.path)}
        return attach(self.model, perp, lambda path, module: path in own) if own else None

    def _fit(self, unit: Unit, fit: _Fit, before: float) -> tuple[float, int]:
        """The error in the end, and how many numbers were trained."""
        torch.manual_seed(self.seed)  # within as_in_use, which puts the process's own back
        shapes = {layer.name: layer.weight.shape for layer in unit.layers}
        handle = self._attached(unit, Masks({name: self.bits[name] for name in shapes}, shapes))
        if handle is None:
            return before, 0
        try:
            parameters = handle.parameters()
            fit.train(parameters, self.count, self.lr)
            handle.merge()
            after = fit.error()
            better = after < before  # not so if it is nan
            if better:
                handle.merge_and_unload()
            else:
                handle.unmerge()
        finally:
            if not handle.removed:
                handle.remove()
        return (after if better else before), sum(p.numel() for p in parameters)


class _Fit:
    """A block's error on all of its data, and its training."""

    def __init__(self, unit: Unit, fed: Fed, wanted: Sequence[Tensor]) -> None:
        self.path, self.fed, self.wanted = unit.path, fed, wanted

    def _squares(self, i: int) -> Tensor:
        """Squared errors of one batch, in float32, without those of padding."""
        made, wanted = self.fed.output(i), self.wanted[i]
        square = (made.float() - wanted.float()).square()
        counted = self.fed.batches[i].counted(made, self.path)
        return square if counted is None else square.flatten(0, -2)[counted]

    def error(self) -> float:
        """The sum over all data."""
        return sum(float(self._squares(i).sum()) for i in range(len(self.fed)))

    def train(self, parameters: Sequence[nn.Parameter], steps: int, lr: float) -> None:
        """AdamW on one batch after another; no gradient is left anywhere."""
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * _shape((step + 1) / steps)
            with torch.enable_grad():
                loss = self._squares(step % len(self.fed)).mean()
                grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = grad
            optimizer.step()
        for p in parameters:
            p.grad = None


def _shape(done: float) -> float:
    """The learning rate's rise and fall over the share of steps that are done."""
    return min(done / _WARM_UP, (1 - done) / (1 - _WARM_UP) + 1e-3)


def _inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")
