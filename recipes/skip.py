"""Skip what a sample does not need: filters of convolutions (FTWT), windows of transformers (AdaWPT).

A small network reads handwritten digits. After half of the steps each convolution gets a predictor, which
learns from the activations which filters are worth computing for a digit; after half of the rest predictors
are frozen. `r` is the share of the activations' mass that the kept filters are to have. Beside it: the dense
network at equal steps, and as many filters as predicted, chosen at random. Windows: images of which one or
two cells are blurred, and a network that may compute those alone. A ResNet-18 and a Swin2SR are timed.

Setting: predictors learn at 10, where the paper has 0.1 and some hundred times the steps; the rest is ours.

Source: FTWT, arXiv 2110.08232; AdaWPT, arXiv 2306.14268.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from . import _skip_filters, _skip_report, _skip_windows
from ._flatness_parts import TRAIN
from ._options import SEEDS, positive, rate, strength, whole
from ._run import Run, SettingsError, chosen, parser, settings_of

ARMS = (*_skip_filters.ARMS, *_skip_windows.ARMS)


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "skip",
        __doc__ or "",
        steps=600,
        seeds={"default": 3} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        width={"type": positive, "default": 16, "help": "channels of the first convolution"},
        batch={"type": whole(2, TRAIN), "default": 50, "help": "digits a step"},
        lr={"type": rate, "default": 0.05, "help": "learning rate of the dense half"},
        tune_lr={"type": rate, "default": 0.01, "help": "of the network in the other half"},
        predictor_lr={"type": rate, "default": 10.0, "help": "of predictors"},
        rounds={"type": positive, "default": 30, "help": "calls of each kind that are timed"},
        timed_width={"type": positive, "default": 64, "help": "channels of the ResNet's first convolution"},
        size={"type": positive, "default": 224, "help": "pixels of its image's sides"},
        window_steps={"type": positive, "default": 600, "help": "steps of windows' arms"},
        window_loss={"type": strength, "default": 0.1, "help": "weight of their pruning loss"},
        window_rounds={"type": positive, "default": 10, "help": "calls of the Swin2SR that are timed"},
        model={"help": "has no meaning here: models are small convolutional networks"},
        data={"help": "has no meaning here: the data is scikit-learn's digits"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options().parse_args(argv)
    if args.model or args.data:
        raise SettingsError("skip brings its own models and data; --model and --data mean nothing here.")
    arms = chosen(args.arms, ARMS)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    halves = [(half, [arm for arm in arms if arm in half.ARMS]) for half in (_skip_filters, _skip_windows)]
    for key, (half, own) in zip(("seconds", "window_seconds"), halves, strict=True):
        if own and key not in run.results:
            run.results[key] = half.seconds(args)
    for seed in range(args.seed, args.seed + args.seeds):
        for half, own in halves:
            for arm in own:
                run.part(f"{arm}/{seed}", half.train, arm, seed, args, run)
    _skip_report.report(run)


if __name__ == "__main__":
    main()
