"""The table of engines and methods: its columns, what is refused, and how a cell is judged.

A cell is equal (the weights after `tasks.STEPS` steps are those of one process on the joined batch, to
`LIMIT`), refused (optx raises when things are put together, in the words given here), or untried.

A column is a function that trains a row (`engines.columns` has the first ones) and gives
``{"trained": weights}``, and ``"resumed"`` where it also went on from a checkpoint; add it to `COLUMNS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from engines import columns, trainers
from engines.columns import Found
from engines.tasks import BY_NAME
from processes import Job, Team
from torch import Tensor

from optx.recipes import _engines_report

LIMIT = 1e-6
MOVED = 1e-3  # what a run has to move weights by, for equality to say something
REFERENCE = "one process"


@dataclass(frozen=True)
class Column:
    """An engine.

    Attributes:
        name: as the page has it.
        run: trains a row and gives what it found.
        world: how many processes do a cell together.
        resumes: whether it also goes on from a checkpoint of as many processes, to the same bits.
        reads: whether it goes on from what "FSDP2" has saved.
    """

    name: str
    run: Callable[[str, Team], Found]
    world: int
    resumes: bool = False
    reads: bool = False


COLUMNS: list[Column] = [
    Column("DDP", columns.ddp, 2, resumes=True),
    Column("FSDP2", columns.fsdp2, 2, resumes=True),
    Column("HSDP, 2 x 2", columns.hsdp, 4),
    Column("FSDP2, 2 to 4", columns.fsdp2_resumed, 4, reads=True),
    Column("FSDP2, 2 to 1", columns.alone_resumed, 1, reads=True),
    Column("wrapped, then FSDP2", columns.wrapped_then_sharded, 2),
    Column("ZeRO-1 (torch)", columns.zero_redundancy, 2),
    Column("FSDP1", columns.fsdp1, 2),
    *(Column(name, run, 1) for name, run in trainers.COLUMNS.items()),
]
BY_TITLE: Mapping[str, Column] = {column.name: column for column in COLUMNS}

# By column, then row or kind of row: words of the error.
_PIECE = "is a piece of a flat parameter of FSDP1"
_ZERO3 = "is partitioned by DeepSpeed's ZeRO-3"
_MESA = {"MESA": "was sharded or reshaped since MESA was made"}
_ABMLL = {"ABMLL": r"is sharded \(a DTensor\), and a task adapts a copy"}
_SHARED = {"StableRPS": "is sharded .FSDP2. with the module that holds it"}
REFUSED: Mapping[str, Mapping[str, str]] = {
    "FSDP2": {**_MESA, **_ABMLL, **_SHARED},
    "HSDP, 2 x 2": {**_MESA, **_ABMLL, **_SHARED},
    "wrapped, then FSDP2": {**_MESA, **_ABMLL, **_SHARED},
    "FSDP1": {"transform": _PIECE, "EWA": _PIECE, **_MESA, "ABMLL": "is a piece of a flat parameter"},
    "ZeRO-1 (torch)": {
        "AdamR": "normalize=True needs Adam's second moment",
        "HFT": "keeps its moments in an optimizer of its own",
        "MuAdamW": "ZeroRedundancyOptimizer is not known. Say how it steps",
    },
    "SFTTrainer": {
        "MuReadout": "'lm_head' did not act: .* weight was used without a call of the module",
        "VQLogits": "did not act: this call of a LlamaForCausalLM did not call the head",
    },
    "ZeRO-3 (its marks)": {"transform": _ZERO3, "injection": _ZERO3, "MESA": _ZERO3},
}

# By column, then row: why there is no such cell.
_NO_RUN = "there is no run to go on with: FSDP2 is refused"
_LOGITS = "it looks at outputs alone, so no part of it would meet a partitioned parameter"
UNTRIED: Mapping[str, Mapping[str, str]] = {
    "FSDP2, 2 to 4": {"MESA": _NO_RUN, "ABMLL": _NO_RUN, "StableRPS": _NO_RUN},
    "FSDP2, 2 to 1": {"MESA": _NO_RUN, "ABMLL": _NO_RUN, "StableRPS": _NO_RUN},
    "FSDP1": {"STN": "its loss on validation batches needs the model outside of FSDP1's forward"},
    "SFTTrainer": {
        "STN": "its batches of validation come between steps, for which SFTTrainer has no place",
        "ABMLL": "its tasks adapt to samples of their own, for which SFTTrainer's collator has no place",
        "FTWT": "it prunes convolutions, and no language model of TRL's has them",
        "WindowPrune": "it prunes windows of images",
        **dict.fromkeys(
            ("EWA", "WideNet"), "its row is no language model, and SFTTrainer steps as Trainer does"
        ),
    },
    "ZeRO-3 (its marks)": dict.fromkeys(("SAF", "LossReweight", "StableMaxCrossEntropy", "ZLoss"), _LOGITS),
}


def refusal(column: str, row: str) -> str | None:
    """The words that a cell is refused with; None: it is equal."""
    words = REFUSED.get(column, {})
    return words.get(row, words.get(BY_NAME[row].kind))


NOT_YET = {"untried": _engines_report.NOT_YET}


def untried(column: str, row: str) -> str | None:
    """Why there is no such cell; None: there is one."""
    return UNTRIED.get(column, {}).get(row)


# ---- running -----------------------------------------------------------------------------------------------


def key(column: str, row: str) -> str:
    """A cell's name."""
    return f"{column}+{row}"


def jobs(names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Iterator[Job]:
    """What has to be done for some columns, each with its own choice of rows."""
    for row in dict.fromkeys(row for name in names for row in rows[name]):
        yield Job(key(REFERENCE, row), 1, columns.cell(columns.one_process, row))
    for name in names:
        column = BY_TITLE[name]
        for row in rows[name]:
            if untried(name, row) is None:
                yield Job(key(name, row), column.world, columns.cell(column.run, row), int(column.reads))


# ---- judging -----------------------------------------------------------------------------------------------


def cells(found: Mapping[str, Found]) -> dict[str, dict[str, Any]]:
    """By column and row: ``{"off": largest deviation}`` and more, or ``{"refused": words}``."""
    judged: dict[str, dict[str, Any]] = {}
    for name, one in found.items():
        column, row = name.split("+")
        if column != REFERENCE:
            judged.setdefault(column, {})[row] = _cell(one, found[key(REFERENCE, row)], _adapter(found, row))
    return judged


def _cell(found: Found, reference: Found, adapter: Mapping[str, Tensor] | None) -> dict[str, Any]:
    if "refused" in found:
        return {"refused": found["refused"]}
    reference = found.get("reference", reference)
    wanted = reference["trained"]
    cell: dict[str, Any] = {"off": off(found.get("trained", found.get("resumed")), wanted)}
    before = reference["start"]  # of what has one shape all along, as STN's history has not
    cell["moved"] = off(
        *({n: t[n] for n in before if before[n].shape == wanted[n].shape} for t in (wanted, before))
    )
    if "trained" in found and "resumed" in found:
        cell["resumed"] = off(found["resumed"], found["trained"])
    if adapter is not None and "adapter" in found:
        cell["adapter"] = off(found["adapter"], adapter)
    if "numbers" in found:
        cell["numbers"] = off({"": found["numbers"]}, {"": reference["numbers"]})
    return cell


def _adapter(found: Mapping[str, Found], row: str) -> Mapping[str, Tensor] | None:
    """What the handle was when it was saved."""
    return found.get(key("FSDP2", row), {}).get("adapter")


def off(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest difference; infinite where names, shapes or what is finite differ."""
    if found.keys() != wanted.keys() or any(found[n].shape != t.shape for n, t in wanted.items()):
        return float("inf")
    gaps = [(found[n].double() - t.double()).abs().max() for n, t in wanted.items() if t.numel()]
    return float(torch.stack(gaps).nan_to_num(float("inf")).max()) if gaps else 0.0


def complaints(column: str, row: str, cell: Mapping[str, Any]) -> list[str]:
    """What is wrong with a cell."""
    where, words = f"{row}, {column}", refusal(column, row)
    if words is not None or "refused" in cell:
        told = cell.get("refused", "nothing")
        right = words is not None and re.search(words, told)
        return [] if right else [f"{where}: refused with {told!r}, not {words!r}"]
    wrong = [
        f"{where}: {name} {cell[name]:.1e}" for name in ("resumed", "adapter", "numbers") if cell.get(name)
    ]
    if not cell["off"] <= LIMIT:
        wrong.append(f"{where}: off by {cell['off']:.1e}")
    if not cell["moved"] > MOVED:
        wrong.append(f"{where}: moved by {cell['moved']:.1e} only")
    if BY_TITLE[column].resumes and "resumed" not in cell:
        wrong.append(f"{where}: nothing was resumed")
    return wrong
