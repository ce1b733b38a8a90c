"""The interaction basis: of each layer's activations, the directions that vary and that matter, in order.

Source: "Using Degeneracy in the Loss Landscape for Mechanistic Interpretability", arXiv 2405.10927, and
"The Local Interaction Basis", arXiv 2405.10928.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from optx._errors import OptxError, check_choice, check_range, check_whole, near, warn
from optx.analysis.interaction._edges import edges_between
from optx.analysis.interaction._gram import Gram, Moment, check_finite, solve
from optx.analysis.interaction._jacobian import Sources, check_reached, pulled
from optx.analysis.interaction._modularity import Modularity, modularity_of
from optx.analysis.interaction._passes import Output, Passes
from optx.analysis.interaction._project import Projection
from optx.analysis.interaction._table import printed

Kind = Literal["local", "global", "pca"]
OWNER = "interaction_basis"


@dataclass(frozen=True, eq=False)
class LayerBasis:
    """Of one layer: fhat = (f - mean) C, and f = mean + fhat C_pinv up to what was dropped.

    Attributes:
        C: (d, dim) float64, features in its columns, from the largest Lambda; each column's largest entry is
            positive.
        C_pinv: (dim, d) float64.
        Lambda: (dim,) float64, mean squares of the features.
        mean: (d,) float64; zeros without ``centre``.
        rank_gram: directions with variance.
        rank_jacobian: directions with influence; with ``kind="pca"`` all d.
        rows: samples (and positions) that this is of.
    """

    C: Tensor
    C_pinv: Tensor
    Lambda: Tensor
    mean: Tensor
    rank_gram: int
    rank_jacobian: int
    rows: int

    def __repr__(self) -> str:
        return (
            f"LayerBasis({self.dim} features of {len(self.mean)}, rank_gram={self.rank_gram}, "
            f"rank_jacobian={self.rank_jacobian}, rows={self.rows})"
        )

    @property
    def dim(self) -> int:
        """How many features there are."""
        return len(self.Lambda)

    def features(self, f: Tensor) -> Tensor:
        """Activations (..., d) in the basis, (..., dim) float64."""
        return (f.to(self.C) - self.mean) @ self.C


@dataclass(frozen=True, eq=False)
class InteractionBasis(Mapping[str, LayerBasis]):
    """What `interaction_basis` found: a `LayerBasis` by layer; ``print`` shows a table.

    It keeps the model and the loader, which ``edges`` reads again.

    Attributes:
        kind: ``"local"``, ``"global"`` or ``"pca"``.
        layers: by path, in the model's order.
    """

    kind: Kind
    layers: Mapping[str, LayerBasis]
    passes: Passes

    def __getitem__(self, layer: str) -> LayerBasis:
        if layer not in self.layers:
            raise KeyError(f"no basis of {layer!r}. {near(str(layer), self.layers)}")
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def edges(self, nodes: int = 0, keep: int | None = None) -> dict[tuple[str, str], Tensor]:
        """How strongly each feature of a layer acts on each of the next layer's, on the data.

        E_ij is the mean over samples of the square of what feature j adds to feature i of the next layer:
        the derivative along the way from no activation (the mean, if centred) to the activation, integrated
        and times the feature. Over positions it is summed before the square at the layer, and after it at
        the next.

        Args:
            nodes: of the Gauss-Legendre rule by which it is integrated; 0: the derivative at the activation.
            keep: the first so many features of each layer only; None: all.

        Returns:
            By pairs of neighbouring layers, (features of the later, features of the earlier), float64.

        Raises:
            OptxError: there is one layer only, or an option is out of range.
        """
        nodes = check_whole("edges", "nodes", nodes, 0)
        keep = None if keep is None else check_whole("edges", "keep", keep, 1)
        if len(self) < 2:
            raise OptxError("edges: this basis has one layer, and edges are between two. Name more layers.")
        paths = list(self.layers)
        with self.passes.at_rest():
            return {
                pair: edges_between(self.passes, pair, (self[pair[0]], self[pair[1]]), nodes, keep)
                for pair in pairwise(paths)
            }

    def modularity(
        self,
        edges: Mapping[tuple[str, str], Tensor] | None = None,
        e0: float | None = None,
        clusters: int | None = None,
        seed: int = 0,
    ) -> Modularity:
        """Into which groups the features fall, and how well, by Newman's modularity of log10(E / e0).

        Args:
            edges: of `edges`; None: computed with its defaults.
            e0: the smallest edge that counts; None: 1e-4 of the largest.
            clusters: merge greedily (Clauset, Newman and Moore) down to so many groups; None: Louvain's
                method, which finds how many.
            seed: of Louvain's order.

        Raises:
            OptxError: an option is out of range, or no edge counts.
        """
        return modularity_of(self.edges() if edges is None else edges, e0, clusters, seed)

    def project(self, layer: str, keep: int | None = None) -> Projection:
        """An injection that keeps a layer's first features: f -> mean + (f - mean) C C_pinv.

        ``optx.attach(model, ib.project("act1", keep=5))``; ``remove()`` gives back what was, bit for bit.

        Args:
            layer: its path.
            keep: how many features, from the largest Lambda; None: all; 0: the mean alone (zeros if not
                centred).

        Raises:
            OptxError: no such layer, or more features than there are.
        """
        if layer not in self.layers:
            raise OptxError(f"project: no basis of {layer!r}. {near(str(layer), self.layers)}")
        one = self[layer]
        kept = one.dim if keep is None else check_whole("project", "keep", keep, 0)
        if kept > one.dim:
            raise OptxError(f"project: keep is {kept}; {layer!r} has {one.dim} features.")
        return Projection(self.passes.paths.here[layer], kept, one.C[:, :kept], one.C_pinv[:kept], one.mean)

    def __str__(self) -> str:
        return printed(self.__rich__())

    def __repr__(self) -> str:
        return f"<InteractionBasis, {self.kind}: {', '.join(f'{k} {v.dim}' for k, v in self.layers.items())}>"

    def __rich__(self) -> Any:
        """The table for a rich console."""
        from optx.analysis.interaction._table import table

        head = ("layer", "width", "rank_gram", "rank_jacobian", "dim", "Lambda", "half of it")
        return table(head, [_row(path, one) for path, one in self.layers.items()])


def _row(path: str, one: LayerBasis) -> tuple[str, ...]:
    total = float(one.Lambda.sum())
    half = int((one.Lambda.cumsum(0) < total / 2).sum()) + 1 if one.dim else 0
    sizes = (one.C.shape[0], one.rank_gram, one.rank_jacobian, one.dim)
    return path, *(f"{n:,}" for n in sizes), f"{total:.4g}", f"first {half}"


def interaction_basis(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Sequence[str],
    kind: Kind = "local",
    *,
    sources: int | None = None,
    centre: bool = True,
    eps: float = 1e-5,
    output: Output | None = None,
    seed: int = 0,
) -> InteractionBasis:
    """A basis of each layer's activations: uncorrelated, and with influences that are orthonormal.

    In fhat = (f - mean) C the Gram matrix of the activations is diag(Lambda) and the mean of J^T J the
    identity, J being the derivative of later features with respect to fhat. Directions that don't vary on
    the data, or that nothing later depends on, are not in it; and it stays as it is if the layer is
    re-parametrised by any invertible map. The model runs in eval mode over the loader once for each layer,
    from the last to the first; weights, hooks, modes, flags and random numbers are as before.

    Args:
        model: any module.
        loader: batches, read once a layer: tensors, mappings (by keyword) or pairs (inputs, target). Where a
            mapping has an ``attention_mask`` (batch, positions), padding doesn't count; in what else a batch
            is it does.
        layers: paths of modules in the order in which they are called, each once a pass, with outputs
            (batch, features) or (batch, positions, features), or tuples that begin with one.
        kind: ``"local"``: J is of the next chosen layer's features, of the last one of the model's output;
            ``"global"``: of the output for all; ``"pca"``: J is left out, and C are principal components.
        sources: J^T J by so many random sign vectors in the place of each output coordinate and position:
            unbiased, with an error of 1 / sqrt(sources). None: exact, a backward pass for each.
        centre: take the mean off, so that a dropped feature is at its mean. False: moments about 0.
        eps: eigenvalues up to this share of the largest count as 0, of the Gram matrix and of Lambda.
        output: which tensor the model's output is, as a function of what it returns. None: the first
            floating one with axes (logits).
        seed: of the random signs.

    Returns:
        A mapping by layer, with ``.edges()``, ``.modularity()`` and ``.project(layer, keep)``.

    Paper values:
        ``eps=1e-5``: the authors' code, there absolute (the default).

    Limits: Linear in the activations: what a layer computes in several regimes is one basis. Where a path
        goes around a layer (a residual stream), it is not seen; name the stream. At the output itself it is
        principal components (J is the identity). ``dim`` is at most both ranks where these are exact; eps
        bounds each by itself. Samples must not depend on each other; take 5 for each feature or more. Exact
        derivatives of a language model's logits are out of reach: give sources. The mask is taken for every
        layer with as many positions: of an encoder-decoder for the decoder's too, if these are as many.

    Keywords: LIB, RIB, interpretability, degeneracy, singular learning theory, features, PCA, Jacobian,
        Gram matrix, ablation, modularity, interaction graph.

    Evidence: ``optx run explain``; ``test_interaction_basis.py``, ``test_interaction_graph.py``,
        ``test_interaction_models.py``.

    Raises:
        OptxError: a layer that is unknown, not called, called more than once, out of order, without
            influence on the target, or whose output is no floating tensor of features; an option out of
            range; inf or nan.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> ib = optx.analysis.interaction_basis(model, [torch.randn(99, 8)], layers=["1"])
        >>> ib["1"].dim
        3
        >>> handle = optx.attach(model, ib.project("1", keep=2))

    Source: arXiv 2405.10928, section 3; arXiv 2405.10927, section 4.
    """
    passes = Passes(OWNER, model, loader, output)
    names = _checked(passes, layers)
    check_choice(OWNER, "kind", kind, ("local", "global", "pca"))
    check_choice(OWNER, "centre", centre, (True, False))
    check_range(OWNER, "eps", eps, 0, 0.1)
    number = None if sources is None else check_whole(OWNER, "sources", sources, 1)
    signs = Sources(number, torch.Generator().manual_seed(check_whole(OWNER, "seed", seed)))
    found: dict[str, LayerBasis] = {}
    with passes.at_rest():
        _check_order(passes, names)
        for path, later in reversed([*zip(names, [*names[1:], None], strict=True)]):
            target = None if later is None or kind != "local" else (later, found[later])
            found[path] = _solved(passes, path, target, signs if kind != "pca" else None, centre, eps)
    return InteractionBasis(kind, {path: found[path] for path in names}, passes)


def _solved(
    passes: Passes,
    path: str,
    target: tuple[str, LayerBasis] | None,
    sources: Sources | None,
    centre: bool,
    eps: float,
) -> LayerBasis:
    """One layer's basis; without sources J is the identity."""
    gram, moment = Gram(centre), Moment()
    rotation = None if target is None else target[1].C
    where = "the model's output" if target is None else repr(target[0])
    first = True
    for batch in passes.batches():
        until = None if target is None else target[0]
        one = passes.run(batch, [path] if until is None else [path, until], until=until)
        f, later = one.seen[path].value, one.output if target is None else one.seen[target[0]].value
        gram.add(one.rows(f))
        if sources is None:
            continue
        if first:
            sources.warn_of_many(OWNER, later, rotation)
            first = False
        kept = one.kept(f)
        for v in sources.pulls(later, rotation, one.kept(later)):
            moment.add(check_reached(OWNER, path, pulled(later, v, [f])[0], where), kept)
    if not gram.n:
        raise OptxError(f"{OWNER}: the loader's batches have no sample.")
    G = gram.matrix
    if gram.n < len(G):
        warn(
            f"{OWNER}: {path!r} has {len(G)} features, and the loader {gram.n} samples (and positions): what "
            "does not vary in these counts as nothing. Give 5 for each feature, or more."
        )
    M = torch.eye(len(G)).to(G) if sources is None else moment.matrix(gram.n, G)
    check_finite(OWNER, path, G, M)
    found = solve(G, M, eps)
    return LayerBasis(
        found.C, found.C_pinv, found.Lambda, gram.mean, found.rank_gram, found.rank_jacobian, gram.n
    )


def _checked(passes: Passes, layers: Any) -> list[str]:
    """Paths of modules, each once."""
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise OptxError(f"{OWNER}: layers is {layers!r}; it must be a list of paths of modules.")
    names: list[str] = []
    for path in layers:
        passes.module(path)
        if path in names:
            raise OptxError(f"{OWNER}: layers has {path!r} twice.")
        names.append(path)
    return names


def _check_order(passes: Passes, names: list[str]) -> None:
    """Raise, before anything is summed, unless the first batch calls the layers in their order."""
    called = list(passes.run(next(passes.batches()), names).seen)
    if called != names:
        raise OptxError(
            f"{OWNER}: layers must be in the order in which the model calls them: {', '.join(called)}."
        )
