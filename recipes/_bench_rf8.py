"""``optx bench rf8``: packing and unpacking beside copying as many bytes, and linear modules of bytes.

A linear module without bias, of normal weights: in float32, in bfloat16, by torch's product with int8 weights
(a scale for each row; bfloat16 vectors, for which it is made), and with RF8's bytes and float32 vectors. All
take turns. The error is that of the output, as a share of float32's.
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import optx
from optx import rf8

from . import _bench
from ._options import positive
from ._report import Table, console, tell

BATCHES = (1, 4, 8, 16, 128)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def turns(subjects: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after a first time that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds + 1):
        for name, do in subjects.items():
            started = time.perf_counter()
            do()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


def codes(numbers: int, rounds: int) -> dict[str, dict[str, float]]:
    """By dtype: GB/s of packing, of unpacking, and of a copy that moves as many bytes."""
    from optx.kernels.rf8 import cpu

    found: dict[str, dict[str, float]] = {}
    for name, dtype in DTYPES.items():
        values = torch.randn(numbers, generator=torch.Generator().manual_seed(0)).to(dtype)
        packed = rf8.pack(values)
        moved = (1 + dtype.itemsize) * numbers
        here, there = (torch.empty(moved // 2, dtype=torch.uint8).fill_(1) for _ in range(2))
        subjects = {
            "copy": lambda here=here, there=there: there.copy_(here),
            "unpack": lambda values=values, p=packed: cpu.unpack(p.codes, values, p.e_max),
            "pack": lambda values=values, p=packed: cpu.pack(values, p.codes, p.e_max),
        }
        found[name] = {what: moved / s / 1e9 for what, s in turns(subjects, rounds).items()}
    return found


def linear(size: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """By batch and kind: seconds, and the output's error."""
    torch.manual_seed(0)
    plain = nn.Linear(size, size, bias=False)
    nn.init.normal_(plain.weight, std=0.02)
    half = nn.Linear(size, size, bias=False).bfloat16()
    half.load_state_dict(plain.state_dict())
    holder = nn.Sequential(nn.Linear(size, size, bias=False))
    holder[0].load_state_dict(plain.state_dict())
    optx.attach(holder, optx.RF8Linear(release=True), targets="0")
    scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
    whole = (plain.weight.detach() / scale).round().to(torch.int8)
    scale = scale.flatten().bfloat16()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for batch in BATCHES:
        x = torch.randn(batch, size)
        y = x.bfloat16()
        subjects: dict[str, Callable[[], torch.Tensor]] = {
            "float32": lambda x=x: plain(x),
            "bfloat16": lambda y=y: half(y),
            "int8": lambda y=y: torch._weight_int8pack_mm(y, whole, scale),  # pyright: ignore
            "RF8": lambda x=x: holder(x),
        }
        with torch.no_grad():
            wanted, seconds = plain(x), turns(subjects, rounds)
            found[str(batch)] = {
                name: {
                    "seconds": seconds[name],
                    "error": float((do().float() - wanted).norm() / wanted.norm()),
                }
                for name, do in subjects.items()
            }
    return found


def tables(results: dict[str, Any]) -> list[Table]:
    """Bandwidths; times and errors of linear modules."""
    settings = results["settings"]
    rates = [
        (
            name,
            *(f"{row[what]:.1f}" for what in ("copy", "unpack", "pack")),
            f"{row['unpack'] / row['copy']:.2f}",
        )
        for name, row in results["codes"].items()
    ]
    rows: list[Sequence[str]] = []
    for batch, kinds in results["linear"].items():
        base = kinds["float32"]["seconds"]
        rows.append(
            (
                batch,
                f"{base * 1e3:.2f}",
                *(f"{kinds[k]['seconds'] / base:.2f}" for k in ("bfloat16", "int8", "RF8")),
            )
        )
    errors = results["linear"][str(BATCHES[0])]
    shown = ", ".join(f"{kind} {100 * errors[kind]['error']:.2f} %" for kind in ("bfloat16", "int8", "RF8"))
    size = settings["size"]
    return [
        Table(
            ("", "copy", "unpack", "pack", "unpack / copy"),
            rates,
            f"GB/s, read and written, of {settings['numbers'] / 1e6:.0f} million numbers",
            "A byte for each number and the number itself, beside torch's copy of as many bytes.",
        ),
        Table(
            ("batch", "float32, ms", "bfloat16", "int8", "RF8"),
            rows,
            f"A linear module of {size} x {size}: time as a share of float32's",
            f"Errors of the output at batch {BATCHES[0]}: {shown}. A weight takes 4, 2, 1 and 1 bytes.",
        ),
    ]


def options() -> ArgumentParser:
    """The benchmark's command line."""
    return _bench.parser(
        "rf8",
        __doc__,
        numbers={"type": positive, "default": 1 << 25, "help": "that are packed and unpacked"},
        size={"type": positive, "default": 4096, "help": "inputs and outputs of the linear module"},
        rounds={"type": positive, "default": 7},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``optx bench rf8 --help``."""
    args = _bench.parsed(options(), arguments)
    found = _bench.results(
        options(), args, codes=codes(args.numbers, args.rounds), linear=linear(args.size, args.rounds)
    )
    console.print(_bench.heading(found))
    tell(tables(found))


if __name__ == "__main__":
    main()
