"""Checks of the other kernels: losses, softmax, compressed deltas, RF8, and the CPU's that gather entries."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from optx.kernels.device.checks import Check, Place, Wrong

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_APART = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-8}


def checks() -> Iterator[Check]:
    """Results first, then speeds."""
    for dtype in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        yield Check("correct", f"ternary, {name}", functools.partial(_ternary, dtype))
        yield Check("correct", f"rf8, {name}", functools.partial(_rf8, dtype))
        yield Check("correct", f"softmax2, {name}", functools.partial(_softmax, dtype))
        if dtype != torch.float16:
            yield Check("correct", f"loss, {name}", functools.partial(_loss, dtype))
    yield Check("correct", "rf8 product", _rf8_product)
    yield Check("correct", "entries (CPU)", _entries)
    for dtype in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        yield Check("speed", f"ternary add, {name}", functools.partial(_ternary_speed, dtype))
        yield Check("speed", f"rf8 unpack, {name}", functools.partial(_rf8_speed, dtype))
    yield Check("speed", "loss, float32", _loss_speed)
    yield Check("speed", "softmax2, float32", _softmax_speed)


def _masks(n: int) -> torch.Tensor:
    from optx.kernels.ternary import cpu

    t = torch.randint(-1, 2, (n,), generator=torch.Generator().manual_seed(n))
    masks = torch.empty(2, -(-n // 64), dtype=torch.int64)
    cpu.pack(t.float(), masks, 1)
    return masks


def _ternary(dtype: torch.dtype, place: Place) -> Mapping[str, Any]:
    from optx.kernels.ternary import cpu
    from optx.kernels.ternary import dense_triton as device

    for n in (size for size in place.sizes if size):
        masks = _masks(n)
        start = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
        for name in ("add", "fill"):
            wanted, found = start.clone(), start.clone().to(place.device)
            getattr(cpu, name)(wanted, masks, 0.3)
            getattr(device, name)(found, masks.to(place.device), 0.3)
            if not torch.equal(wanted, found.cpu()):
                raise Wrong(f"{name} of {n} elements differs from the CPU's kernels")
    return {"bits": "equal"}


def _ternary_speed(dtype: torch.dtype, place: Place) -> Mapping[str, Any]:
    from optx.kernels.ternary import dense_triton as device

    n = place.elements
    masks = _masks(min(n, 1 << 20)).repeat(1, -(-n // (1 << 20)))[:, : -(-n // 64)].contiguous()
    masks, to = masks.to(place.device), torch.zeros(n, dtype=dtype, device=place.device)
    seconds = place.seconds(lambda: device.add(to, masks, 0.3))
    return place.rate((2 * to.element_size() + 0.25) * n, seconds)


def _rf8(dtype: torch.dtype, place: Place) -> Mapping[str, Any]:
    from optx.kernels.rf8 import codes_triton, cpu

    for n in (size for size in place.sizes if size):
        w = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
        made: list[list[torch.Tensor]] = []
        for kernels, device in ((cpu, "cpu"), (codes_triton, place.device)):
            given = w.to(device)
            codes = torch.empty(n, dtype=torch.uint8, device=device)
            wide, rounded = torch.empty_like(given), torch.empty_like(given)
            kernels.pack(given, codes, 1)
            kernels.unpack(codes, wide, 1)
            kernels.quantise(given, rounded)
            made.append([t.cpu() for t in (codes, wide, rounded)])
        if not all(torch.equal(a, b) for a, b in zip(*made, strict=True)):
            raise Wrong(f"{n} elements differ from the CPU's kernels")
    return {"bits": "equal"}


def _rf8_product(place: Place) -> Mapping[str, Any]:
    from optx.kernels.rf8 import cpu, product_triton

    codes, x = torch.randint(256, (33, 1040), dtype=torch.uint8), torch.randn(3, 1040)
    wanted, found = torch.empty(3, 33), torch.empty(3, 33, device=place.device)
    cpu.multiply(codes, x, wanted, -8)
    product_triton.multiply(codes.to(place.device), x.to(place.device), found, -8)
    apart = float((wanted - found.cpu()).abs().max() / wanted.abs().max())
    if not apart <= 2e-5:
        raise Wrong(f"products are {apart:.2g} apart from the CPU's")
    return {"apart": float(f"{apart:.2g}")}


def _rf8_speed(dtype: torch.dtype, place: Place) -> Mapping[str, Any]:
    from optx.kernels.rf8 import codes_triton

    n = place.elements
    codes = torch.randint(256, (n,), dtype=torch.uint8, device=place.device)
    to = torch.empty(n, dtype=dtype, device=place.device)
    seconds = place.seconds(lambda: codes_triton.unpack(codes, to, 0))
    return place.rate((to.element_size() + 1.0) * n, seconds)


def _loss(dtype: torch.dtype, place: Place) -> Mapping[str, Any]:
    from optx.kernels.loss import stablemax_rows as rows
    from optx.kernels.loss import stablemax_triton as device

    worst = 0.0
    for classes in (7, 600) if place.interpreted else (7, 1000, 50_257):
        generator = torch.Generator().manual_seed(classes)
        logits = (4 * torch.randn(5, classes, generator=generator)).to(dtype)
        target = torch.randint(classes, (5,), generator=generator)
        grad = torch.rand(5, generator=generator).to(rows.math_dtype(dtype))
        options = rows.Options(smoothing=0.1)
        wanted = rows.forward(logits, target, options)
        given = [t.to(place.device) for t in (logits, target, grad)]
        found = device.forward(given[0], given[1], options)
        pairs = [(wanted.loss, found.loss)]
        pairs.append(
            (
                rows.backward(grad, logits, target, wanted.rest, wanted.mass, options),
                device.backward(given[2], given[0], given[1], found.rest, found.mass, options),
            )
        )
        for a, b in pairs:
            apart = float((a.double() - b.cpu().double()).abs().max() / a.double().abs().max())
            if not apart <= _APART[dtype]:
                raise Wrong(f"{classes} classes: {apart:.2g} apart from the reference")
            worst = max(worst, apart)
    return {"apart": float(f"{worst:.2g}")}


def _loss_speed(place: Place) -> Mapping[str, Any]:
    from optx.kernels.loss import stablemax_rows as rows
    from optx.kernels.loss import stablemax_triton as device

    classes = 600 if place.interpreted else 32_768
    count = max(place.elements // classes, 1)
    logits = torch.randn(count, classes, device=place.device)
    target = torch.zeros(count, dtype=torch.int64, device=place.device)
    seconds = place.seconds(lambda: device.forward(logits, target, rows.Options()))
    return place.rate(4.0 * logits.numel(), seconds)


def _softmax(dtype: torch.dtype, place: Place) -> Mapping[str, Any]:
    """Rows that fit a program, long ones, and a few that several programs share; one beyond the range."""
    from optx.kernels.softmax import cpu
    from optx.kernels.softmax import pairs_triton as device

    worst = 0.0
    for rows, count in (
        ((3, 300), (2, 17_000)) if place.interpreted else ((70, 1000), (300, 20_001), (2, 1 << 20))
    ):
        generator = torch.Generator().manual_seed(count)
        x = (4 * torch.randn(rows, count, generator=generator)).to(dtype)
        x[0] += 5e4
        grad = torch.randn(rows, count, generator=generator).to(dtype)
        labels = torch.randint(count, (rows,), generator=generator)
        y, sums = cpu.softmax(x), cpu.fold(x)
        scale = torch.rand(rows, generator=generator).to(sums.dtype)
        there = [t.to(place.device) for t in (x, grad, labels, scale, y)]
        pairs = [
            (y, device.softmax(there[0])),
            (cpu.backward(grad, y), device.backward(there[1], there[4])),
            (
                cpu.spread(x, sums, scale, labels, scale),
                device.spread(there[0], device.fold(there[0]), there[3], there[2], there[3]),
            ),
        ]
        for a, b in pairs:
            apart = float((a.double() - b.cpu().double()).abs().max() / a.double().abs().max())
            if not apart <= _APART[dtype]:
                raise Wrong(f"{rows} rows of {count}: {apart:.2g} apart from the CPU's")
            worst = max(worst, apart)
    return {"apart": float(f"{worst:.2g}")}


def _softmax_speed(place: Place) -> Mapping[str, Any]:
    from optx.kernels.softmax import pairs_triton as device

    x = torch.randn(1 if place.interpreted else 16, max(place.elements // 16, 1), device=place.device)
    seconds = place.seconds(lambda: device.softmax(x))
    return place.rate(12.0 * x.numel(), seconds)


def _entries(place: Place) -> Mapping[str, Any]:
    from optx.kernels.entries import cpu

    for n in (size for size in place.sizes if size):
        mask = torch.rand(n, generator=torch.Generator().manual_seed(n)) > 0.5
        dense = torch.randn(n)
        compact = cpu.gather(dense, mask)
        if not torch.equal(compact, dense[mask]):
            raise Wrong(f"gather of {n} elements")
        back = torch.zeros(n)
        cpu.scatter(back, mask, compact)
        if not torch.equal(back, torch.where(mask, dense, 0.0)):
            raise Wrong(f"scatter of {n} elements")
    return {"bits": "equal"}
