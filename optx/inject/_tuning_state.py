"""What a self-tuning run needs to go on bit for bit, as tensors: values, scales, Adam, schedule, history."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optx._errors import FileError, warn
from optx.inject._hparams import HParams
from optx.inject._stored import check_tensors

PREFIX = "optx.stn."
"""What the keys begin with; no module's path can."""

LONG = 100
"""Turns of the schedule after which a loop that has tuned nothing is taken to have forgotten it."""


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        batches: of training, so far.
        steps: of the hyperparameters, so far.
        due: validation batches that the schedule asks for now.
        since: training batches of the turn that is going on.
        draws: batches for which perturbations were drawn.
        log: training batches, raw values and scales: at the start and after each step.
    """

    batches: int = 0
    steps: int = 0
    due: int = 0
    since: int = 0
    draws: int = 0
    log: list[tuple[int, Tensor, Tensor]] = field(default_factory=list[tuple[int, Tensor, Tensor]])

    def counts(self) -> list[int]:
        """The numbers, in the order of the fields."""
        return [self.batches, self.steps, self.due, self.since, self.draws]

    def tell_of_none(self, batches: int) -> None:
        """Warn if after so many training batches the hyperparameters have made no step."""
        if self.batches == batches and not self.steps:
            warn(
                f"STN: {batches} training batches have passed, and no step_hparams(), so the hyperparameters "
                "stay where they began. While stn.due, call the model and backward() within "
                "stn.valid_batch(), then stn.step_hparams()."
            )

    def note(self, hparams: HParams) -> None:
        """Add the values that are in force to the log."""
        self.log.append((self.batches, hparams.raw.detach().clone(), hparams.sigma().detach()))


def history(hparams: HParams, progress: Progress) -> dict[str, list[float]]:
    """The log in a person's units."""
    found: dict[str, list[float]] = {"batches": [float(batches) for batches, _, _ in progress.log]}
    raws = torch.stack([raw for _, raw, _ in progress.log])
    sigmas = torch.stack([sigma for _, _, sigma in progress.log])
    for i, (name, spec) in enumerate(hparams.specs.items()):
        found[name] = spec.constrained(raws[:, i]).tolist()
        found[f"sigma {name}"] = sigmas[:, i].tolist()
    return found


def state_of(hparams: HParams, progress: Progress, adam: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies, under keys with `PREFIX`."""
    raw = hparams.raw.detach()
    moments = [adam.state.get(p, {}) for p in (hparams.raw, hparams.raw_sigma)]
    pairs = [one.get(key, torch.zeros_like(raw)) for one in moments for key in ("exp_avg", "exp_avg_sq")]
    steps = [int(one.get("step", 0)) for one in moments]
    read = [int(name in hparams.read) for name in hparams]
    rows = [torch.cat([torch.tensor([float(n)]).to(raw), *both]) for n, *both in progress.log]
    found = {
        "specs": torch.frombuffer(bytearray(_specs(hparams)), dtype=torch.uint8),
        "raw": raw,
        "raw_sigma": hparams.raw_sigma.detach(),
        "adam": torch.stack(pairs),
        "counts": torch.tensor([*progress.counts(), *steps, *read]),
        "rates": torch.tensor([group["lr"] for group in adam.param_groups], dtype=torch.float64),
        "history": torch.stack(rows).double(),
    }
    return {PREFIX + name: t.clone() for name, t in found.items()}


def check_state(own: Mapping[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise unless it is of the same hyperparameters, and whole; a history may be of any length."""
    specs, log = PREFIX + "specs", PREFIX + "history"
    if specs in own and not torch.equal(own[specs].cpu(), wanted[specs]):
        theirs, ours = (bytes(one[specs].tolist()).decode(errors="replace") for one in (own, wanted))
        raise FileError(f"state_dict: it is of the hyperparameters {theirs}, and this handle has {ours}.")
    if log in own and len(own[log]):
        wanted = {**wanted, log: wanted[log][:1].expand(len(own[log]), -1)}
    check_tensors(own, wanted)


@torch.no_grad()
def restore(
    own: Mapping[str, Tensor], hparams: HParams, progress: Progress, adam: torch.optim.Optimizer
) -> None:
    """Put a checked state in place."""
    state = {key.removeprefix(PREFIX): t.detach() for key, t in own.items()}
    hparams.raw.copy_(state["raw"])
    hparams.raw_sigma.copy_(state["raw_sigma"])
    hparams.raw.grad = hparams.raw_sigma.grad = None  # they were of another run
    counts = [int(n) for n in state["counts"].tolist()]
    progress.batches, progress.steps, progress.due, progress.since, progress.draws = counts[:5]
    hparams.read = {name for name, read in zip(hparams, counts[7:], strict=True) if read}
    moments = state["adam"].to(hparams.raw)
    for i, p in enumerate((hparams.raw, hparams.raw_sigma)):
        adam.state.pop(p, None)
        if steps := counts[5 + i]:
            mean, square = (moments[2 * i + j].clone() for j in (0, 1))
            adam.state[p] = {"step": torch.tensor(float(steps)), "exp_avg": mean, "exp_avg_sq": square}
    for group, lr in zip(adam.param_groups, state["rates"].tolist(), strict=True):
        group["lr"] = lr
    log, H = state["history"].to(hparams.raw), len(hparams)
    progress.log = [(int(row[0]), row[1 : 1 + H].clone(), row[1 + H :].clone()) for row in log]


def _specs(hparams: HParams) -> bytes:
    known = hparams.description()
    plain = {name: {k: v for k, v in one.items() if "raw" not in k} for name, one in known.items()}
    return json.dumps(plain).encode()
