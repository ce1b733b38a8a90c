"""The vocab recipe's part "head": a language model's output head as a few codes.

The model's states are taken once; what trains is the head alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optx

from . import _assets, _text
from ._options import positive, rate
from ._report import COLOURS, Table, by_seed, ranged
from ._run import Run, clock, device, median_ms

# By arm, of how many tokens one has a code, and how they are mapped; the head as it is has none.
ARMS: dict[str, tuple[int, Any]] = {
    "full head": (0, None),
    "V/12 codes": (12, "kmeans"),
    "V/48 codes": (48, "kmeans"),
    "V/192 codes": (192, "kmeans"),
    "V/12 at random": (12, "random"),
}
ONCE = False
TITLE, AXES = "The output head", ("", "perplexity")
OPTIONS: dict[str, dict[str, Any]] = {
    "length": {"type": positive, "default": 128, "help": "tokens of a block of text"},
    "blocks": {"type": positive, "default": 48, "help": "of text that heads are tuned on"},
    "eval_blocks": {"type": positive, "default": 16, "help": "of text that they are measured on"},
    "batch": {"type": positive, "default": 128, "help": "positions a step"},
    "lr": {"type": rate, "default": 1e-3, "help": "AdamW's rate, for codes and their biases"},
    "full_lr": {
        "type": rate,
        "default": 3e-5,
        "help": "its rate for the full head, which is trained already",
    },
    "rounds": {"type": positive, "default": 3, "help": "calls that are timed"},
}


class States(NamedTuple):
    """What the head is given for each position, (N, d), and the token that comes next, (N,)."""

    hidden: Tensor
    labels: Tensor

    def parts(self, size: int = 512) -> Iterable[tuple[Tensor, Tensor]]:
        """A few positions at a time."""
        return zip(self.hidden.split(size), self.labels.split(size), strict=True)


class Known(NamedTuple):
    """A model, its states on text to tune on and on other text, and how often each token is in the first."""

    model: Any
    train: States
    test: States
    counts: Tensor


def prepared(args: Any) -> Known:
    """The model and the states, the same for all arms and seeds."""
    model, tokenizer = _assets.language_model(args.model)
    model.to(device()).eval()
    text = _assets.text(args.data, _assets.NEWS)
    found = _text.learned(tokenizer, text, args.length, args.eval_blocks)
    train = found.train[: args.blocks]
    V = model.get_output_embeddings().weight.shape[0]
    counts = torch.bincount(train.flatten(), minlength=V).float()
    first = _text.context(train)
    return Known(model, _states(model, train, 0), _states(model, found.held_out, first), counts)


@torch.no_grad()
def _states(model: Any, blocks: Tensor, first: int) -> States:
    each = [model.base_model(ids).last_hidden_state[:, first:-1].flatten(0, 1) for ids in blocks.split(4)]
    return States(torch.cat(each), blocks[:, first + 1 :].flatten().to(each[0].device))


def train(arm: str, seed: int, known: Known, args: Any, run: Run) -> dict[str, Any] | None:
    """Perplexity of the head as attached and tuned, with and without a bias for each token; its cost."""
    torch.manual_seed(seed)
    share, init = ARMS[arm]
    if not share:
        return _full(seed, known, args, run)
    V = len(known.counts)
    vq = optx.VQLogits(codes=max(1, V // share), init=init, untie=True, seed=seed)
    handle = optx.attach(known.model, vq)
    report, mapping, start = handle.report(), handle.mapping.clone(), handle.codebook.detach().clone()
    head = known.model.get_output_embeddings()
    found: dict[str, Any] = {"codes": len(start), "bytes": report.code_bytes, "gap": handle.gap(known.counts)}
    found["post_hoc"] = _perplexity(handle.loss, known.test)
    found["forward_ms"], found["loss_ms"] = _times(head, handle.loss, known.test, args)
    done = _tune(handle.parameters(), args.lr, handle.loss, f"{arm}, seed {seed}", seed, known, args, run)
    found["tuned"] = _perplexity(handle.loss, known.test)
    handle.remove()

    both = optx.VQLogits(codes=len(start), init="blocks", untie=True, token_bias=True)
    handle = optx.attach(known.model, both)  # of the same codes
    with torch.no_grad():
        handle.remap(mapping)
        handle.codebook.copy_(start)
        handle.fit_bias(known.counts)
    found["bias_post_hoc"] = _perplexity(handle.loss, known.test)
    what = f"{arm}, bias, seed {seed}"
    done = done and _tune(handle.parameters(), args.lr, handle.loss, what, seed, known, args, run)
    found["bias_tuned"] = _perplexity(handle.loss, known.test)
    found["bias_bytes"] = handle.report().code_bytes
    handle.remove()
    return found if done else None


def _full(seed: int, known: Known, args: Any, run: Run) -> dict[str, Any] | None:
    """The head as it is, and a copy of it tuned by as many steps, at a rate of its own."""
    head = nn.Linear(*known.model.get_output_embeddings().weight.shape[::-1], bias=False, device=device())
    with torch.no_grad():
        head.weight.copy_(known.model.get_output_embeddings().weight)

    def loss(hidden: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return F.cross_entropy(head(hidden), labels, **options)

    found: dict[str, Any] = {"codes": len(head.weight), "bytes": head.weight.nbytes}
    found["post_hoc"] = _perplexity(loss, known.test)
    found["forward_ms"], found["loss_ms"] = _times(head, loss, known.test, args)
    done = _tune([head.weight], args.full_lr, loss, f"full head, seed {seed}", seed, known, args, run)
    found["tuned"] = _perplexity(loss, known.test)
    return found if done else None


def _tune(
    trained: list[nn.Parameter],
    lr: float,
    loss: Callable[..., Tensor],
    what: str,
    seed: int,
    known: Known,
    args: Any,
    run: Run,
) -> bool:
    """Some steps of AdamW; whether it came to their end."""
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    draws = torch.Generator().manual_seed(seed)
    for step in run.steps(what, 0, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / args.steps)
        rows = torch.randint(len(known.train.labels), (args.batch,), generator=draws)
        optimizer.zero_grad()
        loss(known.train.hidden[rows], known.train.labels[rows]).backward()
        optimizer.step()
    return not run.interrupt.wanted


@torch.no_grad()
def _perplexity(loss: Callable[..., Tensor], states: States) -> float:
    total = sum(float(loss(hidden, labels, reduction="sum")) for hidden, labels in states.parts())
    return float(torch.tensor(total / len(states.labels)).exp())


def _times(head: nn.Module, loss: Callable[..., Tensor], states: States, args: Any) -> tuple[float, float]:
    """Milliseconds of all logits, and of a loss with its gradients."""
    hidden, labels = (one[: args.batch] for one in states)
    forward, whole = list[float](), list[float]()
    for _ in range(args.rounds):
        before = clock()
        with torch.no_grad():
            head(hidden)
        between = clock()
        loss(hidden.clone().requires_grad_(), labels).backward()
        forward.append(between - before)
        whole.append(clock() - between)
    for p in head.parameters():
        p.grad = None
    return median_ms(forward), median_ms(whole)


# ---- what is told ---------------------------------------------------------------------------------------

_COLUMNS = {
    "perplexity": ("post_hoc", "{:.1f}"),
    "tuned": ("tuned", "{:.1f}"),
    "with a bias": ("bias_post_hoc", "{:.1f}"),
    "with a bias, tuned": ("bias_tuned", "{:.1f}"),
    "gap, nats": ("gap", "{:.2f}"),
    "logits, ms": ("forward_ms", "{:.0f}"),
    "loss, ms": ("loss_ms", "{:.0f}"),
}


def tables(results: dict[str, Any]) -> list[Table]:
    """A row for each head."""
    settings, arms = results["settings"], by_seed(results["arms"])
    rows = [_row(arm, arms[arm]) for arm in ARMS if arm in arms]
    return [
        Table(
            ("head", *_COLUMNS, "MB"),
            rows,
            f"The output head, {settings['steps']} steps of {settings['batch']} positions",
            "Perplexity on other text. A bias: a number for each token, which begins as the log of the "
            "token's share of its code in the text that heads are tuned on. Gap: what one score for all "
            "tokens of a code costs at least, by those counts. Logits: all V of them, of "
            f"{settings['batch']} positions; loss: by codes, with its gradients (of the full head, by all "
            "logits). MB: of the head, without the bias; the model's is its embedding too, which stays.",
        )
    ]


def _row(arm: str, logs: list[dict[str, Any]]) -> tuple[str, ...]:
    cells = [
        ranged([one[key] for one in logs], form) if key in logs[0] else "-" for key, form in _COLUMNS.values()
    ]
    name = arm if arm == "full head" else f"{arm} ({logs[0]['codes']:,})"
    return name, *cells, f"{logs[0]['bytes'] / 1e6:.1f}"


def draw(axes: Any, results: dict[str, Any]) -> None:
    """Perplexity of each head: post hoc, tuned, and tuned with a bias for each token."""
    arms = {arm: logs for arm, logs in by_seed(results["arms"]).items() if arm in ARMS}
    kinds = {"post hoc": "post_hoc", "tuned": "tuned", "tuned, with a bias": "bias_tuned"}
    for i, (label, key) in enumerate(kinds.items()):
        places = [at + 0.25 * (i - 1) for at, logs in enumerate(arms.values()) if key in logs[0]]
        found = [sum(one[key] for one in logs) / len(logs) for logs in arms.values() if key in logs[0]]
        axes.bar(places, found, width=0.23, color=COLOURS[i], label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(arms)), [arm.replace(" ", "\n", 1) for arm in arms], fontsize=7)
    axes.legend(frameon=False, fontsize=7)
