"""Vocab: what an output head costs, and what it costs to make it cheaper.

Part "head": SmolLM2's head, 49,152 tokens, is exchanged for the codebook of `optx.VQLogits`. K-means over its
rows gives each token a code; all tokens of a code have one score, or with a bias for each token one score and
a share. Told are perplexity on other news as attached, after a few steps that train the head alone (the full
head too), the milliseconds of logits and of the loss by codes, and bytes. Beside it: a mapping at random.

Part "words": the next word of Shakespeare by a small network, whose head has the Z-loss or the squared error
and takes its exact step in factors (`optx.SphericalHead`, `optx.ZLoss`), or is a softmax's.

Source: VQ-Logits, arXiv 2505.10202; the Z-loss, arXiv 1604.08859; its exact step, arXiv 1412.7091.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from . import _in_parts, _vocab_report
from ._options import SEEDS
from ._run import Run, parser, settings_of

PARTS = _vocab_report.PARTS
ARMS = [arm for part in PARTS.values() for arm in part.ARMS]


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "vocab",
        __doc__ or "",
        steps=50,
        seeds={"default": 3} | SEEDS,
        parts={"default": ",".join(PARTS), "help": "which, comma-separated"},
        **_in_parts.options(PARTS),
        model={"help": "part head: a hub name or a folder (default: SmolLM2-135M-Instruct)"},
        data={"help": "part head: a text file or a folder of *.txt (default: 300 news articles)"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all parts with all seeds and report."""
    args = options().parse_args(argv)
    parts = _in_parts.wanted(PARTS, args.parts)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    _in_parts.run_all(run, parts, args)
    _vocab_report.report(run)


if __name__ == "__main__":
    main()
