"""VQLogits beside threads, other methods and modules that are trained whole; labels that don't count."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import injections
import pytest
import torch
from torch import Tensor, nn

import optx


def net() -> tuple[nn.Sequential, optx.VQHandle]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 40))
    handle: Any = optx.attach(model, optx.VQLogits(codes=8, init="blocks"), targets="1")
    return model, handle


def in_a_thread(call: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_hidden_is_of_the_thread_that_asked(compiled: bool) -> None:
    model, handle = net()
    call: Any = torch.compile(model, backend="eager") if compiled else model
    x = torch.randn(3, 6)
    logits, hidden = call(x), model[0](x)
    with handle.hidden():
        assert torch.equal(call(x), hidden)
        assert torch.equal(in_a_thread(lambda: call(x)), logits)
        with handle.hidden():
            assert torch.equal(call(x), hidden)
        assert torch.equal(call(x), hidden)
        assert (
            handle.part._replicate_for_data_parallel().answers is True
        )  # whom a thread of DataParallel calls
    assert torch.equal(call(x), logits)
    assert handle.part.asked == 0


def test_hidden_is_of_the_task_that_asked() -> None:
    model, handle = net()
    x = torch.randn(3, 6)
    ready = asyncio.Event()

    async def asks() -> Tensor:
        with handle.hidden():
            ready.set()
            await asyncio.sleep(0)
            return model(x)

    async def does_not() -> Tensor:
        await ready.wait()
        return model(x)

    async def both() -> list[Tensor]:
        return await asyncio.gather(asks(), does_not())

    hidden, logits = asyncio.run(both())
    assert hidden.shape == (3, 6)
    assert logits.shape == (3, 40)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}])
def test_what_is_ignored_has_no_gradient_even_if_it_is_nan(options: dict[str, float]) -> None:
    _, handle = net()
    x, y = torch.randn(4, 6), torch.tensor([1, -100, 30, -100])

    def grads(x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        handle.codebook.grad = None
        handle.loss(x, y, **options).backward()
        assert x.grad is not None
        assert handle.codebook.grad is not None
        return [x.grad, handle.codebook.grad]

    plain = grads(x)
    broken = x.clone()
    broken[1], broken[3] = torch.nan, torch.inf
    assert not plain[0][1::2].any()
    assert all(map(torch.equal, grads(broken), plain))


def test_a_codebook_on_a_classifier_that_another_adapter_trains_whole() -> None:
    model = injections.bert()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    prefix: Any = optx.attach(model, optx.PrefixTuning(length=2), modules_to_save=["classifier"])
    head = {name: p.detach().clone() for name, p in model.classifier.named_parameters(recurse=False)}
    codes: Any = optx.attach(model, optx.VQLogits(codes=2), targets="classifier")
    ids = torch.randint(20, (2, 5))
    logits = model(ids).logits
    with torch.no_grad():
        model.classifier.bias += 1  # as its training would
        model.classifier.weight += 1
    with prefix.disable():
        assert torch.equal(model.classifier.weight, before["classifier.weight"])
    assert torch.equal(model.classifier.weight, head["weight"] + 1)
    assert torch.equal(model(ids).logits, logits)  # by the codes
    assert not any("optx" in name for name in prefix.state_dict() if "classifier" in name)
    codes.remove()
    prefix.remove()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
