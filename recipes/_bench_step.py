"""``optx bench step``: how long a step takes beside torch's fused AdamW, and beside the bytes it must move.

All subjects take turns in one process, so that a machine's moods hit all alike; what is printed is the
ratio to ``torch.optim.AdamW(fused=True)`` of the same round, its minimum and median over the rounds.
"""

from __future__ import annotations

import importlib.util
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import optx
from optx.kernels.audit.traffic import step_bytes
from optx.kernels.step.layout import Layout
from optx.kernels.step.program import Program

from . import _bench
from ._report import Table, console, tell
from ._run import device

Shapes = dict[str, tuple[int, ...]]

_NO_LIMIT = 1e9  # of a gradient's norm: gradients, which all subjects share, are multiplied by 1
ADAMW_BYTES = 28  # w, g, m, v read, w, m, v written, in float32


class _Block(nn.Module):
    """One transformer block's weights, without their computation."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        for name, shape in shapes.items():
            holder = nn.Module()
            holder.register_parameter("weight", nn.Parameter(torch.empty(shape)))
            self.add_module(name, holder)


class Skeleton(nn.Module):
    """Named weights in blocks, as HFT wants to see them."""

    def __init__(
        self,
        blocks: int,
        shapes: dict[str, tuple[int, ...]],
        others: dict[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        for name, shape in (others or {}).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.layers = nn.ModuleList(_Block(shapes) for _ in range(blocks))


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def _big() -> Skeleton:
    return Skeleton(5, dict.fromkeys(_ATTENTION, (1000, 1000)))


def _small() -> Skeleton:
    return Skeleton(50, dict.fromkeys(_ATTENTION, (40, 25)))


def _smollm2() -> Skeleton:
    """The 272 tensors of SmolLM2-135M."""
    shapes: Shapes = {
        "q_proj": (576, 576),
        "k_proj": (192, 576),
        "v_proj": (192, 576),
        "o_proj": (576, 576),
        "gate_proj": (1536, 576),
        "up_proj": (1536, 576),
        "down_proj": (576, 1536),
        "input_layernorm": (576,),
        "post_attention_layernorm": (576,),
    }
    return Skeleton(30, shapes, {"embed_tokens": (49152, 576), "norm": (576,)})


SHAPES: dict[str, tuple[str, Callable[[], Skeleton]]] = {
    "big": ("20 x 1M", _big),
    "smollm2": ("SmolLM2's 272", _smollm2),
    "small": ("200 x 1000", _small),
}


@dataclass
class Subject:
    """One way to take a step."""

    name: str
    make: Callable[[nn.Module], Any]  # gives something with step()
    bytes: float | None = None  # per parameter; None where it is not ours to count
    dtype: torch.dtype = torch.float32  # of weights and gradients
    own: bool = False  # has weights that others don't move
    times: list[float] = field(default_factory=list[float])
    gradients: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list[tuple[nn.Parameter, Tensor]])

    def give_gradients(self) -> None:
        """Before every step: HeavyBall takes them away."""
        for p, g in self.gradients:
            p.grad = g


def _adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    # A rate so small that weights, shared by all subjects, stay as they are.
    return torch.optim.AdamW(model.named_parameters(), lr=1e-8, weight_decay=0.0, **options)


def _wrapped(
    *transforms: Callable[[nn.Module], optx.Transform], fused: Any = True, **settings: Any
) -> Callable[..., Any]:
    return lambda model: optx.wrap(_adamw(model), *(t(model) for t in transforms), fused=fused, **settings)


def _formats() -> Iterable[Subject]:
    """The same in fewer bytes."""
    low, both = torch.bfloat16, _compositions()["PerpGrad + AdamR"]
    yield Subject("AdamW, state='bfloat16'", _wrapped(state="bfloat16"))
    yield Subject("AdamW, state='8bit'", _wrapped(state="8bit"))
    yield Subject("PerpGrad + AdamR, state='8bit'", _wrapped(*both, state="8bit"))
    split = {"state": "8bit", "master": "split"}
    yield Subject("AdamW bf16, state='8bit', master='split'", _wrapped(**split), dtype=low)
    yield Subject("PerpGrad + AdamR bf16, the same", _wrapped(*both, **split), dtype=low)


def _compositions() -> dict[str, list[Callable[[nn.Module], optx.Transform]]]:
    perp: Callable[[nn.Module], optx.Transform] = lambda _model: optx.PerpGrad()  # noqa: E731
    pull: Callable[[nn.Module], optx.Transform] = lambda _model: optx.AdamR(weight=0.01)  # noqa: E731
    return {
        "AdamW through wrap()": [],
        "AdamR(normalize=False)": [lambda _model: optx.AdamR(weight=0.01, normalize=False)],
        "AdamR": [pull],
        "Clip": [lambda _model: optx.Clip(_NO_LIMIT)],
        "PerpGrad": [perp],
        "PerpGrad + AdamR": [perp, pull],
        "HFT": [lambda model: optx.HFT(model)],
        # All is kept, which costs a step what any mask does.
        "KeepMask": [lambda model: optx.KeepMask(_masks(model))],
    }


def _masks(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters() if p.ndim >= 2}


def subjects(peers: bool, compiled: bool) -> list[Subject]:
    """What is timed, the reference first."""
    everything = [Subject("torch fused=True", lambda m: _adamw(m, fused=True), ADAMW_BYTES)]
    everything.append(Subject("torch clip_grad_norm_, then fused=True", _Clipped))
    for name, transforms in _compositions().items():
        # KeepMask looks again at masks whose weights another than its own step has moved.
        everything.append(Subject(name, _wrapped(*transforms), own=name == "KeepMask"))
    everything += _formats()
    if peers:
        everything.append(Subject("torch foreach", lambda m: _adamw(m, foreach=True)))
        for name in ("PerpGrad", "PerpGrad + AdamR"):
            make = _wrapped(*_compositions()[name], fused=False)
            everything.append(Subject(f"{name}, foreach path", make))
        everything += list(_libraries())
    if compiled:
        everything.append(Subject("PerpGrad + AdamR, torch.compile", _Compiled))
    return everything


def _libraries() -> Iterable[Subject]:
    def there(name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    if there("optimi"):
        import optimi  # pyright: ignore[reportMissingImports]

        yield Subject("torch-optimi AdamW", lambda m: optimi.AdamW(list(m.parameters()), lr=1e-8))
    if there("pytorch_optimizer"):
        import pytorch_optimizer  # pyright: ignore[reportMissingImports]

        make = pytorch_optimizer.StableAdamW
        yield Subject("pytorch_optimizer StableAdamW", lambda m: make(list(m.parameters()), lr=1e-8))
    if there("heavyball"):
        import heavyball  # pyright: ignore[reportMissingImports]

        yield Subject("HeavyBall AdamW", lambda m: heavyball.AdamW(list(m.parameters()), lr=1e-8))


class _Clipped:
    """What `optx.Clip` takes the place of."""

    def __init__(self, model: nn.Module) -> None:
        self.weights, self.optimizer = list(model.parameters()), _adamw(model, fused=True)

    def step(self) -> None:
        """One step."""
        nn.utils.clip_grad_norm_(self.weights, _NO_LIMIT)
        self.optimizer.step()


class _Compiled:
    """PerpGrad + AdamR + AdamW as one would write it for torch.compile: a loop over tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = list(model.parameters())
        self.anchors = [p.detach().clone() for p in self.weights]
        self.m = [torch.zeros_like(p, requires_grad=False) for p in self.weights]
        self.v = [torch.zeros_like(p, requires_grad=False) for p in self.weights]
        self.t = torch.zeros(())
        self.run = torch.compile(self._run, dynamic=False)

    def _run(self, grads: Sequence[Tensor], t: Tensor) -> None:
        lr, weight, b1, b2 = 1e-8, 0.01, 0.9, 0.999
        projected: list[Tensor] = []
        total = torch.zeros(())
        numel = 0
        for w, g, v in zip(self.weights, grads, self.v, strict=True):
            c = (w * g).sum() / ((w * w).sum() + 1e-30)
            orthogonal = g - c * w
            projected.append(orthogonal * (g.norm() / (orthogonal.norm() + 1e-30)))
            total = total + (b2 * v + (1 - b2) * projected[-1] ** 2).sum()
            numel += w.numel()
        r = torch.sqrt(total / (1 - b2**t) / numel)
        state = zip(self.weights, projected, self.anchors, self.m, self.v, strict=True)
        for w, g, anchor, m, v in state:
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            w.sub_((lr * weight / r) * (w - anchor))
            w.sub_(lr / (1 - b1**t) * m / ((v / (1 - b2**t)).sqrt() + 1e-8))

    def step(self) -> None:
        """One step."""
        self.t += 1
        with torch.no_grad():
            self.run([p.grad for p in self.weights if p.grad is not None], self.t)


def _traffic(optimizer: Any, model: nn.Module) -> float | None:
    """Bytes per parameter of the model that a wrapped optimizer's step must move."""
    if not isinstance(optimizer, optx.Wrapped) or not optimizer.plan()[0].path.startswith("fused"):
        return None
    program = optimizer.program(0)
    active = [p for p in model.parameters() if p.requires_grad]
    layouts = ((p, _layout(program, p, optimizer.state[p])) for p in active)
    moved = sum(step_bytes(program, layout) * p.numel() for p, layout in layouts)
    return moved / sum(p.numel() for p in model.parameters())


_CODES = {torch.int8: "signed8", torch.uint8: "nonnegative8"}
_RESTS = {None: "nearest", torch.int8: "split8", torch.int16: "split16"}


def _layout(program: Program, p: Tensor, state: dict[str, Any]) -> Layout:
    """How a step finds a weight's tensors."""
    packed = ("bits" if p.shape[-1] % 8 == 0 else "bool") if p.ndim >= 2 else "ones"
    weight = _name(p.dtype)

    def dtype(name: str) -> str:
        kept = state.get(name, state.get(f"optx.{name}"))
        kind = p.dtype if kept is None else kept.dtype
        return packed if name in program.packed else _CODES.get(kind, _name(kind))

    rest = state["optx.rest"].dtype if "optx.rest" in state else None
    return Layout((weight, weight, *map(dtype, program.slots)), _RESTS[rest], True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(shape: str, rounds: int, peers: bool, compiled: bool, device: str) -> list[Subject]:
    """Time all subjects on one list of shapes."""
    template = SHAPES[shape][1]().to(device)
    gradients = {n: torch.randn_like(p) * 1e-3 for n, p in template.named_parameters()}
    with torch.no_grad():
        for p in template.parameters():
            p.normal_(0.0, 0.02)
    running: list[tuple[Subject, Any]] = []
    for subject in subjects(peers, compiled):
        model = SHAPES[shape][1]().to("meta")
        for (name, module_p), shared in zip(
            list(model.named_parameters()), template.parameters(), strict=True
        ):
            del module_p
            owner, _, leaf = name.rpartition(".")
            weight = shared.detach().to(subject.dtype, copy=subject.own)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(weight))
        optimizer = subject.make(model)
        moving = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        subject.gradients = [(p, gradients[name].to(subject.dtype)) for name, p in moving]
        running.append((subject, optimizer))
        for _ in range(3):  # before others move the weights between AdamR's wrap and its first step
            subject.give_gradients()
            optimizer.step()
        subject.bytes = subject.bytes or _traffic(optimizer, model)
    for number in range(rounds):
        # Not in a fixed cycle: threads that torch leaves spinning would slow down whatever comes next.
        turn = random.Random(number).sample(running, len(running))
        for subject, optimizer in turn:
            subject.give_gradients()
            subject.times.append(timed(optimizer.step, device))
    return [subject for subject, _ in running]


def timed(step: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one step."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


_FIRST_STEP = """
import time, torch, optx
w = torch.nn.Parameter(torch.randn(1000)); w.grad = torch.randn(1000)
opt = optx.wrap(torch.optim.AdamW([w], weight_decay=0), optx.PerpGrad(), optx.AdamR(), fused=True)
start = time.perf_counter(); opt.step(); print(time.perf_counter() - start)
"""


def first_step_seconds() -> tuple[float, float]:
    """Time of a process's first PerpGrad + AdamR step: with an empty kernel cache, and with a filled one."""
    with tempfile.TemporaryDirectory() as cache:
        return seconds_of(_FIRST_STEP, cache), seconds_of(_FIRST_STEP, cache)


def seconds_of(script: str, cache: str) -> float:
    """What a script prints in a process of its own, with this kernel cache."""
    environment = {**os.environ, "OPTX_CACHE_DIR": cache}
    command = [sys.executable, "-c", script]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def tables(results: dict[str, Any]) -> list[Table]:
    """Ratios to torch's fused AdamW on every list of shapes, beside the floor."""
    shapes: dict[str, dict[str, Any]] = {
        shape: {one["name"]: one for one in found} for shape, found in results["shapes"].items()
    }
    first = next(iter(shapes.values()))
    rows: list[Sequence[str]] = []
    for name in first:
        floors = (found[name]["bytes"] for found in shapes.values())
        floor = dict.fromkeys(f"{moved / ADAMW_BYTES:.2f}" for moved in floors if moved)
        rows.append((name, ", ".join(floor), *(_ratios(found, name) for found in shapes.values())))
    seconds = results["first_step_seconds"]
    return [
        Table(
            ("step", "floor", *(SHAPES[shape][0] for shape in shapes)),
            rows,
            "A step's time, as a ratio to torch.optim.AdamW(fused=True)",
            f"Median and, in brackets, least of {results['settings']['rounds']} rounds or more, the subjects "
            "in turn in one process, in float32 where nothing else is said; transforms are around AdamW. "
            "Floor: bytes that must move, in "
            f"units of AdamW's {ADAMW_BYTES} per parameter; more where shapes differ. A process's first "
            f"step takes {seconds['cold']:.1f} s, compiling, and {seconds['warm']:.1f} s from the disk cache "
            "afterwards.",
        )
    ]


def _ratios(found: dict[str, Any], name: str) -> str:
    reference = next(iter(found.values()))["times"]
    times = found[name]["times"]
    middle = statistics.median(a / b for a, b in zip(times, reference, strict=True))
    return f"{middle:.2f} ({min(times) / min(reference):.2f})"


def options() -> ArgumentParser:
    """The benchmark's command line."""
    return _bench.parser(
        "step",
        __doc__,
        shapes={"default": "big,smollm2,small", "help": f"of {', '.join(SHAPES)}"},
        rounds={"type": int, "default": 30},
        no_peers={"action": "store_true", "help": "leave out other libraries and the foreach path"},
        compile={"action": "store_true", "help": "add torch.compile (its first step takes minutes)"},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``optx bench step --help``."""
    args = _bench.parsed(options(), arguments)
    names = args.shapes.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        options().error(f"--shapes: {unknown[0]!r} is not one of {', '.join(SHAPES)}")
    measured: dict[str, Any] = {}
    for name in names:
        rounds = args.rounds if name != "small" else 10 * args.rounds
        console.print(f"{SHAPES[name][0]} tensors, {rounds} rounds")
        subjects = measure(name, rounds, not args.no_peers, args.compile, device().type)
        measured[name] = [{"name": s.name, "bytes": s.bytes, "times": s.times} for s in subjects]
    cold, warm = first_step_seconds()
    seconds = {"cold": cold, "warm": warm}
    found = _bench.results(options(), args, shapes=measured, first_step_seconds=seconds)
    console.print(_bench.heading(found))
    tell(tables(found))


if __name__ == "__main__":
    main()
