"""PSDFactor: a square weight as U U^T, positive semidefinite and of low rank whatever a step does.

Source: the factored matrix of arXiv 2202.08788, as the weight of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError, TargetError, check_range, check_whole
from optx.inject._computes import weight_now
from optx.inject._injection import Injection
from optx.inject._part import Part, Weights, hidden_of, new_tensor
from optx.inject._weights import is_linear


class Factor(Part):
    """y = U (U^T x) + b: U (d, rank) is trained in the place of the weight (d, d)."""

    inside = in_place = True

    def __init__(self, psd: PSDFactor, module: Any, path: str) -> None:
        super().__init__()
        size = module.weight.shape[0]
        rank = size if psd.rank is None else psd.rank
        if rank > size:
            raise TargetError(f"attach: PSDFactor's rank={rank} is above the size of {path!r}, {size}.")
        U = new_tensor(module, size, rank)
        if not U.is_meta and psd.init == "fit":
            weight = weight_now(module, path).detach()
            if not bool(weight.isfinite().all()):
                raise TargetError(f"attach: PSDFactor can't fit {path!r}: its weight has inf or nan.")
            U.copy_(_closest(weight, rank))
        elif not U.is_meta:
            generator = None if psd.seed is None else torch.Generator().manual_seed(psd.seed)
            U.copy_(torch.randn(U.shape, generator=generator) * (psd.alpha / size**0.5))
        self.U = nn.Parameter(U)

    def around(
        self, call: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Two thin products in the place of the square one."""
        x = hidden_of(args, kwargs)
        U = self.U.to(x.dtype)
        return F.linear(F.linear(x, U.t()), U, module.bias)

    def retired(self, module: Any) -> Sequence[nn.Parameter]:
        """The weight."""
        return (module.weight,)

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """U U^T."""
        U = self.U.to(now.weight.dtype)
        return Weights(U @ U.t(), now.bias)

    def note(self) -> str:
        """Its rank at most."""
        return f"U U^T, rank {self.U.shape[1]}"


@dataclass(frozen=True)
class PSDFactor(Injection):
    """Train U in the place of a square weight: W = U U^T, symmetric, positive semidefinite and of low rank.

    The layer's own weight rests and asks for no gradient; its bias is trained as before.
    ``optx.wrap(optimizer, handle)`` exchanges the two in an optimizer that has the weight. The layer does not
    compute what it did, unless ``init="fit"`` and its weight was such a matrix.

    Args:
        rank: the number of U's columns; None: as many as rows.
        alpha: scale of a small start: entries of variance alpha^2 / d. Columns that are not needed stay
            small.
        init: ``"small"``, random; or ``"fit"``, the positive semidefinite matrix of that rank closest to the
            weight.
        seed: of a small start; None: torch's generator.

    Serves square nn.Linear modules. By default: none; name them.

    Paper values:
        ``alpha=1e-3``: the error of `SubGM` then ends near 1e-4, in the recipe (the default).

    Limits: A weight is not one of these by chance: a pretrained model that is served does not compute what it
    did.

    Keywords: matrix factorisation, positive semidefinite, Burer-Monteiro, low rank, small initialisation,
    metric learning.

    Evidence: no recipe (``recover`` trains U itself); ``test_psd_factor.py``.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, a module that is no square linear one, or a rank above its size.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = optx.attach(model, optx.PSDFactor(rank=2, alpha=0.1), targets="0")
        >>> opt = optx.wrap(opt, handle)
        >>> [tuple(p.shape) for p in opt.param_groups[0]["params"]]
        [(4,), (4, 2)]
        >>> handle.merge()
        >>> bool(torch.linalg.eigvalsh(model[0].weight.detach()).min() > -1e-6)
        True

    Source: arXiv 2202.08788.
    """

    name: ClassVar[str] = "psd_factor"
    role: ClassVar[str] = ""
    serves: ClassVar[str] = "square Linear modules"

    rank: int | None = None
    alpha: float = 1e-3
    init: Literal["small", "fit"] = "small"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_whole("PSDFactor", "rank", self.rank, 1)
        check_range("PSDFactor", "alpha", self.alpha, 0)
        if not self.alpha:
            raise OptxError("PSDFactor: alpha is 0, from where nothing grows; it must be above 0, as 1e-3.")
        if self.init not in ("small", "fit"):
            raise OptxError(f"PSDFactor: init is {self.init!r}; it must be 'small' or 'fit'.")
        if self.seed is not None:
            check_whole("PSDFactor", "seed", self.seed, 0)

    @property
    def needs_weight(self) -> bool:
        """Its size, and in a fit its values."""
        return True

    def places(self, model: nn.Module) -> Collection[str] | None:
        """None: what it serves has to be named.

        Raises:
            TargetError: always.
        """
        raise TargetError(
            "attach: PSDFactor replaces what a layer computes, so the layers have to be named: "
            'attach(model, optx.PSDFactor(), targets=...), a list of names, a regex, or "all-linear" where '
            "all linear modules but the output head are square."
        )

    def part(self, module: Any, path: str) -> Part:
        """The factor of one module."""
        if not is_linear(module) or not isinstance(module, nn.Linear):
            raise TargetError(
                f"attach: PSDFactor serves {self.serves}; {path!r} is a {type(module).__name__}."
            )
        rows, columns = module.weight.shape
        if rows != columns:
            raise TargetError(
                f"attach: PSDFactor serves {self.serves}, as U U^T is square; {path!r} has {columns} inputs "
                f"and {rows} outputs."
            )
        return Factor(self, module, path)


def _closest(weight: Tensor, rank: int) -> Tensor:
    """U (d, rank) of the positive semidefinite matrix closest to the weight: its symmetric part's top
    values."""
    found, vectors = torch.linalg.eigh(((weight + weight.t()) / 2).double())
    top = found.flip(0)[:rank].clamp_min(0)
    return (vectors.flip(1)[:, :rank] * top.sqrt()).to(weight.dtype)
