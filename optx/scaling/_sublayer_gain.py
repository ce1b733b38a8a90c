"""How much a model's sublayers amplify: top singular values of their matrices, and sizes out over sizes in.

Source: Fan, Liu, Zhao, Yuan, Gu, "Robust Layerwise Scaling Rules by Proper Weight Decay Tuning", arXiv
    2510.15262.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, check_range, check_whole
from optx._no_trace import buffers_kept, randomness_kept
from optx.delta._input_stats import call
from optx.scaling._coordinate_probe import main_tensor
from optx.scaling._singular import Block, TopValue, matrices_of, refuse_nonfinite, top_values


@dataclass(frozen=True)
class SublayerGains:
    """What `sublayer_gain` found; ``print(gains)`` shows it as a table.

    Attributes:
        top: by parameter (and expert: ``experts.down_proj[3]``), the largest singular value: an estimate,
            with its residual.
        gain: by module, rms(output) / rms(input) on the batch, exact; empty without a batch.
        left_out: why parameters of two dimensions or more are not in ``top``.
        blocks: where the iteration stopped, to go on from (``start=``).
    """

    top: Mapping[str, TopValue]
    gain: Mapping[str, float]
    left_out: Mapping[str, str]
    blocks: Mapping[str, Tensor] = field(repr=False)

    @property
    def converged(self) -> bool:
        """Whether every value is within the tolerance that was asked for."""
        return all(one.converged for one in self.top.values())

    def compare(self, other: SublayerGains) -> dict[str, float]:
        """By matrix, the other's top singular value over this one's; 1 where they match.

        Args:
            other: of a model with the same names, of another width or at another time.

        Raises:
            OptxError: a matrix is in one of them only.
        """
        if only := sorted(self.top.keys() ^ other.top.keys()):
            raise OptxError(
                f"SublayerGains.compare: {only[0]!r} is in one of the two only ({len(only)} in all)."
            )
        return {name: _ratio(other.top[name].value, one.value) for name, one in self.top.items()}

    def __str__(self) -> str:
        width = max([6, *map(len, self.top)])
        lines = [f"{'matrix':{width}}  {'shape':>13}  top value  residual"]
        for name, one in self.top.items():
            shape = f"{one.shape[0]} x {one.shape[1]}"
            mark = "" if one.converged else "  not converged"
            lines.append(f"{name:{width}}  {shape:>13}  {one.value:9.4g}  {one.residual:8.1e}{mark}")
        lines += [
            f"{name or '(the model)'}: rms out / rms in {value:.4g}" for name, value in self.gain.items()
        ]
        if self.left_out:
            lines.append(
                f"Left out: {len(self.left_out)} parameters "
                f"({', '.join(sorted(set(self.left_out.values())))})."
            )
        return "\n".join(lines)


def sublayer_gain(
    model: nn.Module,
    batch: Any = None,
    *,
    embeddings: bool = False,
    vectors: int = 4,
    iterations: int = 300,
    tol: float = 1e-3,
    start: SublayerGains | None = None,
) -> SublayerGains:
    """Top singular value of each of a model's matrices; with a batch, how much each sublayer amplifies it.

    In AdamW's steady state a matrix's top singular value goes as sqrt(lr / weight_decay) * width^0.75 (arXiv
    2510.15262); if proxy and target were scaled right, theirs match. `optx.scaling.GainMonitor` follows
    them during training, `optx.scaling.fit_gains` fits that law over runs.

    By block power iteration in float32 (float64 for such weights), all matrices of one shape at once.
    Kernels of convolutions are matrices of outputs x (inputs, positions), each group a block; a 3-D
    parameter elsewhere is a stack of experts, reported one by one. Of sharded weights one at a time is
    gathered: all ranks must call. Nothing of the model is changed.

    Args:
        model: any module.
        batch: a mapping (passed by keyword), a tuple or list (as positional arguments) or a tensor. The
            model runs once over it, without gradients, in the mode that it is in.
        embeddings: whether tables of embeddings count, and what is tied to them.
        vectors: size of the block; more converge sooner where several singular values are nearly the largest.
        iterations: at most so many.
        tol: iteration stops once all residuals of a shape are at most this.
        start: an earlier result on the same model to go on from: after little training one or two
            iterations do.

    Returns:
        A `SublayerGains`.

    Paper values:
        None: the number of iterations is a matter of accuracy.

    Limits: A value is an estimate from below: the residual says how near to *a* singular value it is, and
        only chance could have hidden a larger one from the start. A convolution's matrix is not the
        convolution itself. Weights that a parametrization computes (weight_norm, spectral_norm, pruning) are
        left out: what they are computed from is not what multiplies.

    Keywords: spectral norm, singular value, power iteration, weight decay, muP, steady state, diagnostics.

    Evidence: ``test_sublayer_gain.py``; ``optx run transfer``.

    Raises:
        OptxError: a matrix holds inf or nan (it is named), there is no matrix, an option is out of range,
            or ``start`` is of other shapes.

    Example:
        >>> import torch, optx
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> layer.weight.data = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
        >>> round(optx.scaling.sublayer_gain(layer).top["weight"].value, 5)
        4.0

    Source: "Robust Layerwise Scaling Rules by Proper Weight Decay Tuning", arXiv 2510.15262.
    """
    owner = "sublayer_gain"
    for name, value in (("vectors", vectors), ("iterations", iterations)):
        check_whole(owner, name, value, 1)
    check_range(owner, "tol", tol, 0)
    with torch.no_grad():
        blocks, left_out = blocks_of(owner, model, embeddings, vectors)
        if start is not None:
            _go_on(blocks, start)
        found = top_values(blocks, iterations, tol)
    refuse_nonfinite(owner, found)
    top = {name: found[name] for block in blocks for name in block.matrices.names()}
    gain = {} if batch is None else _gains(model, batch)
    return SublayerGains(top, gain, left_out, {block.matrices.name: block.v for block in blocks})


def blocks_of(
    owner: str, model: nn.Module, embeddings: bool, vectors: int
) -> tuple[list[Block], dict[str, str]]:
    """A block for each of a model's matrices."""
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(f"{owner}: model is a {type(model).__name__}; it must be a torch.nn.Module.")
    matrices, left_out = matrices_of(model, embeddings)
    if not matrices:
        raise OptxError(
            f"{owner}: the model has no matrix to look at ({len(left_out)} parameters of two dimensions or "
            "more are left out; embeddings=True takes embeddings too)."
        )
    return [Block.start(one, vectors) for one in matrices], left_out


def _go_on(blocks: list[Block], start: SublayerGains) -> None:
    for block in blocks:
        before = start.blocks.get(block.matrices.name)
        if before is None or before.shape != block.v.shape:
            found = "nothing" if before is None else f"a block of shape {tuple(before.shape)}"
            raise OptxError(
                f"sublayer_gain: start has {found} for {block.matrices.name!r}, where "
                f"{tuple(block.v.shape)} is wanted; "
                "give a result of the same model with the same vectors and embeddings."
            )
        block.v = before.to(block.v.device, block.v.dtype)


def _gains(model: nn.Module, batch: Any) -> dict[str, float]:
    """By module with floating input and output, in the order of the first calls' ends."""
    sums: dict[str, list[tuple[Tensor, Tensor]]] = {}
    hooks: list[Any] = []
    given: list[Tensor | None] = []

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        x = main_tensor((args, kwargs))
        given.append(None if x is None else _mean_square(x))

    def after(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            x, y = given.pop(), main_tensor(output)
            if x is not None and y is not None:
                sums.setdefault(path, []).append((x, _mean_square(y)))

        return hook

    try:
        for path, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            hooks.append(module.register_forward_hook(after(path)))
        with torch.no_grad(), buffers_kept(model), randomness_kept():
            call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: _root_ratio(pairs) for path, pairs in sums.items()}


def _mean_square(x: Tensor) -> Tensor:
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return x.square().mean()


def _root_ratio(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Of a module's calls together."""
    given, made = (sum(float(pair[i]) for pair in pairs) for i in (0, 1))
    return math.sqrt(_ratio(made, given))


def _ratio(above: float, below: float) -> float:
    """nan where neither says anything: 0 / 0."""
    return above / below if below else (math.inf if above else math.nan)
