"""How many of a linear layer's weights can change without the network computing anything else.

Source: "Using Degeneracy in the Loss Landscape for Mechanistic Interpretability", arXiv 2405.10927,
section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from optx._errors import OptxError, check_range, check_whole, near, warn
from optx.analysis.interaction._gram import Gram, Moment, check_finite, eigenvalues, rank
from optx.analysis.interaction._jacobian import Sources, pulled
from optx.analysis.interaction._passes import Output, Pass, Passes
from optx.analysis.interaction._table import printed, table
from optx.delta._input_stats import linear_axes

OWNER = "degeneracy"
_BYTES = 1 << 29  # of matrices that are summed at a time; more layers take another pass over the loader


@dataclass(frozen=True)
class LayerDegeneracy:
    """Of one linear layer W, (outputs, inputs).

    Attributes:
        outputs: rows of W.
        inputs: columns of W, and one for a bias, which is the weight of a constant 1.
        rank_gram: r_G: independent inputs on the data, the constant among them.
        rank_jacobian: r_K: independent outputs by what the network's output does with them.
        free: outputs * inputs - r_G * r_K: directions of W that are free by these two.
        blocks: sizes of groups of ReLUs that are on for the same samples, from the largest; of two or more.
        dead: ReLUs that are never on; no group has them.
        relu: whether the outputs go into a ReLU; else there are no blocks.
    """

    outputs: int
    inputs: int
    rank_gram: int
    rank_jacobian: int
    free: int
    blocks: tuple[int, ...]
    dead: int
    relu: bool

    @property
    def synchronised(self) -> int:
        """Directions that blocks add: k^2 - k for each, beyond the k scales that its ReLUs have anyway."""
        return sum(k * k - k for k in self.blocks)


@dataclass(frozen=True, eq=False)
class Degeneracy(Mapping[str, LayerDegeneracy]):
    """What `degeneracy` found, by path of the layer; ``print`` shows a table.

    Attributes:
        layers: in the model's order.
        left_out: why linear layers are not in it, by path.
    """

    layers: Mapping[str, LayerDegeneracy]
    left_out: Mapping[str, str]

    def __getitem__(self, layer: str) -> LayerDegeneracy:
        if layer not in self.layers:
            raise KeyError(f"nothing of {layer!r}. {near(str(layer), self.layers)}")
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        left = [f"Left out: {path} ({why})." for path, why in self.left_out.items()]
        return "\n".join([printed(self.__rich__()), *left])

    def __rich__(self) -> Any:
        """The table for a rich console."""
        head = ("layer", "weights", "r_G", "r_K", "free", "blocks", "dead ReLUs", "free by blocks")
        return table(head, [_row(path, one) for path, one in self.layers.items()])


def _row(path: str, one: LayerDegeneracy) -> tuple[str, ...]:
    all_of_them = one.outputs * one.inputs
    blocks = " ".join(map(str, one.blocks)) or "none"
    return (
        path,
        f"{one.outputs} x {one.inputs}",
        f"{one.rank_gram:,}",
        f"{one.rank_jacobian:,}",
        f"{one.free:,} ({one.free / all_of_them:.0%})",
        *((blocks, f"{one.dead:,}", f"{one.synchronised:,}") if one.relu else ("-", "-", "-")),
    )


@dataclass
class _Sums:
    """Of one layer, batch by batch."""

    bias: bool
    gram: Gram = field(default_factory=lambda: Gram(centre=False))
    moment: Moment = field(default_factory=Moment)
    same: Tensor | None = None  # how often two ReLUs agree
    on: Tensor | None = None
    counted: int = 0

    def add_inputs(self, rows: Tensor) -> None:
        self.gram.add(torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if self.bias else rows)

    def add_firing(self, rows: Tensor) -> None:
        on = (rows > 0).double()
        agree = on.T @ on + (1 - on).T @ (1 - on)
        self.same = agree if self.same is None else self.same + agree
        self.on = on.sum(0) if self.on is None else self.on + on.sum(0)
        self.counted += len(on)


class _ReLUs(TorchFunctionMode):
    """Which tensors go into a ReLU while this is entered."""

    kinds = (F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_)

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operation."""
        if func in self.kinds:
            self.inputs.append(args[0] if args else (kwargs or {})["input"])
        return func(*args, **(kwargs or {}))


def degeneracy(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Sequence[str] | None = None,
    *,
    sources: int | None = None,
    eps: float = 1e-5,
    delta: float = 0.0,
    output: Output | None = None,
    seed: int = 0,
) -> Degeneracy:
    """Count the directions in which each linear layer's weights can change and the network stays the same.

    Three kinds, on the data: inputs that are linearly dependent (r_G of their Gram matrix), outputs whose
    influences on the network's output are (r_K of K = mean J^T J), and ReLUs that are on for the same
    samples, which any invertible map may mix. The first two leave outputs * inputs - r_G * r_K of the
    weights free; k synchronised ReLUs add k^2 - k. The model runs in eval mode; weights, hooks, modes, flags
    and random numbers are as before.

    Args:
        model: any module.
        loader: batches, as `optx.analysis.interaction_basis` takes them; read once, or again for
            layers that are too large to be summed at a time.
        layers: paths of linear modules. None: all that the model calls once.
        sources: K by so many random sign vectors: its rank is at most samples * sources. None: exact.
        eps: eigenvalues up to this share of the largest count as 0.
        delta: two ReLUs are synchronised if they agree on all samples but this share.
        output: which tensor the model's output is; None: the first floating one with axes.
        seed: of the random signs.

    Returns:
        A mapping by layer.

    Paper values:
        ``eps=1e-5``: the authors' code, there absolute (the default).

    Limits: Counts of the first order, on this data: fewer samples than inputs make any layer look free. K is
        of a linear layer's own output. ReLUs are those that are given the layer's output itself (torch's
        relu in any of its forms), not one that a norm has changed. Convolutions are left out.

    Keywords: singular learning theory, learning coefficient, effective parameters, rank, Hessian, free
        directions, dead neurons, polytopes, diagnostics.

    Evidence: ``optx run explain``; ``test_degeneracy.py``.

    Raises:
        OptxError: no linear layer is called once, a named one is not, an option is out of range, or inf or
            nan.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> found = optx.analysis.degeneracy(model, [torch.randn(99, 8)])
        >>> found["2"].rank_jacobian
        3

    Source: arXiv 2405.10927, section 3.
    """
    passes = Passes(OWNER, model, loader, output)
    check_range(OWNER, "eps", eps, 0, 0.1)
    check_range(OWNER, "delta", delta, 0, 0.5)
    number = None if sources is None else check_whole(OWNER, "sources", sources, 1)
    signs = Sources(number, torch.Generator().manual_seed(check_whole(OWNER, "seed", seed)))
    with passes.at_rest():
        names, left_out = _chosen(passes, layers)
        found: dict[str, LayerDegeneracy] = {}
        short = list[tuple[str, int, int]]()
        for group in _groups(passes, names):
            for path, one in _summed(passes, group, signs).items():
                found[path] = _counted(path, one, eps, delta)
                short += [(path, len(one.gram.matrix), one.gram.n)] * (one.gram.n < len(one.gram.matrix))
    if short:
        path, inputs, n = max(short, key=lambda one: one[1])
        warn(
            f"{OWNER}: {len(short)} layers have more inputs than the loader has samples (and positions), as "
            f"{path!r} with {inputs} for {n}, and look free for that alone. Give 5 for each, or more."
        )
    return Degeneracy(found, left_out)


def _chosen(passes: Passes, layers: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The layers, in the order of their calls, and those that can't be counted."""
    linear = {name.removesuffix("weight").removesuffix(".") for name in linear_axes(passes.model)}
    every = [path for path, here in passes.paths.here.items() if path and here in linear]
    if layers is not None:
        if isinstance(layers, str) or not layers:
            raise OptxError(f"{OWNER}: layers is {layers!r}; it must be a list of paths of linear modules.")
        for path in layers:
            kind = type(passes.module(path)).__name__
            if path not in every:
                raise OptxError(f"{OWNER}: {path!r} is a {kind}; it must be a linear module.")
        return list(passes.run(next(passes.batches()), list(layers)).seen), {}
    left = passes.unfit(next(passes.batches()), every) | _no_modules(passes, every)
    names = [path for path in every if path not in left]
    if not names:
        raise OptxError(f"{OWNER}: this {type(passes.model).__name__} calls no linear module once.")
    return names, left


def _no_modules(passes: Passes, linear: Sequence[str]) -> dict[str, str]:
    """Why other modules with matrices of their own are not in it."""
    return {
        path: f"a {type(module).__name__} is no linear module"
        for path, module in passes.paths.modules.items()
        if path not in linear
        and not isinstance(module, nn.Embedding)
        and any(p.ndim > 1 for p in module.parameters(recurse=False))
    }


def _groups(passes: Passes, names: Sequence[str]) -> Iterator[list[str]]:
    """As many layers at a time as there is memory for."""
    group, held = list[str](), 0
    for path in names:
        weight = passes.module(path).weight
        assert isinstance(weight, Tensor)
        size = 16 * sum(n * n for n in weight.shape)
        if group and held + size > _BYTES:
            yield group
            group, held = [], 0
        group.append(path)
        held += size
    yield group


def _summed(passes: Passes, paths: Sequence[str], sources: Sources) -> dict[str, _Sums]:
    found = {path: _Sums(getattr(passes.module(path), "bias", None) is not None) for path in paths}
    first = True
    for batch in passes.batches():
        with _ReLUs() as relus:
            one = passes.run(batch, paths)
        for path in paths:
            _add_values(found[path], one, path, relus)
        if first:
            sources.warn_of_many(OWNER, one.output, None)
            first = False
        places = [one.seen[path].value for path in paths]
        for v in sources.pulls(one.output, None, one.kept(one.output)):
            for path, f, gradient in zip(paths, places, pulled(one.output, v, places), strict=True):
                # What nothing depends on is wholly free: its derivative is 0.
                found[path].moment.add(torch.zeros_like(f) if gradient is None else gradient, one.kept(f))
    return found


def _add_values(sums: _Sums, one: Pass, path: str, relus: _ReLUs) -> None:
    seen = one.seen[path]
    assert seen.given is not None  # a linear module has an input
    sums.add_inputs(one.rows(seen.given))
    if any(x is seen.passed for x in relus.inputs):
        sums.add_firing(one.rows(seen.value))


def _counted(path: str, sums: _Sums, eps: float, delta: float) -> LayerDegeneracy:
    if not sums.gram.n:
        raise OptxError(f"{OWNER}: the loader's batches have no sample.")
    G = sums.gram.matrix
    K = sums.moment.matrix(sums.gram.n, G)
    check_finite(OWNER, path, G, K)
    r_G, r_K = (rank(eigenvalues(matrix), eps) for matrix in (G, K))
    outputs, inputs = len(K), len(G)
    blocks, dead = _blocks(sums, delta)
    free = outputs * inputs - r_G * r_K
    return LayerDegeneracy(outputs, inputs, r_G, r_K, free, blocks, dead, sums.on is not None)


def _blocks(sums: _Sums, delta: float) -> tuple[tuple[int, ...], int]:
    """Sizes of connected components of S >= 1 - delta among ReLUs that are ever on, and how many aren't."""
    if sums.on is None or sums.same is None:
        return (), 0
    live = sums.on > 0
    # Agreements are whole numbers; the margin is for 1 - delta alone.
    linked = (sums.same >= (1 - delta) * sums.counted - 1e-6)[live][:, live].cpu()
    todo, sizes = set(range(len(linked))), list[int]()
    while todo:
        block, edge = set[int](), {todo.pop()}
        while edge:
            block |= edge
            edge = {j for i in edge for j in linked[i].nonzero().flatten().tolist()} - block
        todo -= block
        sizes.append(len(block))
    return tuple(sorted((k for k in sizes if k > 1), reverse=True)), int((~live).sum())
