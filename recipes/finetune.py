"""Fine-tune SmolLM2-135M on Shakespeare, with and without methods that keep what the model knew.

Three arms of equal length: AdamW; AdamW + HFT, which trains a random half of the matrices; AdamW + HFT +
AdamR, which also pulls the weights to where they were. For each: loss on held-out Shakespeare; forgetting
(loss on general English minus what it was before); L2 distance from the pretrained weights; memory; times.

Source: HFT, arXiv 2404.18466; AdamR, arXiv 2410.09344.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import optx

from . import _assets, _finetune_report, _text
from ._run import Run, chosen, clock, device, median_ms, parser, state_bytes, warmed_up

# Each arm is the same loop; this is the line that changes.
ARMS: dict[str, Callable[[Optimizer, nn.Module, int], Optimizer]] = {
    "adamw": lambda adamw, model, seed: adamw,
    "adamw+hft": lambda adamw, model, seed: optx.wrap(adamw, optx.HFT(model, seed=seed)),
    "adamw+hft+adamr": lambda adamw, model, seed: optx.wrap(
        adamw, optx.HFT(model, seed=seed), optx.AdamR(weight=0.05)
    ),
}


def train(arm: str, data: _text.TextData, args: Any, run: Run) -> dict[str, Any] | None:
    """Fine-tune from the pretrained weights with one arm's optimizer; None if interrupted."""
    torch.manual_seed(args.seed)
    model = _assets.language_model(args.model)[0].to(device())
    pretrained = [p.detach().clone() for p in model.parameters()]

    optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    optimizer = ARMS[arm](optimizer, model, args.seed)
    scheduler = warmed_up(optimizer, args.steps)

    log: dict[str, Any] = {"step": 0, "loss": [], "curve": [], "step_s": [], "optimizer_s": []}
    if saved := run.load(arm):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        log = saved["log"]

    for step in run.steps(arm, log["step"], args.steps):
        tokens = data.batch(step, args.batch, args.seed)
        started = clock()
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        before = clock()
        optimizer.step()
        ended = clock()
        scheduler.step()
        log["loss"].append(loss.item())
        log["step_s"].append(ended - started)
        log["optimizer_s"].append(ended - before)
        log["step"] = step + 1
        if log["step"] in {args.steps // 3, args.steps * 2 // 3, args.steps}:
            held_out, general = data.losses(model)
            log["curve"].append([log["step"], held_out, general])
            run.say(f"{arm}, step {log['step']}: held out {held_out:.3f}, general English {general:.3f}")

    if log["step"] < args.steps:
        states = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        run.save(arm, {"log": log} | {name: part.state_dict() for name, part in states.items()})
        return None
    pairs = zip(model.parameters(), pretrained, strict=True)
    moved = sum(float((now.detach() - before).square().sum()) for now, before in pairs)
    return {
        "loss": log["loss"],
        "curve": log["curve"],
        "distance": moved**0.5,
        "state_bytes": state_bytes(optimizer),
        "optimizer_ms": median_ms(log["optimizer_s"]),
        "step_ms": median_ms(log["step_s"]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the arms one after the other and report."""
    args = parser(
        "finetune",
        __doc__ or "",
        steps=40,
        model={"help": "hub name or folder of a causal language model (default: SmolLM2-135M-Instruct)"},
        data={"help": "text file, folder of *.txt or hub data set to train on (default: Shakespeare)"},
        general={"help": "the same, of text that the model knew (default: 300 news articles)"},
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        # AdamW's best of 5e-5, 1e-4 and 2e-4, by loss on held-out Shakespeare
        lr={"type": float, "default": 1e-4, "help": "peak learning rate of all arms"},
        batch={"type": int, "default": 1, "help": "blocks a step"},
        length={"type": int, "default": 256, "help": "tokens of a block"},
        eval_blocks={"type": int, "default": 8, "help": "blocks of each text that losses are measured on"},
        resume={"action": "store_true", "help": "go on with an interrupted run"},
    ).parse_args(argv)
    arms = chosen(args.arms, ARMS)
    settings = {k: v for k, v in vars(args).items() if k not in ("arms", "out", "resume")}
    run = Run(args.out, settings, args.resume)
    model, tokenizer = _assets.language_model(args.model)
    data = _text.load(tokenizer, args)
    if "before" not in run.results:
        run.results["before"] = dict(
            zip(("held_out", "general"), data.losses(model.to(device())), strict=True)
        )
    del model
    for arm in arms:
        run.part(arm, train, arm, data, args, run)
    run.checkpoint.unlink(missing_ok=True)
    _finetune_report.report(run, arms)


if __name__ == "__main__":
    main()
