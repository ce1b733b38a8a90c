"""Warnings that optx causes fail a test; those between two other libraries are listed in the summary."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optx

OLD = '''
"""A library that renames things."""
import functools
import warnings

import torch


def warn_once(text):
    warnings.warn(text, FutureWarning)


def renamed(function):
    @functools.wraps(function)
    def call(*arguments, **named):
        if "old" in named:
            warnings.warn("say new, not old", FutureWarning, stacklevel=2)
            named["new"] = named.pop("old")
        return function(*arguments, **named)

    return call


def logged(function):
    @functools.wraps(function)
    def call(*arguments, **named):
        return function(*arguments, **named)

    return call


def direct():
    warnings.warn("direct is old", DeprecationWarning)


def by_helper():
    warn_once("by_helper is old")


@logged
def decorated():
    warnings.warn("decorated is old", UserWarning)


class Module(torch.nn.Module):
    @logged
    @renamed
    def forward(self, new):
        return new


class Optimizer(torch.optim.SGD):
    def step(self, closure=None):
        warnings.warn("this optimizer is old", FutureWarning)
        return super().step(closure)
'''
USER = '''
"""A library that uses the other one in its old way."""
import old
import torch

import warnings

direct = lambda: old.direct()
by_helper = lambda: old.by_helper()
decorated = lambda: old.decorated()


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = old.Module()

    def forward(self, new):
        return self.inner(old=new)


class Optimizer(torch.optim.SGD):
    def step(self, closure=None):
        old.direct()
        return super().step(closure)


def from_c():
    return torch.ones(1, requires_grad=True).mul(2).grad  # torch's C code warns
'''


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    (tmp_path / "old.py").write_text(OLD)
    (tmp_path / "user.py").write_text(USER)
    monkeypatch.syspath_prepend(tmp_path)
    import old  # type: ignore[import-not-found]
    import user  # type: ignore[import-not-found]

    yield old, user
    del sys.modules["old"], sys.modules["user"]


CALLS = ["direct", "by_helper", "decorated"]


@pytest.mark.parametrize("name", CALLS)
def test_what_we_call_and_is_deprecated_is_an_error(libraries: tuple[Any, Any], name: str) -> None:
    with pytest.raises(Warning, match=f"{name} is old"):
        getattr(libraries[0], name)()


def test_an_argument_of_ours_that_is_deprecated_is_an_error(libraries: tuple[Any, Any]) -> None:
    """As past_key_values: attributed to torch, which called forward()."""
    model = libraries[0].Module()
    with pytest.raises(FutureWarning, match="say new"):
        model(old=torch.ones(1))
    model(new=torch.ones(1))


def step(optimizer: Any) -> None:
    """One step of a wrapped optimizer: optx calls the library's step()."""
    layer = nn.Linear(2, 2)
    opt = optx.wrap(optimizer(layer.parameters(), lr=0.1), optx.PerpGrad())
    layer(torch.ones(2)).sum().backward()
    opt.step()


def test_what_optx_causes_is_an_error(libraries: tuple[Any, Any]) -> None:
    with pytest.raises(FutureWarning, match="this optimizer is old"):
        step(libraries[0].Optimizer)


def test_what_optx_raises_is_an_error() -> None:
    weights = [nn.Parameter(torch.ones(2))]
    plain = torch.optim.AdamW(weights, weight_decay=0.0)
    weights[0].sum().backward()
    plain.step()
    opt = optx.wrap(torch.optim.AdamW(weights, weight_decay=0.0), optx.AdamR(weight=0.1))
    with pytest.raises(UserWarning, match=r"checkpoint has no optx\.adamr\.anchor"):
        opt.load_state_dict(plain.state_dict())


INNER = """
import old
import pytest
import torch
import user
from test_whose_warnings import CALLS, step


@pytest.mark.parametrize("name", CALLS)
def test_between_two_others(name):
    getattr(user, name)()


def test_between_two_others_about_an_argument():
    user.Module()(torch.ones(1))


def test_between_two_others_inside_a_step_of_optx():
    step(user.Optimizer)


def test_from_c():
    assert user.from_c() is None


def test_by_optx():
    step(old.Optimizer)
"""


@pytest.mark.long
def test_what_others_cause_is_listed(tmp_path: Path) -> None:
    """In a run of its own, whose one failure is what optx caused."""
    for name, text in {"old": OLD, "user": USER, "test_inner": INNER}.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "conftest.py").write_text(
        "from whose_warnings import pytest_collection, pytest_runtest_protocol"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = always\nmarkers = long")
    folders = [*Path(__file__).parents[:2], tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "1 failed, 6 passed" in run.stdout, run.stdout
    assert "FAILED test_inner.py::test_by_optx - FutureWarning: this optimizer is old" in run.stdout
    summary = run.stdout.partition("warnings summary")[2]
    for text in (*(f"{name} is old" for name in CALLS), "say new, not old", ".grad attribute of a Tensor"):
        assert text in summary, text
