"""Every method on every engine: a part of the table is run anew, and what was recorded of all is compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from engines import table
from engines.columns import here
from engines.tasks import BY_NAME, ROWS, public
from processes import Done, Job

RECORDED = json.loads(
    (Path(__file__).parents[2] / "recipes/results/engines.json").read_text(encoding="utf-8")
)["cells"]
EVERY = [row.name for row in ROWS]

# In one start of four processes: each method under DDP or FSDP2, and of each column some.
SHARDED = [
    *(name for name in EVERY if BY_NAME[name].kind == "transform"),
    *("LoRA", "MuReadout", "STN", "MESA"),
]
COVERED: Mapping[str, Sequence[str]] = {
    "DDP": [name for name in EVERY if name not in SHARDED],
    "FSDP2": SHARDED,
    "HSDP, 2 x 2": ["AdamR", "SaRA", "MuReadout"],
    "FSDP2, 2 to 4": ["AdamR", "HFT", "MuReadout"],
    "FSDP2, 2 to 1": ["PerpGrad", "KeepMask", "LoRA"],
    "wrapped, then FSDP2": ["AdamR", "DSPReg"],
    "ZeRO-1 (torch)": ["PerpGrad", "HFT"],
    "FSDP1": ["SaRA", "MuReadout"],
}
NEEDS = {"Trainer": "transformers", "SFTTrainer": "trl", "Accelerate": "accelerate", "Lightning": "lightning"}
ALONE: Mapping[str, Sequence[str]] = {
    "torch.compile (aot_eager)": ["PerpGrad", "MuReadout"],
    "Trainer": ["AdamR", "DSPReg", "LoRA"],
    "SFTTrainer": ["PerpGrad", "LoRA"],
    "Accelerate": ["HFT", "LoRA", "StableMaxCrossEntropy"],
    "Lightning": ["AdamR", "STN", "LoRA"],
    "ZeRO-3 (its marks)": ["PerpGrad", "LoRA", "MESA"],
}


def complaints(column: str, cells: Mapping[str, Mapping[str, float]], rows: Sequence[str]) -> list[str]:
    """What is other than the table says."""
    assert list(cells) == list(rows)
    return [line for row, cell in cells.items() for line in table.complaints(column, row, cell)]


def test_every_public_method_has_a_row() -> None:
    assert {row.name: row.kind for row in ROWS} == public()


def test_every_column_and_every_row_is_run() -> None:
    assert [*COVERED, *ALONE] == list(table.BY_TITLE)
    assert sorted(COVERED["DDP"] + COVERED["FSDP2"]) == sorted(EVERY)
    assert all(len(rows) >= 2 for rows in (*COVERED.values(), *ALONE.values()))


def jobs_of(column: str, rows: Sequence[str]) -> list[Job]:
    """Its cells, and what they are held against or go on with."""
    names = ["FSDP2", column] if table.BY_TITLE[column].reads else [column]
    return list(table.jobs(names, dict.fromkeys(names, rows)))


def cells_to_run() -> Iterator[Any]:
    """All of a column, but of the two with every method one in three; the others are long."""
    for column, rows in COVERED.items():
        some, others = (rows[::3], [r for i, r in enumerate(rows) if i % 3]) if len(rows) > 3 else (rows, [])
        for part, marks in (some, []), (others, [pytest.mark.long]):
            if part:
                jobs = pytest.mark.jobs(*jobs_of(column, part))
                name = f"{column}, the others" if marks else column
                yield pytest.param(column, part, marks=[jobs, *marks], id=name)


@pytest.mark.parametrize(("column", "rows"), list(cells_to_run()))
def test_several_processes_are_what_the_table_says(column: str, rows: Sequence[str], done: Done) -> None:
    pytest.importorskip("transformers")
    cells = table.cells({job.name: done.found(job.name) for job in jobs_of(column, rows)})[column]
    assert complaints(column, {row: cells[row] for row in rows}, rows) == []


@pytest.mark.long(keep=2)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("column", ALONE)
def test_trainers_are_what_the_table_says(column: str) -> None:
    pytest.importorskip(NEEDS.get(column, "transformers"))
    rows = ALONE[column]
    found = here(table.jobs([column], {column: rows}))
    assert complaints(column, table.cells(found)[column], rows) == []


@pytest.mark.parametrize("column", table.BY_TITLE)
def test_what_was_recorded_is_what_the_table_says(column: str) -> None:
    """If not: ``python tests/engines/record.py``, then ``python -m optx.recipes._pages write``."""
    cells, without = RECORDED[column], {row: table.untried(column, row) for row in EVERY}
    assert list(cells) == EVERY
    untried = {row: cell["untried"] for row, cell in cells.items() if "untried" in cell}
    assert untried == {row: why for row, why in without.items() if why is not None}
    ran = {row: cell for row, cell in cells.items() if row not in untried}
    assert complaints(column, ran, list(ran)) == []
