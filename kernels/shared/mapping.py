"""Where a weight lies in the short array, and with which sign: one definition for torch, Numba and Triton.

All hashing is of 64-bit integers, wrapping: ``mix(key, v)`` is splitmix64's finaliser of ``key + v G`` with
G = 0x9E3779B97F4A7C15, and a hash becomes one of r values as ``(top 31 bits * r) >> 31``. With
``slots_key = mix(seed, 1)`` and ``signs_key = mix(seed, 2)``, weight i of the long vector (all modules one
behind the other, row by row) has

* fold: slot ``(start(q) + i - q m) mod m`` where ``q = i // m``, ``start(q)`` the hash of q, one of m;
* hashed: slot the hash of i, one of m;
* roast: its module's matrix is cut into blocks of ``tall`` rows and ``wide`` columns, numbered row by row;
  block
  b begins at the hash of b under the key ``mix(slots_key, order + 1)``, one of ``m - tall wide + 1``, and its
  elements follow row by row;
* sign ``-1`` where bit ``i % 64`` of ``mix(signs_key, i // 64)`` is set.

Integers alone: the same on every device, for every dtype, in every process. It is no other library's hash.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_GOLD, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1
MOST = 1 << 31
"""The array is shorter than this."""


def mix(key: int, value: int) -> int:
    """64 bits, as a signed integer."""
    x = (key + value * _GOLD) & _MASK
    x = ((x ^ x >> 30) * _FIRST) & _MASK
    x = ((x ^ x >> 27) * _SECOND) & _MASK
    return signed(x ^ x >> 31)


def signed(x: int) -> int:
    """64 bits as torch and ctypes hold them."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


@dataclass(frozen=True)
class Place:
    """What one module's weights are in the long vector.

    Attributes:
        mapping: ``"fold"``, ``"hashed"`` or ``"roast"``.
        slots: m, the length of the short array.
        offset: the first weight's number.
        numel: how many there are.
        seed: 64 bits.
        scale: what values are multiplied by.
        order: the module's number.
        cols: of its weight as a matrix.
        tall: rows of a block.
        wide: columns of a block.
        slots_key: of the hash that chooses slots.
        signs_key: of the hash that chooses signs.
    """

    mapping: str
    slots: int
    offset: int
    numel: int
    seed: int
    scale: float
    order: int = 0
    cols: int = 1
    tall: int = 16
    wide: int = 16

    slots_key: int = field(init=False)
    signs_key: int = field(init=False)

    def __post_init__(self) -> None:
        key = mix(self.seed, 1)
        object.__setattr__(self, "slots_key", mix(key, self.order + 1) if self.mapping == "roast" else key)
        object.__setattr__(self, "signs_key", mix(self.seed, 2))


def _shifted(x: Tensor, by: int) -> Tensor:
    """A logical shift to the right."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mixed(key: int, value: Tensor) -> Tensor:
    x = value * signed(_GOLD) + key
    x = (x ^ _shifted(x, 30)) * signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * signed(_SECOND)
    return x ^ _shifted(x, 31)


def _chosen(hashes: Tensor, of: int) -> Tensor:
    return (_shifted(hashes, 33) * of) >> 31


def slots(place: Place, device: torch.device | None = None) -> Tensor:
    """The slot of each weight, int64 (numel,): for the paths without a kernel, and to look at."""
    i = torch.arange(place.numel, device=device) + place.offset
    m, key = place.slots, place.slots_key
    if place.mapping == "fold":
        q = i // m
        return (_chosen(_mixed(key, q), m) + i - q * m) % m
    if place.mapping == "hashed":
        return _chosen(_mixed(key, i), m)
    j = i - place.offset
    row, col = j // place.cols, j % place.cols
    block = (row // place.tall) * -(-place.cols // place.wide) + col // place.wide
    start = _chosen(_mixed(key, block), m - place.tall * place.wide + 1)
    return start + (row % place.tall) * place.wide + col % place.wide


def signs(place: Place, device: torch.device | None = None) -> Tensor:
    """-1 or 1 for each weight, int64 (numel,)."""
    i = torch.arange(place.numel, device=device) + place.offset
    return 1 - 2 * ((_mixed(place.signs_key, i >> 6) >> (i & 63)) & 1)


def gather(psi: Tensor, place: Place, dtype: torch.dtype) -> Tensor:
    """scale * sign * psi[slot], (numel,), in torch operations, which autograd and compilers follow."""
    found = psi[slots(place, psi.device)] * signs(place, psi.device).to(psi.dtype)
    return (found * place.scale).to(dtype)


def scatter(values: Tensor, place: Place, dtype: torch.dtype, signed: bool = True) -> Tensor:
    """Per slot the sum of scale * sign * value, (m,), in a dtype."""
    terms = values.to(dtype) * place.scale
    if signed:
        terms = terms * signs(place, values.device).to(dtype)
    made = torch.zeros(place.slots, dtype=dtype, device=values.device)
    return made.index_add_(0, slots(place, values.device), terms)
