"""The think recipe's part "diversity": whether SmolLM2 explores when it is fed mixtures of tokens.

Each prompt is thought about several times, in a few soft steps, without noise, with Gumbel and with
Dirichlet noise. Told are how many different thoughts come of it (rows of each step's heaviest token), what
noise does to the weights, and whether the model follows the heaviest token: what it says after a mixture
beside what it says after the first or the second of its tokens alone.

Source: arXiv 2508.03440, its scaled-down form.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

import optx

from . import _assets
from ._options import positive
from ._report import COLOURS, Table, by_seed, ranged
from ._run import Run, device

ARMS: dict[str, dict[str, Any]] = {
    "vanilla": {"noise": None},
    "Gumbel": {"noise": "gumbel", "tau": 0.5},
    "Dirichlet": {"noise": "dirichlet", "alpha": 4.0},
}
TITLE, AXES = "After a mixture, and after one token", ("", "Jensen-Shannon divergence, nats")
ONCE = True
"""One seed is enough: there are as many thoughts of an arm as questions times samples."""
TOGETHER = 5
"""Questions that are thought about in one batch."""
BETWEEN = (0.5, 0.9)
"""Heaviest weights of the steps that are compared: there is a second token, and a first."""
OPTIONS: dict[str, dict[str, Any]] = {
    "prompts": {"type": positive, "default": 20, "help": "part diversity: questions"},
    "soft_steps": {"type": positive, "default": 40, "help": "part diversity: soft steps"},
    "samples": {"type": positive, "default": 8, "help": "part diversity: thoughts of each question"},
    "model": {"help": "part diversity: a hub name or a folder (default: SmolLM2-135M-Instruct)"},
}
QUESTIONS = """
Why is the sky blue?
How many days are there in three weeks?
What is the capital of Portugal?
Which is heavier, a kilogram of iron or a kilogram of feathers?
How do bees make honey?
What comes after Tuesday?
Why do leaves turn red in autumn?
If I have twelve apples and eat five, how many are left?
What is the largest planet of the solar system?
How does a bicycle stay upright?
Who wrote the play about the prince of Denmark?
What is the difference between weather and climate?
How can I boil an egg?
What is seven times eight?
Why is the sea salty?
Name an animal that sleeps in winter.
What do plants need to grow?
How long does light take from the sun to the earth?
What is a good name for a small grey cat?
Why do we have seasons?
""".strip().splitlines()


class Known(NamedTuple):
    """A model, and the prompts as its tokenizer has them."""

    model: Any
    batch: Any


def prepared(args: Any) -> Known:
    """The model and the questions, the same for all arms and seeds."""
    model, tokenizer = _assets.language_model(args.model)
    model.to(device()).eval()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    asked = [QUESTIONS[i % len(QUESTIONS)] for i in range(args.prompts)]
    texts = [f"Question: {one}\nLet me think." for one in asked]
    return Known(model, dict(tokenizer(texts, return_tensors="pt", padding=True)))


def train(arm: str, seed: int, known: Known, args: Any, run: Run) -> dict[str, Any] | None:
    """Thoughts of each question, and what single steps of one of them say; None: interrupted."""
    T, samples = args.soft_steps, args.samples
    with optx.attach(known.model, optx.SoftThinking(**ARMS[arm])) as thinking:
        # Each thought's own, whatever it is drawn together with.
        seeds = [1_000_003 * seed + row for row in range(args.prompts * samples)]
        different = list[int]()
        batches = -(-args.prompts // TOGETHER)
        for batch in run.steps(f"{arm}, seed {seed}: thoughts", 0, batches):
            at = slice(batch * TOGETHER, (batch + 1) * TOGETHER)
            some = {name: tensor[at] for name, tensor in known.batch.items()}
            own = seeds[at.start * samples : at.stop * samples]
            made = thinking.rollout(some, samples, max_new_tokens=T, seed=own, stop_ids=())
            different += [len(torch.unique(one, dim=0)) for one in made.tokens.split(samples)]
        if run.interrupt.wanted:
            return None
        found = optx.analysis.single_threadedness(
            thinking, known.batch, steps=T, seed=seeds[: args.prompts], stop_ids=()
        )
        K = thinking.injection.width(known.model.config.vocab_size)
    return {
        "different": different,
        "all": found.mean(),
        "between": found.mean(*BETWEEN),
        "log_k": math.log(K),
    }


# ---- what is told ---------------------------------------------------------------------------------------

_COLUMNS = {
    "soft, top 1": ("between", "soft_top1", "{:.4f}"),
    "soft, top 2": ("between", "soft_top2", "{:.4f}"),
    "top 1, top 2": ("between", "top1_top2", "{:.4f}"),
    "steps": ("between", "steps", "{:.0f}"),
    "noise": ("all", "noise", "{:.4f}"),
    "entropy": ("all", "entropy", "{:.2f}"),
}


def tables(results: dict[str, Any]) -> list[Table]:
    """A row for each kind of noise."""
    settings, arms = results["settings"], by_seed(results["arms"])
    rows = [_row(arm, arms[arm]) for arm in ARMS if arm in arms]
    return [
        Table(
            ("noise", "different", *_COLUMNS),
            rows,
            f"{settings['samples']} thoughts of each of {settings['prompts']} questions, "
            f"{settings['soft_steps']} soft steps",
            "Different: rows of each step's heaviest token, mean of the questions. Soft, top 1: the "
            "Jensen-Shannon divergence (nats) of the next token's distribution after a mixture and after its "
            "heaviest token alone, and so on; of steps whose heaviest weight is "
            f"{BETWEEN[0]} to {BETWEEN[1]}, of which there are so many. Noise: JS of the weights fed and of "
            "those before the noise; entropy: of the weights fed, in nats; both of all soft steps.",
        )
    ]


def _row(arm: str, logs: list[dict[str, Any]]) -> tuple[str, ...]:
    different = [sum(one["different"]) / len(one["different"]) for one in logs]
    cells = [ranged([one[part][key] for one in logs], form) for part, key, form in _COLUMNS.values()]
    return (arm, ranged(different, "{:.2f}"), *cells)


def draw(axes: Any, results: dict[str, Any]) -> None:
    """What the model says after a mixture: how far from the first of its tokens, how far from the second."""
    arms = {arm: logs for arm, logs in by_seed(results["arms"]).items() if arm in ARMS}
    kinds = {"mixture and heaviest": "soft_top1", "mixture and second": "soft_top2"}
    for i, (name, key) in enumerate(kinds.items()):
        places = [at + 0.3 * (i - 0.5) for at in range(len(arms))]
        heights = [sum(one["between"][key] for one in logs) / len(logs) for logs in arms.values()]
        axes.bar(places, heights, width=0.28, color=COLOURS[i], label=name)
    axes.set_xticks(range(len(arms)), list(arms))
    axes.legend(frameon=False, fontsize=7)
