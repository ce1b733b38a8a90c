"""``optx bench attach``: what adapters add to a training step, in optx and in PEFT.

One pretrained model, one batch, one rank; the subjects take turns in one process. The zero is the frozen
model's own forward and backward, with the gradient going as far back as the first adapter needs it. What a
library takes above that is its overhead.
"""

from __future__ import annotations

import copy
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import optx

from . import _bench
from ._assets import language_model
from ._report import Table, console, tell
from ._run import device

# The seven projections of every Llama layer.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Measured:
    """What one way to adapt the model takes."""

    name: str
    times: list[float] = field(default_factory=list[float])
    saved: int = 0
    """Bytes of activations that the backward keeps."""


@dataclass
class Subject(Measured):
    """One way to adapt the model."""

    model: nn.Module = field(kw_only=True)


def _frozen(base: nn.Module) -> nn.Module:
    """The zero: nothing to train, and a gradient that reaches the first layer's projections."""
    model = copy.deepcopy(base)
    for path, module in model.named_modules():
        if path.endswith(
            ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj")
        ):
            module.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    return model


def _optx(base: nn.Module, rank: int, dora: bool) -> nn.Module:
    model = copy.deepcopy(base)
    handle = optx.attach(model, optx.LoRA(rank=rank, alpha=2 * rank, dora=dora), targets=TARGETS)
    optx.trainable_only(model, handle)
    return model


def _peft(base: nn.Module, rank: int, dora: bool) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), lora_dropout=0.0, use_dora=dora
    )
    return peft.get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]


def _step(model: nn.Module, ids: Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    if ids.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes that autograd keeps for the backward, each storage once, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, Any] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that its address is not given out again
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(input_ids=ids, labels=ids)
    return sum(storage.nbytes() for storage in storages.values())


def measure(base: nn.Module, ids: Tensor, rank: int, rounds: int, dora: bool) -> list[Subject]:
    """Time the three subjects in turn; the zero comes first."""
    subjects = [
        Subject("frozen model", model=_frozen(base)),
        Subject("PEFT", model=_peft(base, rank, dora)),
        Subject("optx", model=_optx(base, rank, dora)),
    ]
    for subject in subjects:
        subject.model.train()
        subject.saved = saved_bytes(subject.model, ids)
        _step(subject.model, ids)
    for number in range(rounds):
        for subject in subjects[number % 3 :] + subjects[: number % 3]:
            subject.times.append(_step(subject.model, ids))
    return subjects


def overheads(subjects: Sequence[Measured], statistic: Callable[[Sequence[float]], float]) -> list[float]:
    """What each subject takes above the zero, as a share of PEFT's."""
    zero, peft = (statistic(s.times) for s in subjects[:2])
    return [(statistic(s.times) - zero) / (peft - zero) for s in subjects]


def tables(results: dict[str, Any]) -> list[Table]:
    """Time above the frozen model's, and the activations kept."""
    settings = results["settings"]
    subjects = [Measured(**one) for one in results["subjects"]]
    lows, middles = overheads(subjects, min), overheads(subjects, statistics.median)
    rows: list[Sequence[str]] = []
    for subject, low, middle in zip(subjects, lows, middles, strict=True):
        step = statistics.median(a / b for a, b in zip(subject.times, subjects[0].times, strict=True))
        kept = (f"{n / 1e6:.1f} MB" for n in (subject.saved, subject.saved - subjects[0].saved))
        rows.append((subject.name, f"{middle:.2f}", f"{low:.2f}", f"{step:.2f}", *kept))
    return [
        Table(
            ("", "overhead, median", "overhead, min", "step / frozen", "saved activations", "above frozen"),
            rows,
            f"{'DoRA' if settings['dora'] else 'LoRA'} of rank {settings['rank']} on {', '.join(TARGETS)}",
            f"Forward and backward of {settings['batch']} x {settings['tokens']} tokens, in "
            f"{settings['rounds']} rounds. Overhead: what a step takes above the frozen one's, as share of "
            "PEFT's.",
        )
    ]


def options() -> ArgumentParser:
    """The benchmark's command line."""
    return _bench.parser(
        "attach",
        __doc__,
        model={"help": "hub name or folder of a Llama-like model (default: SmolLM2-135M)"},
        rank={"type": int, "default": 8},
        tokens={"type": int, "default": 256, "help": "of each sequence"},
        batch={"type": int, "default": 1, "help": "sequences"},
        rounds={"type": int, "default": 20},
        dora={"action": "store_true", "help": "DoRA in both"},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``optx bench attach --help``."""
    args = _bench.parsed(options(), arguments)
    base = language_model(args.model)[0].to(device()).requires_grad_(False)
    ids = torch.randint(0, base.config.vocab_size, (args.batch, args.tokens), device=device())
    subjects = measure(base, ids, args.rank, args.rounds, args.dora)
    measured = [{"name": s.name, "saved": s.saved, "times": s.times} for s in subjects]
    found = _bench.results(options(), args, subjects=measured)
    console.print(_bench.heading(found))
    tell(tables(found))


if __name__ == "__main__":
    main()
