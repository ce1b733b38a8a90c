"""Flow: DNA out of Gumbel noise, made richer in G and C by a classifier that was never told of the flow.

A transformer of two layers learns windows of a chloroplast's genome, and a repeated motif, by Gumbel-softmax
flow matching, with the paper's noise and with noise that the velocity moves exactly, and by score matching;
beside them linear flow matching and masked diffusion. What they make is compared with held-out data by its
words of two and three bases. A network that reads the share of G and C off clean sequences then guides the
flow, straight through; and one token's law is learned over vocabularies of 4 to 160.

Source: Gumbel-softmax flow matching and STGFlow, arXiv 2503.17361.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import optx

from . import _flow_data, _flow_report
from ._flow_parts import Denoiser, LinearFlow, MaskedDiffusion, Pointwise, reader
from ._options import SEEDS, positive, rate, whole
from ._run import Run, SettingsError, chosen, device, parser, settings_of

ARMS: dict[str, Any] = {
    "Gumbel flow": lambda vocab: optx.GumbelFlow(vocab),
    "Gumbel flow (fixed)": lambda vocab: optx.GumbelFlow(vocab, noise="fixed"),
    "Gumbel score": lambda vocab: optx.GumbelFlow(vocab, form="score"),
    "linear flow": LinearFlow,
    "masked diffusion": MaskedDiffusion,
}
TOYS = ("Gumbel flow", "Gumbel flow (fixed)", "linear flow")
VOCABULARIES = (4, 20, 80, 160)
GAMMAS = (0.0, 2.5, 5.0, 10.0, 20.0)
GUIDED = ("Gumbel flow",)


def trained(
    flow: Any, model: nn.Module, data: Any, seed: int, size: int, args: Any, run: Run, key: str
) -> bool:
    """The loop; False if interrupted."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    draws = torch.Generator().manual_seed(seed)
    for _ in run.steps(key, 0, args.steps):
        (loss := flow.loss(model, data.batch(draws, size), generator=draws)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.live(loss)
    return not run.interrupt.wanted


def measure(arm: str, kinds: dict[str, Any], seed: int, args: Any, run: Run) -> dict[str, Any] | None:
    """An arm on all kinds of sequences, and on one token's law."""
    works = {name: lambda n=name: sequences(arm, kinds[n], n, seed, args, run) for name in kinds}
    if arm in TOYS:
        works["tokens"] = lambda: toy(arm, seed, args, run)
    found = {name: not run.interrupt.wanted and work() for name, work in works.items()}
    return found if all(found.values()) else None


def sequences(arm: str, data: Any, name: str, seed: int, args: Any, run: Run) -> dict[str, Any] | None:
    """An arm on one kind of sequences: words, and where it is guided, what becomes of G and C."""
    torch.manual_seed(seed)
    flow = ARMS[arm](4)
    model = Denoiser(4 + (arm == "masked diffusion"), 4, data.length, args.width).to(device())
    batch = args.batch * (args.length // data.length if name == "motif" else 1)
    begun = time.perf_counter()
    if not trained(flow, model, data, seed, batch, args, run, f"{name}: {arm}, seed {seed}"):
        return None
    spent = time.perf_counter() - begun
    shape = (args.samples, data.length)
    made = flow.sample(model, shape, args.euler, generator=torch.Generator().manual_seed(seed))
    found = _flow_data.kmer_divergences(data.test, made) | {"gc": _flow_data.gc(made), "seconds": spent}
    if name == "dna" and arm in GUIDED:
        found["guided"] = guided(flow, model, data, seed, shape, args)
    return found


def guided(flow: Any, model: nn.Module, data: Any, seed: int, shape: Any, args: Any) -> dict[str, Any]:
    """The share of G and C by strength, and how different the samples still are."""
    content, found = reader(data, seed), {}
    for gamma in GAMMAS:
        guide = optx.STGuide(content, gamma=gamma, samples=4)
        draws = torch.Generator().manual_seed(seed)
        made = flow.sample(model, shape, args.euler, guide=guide, generator=draws)
        found[f"{gamma:g}"] = {"gc": _flow_data.gc(made)} | _flow_data.diversity(made)
    return found


def toy(arm: str, seed: int, args: Any, run: Run) -> dict[str, Any] | None:
    """One token, its law 1 / rank, over larger and larger vocabularies: KL of the law to samples."""
    found: dict[str, Any] = {}
    for vocab in VOCABULARIES:
        torch.manual_seed(seed)
        law, data = _flow_data.law(vocab)
        flow, model = ARMS[arm](vocab), Pointwise(vocab).to(device())
        if not trained(flow, model, data, seed, 512, args, run, f"{vocab} tokens: {arm}, seed {seed}"):
            return None
        made = flow.sample(model, (4096, 1), args.euler, generator=torch.Generator().manual_seed(seed))
        found[str(vocab)] = _flow_data.divergence(law, _flow_data.kmers(made, 1, vocab))
    return found


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "flow",
        __doc__ or "",
        steps=300,
        seeds={"default": 3} | SEEDS,
        arms={"default": ",".join(("baselines", *ARMS)), "help": "which, comma-separated"},
        length={"type": whole(16, _flow_data.BLOCK), "default": 64, "help": "bases of a window"},
        width={"type": positive, "default": 64, "help": "of the transformer's two layers"},
        batch={"type": positive, "default": 16, "help": "windows a step"},
        samples={"type": positive, "default": 96, "help": "sequences that are made to be measured"},
        euler={"type": positive, "default": 50, "help": "steps of each sampler"},
        lr={"type": rate, "default": 0.003, "help": "AdamW's"},
        model={"help": "has no meaning here: the model is a small network, trained from scratch"},
        data={"help": "a genome, GenBank or FASTA; default: a chloroplast's, in Biopython's sources"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options().parse_args(argv)
    if args.model:
        raise SettingsError("flow brings its own model; --model has no meaning here.")
    if args.euler < 7:
        raise SettingsError(f"--euler {args.euler}: below 7 steps probabilities would fall below 0.")
    arms = chosen(args.arms, ("baselines", *ARMS))
    kinds = {"dna": _flow_data.dna(_flow_data.genome(args.data), args.length), "motif": _flow_data.motifs()}
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    for seed in range(args.seed, args.seed + args.seeds):
        run.part(f"baselines/{seed}", _flow_data.baselines, kinds, seed)
        for arm in (one for one in ARMS if one in arms):
            run.part(f"{arm}/{seed}", measure, arm, kinds, seed, args, run)
    _flow_report.report(run)


if __name__ == "__main__":
    main()
