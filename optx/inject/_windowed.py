"""What `optx.WindowPrune` adds to a block: a predictor, if it has one, and a call with windows left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from optx._errors import OptxError
from optx.inject import _window_compute as compute
from optx.inject._own_loss import Collected, LossPart
from optx.inject._part import new_tensor
from optx.inject._window_block import Blocks, Form, WindowBlock, form_of, made_by, structure, width
from optx.inject._window_cost import macs
from optx.inject._window_grid import Grid, Pair
from optx.inject._window_policy import Chain, Predictor, draw, threshold


@dataclass
class Place:
    """Where a block stands in its stage.

    Attributes:
        chain: that it shares with the stage's other blocks of the same shift.
        first: whether it is the chain's first.
        predicts: whether it has a predictor; else it takes the policy as it comes.
    """

    chain: Chain
    first: bool
    predicts: bool


class Windowed(LossPart):
    """One block whose dropped windows pass through: masked in training, left out in evaluation mode."""

    def __init__(
        self, module: nn.Module, path: str, injection: Any, place: Place, collected: Collected
    ) -> None:
        super().__init__(path, collected)
        self.tau: float = injection.tau
        self.blocks: Blocks | None = injection.blocks
        self.window: int | None = injection.window
        self.place = place
        self.form: Form = form_of(module, path, lambda twin: made_by(self.blocks, self.window, twin, path))
        block = made_by(self.blocks, self.window, module, path)
        like = new_tensor(module, 0)
        dim = width(block, path)
        self.predictor = Predictor(dim).to(like) if place.predicts else None
        self.token_macs = 0 if self.predictor is None else self._token_macs(like.new_zeros(1, 2, 2, dim))
        self.forced: Tensor | bool = False
        self.decision: Tensor | None = None
        self.grid: Grid | None = None
        self._kept = WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a copy has no forward whose backward is to come

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_kept": WeakTensorKeyDictionary()})

    @torch.no_grad()
    def _token_macs(self, image: Tensor) -> int:
        """Multiply-adds of the predictor, a token."""
        with torch.autocast(image.device.type, enabled=False):
            return 0 if self.predictor is None else macs(self.predictor, image) // 4

    def note(self) -> str:
        """What was added, in a word or two, for the report."""
        if self.predictor is not None:
            return "predicts"
        return "follows the first of its stage"

    # ---- the block's call ---------------------------------------------------------------------------------

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The block, of windows that are kept."""
        given = {**dict(zip(self.form.arguments, args, strict=False)), **kwargs}
        x: Any = given.pop(self.form.arguments[0])
        size, extra = self._size(module, x, given)
        block = self._block(module, extra)
        high, wide = size or block.size or self._no_size(x)
        image = x.reshape(x.shape[0], high, wide, x.shape[-1])
        grid = block.grid(high, wide)
        policy = self._policy(x, image, grid, training=module.training)
        if module.training:
            windows, weights = compute.residual(block, grid.split(image), grid, len(image), gate=policy)
            y: Tensor = grid.join(windows)
        else:
            y, weights = compute.gathered(block, image, grid, policy > 0)
        y = x if y is image else y.reshape(x.shape)
        if extra.get("output_attentions") or self.form.outputs > 1:
            return y, weights
        return (y,) if self.form.outputs else y

    def _block(self, module: nn.Module, extra: dict[str, Any]) -> WindowBlock:
        made = (
            structure(module, extra)
            if self.blocks is None
            else made_by(self.blocks, self.window, module, self.path)
        )
        return self.form.order(made)

    def _size(self, module: Any, x: Tensor, given: dict[str, Any]) -> tuple[Pair | None, dict[str, Any]]:
        """The image's size among a call's arguments, and those that are neither: for attention."""
        if x.ndim == 4:
            return (x.shape[1], x.shape[2]), given
        size = None
        for name, value in list(given.items()):
            if isinstance(value, tuple | list) and len(value) == 2:
                size = (int(value[0]), int(value[1]))
                del given[name]
                break
        # transformers' Swin does so in its forward.
        clamp = getattr(module, "set_shift_and_window_size", None)
        if clamp is not None and not given.pop("always_partition", False) and size is not None:
            clamp(size)
        return size, given

    def _no_size(self, x: Tensor) -> Pair:
        raise OptxError(
            f"WindowPrune: {self.path!r} was called with {tuple(x.shape)} and no height and width in tokens. "
            "Give them as size= of its optx.WindowBlock."
        )

    # ---- the policy ---------------------------------------------------------------------------------------

    def _policy(self, x: Tensor, image: Tensor, grid: Grid, *, training: bool) -> Tensor:
        """D of every window, and a note of it for the handle."""
        again = not torch.compiler.is_compiling() and _task() != -1
        policy = self._predicted(x, image, grid, training=training, again=again)
        if self.forced is not False:
            policy = self._given(image, grid)
        if not again:
            self.grid = grid
            self.decision = (policy.detach() > 0).reshape(len(image), 1, *grid.counts)
        return policy

    def _predicted(self, x: Tensor, image: Tensor, grid: Grid, *, training: bool, again: bool) -> Tensor:
        if self.predictor is None:
            return self._followed(x, image, grid, training=training, again=again)
        logits = grid.means(self.predictor(image).float())
        if training and self.learning:
            self.collect(logits)
        if not training:
            self._check_finite(logits)
        policy = draw(logits, self.tau) if training else threshold(logits)
        task = -1 if torch.compiler.is_compiling() else _task()
        return self.place.chain.go_on(policy, grid, first=self.place.first, task=task)

    def _followed(self, x: Tensor, image: Tensor, grid: Grid, *, training: bool, again: bool) -> Tensor:
        """What the chain has, of this forward: a checkpoint may compute a block again after another one."""
        chain = self.place.chain
        if again and chain.task != _task():
            known = self._kept.get(x)
            if known is None:
                raise OptxError(
                    f"WindowPrune: {self.path!r} is computed again by a checkpoint, and the policy that it "
                    "had is not known any more. Checkpoint whole stages, or pass use_reentrant=False."
                )
            return known
        policy = chain.policy
        windows = len(image) * grid.counts[0] * grid.counts[1]
        if policy is None or chain.grid is None or chain.grid.counts != grid.counts or len(policy) != windows:
            raise OptxError(
                f"WindowPrune: {self.path!r} follows the first block of its stage, which has not been "
                "computed on windows of this size in this forward. Pass share_policy='block' where blocks "
                "of one stage are left out or have other sizes."
            )
        if training and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not again:
            self._kept[x] = policy.detach().requires_grad_(policy.requires_grad)
        return policy

    def _given(self, image: Tensor, grid: Grid) -> Tensor:
        """A policy that was forced."""
        count = grid.counts[0] * grid.counts[1]
        if self.forced is True or isinstance(self.forced, bool):
            return torch.ones(len(image) * count, device=image.device)
        want = (len(image), 1, *grid.counts)
        if self.forced.shape[-3:] != want[1:] or self.forced.shape[0] not in (1, len(image)):
            raise OptxError(
                f"force: the decisions of {self.path!r} have shape {tuple(self.forced.shape)}, and its "
                f"windows are {want}."
            )
        return self.forced.to(image.device).float().expand(want).reshape(-1)

    def _check_finite(self, logits: Tensor) -> None:
        if not torch.compiler.is_compiling() and not bool(logits.isfinite().all()):
            raise OptxError(
                f"WindowPrune: the predictor of {self.path!r} gave logits that are not finite, by which "
                "every window would be dropped in silence. Look at its input and its weights."
            )


def _task() -> int:
    """The backward pass that is under way; -1: none."""
    return torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]
