"""Explain: which directions of a network's activations matter, and what acts on what.

Part "digits": a network 64-48-48-10 reads handwriting. Each hidden layer is cut to its first directions in
the interaction basis (`optx.analysis.interaction_basis`) and in principal components: how many keep accuracy
within half a point, and how many edges to the next layer are above 1 % of the largest. Beside it: how many of
its weights are free (`optx.analysis.degeneracy`). The local basis and the global one are the same here: the
map from the last hidden layer to the output is linear.

Part "addition": the same of a network that has learnt a + b mod 59 (with perpGrad; see recipe `grokking`).

Part "halves": two networks 32-16-5 that read the halves of two different digits are glued by random rotations
of every layer. Do groups of edges find the halves again?

Part "svm": one layer of attention, trained by normalised gradients (`optx.NormalizedGrad`). Does it come to
the direction of the support vector machine of the tokens that it chooses (`optx.analysis.attention_svm`)?

Source: arXiv 2405.10927, arXiv 2405.10928 and, of part "svm", arXiv 2308.16898.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from . import _explain_report, _in_parts
from ._options import SEEDS
from ._run import Run, parser, settings_of

PARTS = _explain_report.PARTS
ARMS = [arm for part in PARTS.values() for arm in part.ARMS]


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "explain",
        __doc__ or "",
        steps=660,
        seeds={"default": 3} | SEEDS,
        parts={"default": ",".join(PARTS), "help": "which, comma-separated"},
        **_in_parts.options(PARTS),
        model={"help": "has no meaning here: the networks are small and trained from scratch"},
        data={"help": "has no meaning here: the data are scikit-learn's digits and modular addition"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all parts with all seeds and report."""
    args = options().parse_args(argv)
    if args.model or args.data:
        raise SystemExit("explain brings its own models and data; --model and --data have no meaning here.")
    parts = _in_parts.wanted(PARTS, args.parts)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    _in_parts.run_all(run, parts, args)
    _explain_report.report(run)


if __name__ == "__main__":
    main()
