"""``python -m optx.recipes._metrics_figures``: what ``opt.metrics()`` costs, beside training and a bare step.

Subjects take turns in one process; medians over the rounds, and of their ratios within a round.
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable
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


def share_of_a_training_step(steps: int) -> tuple[float, float]:
    """Median seconds of a step with its forward and backward pass, and of ``metrics()`` after it."""
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
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def on_against_off(rounds: int) -> float:
    """The median ratio of a fused step of 10 million numbers that meters, to one that does not."""
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
    ratios: list[float] = []
    for number in range(rounds):
        order = opts if number % 2 else opts[::-1]
        times = {id(opt): _timed(opt.step) for opt in order}
        ratios.append(times[id(opts[1])] / times[id(opts[0])])
    return statistics.median(ratios)


def main() -> None:
    """Measure and print."""
    parser = ArgumentParser(prog="python -m optx.recipes._metrics_figures", description=__doc__)
    parser.add_argument("--rounds", type=int, default=41, help="of bare steps; a third as many trained ones")
    rounds = parser.parse_args().rounds
    step, asked = share_of_a_training_step(max(rounds // 3, 3))
    console.print(
        f"training step {1e3 * step:.1f} ms, metrics() {1e3 * asked:.3f} ms: {asked / step:.3%} of it"
    )
    console.print(f"a fused step of 10M numbers, metered / not: {on_against_off(rounds):.3f}")


if __name__ == "__main__":
    main()
