"""``optx bench hft``: what HFT's frozen half saves of a training step, and the least that it could take.

AdamW and AdamW + HFT train two copies of one model on one batch, in turns in one process. Counted: floating
point operations of forward and backward, bytes of gradients and of the optimizer. Timed: the three parts of a
step and, under torch's profiler, what they consist of.

The floor is AdamW's own time without what the frozen half makes needless: the weight gradient of each
frozen matrix, at the time that a product of its shape takes in AdamW's backward, and the optimizer's bytes
for frozen numbers. All else stays: HFT trains the embeddings, so that the gradient of every layer's input is
needed, down to the first. (What frozen norms save, some thousandths of the backward, is not taken off.)
"""

from __future__ import annotations

import copy
import mmap
import os
import random
import statistics
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import optx

from . import _bench, _hft_report
from ._assets import language_model
from ._bench_step import ADAMW_BYTES
from ._report import Table, console, tell
from ._run import state_bytes
from ._step_profile import MARK, Operation, Shape, quickest, sides, warm_up

PARTS = _hft_report.PARTS
Clock = Callable[[], float]


@dataclass
class Subject:
    """One optimizer with its own copy of the model."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    times: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    faults: dict[str, list[int]] = field(default_factory=lambda: {part: [] for part in PARTS})
    operations: list[Operation] = field(default_factory=lambda: list[Operation]())

    @property
    def trained(self) -> list[nn.Parameter]:
        """What gets a gradient."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def least(self, part: str) -> float:
        """The shortest time that a part took."""
        return min(self.times[part])

    def kind(self, kind: str) -> float:
        """The time of one kind of work, or of a whole part, under the profiler."""
        return sum(o.seconds for o in self.operations if o.kind.startswith(kind))


def subjects(base: nn.Module, ratio: float, level: Any, seed: int) -> list[Subject]:
    """AdamW, and AdamW with HFT; the rate is so small that both stay at the same weights."""
    made: list[Subject] = []
    for name in ("AdamW", "AdamW + HFT"):
        model = copy.deepcopy(base)
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-8, weight_decay=0.0, fused=True)
        if name != "AdamW":
            optimizer = optx.wrap(optimizer, optx.HFT(model, ratio=ratio, level=level, seed=seed))
        made.append(Subject(name, model, optimizer))
    return made


def _faults() -> int:
    """Pages that this process touched for the first time; 0 where the system doesn't tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _step(subject: Subject, ids: Tensor, clock: Clock, keep: bool, noted: bool = True) -> None:
    """One training step, as in `optx run finetune`."""
    moments, faults = [clock()], [_faults()]

    def passed() -> None:
        moments.append(clock())
        faults.append(_faults())

    with record_function(MARK + "forward"):
        loss = subject.model(input_ids=ids, labels=ids).loss
    passed()
    with record_function(MARK + "backward"):
        subject.optimizer.zero_grad(set_to_none=not keep)
        loss.backward()
    passed()
    with record_function(MARK + "step"):
        subject.optimizer.step()
    passed()
    for i, part in enumerate(PARTS if noted else ()):
        subject.times[part].append(moments[i + 1] - moments[i])
        subject.faults[part].append(faults[i + 1] - faults[i])


def measure(
    both: Sequence[Subject], ids: Tensor, rounds: int, profiled: int, clock: Clock, keep: bool = False
) -> None:
    """Time both in turns, in an order drawn anew each round; then so many rounds under the profiler."""
    for _ in range(2):  # the first step makes state and compiles
        for subject in both:
            _step(subject, ids, clock, keep, noted=False)
    for number in range(rounds):
        for subject in random.Random(number).sample(both, len(both)):
            _step(subject, ids, clock, keep)
    if profiled:
        warm_up()
    for number in range(profiled):
        for subject in random.Random(number).sample(both, len(both)):
            step = partial(_step, subject, ids, clock, keep, noted=False)
            subject.operations = quickest(step, ids.numel(), subject.operations)


# ---- counted ---------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What one step computes (floating point operations of products) and holds or moves (bytes).

    Attributes:
        forward: of the forward.
        backward: of the backward, as torch ran it.
        weight_gradients: the part of it that the trained matrices' own gradients take.
        matrices: how many those are; a tied head counts, a table that is only looked up does not.
        gradient_bytes: of all gradients.
        state_bytes: of the optimizer's state.
        step_bytes: that the optimizer must read and write.
    """

    forward: int
    backward: int
    weight_gradients: int
    matrices: int
    gradient_bytes: int
    state_bytes: int
    step_bytes: int


def count(subject: Subject, ids: Tensor) -> Work:
    """Count a step's work; the optimizer must have taken a step, for its state."""
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        loss = subject.model(input_ids=ids, labels=ids).loss
        by_module = {name: sum(n.values()) for name, n in counter.get_flop_counts().items()}
        forward = counter.get_total_flops()
        loss.backward()
    subject.optimizer.zero_grad()
    root = type(subject.model).__name__
    own = [n for m in _with_trained_matrix(subject.model) if (n := by_module.get(f"{root}.{m}", 0))]
    numbers = sum(p.numel() for p in subject.trained)
    return Work(
        forward,
        counter.get_total_flops() - forward,
        sum(own),  # each product of the forward has one of the same size for its weight
        len(own),
        sum(p.numel() * p.element_size() for p in subject.trained),
        state_bytes(subject.optimizer),
        ADAMW_BYTES * numbers,
    )


def _with_trained_matrix(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if any(p.ndim == 2 and p.requires_grad for p in module.parameters(recurse=False))
    ]


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_back(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# torch's counter doesn't know its own attention on CPUs.
_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_back,
}


# ---- the floor -------------------------------------------------------------------------------------------


def frozen_matrices(model: nn.Module) -> Counter[Shape]:
    """The matrices that get no gradient, by shape."""
    return Counter(sides(*p.shape) for p in model.parameters() if p.ndim == 2 and not p.requires_grad)


def needless(reference: Subject, frozen: Mapping[Shape, int]) -> float:
    """Seconds of AdamW's backward that go into the weight gradients of such matrices."""

    def once(shape: Shape) -> float:
        return statistics.mean(o.seconds for o in reference.operations if o.matrix == shape)

    return sum(number * once(shape) for shape, number in frozen.items())


def floors(both: Sequence[Subject]) -> dict[str, float]:
    """The least that HFT could take, in AdamW's time: of each part, of all, and of weight gradients alone."""
    adamw, hft = both
    numbers = [sum(p.numel() for p in subject.trained) for subject in both]
    ratios = {
        "forward": 1.0,
        "backward": 1 - needless(adamw, frozen_matrices(hft.model)) / adamw.kind("backward"),
        "step": numbers[1] / numbers[0],
    }
    whole = sum(adamw.least(part) for part in PARTS)
    left = 1 - needless(adamw, frozen_matrices(hft.model)) / adamw.kind("backward: weight gradients")
    return {
        **ratios,
        "all": sum(ratios[part] * adamw.least(part) for part in PARTS) / whole,
        "weight gradients": left,
    }


# ---- the command -----------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> list[Table]:
    """What is counted, what is timed, and where the time goes."""
    return _hft_report.tables(results)


def options() -> ArgumentParser:
    """The benchmark's command line."""
    return _bench.parser(
        "hft",
        __doc__,
        model={"help": "hub name or folder of a causal language model (default: SmolLM2-135M)"},
        ratio={"type": float, "default": 0.5, "help": "share that HFT trains"},
        level={"default": "category", "choices": ("category", "layer", "model")},
        seed={"type": int, "default": 0, "help": "of HFT's draw"},
        tokens={"type": int, "default": 256, "help": "of each sequence"},
        batch={"type": int, "default": 1, "help": "sequences"},
        rounds={"type": int, "default": 12},
        profiled={"type": int, "default": 4, "help": "rounds under the profiler"},
        keep={"action": "store_true", "help": "zero_grad(set_to_none=False): gradients stay in place"},
        cpu_time={"action": "store_true", "help": "processor time (with --threads 1, on a busy machine)"},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``optx bench hft --help``."""
    form = options()
    args = _bench.parsed(form, arguments)
    if min(args.rounds, args.profiled) < 1:
        form.error("--rounds and --profiled: at least 1 each; the floor is made of profiled times.")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler notes each start and stop
    base = language_model(args.model)[0]
    tokens = args.batch * args.tokens
    if clash := [n for n, p in base.named_parameters() if p.ndim == 2 and tokens in p.shape]:
        form.error(f"--tokens: {tokens} tokens a step is also a size of {clash[0]}; take another number.")
    ids = torch.randint(0, base.config.vocab_size, (args.batch, args.tokens))
    both = subjects(base, args.ratio, args.level, args.seed)
    clock = time.process_time if args.cpu_time else time.perf_counter
    measure(both, ids, args.rounds, args.profiled, clock, args.keep)
    work = [asdict(count(subject, ids)) for subject in both]
    found = _bench.results(
        form, args, floor=floors(both), work=work, subjects=[measured(subject) for subject in both]
    )
    console.print(_bench.heading(found))
    tell(tables(found))


def measured(subject: Subject) -> dict[str, Any]:
    """A subject's numbers, for results; operations summed by kind, and by name where they are no product."""
    kinds: dict[str, float] = {}
    others: dict[str, tuple[float, int]] = {}
    for o in subject.operations:
        kinds[o.kind] = kinds.get(o.kind, 0.0) + o.seconds
        if o.kind.startswith("backward") and not o.kind.endswith("gradients"):
            name = f"{o.kind.removeprefix('backward: ')}: {o.name}"
            seconds, calls = others.get(name, (0.0, 0))
            others[name] = seconds + o.seconds, calls + 1
    return {
        "name": subject.name,
        "times": subject.times,
        "touched": {part: [n * mmap.PAGESIZE for n in faults] for part, faults in subject.faults.items()},
        "kinds": kinds,
        "others": others,
        "products": sum(o.matrix is not None for o in subject.operations),
    }


if __name__ == "__main__":
    main()
