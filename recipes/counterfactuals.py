"""Ask what would have to differ for another decision, so that it still holds when the model is trained anew.

A perceptron tells malignant from benign tumours (scikit-learn's breast-cancer data, 30 features scaled to
[0, 1]). Of test rows that it calls malignant: the closest point that it calls benign (closest), the nearest
such example (nearest), and T-Rex's two, which have a Stability of tau: steps from the closest one (trex-i),
and the first stable example (trex-nn). The control takes the same steps until the probability of benign, and
not Stability, is tau (confident). Then others are trained from other seeds, on the same rows, or on as many
drawn with replacement: how many of them agree?

Source: T-Rex, arXiv 2305.11997.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import optx

from . import _counterfactuals_report
from ._counterfactuals_parts import Setting, agreeing, outliers, setting
from ._options import SEEDS, positive, rate, share
from ._run import Run, chosen, parser, settings_of

ARMS = ("closest", "confident", "trex-i", "nearest", "trex-nn")
TAUS = {
    "trex-i": (0.5, 0.6, 0.7, 0.8, 0.9),
    "trex-nn": (0.5, 0.6, 0.7, 0.8, 0.9),
    "confident": (0.6, 0.9, 0.95, 0.98, 0.99, 0.999),
}
"""Besides --tau: what it buys at which price."""


def found(arm: str, tau: float, seed: int, s: Setting, args: Any) -> optx.analysis.Counterfactuals:
    """One counterfactual for each factual, all in the box of features."""
    options: dict[str, Any] = {
        "data": s.data,
        "bounds": (0, 1),
        "tau": tau,
        "sigma": args.sigma,
        "generator": seed,
    }
    if arm == "closest":
        options |= {"max_steps": 0}
    elif arm == "nearest":
        options |= {"base": "nn", "max_steps": 0}
    elif arm == "trex-i":
        options |= {"max_steps": args.walk}
    elif arm == "trex-nn":
        options |= {"method": "nn"}
    else:  # without noise Stability is the probability
        options |= {"max_steps": args.walk, "sigma": 1e-5, "k": 1}
    return optx.analysis.robust_counterfactual(s.model, s.factuals, target=1, **options)


def measured(arm: str, seed: int, args: Any, run: Run) -> dict[str, Any] | None:
    """What an arm's points are, by tau; None if interrupted."""
    if (s := setting(seed, args, run)) is None:
        return None
    taus = sorted({args.tau, *TAUS.get(arm, ())}) if arm in TAUS else [args.tau]
    log: dict[str, Any] = {"taus": taus, "at": []}
    for i in run.steps(f"{arm}, seed {seed}", 0, len(taus)):
        cf = found(arm, taus[i], seed, s, args)
        stability = optx.analysis.stability(s.model, cf.x, target=1, sigma=args.sigma, generator=10**6 + seed)
        each = {
            "stability": stability,
            "probability": s.model(cf.x).softmax(1)[:, 1].detach(),
            "distance": cf.distance,
            "lof": outliers(s, cf.x),
            **{kind: agreeing(models, cf.x) for kind, models in s.others.items()},
        }
        means = {name: float(value.double().mean()) for name, value in each.items()}
        log["at"].append(means | {"reached": float(cf.reached.double().mean())})
        if taus[i] == args.tau:
            # Ranks are made of these: what differs by rounding alone is a tie.
            log["each"] = {name: [round(v, 4) for v in value.tolist()] for name, value in each.items()}
    return None if run.interrupt.wanted else log | {"accuracy": s.accuracy}


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "counterfactuals",
        __doc__ or "",
        steps=350,
        seeds={"default": 5} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        tau={"type": share, "default": 0.75, "help": "the Stability that T-Rex's points shall have"},
        sigma={"type": rate, "default": 0.1, "help": "deviation of Stability's noise"},
        walk={"type": positive, "default": 200, "help": "steps that a counterfactual may take"},
        factuals={"type": positive, "default": 30, "help": "test rows to be explained, at most"},
        others={"type": positive, "default": 20, "help": "models trained anew, of each kind"},
        lr={"type": rate, "default": 1e-3, "help": "Adam's rate"},
        model={"help": "has no meaning here: the model is a small MLP, trained from scratch"},
        data={
            "help": "a CSV file of numbers under a line of names, whose last column is 0, or 1 for the "
            "class that is wanted (default: scikit-learn's breast-cancer data)"
        },
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options().parse_args(argv)
    if args.model:
        raise SystemExit("counterfactuals trains its own small models; --model has no meaning here.")
    arms = chosen(args.arms, ARMS)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    for seed in range(args.seed, args.seed + args.seeds):
        for name in arms:
            run.part(f"{name}/{seed}", measured, name, seed, args, run)
    _counterfactuals_report.report(run)


if __name__ == "__main__":
    main()
