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

import argparse
import copy
import json
import mmap
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import optx

from ._assets import language_model
from ._bench_step import ADAMW_BYTES
from ._report import console
from ._run import state_bytes
from ._step_profile import MARK, Operation, Shape, quickest, sides, warm_up

_PAGE = mmap.PAGESIZE
PARTS = ("forward", "backward", "step")
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
    """For each part of a step, and for all of it: the least that HFT could take, in AdamW's time."""
    adamw, hft = both
    numbers = [sum(p.numel() for p in subject.trained) for subject in both]
    ratios = {
        "forward": 1.0,
        "backward": 1 - needless(adamw, frozen_matrices(hft.model)) / adamw.kind("backward"),
        "step": numbers[1] / numbers[0],
    }
    whole = sum(adamw.least(part) for part in PARTS)
    return {**ratios, "all": sum(ratios[part] * adamw.least(part) for part in PARTS) / whole}


def _kinds(both: Sequence[Subject]) -> list[str]:
    """Kinds of work, in the order of a step and then by AdamW's time."""
    adamw = both[0]
    kinds = dict.fromkeys(o.kind for subject in both for o in subject.operations)
    return sorted(kinds, key=lambda kind: (PARTS.index(kind.partition(":")[0]), -adamw.kind(kind)))


# ---- tables ----------------------------------------------------------------------------------------------


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _counted(work: Sequence[Work]) -> Table:
    """What torch computed, beside what it must."""
    adamw, hft = work
    table = _table("Counted, one step", "AdamW", "AdamW + HFT", "ratio", "floor")
    must = adamw.backward - adamw.weight_gradients + hft.weight_gradients
    inputs = adamw.backward - adamw.weight_gradients
    rows = [
        ("forward, GFLOP", adamw.forward, hft.forward, adamw.forward, 1e9),
        ("backward, GFLOP", adamw.backward, hft.backward, must, 1e9),
        ("  gradients of inputs", inputs, hft.backward - hft.weight_gradients, inputs, 1e9),
        ("  gradients of weights", *(w.weight_gradients for w in work), hft.weight_gradients, 1e9),
        (
            "forward + backward, GFLOP",
            *(w.forward + w.backward for w in work),
            adamw.forward + must,
            1e9,
        ),
        ("gradients, MB", *(w.gradient_bytes for w in work), hft.gradient_bytes, 1e6),
        ("optimizer state, MB", *(w.state_bytes for w in work), hft.state_bytes, 1e6),
        ("moved by the optimizer, MB", *(w.step_bytes for w in work), hft.step_bytes, 1e6),
    ]
    for name, a, h, least, unit in rows:
        table.add_row(name, f"{a / unit:.1f}", f"{h / unit:.1f}", f"{h / a:.3f}", f"{least / a:.3f}")
    return table


def _timed(both: Sequence[Subject], floor: Mapping[str, float]) -> Table:
    """The parts of a step without the profiler."""
    table = _table(
        "Timed, minimum over the rounds; in brackets, how far the median is above it",
        *("AdamW, ms", "AdamW + HFT, ms", "ratio", "of medians", "floor", "pages touched first, MB"),
    )
    for name, parts in {**{part: (part,) for part in PARTS}, "all": PARTS}.items():
        least = [sum(s.least(part) for part in parts) for s in both]
        middle = [sum(statistics.median(s.times[part]) for part in parts) for s in both]
        times = (f"{1e3 * a:.0f} (+{b / a - 1:.0%})" for a, b in zip(least, middle, strict=True))
        pages = (sum(statistics.median(s.faults[part]) for part in parts) * _PAGE / 1e6 for s in both)
        table.add_row(
            name,
            *times,
            f"{least[1] / least[0]:.3f}",
            f"{middle[1] / middle[0]:.3f}",
            f"{floor[name]:.3f}",
            " / ".join(f"{page:.0f}" for page in pages),
        )
    return table


def _profiled(both: Sequence[Subject], floor: Mapping[str, float]) -> Table:
    """Where the time goes."""
    adamw, hft = both
    table = _table(
        "Under the profiler: every operation's own time, its minimum over the rounds",
        *("AdamW, ms", "share", "AdamW + HFT, ms", "ratio", "floor"),
    )
    left = needless(adamw, frozen_matrices(hft.model)) / adamw.kind("backward: weight gradients")
    floors = {"backward: weight gradients": 1 - left, "step: all": floor["step"]}
    for kind in _kinds(both):
        a, h = adamw.kind(kind), hft.kind(kind)
        share, least = a / adamw.kind(""), floors.get(kind, 1.0)
        table.add_row(
            kind, f"{1e3 * a:.1f}", f"{share:.1%}", f"{1e3 * h:.1f}", f"{h / a:.3f}", f"{least:.3f}"
        )
    return table


def _operations(both: Sequence[Subject], number: int) -> Table:
    """The longest operations that are no matrix product."""
    table = _table("Other operations of the backward", "AdamW, ms", "calls", "AdamW + HFT, ms", "calls")
    times: list[dict[str, list[float]]] = [{}, {}]
    for subject, found in zip(both, times, strict=True):
        for o in subject.operations:
            if o.kind.startswith("backward") and not o.kind.endswith("gradients"):
                found.setdefault(f"{o.kind.removeprefix('backward: ')}: {o.name}", []).append(o.seconds)
    for name in sorted(times[0], key=lambda name: -sum(times[0][name]))[:number]:
        calls = (found.get(name, []) for found in times)
        table.add_row(name, *(cell for c in calls for cell in (f"{1e3 * sum(c):.1f}", str(len(c)))))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``optx bench hft --help``."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="optx bench hft", description=__doc__, formatter_class=form)
    parser.add_argument(
        "--model", help="hub name or folder of a causal language model (default: SmolLM2-135M)"
    )
    parser.add_argument("--ratio", type=float, default=0.5, help="share that HFT trains")
    parser.add_argument("--level", default="category", choices=("category", "layer", "model"))
    parser.add_argument("--seed", type=int, default=0, help="of HFT's draw")
    parser.add_argument("--tokens", type=int, default=256, help="of each sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--profiled", type=int, default=4, help="rounds under the profiler")
    parser.add_argument(
        "--keep", action="store_true", help="zero_grad(set_to_none=False): gradients stay in place"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time (with --threads 1, where others use the machine)",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="write every time to a file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler notes each start and stop
    base = language_model(options.model)[0]
    tokens = options.batch * options.tokens
    if clash := [n for n, p in base.named_parameters() if p.ndim == 2 and tokens in p.shape]:
        parser.error(f"--tokens: {tokens} tokens a step is also a size of {clash[0]}; take another number.")
    ids = torch.randint(0, base.config.vocab_size, (options.batch, options.tokens))
    both = subjects(base, options.ratio, options.level, options.seed)
    clock = time.process_time if options.cpu_time else time.perf_counter
    measure(both, ids, options.rounds, options.profiled, clock, options.keep)
    report(both, [count(subject, ids) for subject in both], vars(options))


def report(both: Sequence[Subject], work: Sequence[Work], options: Mapping[str, Any]) -> None:
    """Print all tables, and write the file."""
    console.print(
        f"torch {torch.__version__}, cpu, {options['threads']} threads, {options['rounds']} rounds, "
        f"{options['batch']} x {options['tokens']} tokens, HFT(ratio={options['ratio']}, "
        f"level={options['level']!r}, seed={options['seed']})"
    )
    floor = floors(both)
    for table in (_counted(work), _timed(both, floor), _profiled(both, floor), _operations(both, 10)):
        console.print(table)
    for subject, done in zip(both, work, strict=True):
        found = sum(o.matrix is not None for o in subject.operations)
        console.print(
            f"{subject.name}: {found} products are weight gradients, of {done.matrices} trained matrices"
        )
    if options["json"]:
        kept = [
            {"name": s.name, "times": s.times, "faults": s.faults}
            | {"kinds": {kind: s.kind(kind) for kind in _kinds(both)}}
            for s in both
        ]
        with open(options["json"], "w") as file:
            json.dump({"floor": floor, "work": [asdict(w) for w in work], "subjects": kept}, file)


if __name__ == "__main__":
    main()
