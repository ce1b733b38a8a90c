"""Fine-tune SmolLM2-135M on Shakespeare, with and without methods that keep what the model was.

Three arms of equal length: AdamW; AdamW + HFT, which trains a random half of the matrices; AdamW + HFT +
AdamR, which also pulls the weights to where they were. For each: the loss on held-out Shakespeare; drift,
KL(pretrained || tuned) in nats a token, on general English and on the model's own answers to a dozen prompts
(made before tuning); the share of those answers' tokens that it would still choose; some answers before and
after; the loss on general English; memory; times. What moves less drifts less: hold an arm against AdamW at a
smaller rate too, as in ``--arms adamw,adamw@0.5,adamw+hft``.

``torchrun --nproc-per-node 2 -m optx.recipes.finetune`` trains on two processes, which share a batch (DDP);
with ``--fsdp`` the weights too (FSDP2). One process with the same ``--batch`` gives the same numbers.
``--state 8bit --master split``, as in `optx.wrap`: all arms keep moments and weights in fewer bytes.

Keywords: DDP, FSDP2, torchrun, SLURM, Kubernetes, Ray, cluster, several machines, 8-bit optimizer,
low-bit state.

Source: HFT, arXiv 2404.18466; AdamR, arXiv 2410.09344.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

import optx

from . import _assets, _drift, _finetune_report, _formats, _parallel, _text
from ._options import SEEDS, path, positive, rate, whole
from ._run import (
    Run,
    SettingsError,
    chosen,
    clock,
    device,
    gradient_bytes,
    median_ms,
    parser,
    settings_of,
    state_bytes,
    warmed_up,
)

# Each arm is the same loop; this is the line that changes.
ARMS: dict[str, Callable[[Optimizer, nn.Module, int], Optimizer]] = {
    "adamw": lambda adamw, model, seed: adamw,
    "adamw+hft": lambda adamw, model, seed: optx.wrap(adamw, optx.HFT(model, seed=seed)),
    "adamw+hft+adamr": lambda adamw, model, seed: optx.wrap(
        adamw, optx.HFT(model, seed=seed), optx.AdamR(weight=0.05)
    ),
}


def arm_and_factor(text: str) -> tuple[str, float]:
    """An arm and what its rate is multiplied by: ``adamw@0.5`` is AdamW at half the rate."""
    arm, _, factor = map(str.strip, text.partition("@"))
    try:
        number = float(factor or 1)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise SettingsError(f"--arms: {text}: after @ stands a factor on the learning rate, as in {arm}@0.5.")
    return arm, number


class Measures(NamedTuple):
    """What an arm is measured with.

    Attributes:
        data: the text to learn.
        drift: from the pretrained model.
        tokenizer: the model's.
        asked: the prompts.
        answer_length: tokens of an answer, at most.
    """

    data: _text.TextData
    drift: _drift.Drift
    tokenizer: Any
    asked: Sequence[str]
    answer_length: int

    def point(self, model: nn.Module, team: _parallel.Team) -> dict[str, float]:
        """Where the model is now."""
        with team.whole(model):
            return {"held_out": _text.loss_on(model, self.data.held_out)} | self.drift.measure(model)

    def answers(self, model: nn.Module, team: _parallel.Team) -> _drift.Answers:
        """What it answers now."""
        with team.whole(model):
            return _drift.answers(model, self.tokenizer, self.asked, self.answer_length)


def train(arm: str, seed: int, measures: Measures, args: Any, run: Run) -> dict[str, Any] | None:
    """Fine-tune from the pretrained weights with one arm's optimizer; None if interrupted."""
    torch.manual_seed(seed)
    team = run.team
    model = _formats.cast(_assets.language_model(args.model)[0].to(device()), args.master)
    method, factor = arm_and_factor(arm)
    trained = team.spread(model, idle="hft" in method)  # several processes: DDP or FSDP2; else the model
    pretrained = [p.detach().clone() for p in model.parameters()]

    lr = factor * args.lr
    optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    optimizer = _formats.kept(ARMS[method](optimizer, model, seed), args.state, args.master)
    optimizer = team.measured(optimizer)
    scheduler = warmed_up(optimizer, args.steps)

    key = f"{arm}/{seed}"
    log: dict[str, Any] = {"step": 0, "loss": [], "curve": [], "step_s": [], "optimizer_s": []}
    if saved := run.load(key):
        team.restore(model, optimizer, saved)
        scheduler.load_state_dict(saved["scheduler"])
        log = saved["log"]

    looked_at = {args.steps * part // 3 for part in (1, 2, 3)}
    for step in run.steps(f"{arm}, seed {seed}", log["step"], args.steps):
        tokens = team.share(measures.data.batch(step, args.batch, seed))
        started = clock()
        loss = trained(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        before = clock()
        optimizer.step()
        ended = clock()
        scheduler.step()
        log["loss"].append(team.mean(loss))
        run.live(log["loss"][-1], optimizer)
        log["step_s"].append(ended - started)
        log["optimizer_s"].append(ended - before)
        log["step"] = step + 1
        if log["step"] in looked_at:
            log["curve"].append({"step": log["step"]} | measures.point(model, team))
            run.say(_finetune_report.line(arm, log["curve"][-1]))

    if log["step"] < args.steps:
        states = team.states(model, optimizer) | {"scheduler": scheduler.state_dict()}
        run.save(key, {"log": log} | states)
        return None
    return {
        "loss": log["loss"],
        "curve": log["curve"],
        "distance": _parallel.distance(model.parameters(), pretrained),
        "gradient_bytes": gradient_bytes(optimizer),
        "state_bytes": state_bytes(optimizer),
        "resident_bytes": _formats.resident_bytes(model, optimizer),
        "optimizer_ms": median_ms(log["optimizer_s"]),
        "step_ms": median_ms(log["step_s"]),
        "answers": measures.answers(model, team).texts,
    }


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "finetune",
        __doc__ or "",
        steps=32,
        seeds={"default": 1} | SEEDS,
        model={"help": "hub name or folder of a causal language model (default: SmolLM2-135M-Instruct)"},
        data={"help": "text file, folder of *.txt or hub data set to train on (default: Shakespeare)"},
        general={"help": "the same, of text that the model knew (default: 300 news articles)"},
        prompts={"type": path, "help": "text file with a prompt a line (default: a dozen of daily life)"},
        arms={"default": ",".join(ARMS), "help": "which, comma-separated; @0.5 behind one halves its rate"},
        # AdamW's best by loss on held-out Shakespeare: 5e-5 came to 3.525, 1e-4 to 3.510, 2e-4 to 3.523, with
        # a seed that is in no table (100). As many steps as six minutes on two cores leave to three arms.
        lr={"type": rate, "default": 1e-4, "help": "peak learning rate"},
        batch={
            "type": positive,
            "default": _parallel.processes(),
            "help": "blocks a step, of all processes together",
        },
        length={"type": whole(4), "default": 256, "help": "tokens of a block"},
        answer_length={"type": positive, "default": 48, "help": "tokens of an answer, at most"},
        eval_blocks={"type": positive, "default": 8, "help": "blocks of each text to measure losses on"},
        state=_formats.STATE,
        master=_formats.MASTER,
        resume={"action": "store_true", "help": "go on with an interrupted run"},
        fsdp=_parallel.FSDP,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the arms one after the other and report; under torchrun, on all of its processes."""
    with _parallel.team(options(), argv) as (team, args):
        asked_for = [arm_and_factor(name) for name in args.arms.split(",") if name.strip()]
        chosen(",".join(arm for arm, _ in asked_for), ARMS)
        arms = list(dict.fromkeys(arm if factor == 1 else f"{arm}@{factor:g}" for arm, factor in asked_for))
        asked = _drift.prompts(args.prompts)
        _formats.settle(args)
        team.divides(args.batch)
        run = Run(args.out, settings_of(args), args.resume, args.overwrite, team)
        if "before" in run.results and run.results["before"]["prompts"] != list(asked):
            raise SettingsError(
                f"--resume: the run in {args.out} asked other prompts than --prompts has now."
            )
        measures, before = measured_before(asked, args, team)
        run.results.setdefault("before", before)
        for seed in range(args.seed, args.seed + args.seeds):
            for arm in arms:
                run.part(f"{arm}/{seed}", train, arm, seed, measures, args, run)
        if team.leads:
            run.checkpoint.unlink(missing_ok=True)
            _finetune_report.report(run, arms)


def measured_before(asked: Sequence[str], args: Any, team: _parallel.Team) -> tuple[Measures, dict[str, Any]]:
    """What the arms are measured with, made from the pretrained model, and how that one does."""
    with team.in_turn():
        _text.bring(args)
    model, tokenizer = _assets.language_model(args.model)
    model.to(device())
    own = _drift.answers(model, tokenizer, asked, args.answer_length)
    data = _text.load(tokenizer, args)
    drift = _drift.Drift(model, data.general, own)
    measures = Measures(data, drift, tokenizer, asked, args.answer_length)
    before = measures.point(model, team) | {"prompts": list(asked), "answers": own.texts}
    return measures, before


if __name__ == "__main__":
    main()
