"""Checks of step programs: against the CPU's kernels, their speed, registers, launches, and graphs."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optx.kernels.audit.kernels import Case
from optx.kernels.audit.traffic import call_bytes, step_bytes
from optx.kernels.device.buckets import Bucket
from optx.kernels.device.checks import Check, LeftOut, Place, Wrong
from optx.kernels.step.layout import EIGHT

REGISTERS = (64, 96, 128)
# How far results of two compilers may be apart, in units of a tensor's largest number. Where something is
# rounded stochastically each draws in its own way: one step is compared, and sums of what was stored loosely.
_APART = {
    **{torch.float64: 1e-7, torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-8},
    **{torch.int8: 2 / 127, torch.uint8: 2 / 255},  # codes of moments
}


def checks(cases: Sequence[Case], main: int) -> Iterator[Check]:
    """Results and speed of all cases, all else of the first so many."""
    for kind, run in (
        ("correct", _correct),
        ("speed", _speed),
        ("registers", _registers),
        ("launches", _launches),
        ("graph", _graph),
    ):
        some = cases if kind in ("correct", "speed") else cases[:main]
        for case in some:
            yield Check(kind, case.name, functools.partial(run, case))


def on_device(case: Case, sizes: Sequence[int], place: Place, kind: Any = None) -> Bucket:
    """Tensors and Triton's kernels."""
    from optx.kernels.step.triton import TritonStep

    runner = functools.partial(kind or TritonStep, device=place.device)
    return Bucket(case, sizes, place.device, runner)


def _correct(case: Case, place: Place) -> Mapping[str, Any]:
    from optx.kernels.step.cpu import CpuStep

    here, there = Bucket(case, place.sizes, "cpu", CpuStep), on_device(case, place.sizes, place)
    drawn = any(dtype in ("bfloat16", *EIGHT) for dtype in case.layout.dtypes)
    for _ in range(1 if drawn else 2):
        here.step()
        there.step()
    worst = 0.0
    for (name, wanted), (_, found) in zip(here.kept(), there.kept(), strict=True):
        apart = _apart(wanted, found.cpu())
        allowed = 0.02 if drawn and wanted.ndim == 0 else _APART.get(wanted.dtype, 0.0)
        if not apart <= allowed:
            raise Wrong(f"{name} is {apart:.2g} of its largest number apart from the CPU's kernels")
        worst = max(worst, apart)
    return {"apart": float(f"{worst:.2g}"), "tensors": len(place.sizes)}


def _apart(wanted: Tensor, found: Tensor) -> float:
    if wanted.numel() == 0:
        return 0.0
    a, b = wanted.double(), found.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a.nan_to_num(0.0, 0.0, 0.0), b.nan_to_num(0.0, 0.0, 0.0)
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))


def _large(case: Case, place: Place, kind: Any = None) -> Bucket:
    """Eight tensors, as many elements as a bandwidth needs."""
    return on_device(case, [place.elements // 8] * 8, place, kind)


def _speed(case: Case, place: Place) -> Mapping[str, Any]:
    bucket = _large(case, place)
    seconds = place.seconds(bucket.step)
    moved = step_bytes(case.program, case.layout)
    elements = place.elements // 8 * 8
    return {**place.rate(moved * elements, seconds), "bytes": moved, "ms": round(1e3 * seconds, 3)}


def _registers(case: Case, place: Place) -> Mapping[str, Any]:
    if torch.version.hip:
        raise LeftOut("ROCm's compiler takes no limit of registers")
    calls = (*case.program.update, *case.program.observe)
    moved = call_bytes(case.program, case.layout, calls, stores=True) * (place.elements // 8 * 8)
    found: dict[str, Any] = {}
    bucket = _large(case, place)
    bucket.step()
    options = bucket.runner._options["update"]
    for limit in (*REGISTERS, 0):
        options.pop("maxnreg", None)
        if limit:
            options["maxnreg"] = limit
        name = f"{limit or 'free'}"
        try:
            found[name] = place.rate(moved, place.seconds(bucket.runner.update))["of a copy"]
        except Exception as error:  # too few to compile with: the others are told
            found[name] = f"{type(error).__name__}"
    return found


def _launches(case: Case, place: Place) -> Mapping[str, Any]:
    from optx.kernels.step.triton import TritonStep

    class Counted(TritonStep):
        launched = 0

        def _launch(self, name: str, programs: int, warps: int, **more: Any) -> None:
            self.launched += programs > 0 and name in vars(self._module)
            super()._launch(name, programs, warps, **more)

    found: dict[str, int] = {}
    for count in (1, 40 if place.interpreted else 400):
        bucket = on_device(case, [64] * count, place, Counted)
        bucket.step()
        bucket.runner.launched = 0
        bucket.step()
        found[f"{count} tensors"] = bucket.runner.launched
    if len(set(found.values())) > 1:
        raise Wrong(f"launches grow with the tensors: {found}")
    return found


def _graph(case: Case, place: Place) -> Mapping[str, Any]:
    """Replays with another lr each time, beside the same steps without a graph."""
    if place.interpreted:
        raise LeftOut("the interpreter has no CUDA graphs")
    captured, plain = (on_device(case, place.sizes, place) for _ in range(2))
    captured.step()  # compiles, and fills the tables
    plain.step()
    graph = torch.cuda.CUDAGraph()
    before = [(t, t.clone()) for _, t in captured.kept()]
    with torch.cuda.graph(graph):
        captured.step()
    if any(not torch.equal(t, old) for t, old in before):
        raise Wrong("the capture itself took a step")
    hypers = captured.columns.hypers
    if "lr" not in hypers:
        raise LeftOut("the program reads no lr")
    for lr in (2e-3, 5e-4, 0.0):
        for bucket in (captured, plain):
            bucket.runner.hypers[hypers.index("lr")] = lr
        captured.runner.upload()
        graph.replay()
        plain.step()
    torch.cuda.synchronize()
    for (name, a), (_, b) in zip(captured.kept(), plain.kept(), strict=True):
        if not torch.equal(a, b):
            raise Wrong(f"{name} differs by {_apart(b.cpu(), a.cpu()):.2g} from steps without a graph")
    return {"replays": 3, "bits": "equal"}
