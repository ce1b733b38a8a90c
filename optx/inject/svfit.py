"""SVFit: train the singular values of a weight, and leave its singular vectors as they are.

Source: SVFit, arXiv 2409.05926.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError, TargetError, check_range
from optx.inject._computes import weight_now
from optx.inject._embeddings import peculiar, rows
from optx.inject._injection import Injection, Site
from optx.inject._metrics import product_sq
from optx.inject._part import Part, Weights, hidden_of, new_tensor
from optx.inject._weights import add_product, conv_like, is_conv, is_linear, is_transposed, shape_of


class Spectrum(Part):
    """y + U diag(sigma - sigma0) V x, for a weight seen as a matrix (out, in) = U diag(sigma0) V + rest.

    What is trained is ``shift`` = sigma - sigma0, (r,): the same steps as on sigma, but weight decay pulls
    towards the pretrained weight instead of shrinking it, and a small move of a large value is not rounded
    away. U (out, r) and V (r, in) are frozen, and saved: another machine's SVD has other signs, and other
    bases where values repeat.
    """

    sigma0: Tensor
    U: Tensor
    V: Tensor

    def __init__(self, svfit: SVFit, module: Any, path: str) -> None:
        super().__init__()
        self.transposed = is_transposed(module)
        weight = weight_now(module, path).detach()
        U, sigma, V = _svd(self.matrix(weight), path)
        self.of = len(sigma)
        rank = svfit.rank_of(sigma, path)
        self.shift = nn.Parameter(new_tensor(module, rank))
        self.register_buffer("sigma0", sigma[:rank].to(self.shift.dtype))
        self.register_buffer("U", U[:, :rank].to(weight.dtype).contiguous())
        self.register_buffer("V", V[:rank].to(weight.dtype).contiguous())

    @property
    def sigma(self) -> Tensor:
        """The trained singular values (r,); of any sign, in any order."""
        return self.sigma0 + self.shift

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as (out, in)."""
        return weight.t() if self.transposed else weight.flatten(1)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """The change of the weight as a matrix (out, in)."""
        return (self.U.to(dtype) * self.shift.to(dtype)) @ self.V.to(dtype)

    def down(self, module: nn.Module, x: Tensor, V: Tensor) -> Tensor:
        """V x."""
        return F.linear(x, V)

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Add the change to the module's output."""
        dtype = output.dtype
        low = self.down(module, hidden_of(args, kwargs), self.V.to(dtype)) * self.shift.to(dtype)
        return self.up(output, low, self.U.to(dtype), self.owns(module))

    def up(self, output: Tensor, low: Tensor, U: Tensor, owned: bool) -> Tensor:
        """output + U low, in one pass over the output."""
        return add_product(output, low, U, owned=owned)

    @property
    def adds(self) -> bool:
        """Whether all it does is add: it does."""
        return True

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """W + U diag(sigma - sigma0) V."""
        delta = self.delta(now.weight.dtype)
        own_shape = delta.t() if self.transposed else delta.view(now.weight.shape)
        return Weights(now.weight + own_shape, now.bias)

    def as_lora(self) -> tuple[Tensor, Tensor, float]:
        """A (r, in), B (out, r) and scale of the LoRA that is the same change."""
        return self.V.detach(), (self.U * self.shift).detach(), 1.0

    def change_sq(self) -> Tensor | None:
        """That of the LoRA that is the same change."""
        return product_sq(*self.as_lora())

    def note(self) -> str:
        """How many singular values are trained."""
        return f"{len(self.shift)} of {self.of} singular values"


class EmbeddingSpectrum(Spectrum):
    """On nn.Embedding, whose weight (V, d) is the transpose of a linear one of V inputs."""

    def down(self, module: nn.Module, x: Tensor, V: Tensor) -> Tensor:
        """Columns of V."""
        return rows(module, x, V.t())

    def up(self, output: Tensor, low: Tensor, U: Tensor, owned: bool) -> Tensor:
        """output + U low, in the output's precision: autocast leaves embeddings alone."""
        return output + (low @ U.t()).to(output.dtype)


class ConvSpectrum(Spectrum):
    """On convolutions, with the kernel as (out, in * k): V is one of the same geometry, U is 1 x 1."""

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the change to the module's output."""
        x, dtype, kernel = hidden_of(args, kwargs), output.dtype, shape_of(module)[1:]
        if module.groups > 1:
            # Factored, each group would need r channels of its own; the change as a kernel costs r times the
            # weight, once a call.
            return output + conv_like(module, x, self.delta(dtype).view(-1, *kernel), module.groups)
        ones = (1,) * (len(kernel) - 1)
        low = conv_like(module, x, self.V.to(dtype).view(-1, *kernel), 1)
        low = low * self.shift.to(dtype).view(-1, *ones)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(ones) - 1]
        return output + conv(low, self.U.to(dtype).view(*self.U.shape, *ones))


@dataclass(frozen=True)
class SVFit(Injection):
    """Train singular values: y = W x + U diag(sigma - sigma0) V x, where W = U diag(sigma0) V + rest.

    Args:
        rank: r, how many of the largest singular values are trained. None: all of them, as in the paper.
        energy: instead of a rank, the smallest one whose squared singular values are this share of all, as
            0.99; each weight gets its own.

    Serves nn.Linear, transformers' Conv1D, nn.Conv1d/2d/3d (the kernel as a matrix of (out, in * k), also
    with groups) and nn.Embedding. By default: query and value projections. Load the pretrained weights
    first: the SVD is taken at attach, in float64 where the device has it, and of the weights as they are.

    Each module gets r trained numbers and r (in + out) frozen ones. ``shift`` = sigma - sigma0 is what an
    optimizer sees, and ``module.optx.svfit.sigma`` the singular values that it makes, so weight decay pulls
    towards the pretrained weight. Adam moves every value by its learning rate, large or small: try 1e-3 to
    1e-1, ten to a hundred times that of LoRA. With DDP, pass it ``broadcast_buffers=False``: it would send
    the frozen numbers at every call.

    Paper values:
        ``rank=None``: what the paper's count says of RoBERTa-base (the default): 768 numbers for each query
            and value matrix, 16 times fewer than LoRA's at rank 8.
        ``energy=0.99``: "over 99 % of the matrix's information" (abstract). Learning rates could not be
            checked.

    Limits: It can't turn singular directions, only weigh them. The frozen directions take about twice the
    memory of the weight at full rank; a kept copy comes on top while merged.

    Keywords: PEFT, SVD, singular values, parameter-efficient fine-tuning.

    Evidence: ``optx run adapt``; ``test_svfit.py``.

    Raises:
        OptxError: an option out of range, or both given.
        TargetError: at attach, a rank larger than the weight's, or a weight that has no SVD.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8))
        >>> handle = optx.attach(model, optx.SVFit(rank=4), targets="0")
        >>> print(model[0].optx.svfit.note(), handle.report().trainable)
        4 of 8 singular values 4

    Source: arXiv 2409.05926.
    """

    name: ClassVar[str] = "svfit"
    role: ClassVar[str] = "query_value"
    serves: ClassVar[str] = "Linear, Conv1D, Conv1d/2d/3d or Embedding modules"

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise OptxError(f"SVFit: rank={self.rank} and energy={self.energy} both say the rank. Give one.")
        if self.rank is not None:
            check_range("SVFit", "rank", self.rank, 1)
        if self.energy is not None:
            check_range("SVFit", "energy", self.energy, 0, 1)

    @property
    def needs_weight(self) -> bool:
        """Its singular values."""
        return True

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's singular values."""
        if is_conv(module):
            return ConvSpectrum(self, module, path)
        if is_linear(module):
            return Spectrum(self, module, path)
        if isinstance(module, nn.Embedding) and not peculiar(module):
            return EmbeddingSpectrum(self, module, path)
        raise TargetError(
            f"attach: SVFit serves {self.serves}; {path!r} is a {type(module).__name__}{peculiar(module)}."
        )

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """As `part`; a terminal shows how far it is, for the SVDs of a large model take minutes."""
        from rich.console import Console
        from rich.progress import track

        shown = track(
            sites,
            "SVFit: singular values",
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        return [self.part(site.module, site.path) for site in shown]

    def rank_of(self, sigma: Tensor, path: str) -> int:
        """How many of a weight's singular values, descending, are trained."""
        if self.rank is not None and self.rank > len(sigma):
            raise TargetError(
                f"attach: SVFit's rank={self.rank} is larger than the number of singular values of {path!r}, "
                f"{len(sigma)}. Use at most that, or None for all."
            )
        if self.energy is None:
            return self.rank or len(sigma)
        if sigma.is_meta:
            raise TargetError(f"attach: {path}.weight is on the meta device, so energy= can't be measured.")
        total = sigma.double().square().cumsum(0)
        return min(int((total < self.energy * total[-1]).sum()) + 1, len(sigma))


def _svd(matrix: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD; in float64 it costs less than twice what float32 does, and is good to float32's last bit."""
    dtype = torch.float32 if matrix.device.type == "mps" else torch.float64
    if not matrix.is_meta and not matrix.isfinite().all():
        raise TargetError(f"attach: {path}.weight is not finite, so it has no singular values for SVFit.")
    return torch.linalg.svd(matrix.to(dtype), full_matrices=False)
