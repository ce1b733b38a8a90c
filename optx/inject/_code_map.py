"""Which code each token of a vocabulary has: by k-means over the head's rows, at random, or in blocks.

Source: VQ-Logits, arXiv 2505.10202; mini-batch k-means is scikit-learn's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from optx._errors import OptxError

Kind = Literal["kmeans", "random", "blocks", "frequency"]
KINDS = ("kmeans", "random", "blocks", "frequency")

_BATCH, _PASSES, _CAREFUL = 4096, 3, 512


def mapped(kind: Kind, rows: Tensor, codes: int, counts: Tensor | None, seed: int) -> Tensor:
    """The code of each row.

    Args:
        kind: how.
        rows: of the head, (V, d).
        codes: how many there are, at most V.
        counts: how often each token occurs, (V,), for ``"frequency"``.
        seed: of what is random.

    Returns:
        (V,) int64, on the CPU.
    """
    V = len(rows)
    if codes == V:
        return torch.arange(V)
    if kind == "kmeans":
        return by_k_means(rows.detach().float().cpu(), codes, seed)
    if kind == "random":
        order = torch.randperm(V, generator=torch.Generator().manual_seed(seed))
        return order % codes
    if kind == "blocks":
        return torch.arange(V) // -(-V // codes)
    assert counts is not None
    return _by_frequency(counts.double().cpu(), codes)


def _by_frequency(counts: Tensor, codes: int) -> Tensor:
    """Tokens in the order of their counts, cut so that all codes occur about as often."""
    order = counts.argsort(descending=True, stable=True)
    falling: list[float] = (counts[order] + 1e-9 * counts.sum().clamp_min(1)).tolist()  # pyright: ignore
    found, code, left, mass = torch.empty(len(counts), dtype=torch.int64), 0, sum(falling), 0.0
    share = left / codes
    for i, one in enumerate(falling):
        found[order[i]] = code
        mass += one
        others = codes - code - 1
        if others and (mass >= share or len(falling) - i - 1 == others):
            left -= mass
            code, mass, share = code + 1, 0.0, left / others
    return found


def by_k_means(rows: Tensor, codes: int, seed: int) -> Tensor:
    """The nearest of so many centres, none of which is left without a row if there are rows enough.

    Rows of few values are mapped by value: fewer distinct ones than codes are reproduced exactly.

    Args:
        rows: (V, d) float32, finite.
        codes: number of centres.
        seed: of the start.
    """
    values: Any = rows.numpy()
    numpy, KMeans = _modules()
    if len(numpy.unique(values[:, 0])) <= codes:
        distinct, inverse = numpy.unique(values, axis=0, return_inverse=True)
        if len(distinct) <= codes:
            return _tensor(inverse.reshape(-1)).long()
    batch = min(len(values), max(_BATCH, codes))
    fit = KMeans(
        codes,
        # For thousands of centres the careful start takes five times as long as all the rest, and ends at
        # the same distance (SmolLM2's head, 4096 codes: 0.693 of the variance left, 0.695 without).
        init="k-means++" if codes <= _CAREFUL else "random",
        n_init=1,
        init_size=min(len(values), 3 * batch),
        batch_size=batch,
        max_iter=_PASSES,
        random_state=seed % 2**32,
        compute_labels=False,
    ).fit(values)
    found = _tensor(fit.predict(values)).long()
    return _without_empty(rows, found, _tensor(fit.cluster_centers_).float())


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]


def _modules() -> tuple[Any, Any]:
    try:
        import numpy
        from sklearn.cluster import MiniBatchKMeans  # pyright: ignore
    except ImportError:
        raise OptxError(
            "VQLogits: k-means is scikit-learn's, which is not here. Type: python -m pip install "
            'scikit-learn; or give another init ("random", "blocks", "frequency").'
        ) from None
    return numpy, MiniBatchKMeans


def _without_empty(rows: Tensor, found: Tensor, centres: Tensor) -> Tensor:
    """Give each code without a row the row that is farthest from its own centre."""
    sizes = torch.bincount(found, minlength=len(centres))
    far = (rows - centres[found]).square_().sum(1).argsort(descending=True)
    donors = iter(far)
    for code in (sizes == 0).nonzero()[:, 0]:
        row = next(i for i in donors if sizes[found[i]] > 1)
        sizes[found[row]] -= 1
        found[row], sizes[code] = code, 1
    return found


def means(rows: Tensor, mapping: Tensor, codes: int) -> Tensor:
    """The mean of each code's rows, (codes, ...) in the rows' dtype; 0 where it has none."""
    sizes = torch.bincount(mapping, minlength=codes)
    total = torch.zeros(codes, *rows.shape[1:], dtype=torch.float64)
    for part, to in zip(_parts(rows.detach().cpu()), _parts(mapping), strict=True):
        total.index_add_(0, to, part.double())
    share = sizes.clamp_min(1).view(-1, *(1 for _ in rows.shape[1:]))
    return (total / share).to(rows.dtype)


def log_shares(counts: Tensor, mapping: Tensor, codes: int) -> Tensor:
    """The log of each token's share of its code, times the code's number of tokens: 0 where they are even."""
    sizes = torch.bincount(mapping, minlength=codes)
    total = torch.zeros(codes, dtype=counts.dtype).index_add_(0, mapping, counts)
    return (counts * sizes[mapping] / total[mapping]).log()


def nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    """The code closest to each row, (V,) int64 on the CPU."""
    half = codebook.detach().float().square().sum(1) / 2
    wide = codebook.detach().float().t()
    found = [(part.float() @ wide - half).argmax(1) for part in _parts(rows.detach())]
    return torch.cat(found).cpu()


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    """A few thousand at a time, so that no wide copy of all is made."""
    return torch.split(rows, _BATCH)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
