"""The metrics of all optimizers of a trainer and of handles, in one dict."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optx.inject._handle import Handle
from optx.integrations._metrics import collect


def collect_all(optimizers: Iterable[Any], handles: Iterable[Handle]) -> dict[str, float]:
    """What `collect` finds in each; a later optimizer's names have its number: ``optx_2/lr``."""
    found = collect(None, handles)
    for number, optimizer in enumerate(optimizers, 1):
        own = collect(optimizer)
        for name, value in own.items():
            owner, what = name.split("/", 1)
            found[name if number == 1 else f"{owner}_{number}/{what}"] = value
    return found
