"""Where shared weights lie, one at a time, by Python's integers: a plain copy of the definitions."""

from __future__ import annotations

from optx.kernels.shared.mapping import Place

ALL = (1 << 64) - 1


def mix(key: int, value: int) -> int:
    x = (key + value * 0x9E3779B97F4A7C15) & ALL
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & ALL
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & ALL
    return x ^ (x >> 31)


def one_of(key: int, value: int, of: int) -> int:
    return ((mix(key, value) >> 33) * of) >> 31


def slot(place: Place, j: int) -> int:
    """Of weight j of the module."""
    m, key, i = place.slots, mix(place.seed, 1), place.offset + j
    if place.mapping == "fold":
        return (one_of(key, i // m, m) + i % m) % m
    if place.mapping == "hashed":
        return one_of(key, i, m)
    row, col = divmod(j, place.cols)
    across = (place.cols + place.wide - 1) // place.wide
    block = (row // place.tall) * across + col // place.wide
    start = one_of(mix(key, place.order + 1), block, m - place.tall * place.wide + 1)
    return start + (row % place.tall) * place.wide + col % place.wide


def sign(place: Place, j: int) -> int:
    """Likewise."""
    word, bit = divmod(place.offset + j, 64)
    return -1 if mix(mix(place.seed, 2), word) >> bit & 1 else 1
