"""The explain recipe's part "svm": one layer of attention with a fixed head, trained by normalised gradients.

n sequences of T unit tokens, each with a label of +-1; the first token of each asks. What is trained is W of
softmax(X W z), or K and Q with W = K Q'. The direction is compared, step by step, with the support vector
machine of the tokens which softmax has chosen in the end, in the Frobenius norm and in the nuclear one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

import optx

from ._options import positive, rate
from ._report import COLOURS, Table, band, by_seed, ranged
from ._run import Run

ARMS = ["attention, W", "attention, K and Q"]
ONCE = False
TITLE, AXES = "Attention and its SVM", ("step", "correlation")
N, T, D, EVERY = 6, 8, 10, 20
NORMS = {"fro": "Frobenius", "nuc": "nuclear"}
OPTIONS: dict[str, dict[str, Any]] = {
    "svm_steps": {"type": positive, "default": 1000, "help": "part svm: steps"},
    "svm_draws": {"type": positive, "default": 4, "help": "part svm: data sets a seed, trained side by side"},
    "svm_lr": {"type": rate, "default": 0.1, "help": "part svm: how long a step of W is, or of K and Q each"},
}


class Data(NamedTuple):
    """Tokens (S, n, T, d), heads (S, d) and labels (S, n) of all draws, in float64."""

    X: Tensor
    v: Tensor
    Y: Tensor

    def logits(self, W: Tensor) -> Tensor:
        """X W z, (S, n, T)."""
        return torch.einsum("sntd,sde,sne->snt", self.X, W, self.X[:, :, 0])

    def loss(self, W: Tensor) -> Tensor:
        """The draws' mean logistic losses, added: none has a part in another's gradient.

        What the head makes of tokens is counted from the heaviest one's. So gradients keep their digits when
        softmax is full, and no floor is needed that would stop training there.
        """
        logits = self.logits(W)
        heads = torch.einsum("sntd,sd->snt", self.X, self.v)
        own = heads.gather(-1, logits.argmax(-1, keepdim=True))
        output = own[..., 0] + (logits.softmax(-1) * (heads - own)).sum(-1)
        return softplus(-self.Y * output).mean(-1).sum()


def drawn(seed: int, draws: int) -> Data:
    """Unit Gaussian tokens and heads, and fair labels."""
    g = torch.Generator().manual_seed(seed)
    X = normalize(torch.randn(draws, N, T, D, generator=g, dtype=torch.float64), dim=-1)
    v = normalize(torch.randn(draws, D, generator=g, dtype=torch.float64), dim=-1)
    return Data(X, v, torch.randint(2, (draws, N), generator=g).double() * 2 - 1)


def prepared(args: Any) -> None:
    """Nothing."""


def train(arm: str, seed: int, known: None, args: Any, run: Run) -> dict[str, Any] | None:
    """Correlations by step, a curve for each draw."""
    data, g = drawn(seed, args.svm_draws), torch.Generator().manual_seed(seed)
    zeros = [nn.Parameter(torch.zeros(D, D, dtype=torch.float64)) for _ in data.v]
    # Both at 0 would be a saddle.
    Ks = [nn.Parameter(0.1 * torch.randn(D, D, generator=g, dtype=torch.float64)) for _ in data.v]
    by_factors = arm == ARMS[1]
    trained = [*Ks, *zeros] if by_factors else zeros
    opt = optx.wrap(torch.optim.SGD(trained, lr=args.svm_lr), optx.NormalizedGrad(floor=1e-250))
    seen: list[Tensor] = []
    for step in run.steps(f"{arm}, seed {seed}", 0, args.svm_steps):
        opt.zero_grad()
        W = torch.stack([*Ks]) @ torch.stack([*zeros]).mT if by_factors else torch.stack([*zeros])
        data.loss(W).backward()
        opt.step()
        if step % EVERY == EVERY - 1 or step == args.svm_steps - 1:
            seen.append(W.detach())
    return None if run.interrupt.wanted else _compared(data, seen)


def _compared(data: Data, seen: list[Tensor]) -> dict[str, Any]:
    """With the SVMs of the tokens that have the largest weight at the end."""
    weights = data.logits(seen[-1]).softmax(-1)
    chosen = weights.argmax(-1)
    best = (data.Y[..., None] * torch.einsum("sntd,sd->snt", data.X, data.v)).argmax(-1)
    found: dict[str, Any] = {
        "weight": [float(w.amax(-1).mean()) for w in weights],
        "best": float((chosen == best).double().mean()),
    }
    for norm in NORMS:
        svms = [
            optx.analysis.attention_svm(X, X[:, 0], choice, norm)
            for X, choice in zip(data.X, chosen, strict=True)
        ]
        found[norm] = [
            [optx.analysis.corr(W[s], svm.W) for W in seen] for s, svm in enumerate(svms) if svm.feasible
        ]
        ranks = [int(torch.linalg.matrix_rank(svm.W, tol=1e-5 * svm.value)) for svm in svms if svm.feasible]
        found[f"{norm} rank"] = sum(ranks) / max(len(ranks), 1)
    return found


# ---- what is told ---------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> list[Table]:
    """A row for what is trained."""
    settings, arms = results["settings"], by_seed(results["arms"])
    rows: list[tuple[str, ...]] = []
    for arm in (arm for arm in ARMS if arm in arms):
        logs = arms[arm]
        corrs = [ranged([curve[-1] for log in logs for curve in log[norm]]) for norm in NORMS]
        ranks = [f"{_mean(logs, f'{norm} rank'):.1f}" for norm in NORMS]
        weights = ranged([weight for log in logs for weight in log["weight"]])
        rows.append((arm, *corrs, *ranks, weights, f"{_mean(logs, 'best'):.0%}"))
    return [
        Table(
            (
                "trained",
                *(f"corr to the {word} SVM" for word in NORMS.values()),
                *(f"its rank ({word})" for word in NORMS.values()),
                "largest weight",
                "best token",
            ),
            rows,
            f"Attention over {T} tokens of {D} numbers, {N} sequences, {settings['svm_steps']} steps, "
            f"{settings['svm_draws']} draws a seed",
            "Correlations, at the end, are with the SVM that separates what softmax has chosen then; in "
            "brackets the draws' least and most. Largest weight: softmax's, the mean over sequences. Best "
            "token: how often it has the largest weight, best being what the fixed head scores highest; "
            "elsewhere the direction is a local optimum.",
        )
    ]


def _mean(logs: list[dict[str, Any]], what: str) -> float:
    return sum(log[what] for log in logs) / len(logs)


def draw(axes: Any, results: dict[str, Any]) -> None:
    """Correlations by step, the mean of the draws and their range."""
    lines = [(ARMS[0], "fro", "-"), (ARMS[1], "nuc", "-"), (ARMS[1], "fro", "--")]
    arms, steps = by_seed(results["arms"]), results["settings"]["svm_steps"]
    for colour, (arm, norm, style) in zip(COLOURS, lines, strict=False):
        if arm in arms:
            curves = [curve for log in arms[arm] for curve in log[norm]]
            at = [min(EVERY * (k + 1), steps) for k in range(len(curves[0]))]
            band(axes, at, curves, colour, f"{arm.partition(', ')[2]}, {NORMS[norm]} SVM", style)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=7, loc="lower right")
