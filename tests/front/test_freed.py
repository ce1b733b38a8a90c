"""What is dropped is freed at once: nothing of optx holds it in a cycle."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hft_models import fresh
from injections import ROWS, Row, move, run
from torch import nn

import optx


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def alive(refs: list[weakref.ref[Any]]) -> int:
    return sum(ref() is not None for ref in refs)


def refs_of(model: nn.Module) -> list[weakref.ref[Any]]:
    return [*map(weakref.ref, model.parameters()), *map(weakref.ref, model.modules())]


def bare(row: Row) -> list[weakref.ref[Any]]:
    model = row.model()
    run(model).sum().backward()
    return refs_of(model)


def trained(row: Row) -> tuple[nn.Module, optx.Handle]:
    model = row.model()
    handle = row.attach(model)
    optx.trainable_only(model, handle)
    move(handle)
    run(model).sum().backward()
    return model, handle


def dropped_together(row: Row) -> list[weakref.ref[Any]]:
    model, _ = trained(row)
    return refs_of(model)


def handle_first(row: Row) -> list[weakref.ref[Any]]:
    model, handle = trained(row)
    del handle
    run(model)
    return refs_of(model)


def merged_and_back(row: Row) -> list[weakref.ref[Any]]:
    model, handle = trained(row)
    if row.merges:
        handle.merge(untie=True)
        run(model)
        refs = refs_of(model)
        handle.unmerge()
        return refs + refs_of(model)
    return refs_of(model)


def removed(row: Row) -> list[weakref.ref[Any]]:
    model, handle = trained(row)
    refs = refs_of(model)
    handle.remove()
    kept = {id(module) for module in model.modules()} | {id(p) for p in model.parameters()}
    parts = [ref for ref in refs if id(ref()) not in kept]
    del handle
    assert parts
    assert alive(parts) == 0  # what was added is gone, with the model still there
    run(model)
    return refs


def copied(row: Row) -> list[weakref.ref[Any]]:
    model, handle = trained(row)
    run(model)
    twin, same = copy.deepcopy((model, handle))
    assert torch.equal(run(twin), run(model))
    refs = refs_of(model)
    del model, handle
    assert alive(refs) == 0
    run(twin)
    same.remove()
    again = pickle.loads(pickle.dumps(trained(row)))
    run(again[0])
    return refs_of(twin) + refs_of(again[0])


WAYS = [dropped_together, handle_first, merged_and_back, removed, copied]


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_a_model_with_something_attached_is_freed(row: Row) -> None:
    bare(row)  # what a first call imports and caches
    assert alive(bare(row)) == 0  # the model itself makes no cycle
    for way in WAYS:
        assert alive(way(row)) == 0, way.__name__


def test_a_handle_that_outlives_its_model_holds_it() -> None:
    """It can still be removed, or saved; with it everything goes."""
    row = ROWS[0]
    model, handle = trained(row)
    refs = refs_of(model)
    del model
    assert alive(refs) == len(refs)
    handle.remove()
    del handle
    assert alive(refs) == 0


def test_a_part_that_is_alone_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optx.attach(model, optx.LoRA(rank=2), "0")
    container: Any = model[0].optx
    del model
    with pytest.raises(ReferenceError, match="the module that this was attached to is gone"):
        _ = container._target()


def test_a_whole_model_goes_through_torch_save() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    handle = optx.attach(model, optx.ParallelAdapter(rank=2), "0")
    move(handle)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.randn(2, 4)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    "transform",
    [
        lambda model: optx.PerpGrad(),
        lambda model: optx.AdamR(weight=0.05),
        lambda model: optx.HFT(model, rounds_every=1),
        lambda model: optx.DSPReg(domains=2),
    ],
    ids=["PerpGrad", "AdamR", "HFT", "DSPReg"],
)
def test_an_optimizer_is_freed_with_its_weights(transform: Any) -> None:
    def stepped() -> list[weakref.ref[Any]]:
        model = fresh()
        opt = optx.wrap(torch.optim.AdamW(model.parameters()), transform(model))
        for _ in range(3):
            for domain in range(2):
                with opt.dsp_reg.domain(domain) if hasattr(opt, "dsp_reg") else nullcontext():
                    for p in model.parameters():
                        p.grad = torch.full_like(p, 1.0 + domain)
            opt.step()
            opt.zero_grad()
        return [weakref.ref(opt), *refs_of(model)]

    stepped()  # what a first step imports and compiles
    gc.collect()
    assert alive(stepped()) == 0
