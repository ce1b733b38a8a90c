"""Certify: networks that are known not to change by more than L per unit of their input.

Part "digits": handwriting read by networks 64-64-64-10 that have one Lipschitz constant by construction: LDLT
(`optx.LDLT`), which bounds the network as a whole; torch's spectral norm and its orthogonal layers, of the
constant's third root each; and SLL's residual blocks (`optx.LDLT(residual=True)`). How many digits are read
right, and how many are certified to be at a distance.

Part "depth": of networks that were trained without any bound, how much less LipSDP
(`optx.analysis.lipschitz`) proves than the product of norms, and how near it is to what a search finds.

Source: LDLT, arXiv 2512.05915; LipSDP with MaxMin, arXiv 2401.14033.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from . import _certify_report, _in_parts
from ._options import SEEDS
from ._run import Run, parser, settings_of

PARTS = _certify_report.PARTS
ARMS = [arm for part in PARTS.values() for arm in part.ARMS]


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "certify",
        __doc__ or "",
        steps=570,
        seeds={"default": 5} | SEEDS,
        parts={"default": ",".join(PARTS), "help": "which, comma-separated"},
        **_in_parts.options(PARTS),
        model={"help": "has no meaning here: the networks are small and trained from scratch"},
        data={"help": "has no meaning here: the data are scikit-learn's digits"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all parts with all seeds and report."""
    args = options().parse_args(argv)
    if args.model or args.data:
        raise SystemExit("certify brings its own models and data; --model and --data have no meaning here.")
    parts = _in_parts.wanted(PARTS, args.parts)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    _in_parts.run_all(run, parts, args)
    _certify_report.report(run)


if __name__ == "__main__":
    main()
