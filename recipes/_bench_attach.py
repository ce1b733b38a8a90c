"""``optx bench attach``: what adapters add to a training step, in optx and in PEFT.

One pretrained model, one batch, one rank; the subjects take turns in one process. The zero is the frozen
model's own forward and backward, with the gradient going as far back as the first adapter needs it. What a
library takes above that is its overhead.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import optx

from ._assets import language_model
from ._report import console

# The seven projections of every Llama layer.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Subject:
    """One way to adapt the model."""

    name: str
    model: nn.Module
    times: list[float] = field(default_factory=list[float])
    saved: int = 0
    """Bytes of activations that the backward keeps."""


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
        Subject("frozen model", _frozen(base)),
        Subject("PEFT", _peft(base, rank, dora)),
        Subject("optx", _optx(base, rank, dora)),
    ]
    for subject in subjects:
        subject.model.train()
        subject.saved = saved_bytes(subject.model, ids)
        _step(subject.model, ids)
    for number in range(rounds):
        for subject in subjects[number % 3 :] + subjects[: number % 3]:
            subject.times.append(_step(subject.model, ids))
    return subjects


def overheads(subjects: Sequence[Subject], statistic: Callable[[Sequence[float]], float]) -> list[float]:
    """What each subject takes above the zero, as a share of PEFT's."""
    zero, peft = (statistic(s.times) for s in subjects[:2])
    return [(statistic(s.times) - zero) / (peft - zero) for s in subjects]


def _table(title: str, subjects: Sequence[Subject]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("overhead, min", "overhead, median", "step / frozen", "saved activations", "above frozen"):
        table.add_column(column, justify="right")
    lows, middles = overheads(subjects, min), overheads(subjects, statistics.median)
    for subject, low, middle in zip(subjects, lows, middles, strict=True):
        step = statistics.median(a / b for a, b in zip(subject.times, subjects[0].times, strict=True))
        above = subject.saved - subjects[0].saved
        table.add_row(
            subject.name,
            f"{low:.2f}",
            f"{middle:.2f}",
            f"{step:.2f}",
            f"{subject.saved / 1e6:.1f} MB",
            f"{above / 1e6:.1f} MB",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``optx bench attach --help``."""
    parser = argparse.ArgumentParser(prog="optx bench attach", description=__doc__)
    parser.add_argument("--model", help="hub name or folder of a Llama-like model (default: SmolLM2-135M)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of each sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dora", action="store_true", help="DoRA in both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="write every time to a file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = language_model(options.model)[0].to(device).requires_grad_(False)
    ids = torch.randint(0, base.config.vocab_size, (options.batch, options.tokens), device=device)
    subjects = measure(base, ids, options.rank, options.rounds, options.dora)
    console.print(
        f"torch {torch.__version__}, {device}, {options.threads} threads, {options.rounds} rounds, "
        f"{options.batch} x {options.tokens} tokens"
    )
    what = f"{'DoRA' if options.dora else 'LoRA'} of rank {options.rank} on {', '.join(TARGETS)}"
    console.print(_table(f"{what}; overhead above the frozen model, in PEFT's", subjects))
    if options.json:
        with open(options.json, "w") as file:
            json.dump([{"name": s.name, "saved": s.saved, "times": s.times} for s in subjects], file)


if __name__ == "__main__":
    main()
