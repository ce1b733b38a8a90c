"""``python -m optx.recipes._metrics_figures``: what ``opt.metrics()`` costs, beside training and a bare step.

Subjects take turns in one process. What is printed are minima over the rounds, and in parentheses medians (of
ratios: within a round).
"""

from __future__ import annotations

import os
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import optx

from ._bench_step import Skeleton
from ._report import console


def _llama() -> nn.Module:
    """A Llama of 3.3 million numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def _optimizer(model: nn.Module, *, hft: bool) -> Any:
    torch.manual_seed(0)
    base = torch.optim.AdamW(model.named_parameters(), lr=1e-5, weight_decay=0.0)
    half = [optx.HFT(model)] if hft else []
    return optx.wrap(base, optx.PerpGrad(), optx.AdamR(weight=0.01), *half)


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def least_and_median(seconds: Sequence[float]) -> tuple[float, float]:
    """Of a list."""
    return min(seconds), statistics.median(seconds)


def share_of_a_training_step(steps: int) -> tuple[list[float], list[float]]:
    """Seconds of steps with their forward and backward passes, and of ``metrics()`` after each."""
    model = _llama()
    opt = _optimizer(model, hft=True)
    tokens = torch.randint(3, 1024, (8, 128))

    def train() -> None:
        opt.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        opt.step()

    opt.metrics()
    train()
    opt.metrics()
    pairs = [(_timed(train), _timed(opt.metrics)) for _ in range(steps)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def call_for_a_large_model(rounds: int) -> list[float]:
    """Seconds of ``metrics()`` after a step of as many tensors as SmolLM2 has, of few numbers each."""
    sizes = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = Skeleton(30, dict.fromkeys(sizes, (8, 8)))
    for p in model.parameters():
        nn.init.normal_(p)
    opt = _optimizer(model, hft=False)
    opt.metrics()
    found: list[float] = []
    for _ in range(rounds):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        found.append(_timed(opt.metrics))
    return found


def on_against_off(rounds: int) -> tuple[float, float]:
    """A fused step of 10 million numbers that meters, to one that does not: of minima, median of ratios."""
    opts: list[Any] = []
    for metered in (False, True):
        model = Skeleton(5, dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (707, 707)))
        for p in model.parameters():
            nn.init.normal_(p)
            p.grad = torch.randn_like(p)
        opts.append(_optimizer(model, hft=False))
        if metered:
            opts[-1].metrics()
    for opt in opts:
        opt.step()
        opt.step()
    pairs: list[tuple[float, float]] = []
    for number in range(rounds):
        order = opts if number % 2 else opts[::-1]
        times = {id(opt): _timed(opt.step) for opt in order}
        pairs.append((times[id(opts[1])], times[id(opts[0])]))
    least = min(on for on, _ in pairs) / min(off for _, off in pairs)
    return least, statistics.median(on / off for on, off in pairs)


def main() -> None:
    """Measure and print."""
    parser = ArgumentParser(prog="python -m optx.recipes._metrics_figures", description=__doc__)
    parser.add_argument("--rounds", type=int, default=41, help="of bare steps; a third as many trained ones")
    rounds = parser.parse_args().rounds
    steps, asked = map(least_and_median, share_of_a_training_step(max(rounds // 3, 3)))
    console.print(f"{torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}; minima (medians)")
    console.print(
        f"training step {1e3 * steps[0]:.1f} ({1e3 * steps[1]:.1f}) ms, "
        f"metrics() {1e3 * asked[0]:.3f} ({1e3 * asked[1]:.3f}) ms: "
        f"{asked[0] / steps[0]:.3%} ({asked[1] / steps[1]:.3%}) of it"
    )
    large = least_and_median(call_for_a_large_model(10 * rounds))
    console.print(f"metrics() of 210 tensors: {1e3 * large[0]:.3f} ({1e3 * large[1]:.3f}) ms")
    least, median = on_against_off(rounds)
    console.print(f"a fused step of 10M numbers, metered / not: {least:.3f} ({median:.3f})")


if __name__ == "__main__":
    main()
