"""Hints at memory to come: which passes have them on which processors."""

from __future__ import annotations

import re

import pytest
import torch
from numba.core import config

import optx
from optx.kernels.step.emit_cpu import emit
from optx.kernels.step.layout import Layout


def chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The hints that each pass of PerpGrad + AdamW gives from run to run, as text, on a processor."""
    monkeypatch.setattr(config, "CPU_NAME", name)
    opt = optx.wrap(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 2))]), optx.PerpGrad())
    text = emit(opt.program(0), Layout(("float32",) * 4, "nearest", True))
    bodies = re.findall(r"def (reduce_0|update)\w*_chunk\([^)]*\):\n((?:    .*\n)+)", text)
    in_runs = [(kernel, body) for kernel, body in bodies if "for at" in body]
    return {kernel: re.findall(r"(?:read|write)_\d+\(.*\)", body) for kernel, body in in_runs}


def test_zen_is_told_of_pages_where_a_pass_only_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fetches ahead by itself, up to a page's end; where it writes, hints cost more than they bring."""
    of_page = "read_1(({}_p + at * 4 + 65536) & -4096)"
    expected = {"reduce_0": [of_page.format("w"), of_page.format("g")], "update": []}
    assert chunks("znver4", monkeypatch) == expected


def test_others_are_told_of_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chunks("skylake-avx512", monkeypatch)
    assert found["reduce_0"] == ["read_8(w_p + at * 4 + 2048)", "read_8(g_p + at * 4 + 2048)"]
    assert [hint.partition("(")[0] for hint in found["update"]] == ["write_8", "read_8", "write_8", "write_8"]
