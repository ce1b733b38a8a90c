"""The handle of `optx.WindowPrune`: its loss, what it decided, what that costs, and pictures of it.

Source: AdaWPT, arXiv 2306.14268, section 3.3 (the pruning loss).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError, check_range, near
from optx.inject._own_loss import LossHandle
from optx.inject._served import Served
from optx.inject._trained_whole import Saved
from optx.inject._window_cost import WindowCost
from optx.inject._window_grid import Grid, expand
from optx.inject._window_picture import draw
from optx.inject._windowed import Windowed


class WindowHandle(LossHandle):
    """What `optx.attach` returns for `optx.WindowPrune`."""

    group: ClassVar[Mapping[str, float]] = {"lr": 2e-4, "weight_decay": 0.0}

    def __init__(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved] = ()
    ) -> None:
        super().__init__(model, injection, served, saved)
        self._image: Sequence[int] = ()
        self.served[0].hooks.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward begins: no policy of the last one is followed, even where a first block is left out."""
        for _, part in self._parts():
            part.place.chain.clear()
        given = () if torch.compiler.is_compiling() else (*args, *kwargs.values())
        images = (one.shape for one in given if isinstance(one, Tensor) and one.ndim == 4)
        self._image = next(images, ())

    def _parts(self) -> Iterator[tuple[str, Windowed]]:
        return ((one.path, one.part) for one in self.served if isinstance(one.part, Windowed))

    # ---- the loss -----------------------------------------------------------------------------------------

    def loss(self, blur_mask: Tensor, share: float = 0.0) -> Tensor:
        """The pruning loss of the last forward: cross-entropy of each predictor's windows with an annotation.

        A window is to be kept if more than ``share`` of it is marked, which is asked of the windows as that
        block cuts them, shifted ones too. Layers count equally. Call it once after each forward.

        Args:
            blur_mask: what is to be kept (B, 1, H, W) or (B, H, W) on the model's input: bool, or 0 to 1; 1
                is blurred.
            share: of a window that may be marked without its being kept; 0: none. Where a window is kept only
                if most of it is blurred, shifted windows, which cut a blurred spot in four, drop it.

        Returns:
            A scalar in float32; 0 after `freeze`. The paper adds it to the reconstruction loss at a small
            weight.

        Raises:
            OptxError: no forward in training mode came before, the mask is of another batch, coarser than the
                tokens, neither of the model's input nor a whole multiple or part of that size, or not within
                0 and 1.
        """
        check_range("loss", "share", share, 0, 1)
        mask = _checked(blur_mask)
        parts, losses = dict(self._parts()), dict[str, list[Tensor]]()
        for path, found in self._take().items():
            grid = parts[path].grid
            assert grid is not None
            losses[path] = [self._cross_entropy(path, logits, grid, mask, share) for logits in found]
        return self._mean(losses)

    def _cross_entropy(self, path: str, logits: Tensor, grid: Grid, mask: Tensor, share: float) -> Tensor:
        rows, columns = grid.counts
        if len(logits) != len(mask) * rows * columns:
            raise OptxError(
                f"loss: the mask is of {len(mask)} images, and {path!r} has decided of {len(logits)} "
                f"windows, {rows} x {columns} an image. Pass the mask of the last forward's batch."
            )
        step = self._steps(mask, grid)
        tokens = _pooled(mask.to(logits.device), grid, step)
        blurred = grid.means(tokens.permute(0, 2, 3, 1)).squeeze(1) > share
        return F.cross_entropy(logits.float(), (~blurred).long())  # class 0: keep

    def _steps(self, mask: Tensor, grid: Grid) -> tuple[int, int]:
        """Pixels in a token along both axes.

        The finest grid says it, rounded up for a model that pads its input; coarser ones are whole multiples,
        whatever their own padding.
        """
        grids = [part.grid for _, part in self._parts() if part.grid is not None]
        steps: list[int] = []
        for axis, name in ((-2, "height"), (-1, "width")):
            finest, own = max(getattr(one, name) for one in grids), getattr(grid, name)
            if mask.shape[axis] < finest - max(one.window[axis] for one in grids) + 1:
                raise OptxError(
                    f"loss: the mask is {tuple(mask.shape[-2:])}, coarser than the model's tokens, whose "
                    f"{name} is {finest}. Pass it at the size of the model's input."
                )
            steps.append(-(-mask.shape[axis] // finest) * round(finest / own))
        self._check_scale(mask, [max(one.height for one in grids), max(one.width for one in grids)])
        return steps[0], steps[1]

    def _check_scale(self, mask: Tensor, finest: Sequence[int]) -> None:
        """Raise if pixels of the mask are not where those of the model's input are."""
        if not self._image:
            return
        size = mask.shape[-2:]
        for own in (self._image[-2:], self._image[1:3]):  # channels may be last
            pairs = [*zip(size, own, finest, strict=True)]
            same = all(-(-n // tokens) == -(-m // tokens) for n, m, tokens in pairs)
            scaled = size[0] * own[1] == size[1] * own[0] and not (size[0] % own[0] and own[0] % size[0])
            if same or scaled:
                return
        raise OptxError(
            f"loss: the mask is {tuple(size)}, and the model's input was {tuple(self._image)}: neither that "
            "size nor a whole multiple or part of it, so it isn't known which window a pixel is in."
        )

    # ---- what was decided ---------------------------------------------------------------------------------

    @property
    def decisions(self) -> dict[str, Tensor]:
        """Which windows of the last forward are kept, by block: bool (B, 1, rows, columns).

        In a shifted block these are windows of the rolled image; `maps` has them rolled back.

        Raises:
            OptxError: there has been no forward.
        """
        return {path: decision for path, _, decision in self._decided()}

    def maps(self) -> dict[str, Tensor]:
        """`decisions` for each token of the image, where it lies in it: bool (B, 1, height, width)."""
        return {path: expand(decision, grid) for path, grid, decision in self._decided()}

    def active_ratio(self) -> float:
        """The share of windows that the last forward kept, of all blocks' windows."""
        found = [decision for _, _, decision in self._decided()]
        return sum(int(one.sum()) for one in found) / sum(one.numel() for one in found)

    def numbers(self) -> dict[str, float | Tensor]:
        """For `Handle.metrics`: what the last forward had."""
        found: dict[str, float | Tensor] = {} if self.last_loss is None else {"loss": self.last_loss}
        decided = [part.decision for _, part in self._parts() if part.decision is not None]
        if decided:
            kept = torch.stack([one.sum().to(decided[0].device) for one in decided]).sum()
            found["kept"] = kept / sum(one.numel() for one in decided)
        return found

    def cost(self) -> WindowCost:
        """The multiply-adds of the last forward in the served blocks, if only kept windows are computed."""
        active = predictor = dense = 0
        for path, grid, decision in self._decided():
            part = next(part for own, part in self._parts() if own == path)
            kept = int(decision.sum())
            active += kept * part.form.window_macs + (part.form.call_macs if kept else 0)
            predictor += len(decision) * grid.height * grid.width * part.token_macs
            dense += decision.numel() * part.form.window_macs + part.form.call_macs
        return WindowCost(active, predictor, dense)

    def plot(self, path: str | PathLike[str], image: Tensor | None = None, example: int = 0) -> None:
        """Draw which windows each block kept: what is dropped is dark.

        Args:
            path: of the file; its ending says the kind, as ``.png``. Needs matplotlib.
            image: the model's input (B, channels, H, W), to draw it under; None: the decisions alone.
            example: which image of the last forward's batch.

        Raises:
            OptxError: there has been no forward, or no such example in it.
        """
        maps = self.maps()
        batch = min(len(one) for one in maps.values())
        if not 0 <= example < batch:
            raise OptxError(f"plot: example is {example}, and the last forward had {batch} images.")
        draw(
            path,
            {name: one[example, 0] for name, one in maps.items()},
            None if image is None else image[example],
        )

    def _decided(self) -> list[tuple[str, Grid, Tensor]]:
        self._check_alive("decisions")
        found = [
            (path, part.grid, part.decision)
            for path, part in self._parts()
            if part.grid is not None and part.decision is not None
        ]
        if not found:
            raise OptxError("WindowPrune: nothing has been decided yet. Call the model first.")
        return found

    # ---- by hand ------------------------------------------------------------------------------------------

    def force(self, decisions: Mapping[str, Tensor] | None = None, *, keep_all: bool = False) -> _Forced:
        """Decide by hand which windows are kept, until the next `force` or the end of a ``with``.

        Predictors still run in training, and `loss` goes on.

        Args:
            decisions: by block, as `decisions` gives them: (B, 1, rows, columns) or (1, 1, rows, columns),
                not 0 is kept. Other blocks decide themselves.
            keep_all: all windows everywhere: the dense model. Without either, predictors decide again.

        Raises:
            OptxError: both are given, or a block that isn't served.
        """
        self._check_alive("force")
        if decisions is not None and keep_all:
            raise OptxError("force: decisions and keep_all=True exclude each other; pass one of them.")
        parts = dict(self._parts())
        for path in decisions or {}:
            if path not in parts:
                raise OptxError(f"force: no served block is called {path!r}. {near(path, parts)}")
        before = [(part, part.forced) for part in parts.values()]
        for path, part in parts.items():
            given = (decisions or {}).get(path, keep_all)
            part.forced = given if isinstance(given, bool) else given.detach() != 0
        return _Forced(before)


class _Forced:
    """Gives back at the end of a ``with`` how `WindowHandle.force` found it."""

    def __init__(self, before: list[tuple[Windowed, Tensor | bool]]) -> None:
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for part, forced in self._before:
            part.forced = forced


def _checked(mask: Tensor) -> Tensor:
    """A mask as (B, 1, H, W) of float32.

    Raises:
        OptxError: it has other axes, or values beyond 0 and 1.
    """
    if mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise OptxError(
            f"loss: blur_mask has shape {tuple(mask.shape)}; it must be (B, 1, H, W) or (B, H, W)."
        )
    mask = mask.detach().float()
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise OptxError(
            f"loss: blur_mask goes from {float(mask.min()):.4g} to {float(mask.max()):.4g}; it must be "
            "bool, or from 0 (sharp) to 1 (blurred)."
        )
    return mask


def _pooled(mask: Tensor, grid: Grid, step: tuple[int, int]) -> Tensor:
    """The share of each token that is marked; what a model pads its input by is not."""
    below, right = grid.height * step[0] - mask.shape[-2], grid.width * step[1] - mask.shape[-1]
    mask = F.pad(mask, (0, max(0, right), 0, max(0, below)))
    mask = mask[..., : grid.height * step[0], : grid.width * step[1]]
    return F.avg_pool2d(mask, step)
