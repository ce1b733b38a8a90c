"""The think recipe's part "bandit": one step whose mixture of 16 tokens is to be like one token's embedding.

All that is learnt are 16 logits, which begin at 0. A step's reward is minus the mean square between the
mixture and the target's embedding, so that every token's share in it has to be credited.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import optx

from ._options import positive, rate
from ._report import COLOURS, Table, band, by_seed, ranged
from ._run import Run

ARMS = ["masked mean", "sum"]
ONCE = False
TITLE, AXES = "A bandit of 16 tokens", ("step", "target's probability")
V, WIDTH, GROUPS, SAMPLES = 16, 8, 8, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "bandit_steps": {"type": positive, "default": 200, "help": "part bandit: steps"},
    "bandit_lr": {"type": rate, "default": 0.5, "help": "part bandit: SGD's rate"},
}


class Bandit(nn.Module):
    """The same logits after whatever tokens; their embeddings stay."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, WIDTH).requires_grad_(False)
        self.logits = nn.Parameter(torch.zeros(V))

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)[..., :1] * 0 + self.logits


def prepared(args: Any) -> None:
    """Nothing."""


def train(arm: str, seed: int, known: None, args: Any, run: Run) -> dict[str, Any] | None:
    """Rewards and the target's probability by step."""
    torch.manual_seed(seed)
    model = Bandit()
    target = int(torch.randint(V, ()))
    thinking = optx.attach(
        model,
        optx.SoftThinking(record=True, tau=0.1, temperature=1.0, top_k=V, top_p=1.0, max_topk=V),
        targets="embedding",
    )
    objective = optx.SofTGRPO(tau=0.1, kl=0.0, reduce=arm.replace(" ", "_"))
    opt = torch.optim.SGD([model.logits], lr=args.bandit_lr)
    prompts = torch.zeros(GROUPS, 1, dtype=torch.int64)
    found: dict[str, Any] = {"reward": [], "probability": []}
    for step in run.steps(f"{arm}, seed {seed}", 0, args.bandit_steps):
        rollout = thinking.rollout(prompts, SAMPLES, max_new_tokens=1, seed=1000 * seed + step, stop_ids=())
        mixtures = rollout.inputs(model)[:, -1]
        rewards = -(mixtures - model.embedding.weight[target]).square().mean(-1)
        loss = objective(model, rollout, rewards)
        opt.zero_grad()
        loss.backward()
        opt.step()
        found["reward"].append(float(rewards.mean()))
        found["probability"].append(float(model.logits.softmax(0)[target].detach()))
    if run.interrupt.wanted:
        return None
    found["hit"] = int(model.logits.argmax()) == target
    return found


# ---- what is told ---------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> list[Table]:
    """A row for each way to sum a step up."""
    settings, arms = results["settings"], by_seed(results["arms"])
    rows: list[tuple[str, ...]] = []
    for arm in (arm for arm in ARMS if arm in arms):
        logs = arms[arm]
        hits = f"{sum(one['hit'] for one in logs)} of {len(logs)}"
        first, last = ([sum(some(one)) / len(some(one)) for one in logs] for some in (_first, _last))
        ends = [one["probability"][-1] for one in logs]
        rows.append((arm, hits, ranged(ends, "{:.2f}"), ranged(first, "{:.2f}"), ranged(last, "{:.2f}")))
    return [
        Table(
            ("density", "target is likeliest", "its probability", "reward at first", "reward at last"),
            rows,
            f"A bandit of {V} tokens, {settings['bandit_steps']} steps of {GROUPS} groups of {SAMPLES}",
            f"Probability: at the end; at the start it is {1 / V:.4f}. Rewards: means of ten steps. Masked "
            "mean: over the tokens with a share above e^-3 = 0.0498, below which a share rests.",
        )
    ]


def _first(log: dict[str, Any]) -> list[float]:
    return log["reward"][:10]


def _last(log: dict[str, Any]) -> list[float]:
    return log["reward"][-10:]


def draw(axes: Any, results: dict[str, Any]) -> None:
    """The target's probability by step, the mean of the seeds and their range."""
    for colour, arm in zip(COLOURS, ARMS, strict=False):
        if logs := by_seed(results["arms"]).get(arm):
            curves = [one["probability"] for one in logs]
            band(axes, range(1, len(curves[0]) + 1), curves, colour, arm)
    axes.legend(frameon=False, fontsize=7)
