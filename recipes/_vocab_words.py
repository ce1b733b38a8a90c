"""The vocab recipe's part "words": next words of Shakespeare by the Z-loss on a factored head, by softmax.

The network before the head is one small one for all. What differs is the head's loss, and with it what a step
costs: of a softmax as much as there are words, of the spherical family the same for any number.

Source: the Z-loss, arXiv 1604.08859; its exact step, arXiv 1412.7091.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optx

from . import _assets
from ._options import positive, rate
from ._report import COLOURS, Table, by_seed, ranged
from ._run import Run, clock, device, median_ms

SPHERICAL = {"Z-loss": "z", "squared error": "mse"}
IN_THAT_TIME = "softmax in that time"
ARMS = [
    *("Z-loss, 10k", "squared error, 10k", f"{IN_THAT_TIME}, 10k", "softmax, 10k"),
    *("Z-loss, 74k", f"{IN_THAT_TIME}, 74k"),
]
TOPS = (1, 10, 100)
CONTEXT, KNOWN_WORDS, WIDTH = 2, 5000, 64
ONCE = False
TITLE, AXES = "Next words of Shakespeare", ("of the first k", "accuracy, %")
OPTIONS: dict[str, dict[str, Any]] = {
    "word_steps": {"type": positive, "default": 600, "help": "part words: steps"},
    "word_batch": {"type": positive, "default": 128, "help": "part words: words a step"},
    "word_lr": {"type": rate, "default": 30.0, "help": "part words: SGD's rate of the Z-loss's head"},
    "word_mse_lr": {"type": rate, "default": 0.03, "help": "part words: of the squared error's head"},
    "word_body_lr": {"type": rate, "default": 2e-3, "help": "part words: Adam's rate of all else"},
}


class Words(NamedTuple):
    """Words by number, the most frequent first: those that are learnt from, and those that test."""

    train: Tensor
    test: Tensor
    count: int


class Body(nn.Sequential):
    """Two words' embeddings through a layer; rare words in a context are one."""

    def __init__(self) -> None:
        super().__init__(
            nn.Embedding(KNOWN_WORDS, WIDTH // CONTEXT),
            nn.Flatten(),
            nn.Linear(WIDTH, WIDTH),
            nn.Tanh(),
        )

    def forward(self, context: Tensor) -> Tensor:
        return super().forward(context.clamp(max=KNOWN_WORDS - 1))


def prepared(args: Any) -> dict[str, Words]:
    """Shakespeare's words: lower case and the 10,000 most frequent, or all as they are printed."""
    text = _assets.text(None)
    return {
        "10k": _numbered(re.findall(r"[a-z']+|[.,;:!?]", text.lower()), 10_000),
        "74k": _numbered(text.split()),
    }


def _numbered(words: list[str], most: int | None = None) -> Words:
    numbers = {word: i for i, (word, _) in enumerate(Counter(words).most_common(most))}
    found = torch.tensor([numbers.get(word, -100) for word in words])
    cut = len(found) * 19 // 20
    return Words(found[:cut], found[cut:], len(numbers))


def _examples(words: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The two words before each place (rarer ones than have a number: the last), and the word there."""
    context = torch.stack([words[at - back] for back in range(CONTEXT, 0, -1)], 1)
    return context.where(context >= 0, KNOWN_WORDS).to(device()), words[at].to(device())


def train(arm: str, seed: int, known: dict[str, Words], args: Any, run: Run) -> dict[str, Any] | None:
    """Accuracy among the first k, and how many steps there were."""
    head, size = arm.split(", ")
    words, steps, found = known[size], args.word_steps, dict[str, Any]()
    torch.manual_seed(seed)
    if head == IN_THAT_TIME:
        found["ratio"] = _ratio(words, args)
        steps = max(1, round(steps / found["ratio"]))
    torch.manual_seed(seed)
    model, step = _trained(head, words, args)
    draws = torch.Generator().manual_seed(seed)
    for _ in run.steps(f"{arm}, seed {seed}", 0, steps):
        at = torch.randint(CONTEXT, len(words.train), (args.word_batch,), generator=draws)
        step(*_examples(words.train, at))
    if run.interrupt.wanted:
        return None
    return {**found, "steps": steps, "classes": words.count, "tops": _accuracies(model, words)}


def _trained(head: str, words: Words, args: Any) -> tuple[nn.Module, Callable[[Tensor, Tensor], None]]:
    """A network, and what a step of it is."""
    model = nn.Sequential(Body(), nn.Linear(WIDTH, words.count)).to(device())
    loss, optimizer = _spherical(model, head, args) if head in SPHERICAL else _softmax(model, args)

    def step(context: Tensor, labels: Tensor) -> None:
        loss(model(context), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def _ratio(words: Words, args: Any, rounds: int = 15) -> float:
    """Median time of a step with softmax over that with the Z-loss, in turns."""
    examples = _examples(words.train, torch.arange(CONTEXT, CONTEXT + args.word_batch))
    taken: dict[str, list[float]] = {"softmax": [], "Z-loss": []}
    ways = {head: _trained(head, words, args)[1] for head in taken}
    for turn in range(rounds + 2):
        for head, step in ways.items():
            before = clock()
            step(*examples)
            taken[head] += [clock() - before] * (turn > 1)
    return median_ms(taken["softmax"]) / median_ms(taken["Z-loss"])


def _spherical(model: nn.Module, head: str, args: Any) -> tuple[Any, Any]:
    """The head in factors: these lines are what it takes."""
    z = optx.ZLoss() if head == "Z-loss" else optx.ZLoss(form="mse")
    rate = args.word_lr if head == "Z-loss" else args.word_mse_lr
    handle = optx.attach(model, optx.SphericalHead(z, lr=rate), targets="1")
    return handle.loss, optx.wrap(torch.optim.Adam(model.parameters(), lr=args.word_body_lr), handle)


def _softmax(model: nn.Module, args: Any) -> tuple[Any, Any]:
    return F.cross_entropy, torch.optim.Adam(model.parameters(), lr=args.word_body_lr)


@torch.no_grad()
def _accuracies(model: nn.Module, words: Words) -> dict[str, float]:
    """By k, the share of test words that are among the k likeliest, in per cent."""
    every = torch.arange(CONTEXT, len(words.test))
    ranks: list[Tensor] = []
    for at in every[words.test[every] >= 0][::16].split(256):
        context, labels = _examples(words.test, at)
        scores = model.eval()(context)
        ranks.append((scores > scores.gather(1, labels[:, None])).sum(1))
    rank = torch.cat(ranks)
    return {str(k): 100 * float((rank < k).float().mean()) for k in TOPS}


# ---- what is told ---------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> list[Table]:
    """A row for each head."""
    settings, arms = results["settings"], by_seed(results["arms"])
    rows = [_row(arm, arms) for arm in ARMS if arm in arms]
    return [
        Table(
            ("head, words", *(f"top {k}, %" for k in TOPS), "steps", "a step"),
            rows,
            f"Words of Shakespeare, {settings['word_steps']} steps of {settings['word_batch']}",
            "The share of held-out words that are among the k first. 10k: the most frequent, in lower case; "
            "74k: all, as they are printed. In that time: as many steps as fit into the time of the "
            "Z-loss's. A step: its time, of all the network, over the Z-loss's, by medians, in turns.",
        )
    ]


def _row(arm: str, arms: dict[str, list[dict[str, Any]]]) -> tuple[str, ...]:
    logs, (head, size) = arms[arm], arm.split(", ")
    tops = [ranged([one["tops"][str(k)] for one in logs], "{:.1f}") for k in TOPS]
    ratios = [one["ratio"] for one in arms.get(f"{IN_THAT_TIME}, {size}", [])] if "softmax" in head else []
    step = ranged(ratios, "{:.1f}") if ratios else "1" if head == "Z-loss" else "-"
    return arm, *tops, ranged([one["steps"] for one in logs], "{:.0f}"), step


def draw(axes: Any, results: dict[str, Any]) -> None:
    """Accuracy over k: the mean of the seeds, all words dashed."""
    arms = {arm: logs for arm, logs in by_seed(results["arms"]).items() if arm in ARMS}
    heads = list(dict.fromkeys(arm.split(", ")[0] for arm in ARMS))
    for arm, logs in arms.items():
        head, size = arm.split(", ")
        means = [sum(one["tops"][str(k)] for one in logs) / len(logs) for k in TOPS]
        style = "o-" if size == "10k" else "o--"
        axes.plot(TOPS, means, style, color=COLOURS[heads.index(head)], label=arm, linewidth=1.1)
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=6)
