"""A loss that an injection has of its own: what is collected, when, and that nothing of it stays."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import optx
from optx.inject._injection import Site
from optx.inject._own_loss import Collected, LossHandle, LossPart


class Guess(LossPart):
    """Predicts the mean of its module's output, from a number that it learns."""

    def __init__(self, path: str, collected: Collected) -> None:
        super().__init__(path, collected)
        self.w = nn.Parameter(torch.ones(()))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if self.learning:
            self.collect((self.w - output.detach().mean()) ** 2)


class Guesses(LossHandle):
    group: ClassVar[dict[str, float]] = {"lr": 0.1, "weight_decay": 0.0}

    def loss(self) -> Tensor:
        return self._mean(self._take())


@dataclass(frozen=True)
class Guessing(optx.Injection):
    name: ClassVar[str] = "guessing"
    role: ClassVar[str] = "linears"
    serves: ClassVar[str] = "Linear modules"

    def part(self, module: nn.Module, path: str) -> optx.Part:
        raise NotImplementedError

    def parts(self, sites: Sequence[Site]) -> list[optx.Part]:
        collected = Collected("Guessing")
        return [Guess(site.path, collected) for site in sites]

    def handle(self, model: nn.Module, injection: Any, served: Any, saved: Any) -> Guesses:
        return Guesses(model, injection, served, saved)


class Net(nn.Module):
    """Two layers, the first of which may be computed in a checkpoint, without gradients, or twice."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.first, self.last = how, nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        if self.how == "no_grad":
            with torch.no_grad():
                x = self.first(x)
        elif self.how in ("True", "False"):
            # Both, so that the first is computed again whole: a checkpoint stops once it has what it needs.
            return checkpoint(lambda x: self.last(self.first(x)), x, use_reentrant=self.how == "True")
        else:
            x = self.first(self.first(x) if self.how == "twice" else x)
        return self.last(x)


def guessed(how: str = "") -> tuple[Net, Guesses]:
    model = Net(how)
    return model, optx.attach(model, Guessing(), nn.Linear)


def x(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def wanted(model: Net, x: Tensor) -> Tensor:
    """What the loss should be, by calls of the layers' own functions."""
    w, h = [], x
    for layer in (model.first, model.last):
        h = nn.functional.linear(h, layer.weight, layer.bias)
        w.append((1 - h.mean()) ** 2)
    return torch.stack(w).mean().detach()


def test_the_mean_over_layers_with_its_graph() -> None:
    model, handle = guessed()
    model(x())
    loss = handle.loss()
    torch.testing.assert_close(loss.detach(), wanted(model, x()))
    loss.backward()
    assert all(p.grad is not None for p in handle.parameters())
    assert all(p.grad is None for p in handle.base_parameters())


def test_a_module_called_twice_counts_once() -> None:
    model, handle = guessed("twice")
    model(x())
    assert [len(some) for some in handle.collected.values.values()] == [2, 1]
    kept = {path: torch.stack(some).mean() for path, some in handle.collected.values.items()}
    torch.testing.assert_close(handle.loss(), torch.stack(list(kept.values())).mean())


def test_each_forward_has_its_own_when_gradients_accumulate() -> None:
    model, handle = guessed()
    for seed in range(3):
        model(x(seed))
        torch.testing.assert_close(handle.loss().detach(), wanted(model, x(seed)))


def test_one_warning_if_nobody_takes_it() -> None:
    model, handle = guessed()
    model(x(0))
    with pytest.warns(UserWarning, match=r"Guessing: .* nobody took, .* handle\.loss\(\)"):
        model(x(1))
    model(x(2))  # a warning would be an error here
    torch.testing.assert_close(handle.loss().detach(), wanted(model, x(2)))


def test_a_submodule_called_alone_begins_a_forward_too() -> None:
    model, handle = guessed()
    model.last(x())
    handle.loss()
    model.last(x())
    with pytest.warns(UserWarning, match="nobody took"):
        model.last(x(1))
    assert [len(some) for some in handle.collected.values.values()] == [1]


def test_evaluation_and_no_grad_collect_nothing_and_keep_what_is_there() -> None:
    model, handle = guessed()
    model(x())
    model.eval()
    model(x(1))
    model.train()
    with torch.no_grad():
        model(x(2))
    torch.testing.assert_close(handle.loss().detach(), wanted(model, x()))


def test_asking_without_a_forward_is_an_error() -> None:
    model, handle = guessed()
    with pytest.raises(optx.OptxError, match=r"loss: nothing has been collected"):
        handle.loss()
    model(x())
    handle.loss()
    with pytest.raises(optx.OptxError, match=r"keep it in a variable"):
        handle.loss()
    model.eval()(x())
    with pytest.raises(optx.OptxError, match=r"in training mode"):
        handle.loss()


def test_what_a_checkpoint_computes_again_is_not_collected() -> None:
    plain, own = guessed()
    again, handle = guessed("False")
    for model, one in ((plain, own), (again, handle)):
        (model(x()).sum() + one.loss()).backward()
        assert not one.collected.values
    for p, q in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("how", ["True", "no_grad"])
def test_a_part_of_the_model_without_gradients_is_an_error(how: str) -> None:
    model, _ = guessed(how)
    with pytest.raises(optx.OptxError, match=r"'first' .* without gradients.*use_reentrant=False"):
        model(x().requires_grad_())
    model.first.eval()
    if how == "no_grad":
        model(x())


def test_disabled_and_frozen_have_a_loss_of_zero() -> None:
    model, handle = guessed()
    with handle.disable():
        model(x())
        assert handle.loss().item() == 0
    model(x())
    handle.loss().backward()
    opt = torch.optim.SGD(handle.param_groups(), momentum=0.9)
    assert opt.param_groups[0]["lr"] == 0.1
    opt.step()
    handle.freeze()
    before = [p.clone() for p in handle.parameters()]
    for _ in range(2):
        (model(x()).sum() + handle.loss()).backward()
        opt.step()
    assert handle.frozen
    assert handle.loss().item() == 0
    assert all(map(torch.equal, before, handle.parameters()))


def test_nothing_stays_alive() -> None:
    model, handle = guessed()
    model(x())
    values = [weakref.ref(t) for some in handle.collected.values.values() for t in some]
    gc.disable()
    try:
        loss = handle.loss()
        loss.backward()
        del loss
        assert not any(ref() is not None for ref in values)
        model(x())
        values = [weakref.ref(t) for some in handle.collected.values.values() for t in some]
        hooks = len(model._forward_hooks)
        handle.remove()
        assert not any(ref() is not None for ref in values)
        assert hooks
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
    finally:
        gc.enable()
    with pytest.raises(optx.OptxError, match="removed"):
        handle.loss()


def test_a_copy_has_a_loss_of_its_own() -> None:
    model, handle = guessed()
    model(x())
    twin, twins = copy.deepcopy((model, handle))
    pickle.loads(pickle.dumps(model))
    torch.save(model, io.BytesIO())
    twin(x(1))
    torch.testing.assert_close(handle.loss().detach(), wanted(model, x()))
    torch.testing.assert_close(twins.loss().detach(), wanted(twin, x(1)))


def test_compiled_whole() -> None:
    torch._dynamo.reset()
    model, handle = guessed()
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        call(x(seed))
        loss = handle.loss()
        torch.testing.assert_close(loss.detach(), wanted(model, x(seed)))
        loss.backward()
    call(x())
    with pytest.warns(UserWarning, match="nobody took"):
        call(x(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(x(2))
    torch.testing.assert_close(handle.loss().detach(), wanted(model, x(2)))


def test_layers_compiled_one_by_one() -> None:
    torch._dynamo.reset()
    model, handle = guessed()
    model.eval()(x())  # attach's own look at the first call is not for tracing
    model.train()
    for layer in (model.first, model.last):
        layer.compile(fullgraph=True, backend="aot_eager")
    for seed in range(3):
        model(x(seed))
        torch.testing.assert_close(handle.loss().detach(), wanted(model, x(seed)))


@pytest.mark.parametrize("given", [True, False])
def test_predictors_that_no_optimizer_has_are_told_of_once(given: bool) -> None:
    model, handle = guessed()
    opt = torch.optim.SGD(model.parameters() if given else [nn.Parameter(torch.ones(1))], lr=0.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(450):
            model(x())
            handle.loss().backward()
            opt.step()
    assert len(told) == (0 if given else 1)
    assert given or "no optimizer has it" in str(told[0].message)


def test_groups_have_the_methods_settings() -> None:
    model, handle = guessed()
    (group,) = handle.param_groups()
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.1, 0.0, 2)
    (group,) = handle.param_groups(lr=0.5)
    assert group["lr"] == 0.5
    opt = torch.optim.SGD([{"params": handle.base_parameters()}, *handle.param_groups()], lr=0.01)
    claimed = [id(p) for group in opt.param_groups for p in group["params"]]
    assert sorted(claimed) == sorted(id(p) for p in model.parameters())
    with pytest.raises(optx.OptxError, match="LoRA"):
        handle.param_groups(ratio=16)
