"""Newman's modularity of the interaction graph, with logarithms of edges as weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError, check_above_0, check_whole

_FLOOR = 1e-4  # of the largest edge, where e0 is not given


@dataclass(frozen=True, eq=False)
class Modularity:
    """Groups of features.

    Attributes:
        Q: Newman's modularity of the groups, from -0.5 to 1.
        clusters: by layer, (dim,) int64, each feature's group, the largest group first; -1: no edge of it
            counts.
        number: of groups.
        e0: the smallest edge that counts.
    """

    Q: float
    clusters: Mapping[str, Tensor]
    number: int
    e0: float


def modularity_of(
    edges: Mapping[tuple[str, str], Tensor], e0: float | None, clusters: int | None, seed: int
) -> Modularity:
    """What `InteractionBasis.modularity` gives."""
    clusters = None if clusters is None else check_whole("modularity", "clusters", clusters, 1)
    seed = check_whole("modularity", "seed", seed, 0)
    largest = max((float(E.max()) for E in edges.values() if E.numel()), default=0.0)
    floor = _FLOOR * largest if e0 is None else check_above_0("modularity", "e0", e0)
    weights = {pair: (E / floor).clamp_min(1).log10() for pair, E in edges.items()} if largest else {}
    if not any(bool((W > 0).any()) for W in weights.values()):
        raise OptxError(
            f"modularity: no edge is above e0 ({floor:.3g}); the largest is {largest:.3g}. Give a smaller e0."
        )
    graph = _graph(weights)
    groups = _grouped(graph, clusters, seed)
    owner = {node: number for number, group in enumerate(groups) for node in group}
    found: dict[str, Tensor] = {}
    for (earlier, later), E in edges.items():
        for layer, count in ((earlier, E.shape[1]), (later, E.shape[0])):
            found[layer] = torch.tensor([owner.get((layer, j), -1) for j in range(count)])
    return Modularity(_newman(weights, found), found, len(groups), floor)


def _graph(weights: Mapping[tuple[str, str], Tensor]) -> Any:
    import networkx  # comes with torch

    graph = networkx.Graph()
    for (earlier, later), W in weights.items():
        for i, j in W.nonzero().tolist():
            graph.add_edge((earlier, j), (later, i), weight=float(W[i, j]))
    return graph


def _grouped(graph: Any, clusters: int | None, seed: int) -> list[Any]:
    """Sets of nodes, the largest first."""
    from networkx.algorithms import community

    if clusters is None:
        groups = community.louvain_communities(graph, weight="weight", seed=seed)
    else:
        most = min(clusters, len(graph))
        groups = community.greedy_modularity_communities(graph, weight="weight", cutoff=most, best_n=most)
    return sorted(groups, key=lambda group: (-len(group), min(group)))


def _newman(weights: Mapping[tuple[str, str], Tensor], clusters: Mapping[str, Tensor]) -> float:
    """Q = 1/2m sum_ij (A_ij - k_i k_j / 2m) [c_i = c_j]."""
    strength = {layer: torch.zeros(len(c), dtype=torch.float64) for layer, c in clusters.items()}
    inside = total = 0.0
    for (earlier, later), here in weights.items():
        W = here.cpu()
        strength[earlier] += W.sum(0)
        strength[later] += W.sum(1)
        same = clusters[later][:, None] == clusters[earlier][None]
        inside, total = inside + float(W[same].sum()), total + float(W.sum())
    owners, k = torch.cat([*clusters.values()]), torch.cat([strength[layer] for layer in clusters])
    within = torch.zeros(int(owners.max()) + 1).to(k)
    within.index_add_(0, owners[owners >= 0], k[owners >= 0])
    return inside / total - float(within.square().sum()) / (2 * total) ** 2
