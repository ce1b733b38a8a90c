"""The think recipe's part "sums": a small transformer that works two-digit sums out, trained by its answers.

``47+85=2131>132.``: four tokens of thought (the sum's last digit, its carry, the next digit, the hundreds),
a token that ends thinking, three of the answer, and a full stop. A supervised start learns this from examples
and is broken off when it is right now and then. From there each arm trains by rewards alone: 1 if the answer
is right. It thinks in mixtures (SofT-GRPO) or in tokens (GRPO), with as many samples.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

import optx

from ._options import positive, rate, strength
from ._report import COLOURS, Table, band, by_seed, ranged
from ._run import Run

TOKENS = "0123456789+=>."
END, STOP = TOKENS.index(">"), TOKENS.index(".")
START, MIXTURES, WORDS = "start", "mixtures", "tokens"
ARMS = [
    f"{START}, {WORDS}",
    f"{START}, {MIXTURES}",
    f"GRPO, {WORDS}",
    f"SofT-GRPO, {MIXTURES}",
]
ONCE = False
TITLE, AXES = "Two-digit sums", ("step", "pass@1 of the samples, %")
HELD_OUT, SAMPLES, LONGEST = 256, 8, 9
OPTIONS: dict[str, dict[str, Any]] = {
    "warm_steps": {"type": positive, "default": 420, "help": "part sums: steps of the supervised start"},
    "warm_lr": {"type": rate, "default": 2e-3, "help": "part sums: its rate"},
    "sums_lr": {"type": rate, "default": 3e-4, "help": "part sums: their rate"},
    "questions": {"type": positive, "default": 48, "help": "part sums: sums a step, of 8 samples each"},
    "kl": {"type": strength, "default": 1e-3, "help": "part sums: weight of the divergence from the start"},
}


class Sums(NamedTuple):
    """Sums as token numbers: the questions, (N, 6), what follows them, (N, 9), and which are held out."""

    questions: Tensor
    answers: Tensor
    test: Tensor
    train: Tensor


class Known(NamedTuple):
    """All sums, and the supervised starts by seed."""

    sums: Sums
    starts: dict[int, Any]


def prepared(args: Any) -> Known:
    """All sums of two numbers from 10 to 99, in an order of their own."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    texts = [worked(*pairs[i]) for i in order.tolist()]
    ids = torch.tensor([[TOKENS.index(c) for c in text] for text in texts])
    every = torch.arange(len(texts))
    return Known(Sums(ids[:, :6], ids[:, 6:], every[:HELD_OUT], every[HELD_OUT:]), {})


def worked(a: int, b: int) -> str:
    """A sum as it is learnt."""
    units, total = a % 10 + b % 10, f"{a + b:03d}"
    return f"{a}+{b}={units % 10}{units // 10}{total[1]}{total[0]}>{total}."


def network(seed: int) -> Any:
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=STOP,
        bos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def started(seed: int, known: Known, args: Any, run: Run) -> Any:
    """The network after some supervised steps; None if interrupted."""
    if seed in known.starts:
        return copy.deepcopy(known.starts[seed])
    model, sums = network(seed), known.sums
    opt = torch.optim.AdamW(model.parameters(), lr=args.warm_lr)
    draws = torch.Generator().manual_seed(seed)
    for step in run.steps(f"supervised start, seed {seed}", 0, args.warm_steps):
        opt.param_groups[0]["lr"] = args.warm_lr * (1 - step / args.warm_steps)
        rows = sums.train[torch.randint(len(sums.train), (64,), generator=draws)]
        ids = torch.cat([sums.questions[rows], sums.answers[rows]], 1)
        model(ids, labels=ids.index_fill(1, torch.arange(6), -100)).loss.backward()
        opt.step()
        opt.zero_grad()
    if run.interrupt.wanted:
        return None
    known.starts[seed] = model.eval()
    return copy.deepcopy(model)


def train(arm: str, seed: int, known: Known, args: Any, run: Run) -> dict[str, Any] | None:
    """Rewards by step, and pass@1 and pass@8 on sums that were held out."""
    kind, thinks = arm.split(", ")
    if (model := started(seed, known, args, run)) is None:
        return None
    sums, soft = known.sums, thinks == MIXTURES
    thinking = optx.attach(
        model, optx.SoftThinking(record=True, tau=0.1, temperature=1.0, top_k=5, max_topk=5, end_id=END)
    )
    rewarded: list[float] = []
    if kind != START:
        start = copy.deepcopy(known.starts[seed])
        objective = optx.SofTGRPO(tau=0.1, kl=args.kl)
        opt = optx.wrap(
            torch.optim.AdamW(model.parameters(), lr=args.sums_lr, weight_decay=0.0), optx.Clip(1.0)
        )
        first = _resumed(arm, seed, run, model, opt, rewarded)
        for step in run.steps(f"{arm}, seed {seed}", first, args.steps):
            draws = torch.Generator().manual_seed(1000 * seed + step)
            rows = sums.train[torch.randint(len(sums.train), (args.questions,), generator=draws)]
            rollout = thinking.rollout(
                sums.questions[rows], SAMPLES, max_new_tokens=LONGEST, seed=step, thinking=soft
            )
            rewards = right(rollout, sums.answers[rows])
            loss = objective(model, rollout, rewards, start)
            opt.zero_grad()
            loss.backward()
            opt.step()
            rewarded.append(float(rewards.mean()))
        if run.interrupt.wanted:
            state = {"model": model.state_dict(), "opt": opt.state_dict(), "rewarded": rewarded}
            run.save(f"{arm}/{seed}", state)
            return None
    rollout = thinking.rollout(
        sums.questions[sums.test], SAMPLES, max_new_tokens=LONGEST, seed=10**6 + seed, thinking=soft
    )
    correct = right(rollout, sums.answers[sums.test]).view(-1, SAMPLES)
    thinking.remove()
    return {
        "pass1": 100 * float(correct.mean()),
        "pass8": 100 * float(correct.amax(1).mean()),
        "rewards": rewarded,
    }


def _resumed(arm: str, seed: int, run: Run, model: Any, opt: Any, rewarded: list[float]) -> int:
    """Go on with an interrupted arm; its first step."""
    if (state := run.load(f"{arm}/{seed}")) is None:
        return 0
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["opt"])
    rewarded += state["rewarded"]
    return len(rewarded)


def right(rollout: Any, answers: Tensor) -> Tensor:
    """1 where what follows the end of thinking is the answer and a stop, else 0: one a row."""
    wanted = answers.repeat_interleave(rollout.group, 0)[:, 5:]
    tokens = rollout.tokens
    found = torch.zeros(len(tokens))
    ends = (tokens == END) & rollout.mask
    for row in ends.any(1).nonzero().flatten().tolist():
        after = tokens[row, int(ends[row].float().argmax()) + 1 :][: wanted.shape[1]]
        found[row] = float(torch.equal(after, wanted[row]))
    return found


# ---- what is told ---------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> list[Table]:
    """A row for each arm."""
    settings, arms = results["settings"], by_seed(results["arms"])
    rows: list[tuple[str, ...]] = []
    for arm in (arm for arm in ARMS if arm in arms):
        logs = arms[arm]
        cells = [ranged([one[key] for one in logs], "{:.1f}") for key in ("pass1", "pass8")]
        last = [100 * sum(some) / len(some) for one in logs if (some := one["rewards"][-10:])]
        rows.append((arm, *cells, ranged(last, "{:.1f}") if last else "-"))
    return [
        Table(
            ("trained by, thinks in", "pass@1, %", f"pass@{SAMPLES}, %", "in training, %"),
            rows,
            f"Two-digit sums, {settings['steps']} steps of {settings['questions']} x {SAMPLES} samples",
            f"Of {HELD_OUT} sums that nothing was learnt from, {SAMPLES} samples each: the share of right "
            "answers, and of sums with one. In training: right answers in the last ten steps. Start: "
            f"{settings['warm_steps']} supervised steps, from which both arms go on.",
        )
    ]


def draw(axes: Any, results: dict[str, Any]) -> None:
    """Rewards by step, means over ten, of all seeds."""
    arms = by_seed(results["arms"])
    for colour, arm in zip(COLOURS, ARMS[2:], strict=False):
        if logs := arms.get(arm):
            curves = [_smooth([100 * r for r in one["rewards"]]) for one in logs]
            band(axes, range(len(curves[0])), curves, colour, arm)
    axes.legend(frameon=False, fontsize=7)


def _smooth(values: list[float], over: int = 10) -> list[float]:
    parts = [values[max(0, i - over + 1) : i + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in parts]
