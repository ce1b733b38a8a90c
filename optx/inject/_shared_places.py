"""Where each module's weights are in the long vector, with which scale, and what the array begins from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TargetError
from optx.inject._computes import derived
from optx.inject._embeddings import peculiar
from optx.inject._injection import Site
from optx.inject._own_call import has_own_call
from optx.inject._shared_read import summed
from optx.inject._weights import is_conv, is_linear
from optx.kernels.shared.mapping import MOST, Place, mix

_BLOCK, _ROW = (16, 16), (1, 8)  # of weights, and of embeddings


def weight_at(site: Site) -> nn.Parameter:
    """A module's own."""
    return cast("nn.Parameter", site.module.weight)


def check_site(site: Site, serves: str) -> None:
    """Raise unless a module's weight is one that can be read from elsewhere.

    Raises:
        TargetError: says why not.
    """
    path, module = site.path, site.module
    embedding = isinstance(module, nn.Embedding)
    if not (is_linear(module) or is_conv(module) or embedding):
        raise TargetError(f"attach: StableRPS serves {serves}; {path!r} is a {type(module).__name__}.")
    weight: Any = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
    if by := derived(module):
        raise TargetError(f"attach: StableRPS: {path}.weight is made by {by} already. Leave it out.")
    if weight is None or not weight.is_floating_point():
        raise TargetError(f"attach: StableRPS: {path}.weight is no floating-point parameter. Leave it out.")
    if why := peculiar(module):
        raise TargetError(f"attach: StableRPS: {path!r} is an embedding{why}. Leave it out.")
    if embedding and module.sparse:
        raise TargetError(f"attach: StableRPS: {path!r} has sparse gradients (sparse=True). Leave it out.")
    if not embedding and has_own_call(module):
        raise TargetError(
            f"attach: StableRPS: {path!r} is a {type(module).__name__} with a forward of its own, which may "
            "keep or change its weight. Leave it out."
        )


def check_ties(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise where a served weight is also that of a module that is not served.

    Raises:
        TargetError: names both.
    """
    served = {id(site.module): site.path for site in sites}
    shared = {id(weight_at(site)): site.path for site in sites}
    every = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
    for path, module in every:
        if id(module) in served:
            continue
        for name, p in module.named_parameters(recurse=False):
            if id(p) in shared:
                raise TargetError(
                    f"attach: StableRPS: {shared[id(p)]}.weight is tied to {path}.{name}, which is not "
                    "served and would keep its old values. Serve both (targets=), or neither (exclude=)."
                )


def places(
    sites: Sequence[Site], scales: Sequence[float], mapping: str, compression: float, seed: int
) -> list[Place]:
    """One per site, in their order; modules that share a weight have one place.

    Args:
        sites: in the model's order.
        scales: of each.
        mapping: which hash.
        compression: slots per weight.
        seed: of the hashes.

    Raises:
        OptxError: there would be fewer slots than one, or than a block has; or too many.
    """
    total = sum(weight.numel() for weight in weights_of(sites))
    slots = int(total * compression + 1e-9)
    if slots < 1 or slots >= MOST:
        raise OptxError(
            f"StableRPS: compression={compression} makes {slots} slots of {total:,} weights; there must be "
            f"at least 1, and fewer than {MOST:,}."
        )
    found: dict[int, Place] = {}
    made: list[Place] = []
    offset = 0
    for site, scale in zip(sites, scales, strict=True):
        weight = weight_at(site)
        if id(weight) not in found:
            cols = weight[0].numel() if weight.ndim > 1 else 1
            tall, wide = _ROW if isinstance(site.module, nn.Embedding) else _BLOCK
            if mapping == "roast" and slots < tall * wide:
                raise OptxError(
                    f"StableRPS: compression={compression} leaves {slots} slots, and a block of "
                    f"{site.path!r} needs {tall * wide}. Use compression >= {tall * wide / total:.3g}, or "
                    'mapping="fold".'
                )
            found[id(weight)] = Place(
                *(mapping, slots, offset, weight.numel(), seed, scale, len(found)), cols, tall, wide
            )
            offset += weight.numel()
        made.append(found[id(weight)])
    return made


def weights_of(sites: Iterable[Site]) -> list[nn.Parameter]:
    """Those of all sites, each once."""
    return list({id(weight_at(site)): weight_at(site) for site in sites}.values())


def deviations(sites: Sequence[Site], kind: str) -> list[float]:
    """The standard deviation that each module's weight is to go by.

    Args:
        sites: the modules.
        kind: ``"init"``: the weight's own; ``"fan_in"``: 1 / sqrt(fan_in).

    Raises:
        TargetError: a weight has no spread to go by.
    """
    found: list[float] = []
    for site in sites:
        weight = weight_at(site).detach()
        if kind == "fan_in":
            found.append(
                (weight.shape[-1] if isinstance(site.module, nn.Embedding) else weight[0].numel()) ** -0.5
            )
            continue
        deviation = float(weight.double().std(unbiased=False)) if weight.numel() else 0.0
        if not (0.0 < deviation < math.inf):
            raise TargetError(
                f"attach: StableRPS: {site.path}.weight has a standard deviation of {deviation}, so nothing "
                'says how large it is to be. Initialise it, or use scale="fan_in" or a number.'
            )
        found.append(deviation)
    return found


def mean_deviation(sites: Sequence[Site], each: Sequence[float]) -> float:
    """Over all weights, each with its module's: the half-width with which the mean scale is 1."""
    counts = [weight_at(site).numel() for site in sites]
    return sum(count * one for count, one in zip(counts, each, strict=True)) / sum(counts)


def drawn(slots: int, sigma: float, seed: int, like: Tensor) -> Tensor:
    """U(-sigma, sigma), the same in every process: from a generator of its own."""
    generator = torch.Generator().manual_seed(mix(seed, 3) & ((1 << 63) - 1))
    values = torch.rand(slots, generator=generator, dtype=torch.float64)
    return ((2.0 * values - 1.0) * sigma).to(like)


def fitted(sites: Sequence[Site], every: Sequence[Place], start: Tensor) -> Tensor:
    """The array whose weights are nearest to those that there are: psi = sum(s g W) / sum(s^2).

    Slots that no weight reads, which some mappings leave, stay as they were.
    """
    top = torch.zeros_like(start, dtype=torch.float64)
    bottom = totals(every, start.device)["squares"]
    once = {place.offset: (site, place) for site, place in zip(sites, every, strict=True)}
    for site, place in once.values():
        weight = weight_at(site).detach()
        top += summed(weight.to(start.device, torch.float64).reshape(-1), place, torch.float64)
    return torch.where(bottom > 0, top / bottom, start.double()).to(start.dtype)


def totals(every: Iterable[Place], device: torch.device) -> Mapping[str, Tensor]:
    """Per slot, over all modules: how many weights read it, the sum of their scales, and of their squares.

    Returns:
        ``count``, ``sum`` and ``squares``, each (m,) float64.
    """
    unique = list({place.offset: place for place in every}.values())
    found = {
        name: torch.zeros(unique[0].slots, dtype=torch.float64, device=device)
        for name in ("count", "sum", "squares")
    }
    for place in unique:
        ones = _counts(place, device)
        found["count"] += ones
        found["sum"] += ones * place.scale
        found["squares"] += ones * place.scale**2
    return found


def _counts(place: Place, device: torch.device) -> Tensor:
    """How many of a module's weights read each slot, float64: exact."""
    ones = torch.ones(place.numel, dtype=torch.float32, device=device)
    return summed(ones, replace(place, scale=1.0), torch.float64, signed=False)
