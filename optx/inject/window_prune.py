"""AdaWPT: a window transformer that computes only the windows that need it.

Source: arXiv 2306.14268 (LMD-ViT), section 3. The predictor and its draw are in ``_window_policy.py``, what a
block makes of windows in ``_window_compute.py``, how a block is recognised in ``_window_block.py``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from optx._errors import OptxError, TargetError, check_choice, check_range, check_whole
from optx.inject._injection import Injection, Site
from optx.inject._own_loss import Collected
from optx.inject._part import RESERVED, Part
from optx.inject._served import Served
from optx.inject._trained_whole import Saved
from optx.inject._window_block import Blocks, check_blocks, is_block, made_by, pair
from optx.inject._window_handle import WindowHandle
from optx.inject._window_policy import Chain
from optx.inject._windowed import Place, Windowed


@dataclass(frozen=True)
class WindowPrune(Injection):
    """Compute only those windows of a Swin-like transformer that need it (AdaWPT): dropped ones pass through.

    A small predictor scores every token, "keep" against "drop", and each window takes the mean of its tokens.
    In training all windows are computed and what is added to dropped ones is multiplied by 0, drawn by a
    straight-through Gumbel-Softmax, so that predictors learn from the model's loss and from ``handle.loss``.
    In evaluation mode kept windows are gathered, computed and put back; the others are copies of what they
    were.

    Args:
        blocks: what a module is made of: a function of a module that gives an `optx.WindowBlock`, or with
            ``window`` the four callables (norm1, attn, norm2, mlp) on (n, w², C) windows; None for one that
            is no block. None: what is built as Swin, Swin V2 and Swin2SR are in transformers, and Swin in
            timm, by its parts' names. Either way the block is put together and compared with its own forward
            at attach.
        window: height and width of a window, in tokens. None: as each block says.
        tau: temperature of the Gumbel-Softmax.
        share_policy: ``"stage"``: the first plain and the first shifted block of each stage (blocks in one
            list) predict, and later ones follow. ``"block"``: every block predicts. Once a window is dropped
            it is dropped for the rest of its stage, in plain and in shifted blocks apart.

    The handle has ``loss(blur_mask)``, ``decisions``, ``maps()``, ``active_ratio()``, ``force(...)``,
    ``cost()``, ``plot(path)`` and ``freeze()``. Norms before attention (Swin) and after it (Swin V2) are
    told apart: there a norm's bias would change a dropped window, so D comes after it. There is no
    ``merge()``: which windows are dropped depends on the input, so no weights are equal to it.

    Paper values:
        ``tau=1.0, share_policy="stage"``: LMD-ViT (the defaults), with windows of 8 and the pruning loss at a
            weight that is 0.01 by memory: the authors published no training code.

    Limits: Draws are of torch's own random stream, as dropout's: seed that, and keep ``preserve_rng_state``
        in checkpoints. New predictors decide at random until they have learnt, so the model is another one at
        first (``handle.force(keep_all=True)`` is the dense one). Attention and MLP must be of one window
        each: an MLP that convolves the image is refused. Gathering waits for the device once a block, and
        under ``torch.compile`` its shapes depend on data: training compiles whole, evaluation with graph
        breaks (not ``fullgraph=True``). A checkpoint around single blocks needs ``use_reentrant=False``. In
        training a dropped -0.0 becomes 0.0. Attention weights of windows that were left out are 0.

    Keywords: AdaWPT, LMD-ViT, adaptive window pruning, local motion deblurring, dynamic inference, token
        pruning, Swin, window attention, conditional computation.

    Evidence: ``optx run skip``; ``test_window_prune.py``, ``test_window_models.py``,
        ``test_window_handle.py``.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, nothing is built as a block of windows, or one can't be served; says why.

    Example:
        >>> import torch, optx
        >>> from transformers import SwinConfig, SwinModel
        >>> model = SwinModel(SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 2],
        ...                              num_heads=[2, 2], window_size=4))
        >>> handle = optx.attach(model, optx.WindowPrune())
        >>> images, blurred = torch.randn(2, 3, 32, 32), torch.zeros(2, 1, 32, 32)
        >>> blurred[..., :8, :8] = 1
        >>> output = model.train()(images).last_hidden_state
        >>> loss = output.square().mean() + 0.01 * handle.loss(blurred)
        >>> loss.backward()
        >>> output = model.eval()(images)
        >>> [tuple(one.shape) for one in handle.decisions.values()]
        [(2, 1, 4, 4), (2, 1, 4, 4), (2, 1, 2, 2), (2, 1, 2, 2)]

    Source: arXiv 2306.14268, and the authors' ``model_hw.py``.
    """

    name: ClassVar[str] = "adawpt"
    role: ClassVar[str] = "block"
    serves: ClassVar[str] = "blocks of window attention"

    blocks: Blocks | None = None
    window: int | None = None
    tau: float = 1.0
    share_policy: str = "stage"

    def __post_init__(self) -> None:
        check_blocks(self.blocks)
        if self.window is not None:
            object.__setattr__(self, "window", check_whole("WindowPrune", "window", self.window, 1))
        check_range("WindowPrune", "tau", self.tau, 1e-6)
        if isinstance(self.tau, bool) or math.isinf(self.tau):
            raise OptxError(f"WindowPrune: tau is {self.tau!r}; it must be a finite number.")
        object.__setattr__(self, "tau", float(self.tau))  # NumPy's would not be saved
        check_choice("WindowPrune", "share_policy", self.share_policy, ("stage", "block"))

    def places(self, model: nn.Module) -> Collection[str]:
        """Every block of windows.

        Raises:
            TargetError: there is none.
        """
        found = [
            path
            for path, module in model.named_modules()
            if path and RESERVED not in path.split(".") and self._is_block(module)
        ]
        if not found:
            how = "that blocks= calls one" if self.blocks else "built as Swin's blocks are"
            raise TargetError(
                f"attach: WindowPrune finds no module {how} in this {type(model).__name__}. Pass blocks=, a "
                "function of a module that gives an optx.WindowBlock, or None for one that is no block."
            )
        return found

    def _is_block(self, module: nn.Module) -> bool:
        return is_block(module) if self.blocks is None else self.blocks(module) is not None

    def part(self, module: nn.Module, path: str) -> Part:
        """One block alone, which is a stage of its own."""
        return self.parts([Site(path, module)])[0]

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per block; those of a stage share a policy."""
        collected, chains = Collected("WindowPrune", alone=False), dict[tuple[str, bool], Chain]()
        made: list[Part] = []
        for site in sites:
            block = made_by(self.blocks, self.window, site.module, site.path)
            key = site.path.rpartition(".")[0], self._shifted(site.module, pair(block.shift))
            first = key not in chains
            place = Place(chains.setdefault(key, Chain()), first, first or self.share_policy == "block")
            made.append(Windowed(site.module, site.path, self, place, collected))
        return made

    def _shifted(self, module: nn.Module, shift: tuple[int, int]) -> bool:
        """Whether a block rolls: transformers' Swin says so until it has seen an image that is too small."""
        own: Any = getattr(module, "input_resolution", None)
        clamps = hasattr(module, "set_shift_and_window_size") and own is not None
        return any(shift) and not (clamps and min(pair(own)) <= min(pair(module.window_size)))

    def metrics(self, handle: WindowHandle) -> dict[str, float | Tensor]:
        """The share of windows that the last forward kept, of all blocks; the loss."""
        return handle.numbers()

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> WindowHandle:
        """What `optx.attach` returns."""
        return WindowHandle(model, injection, served, saved)

    def options(self) -> dict[str, Any]:
        """As plain data; a function of modules is none, so `Handle.load` goes with an attach that has it."""
        return {"window": self.window, "tau": self.tau, "share_policy": self.share_policy}
