"""Think: mixtures of tokens in the place of tokens, sampled, and trained by rewards.

Part "diversity": SmolLM2 thinks in mixtures, without noise, with Gumbel and with Dirichlet noise
(`optx.SoftThinking`): how many different thoughts there are, and whether a mixture's heaviest token is what
the model follows.

Part "bandit": one mixture of 16 tokens is rewarded for being like one of them. SofT-GRPO credits every token
of it; the density is a masked mean over tokens, as its authors' code has it, or their paper's sum.

Part "sums": a small transformer adds two-digit numbers in four steps of thought. After a supervised start,
broken off early, it is trained by right answers alone: SofT-GRPO (`optx.SofTGRPO`) where it thinks in
mixtures, GRPO where it thinks in tokens, from the same start with as many samples.

Source: Soft Thinking with randomness, arXiv 2508.03440; SofT-GRPO, arXiv 2511.06411.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from . import _in_parts, _think_report
from ._options import SEEDS
from ._run import Run, parser, settings_of

PARTS = _think_report.PARTS
ARMS = [arm for part in PARTS.values() for arm in part.ARMS]
ONCE = [arm for part in PARTS.values() if part.ONCE for arm in part.ARMS]


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "think",
        __doc__ or "",
        steps=100,
        seeds={"default": 3} | SEEDS,
        parts={"default": ",".join(PARTS), "help": "which, comma-separated"},
        **_in_parts.options(PARTS),
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all parts with all seeds and report."""
    args = options().parse_args(argv)
    parts = _in_parts.wanted(PARTS, args.parts)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    _in_parts.run_all(run, parts, args)
    _think_report.report(run)


if __name__ == "__main__":
    main()
