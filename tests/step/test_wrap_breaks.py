"""What a tester found: memory that overlaps, closures that edit groups, steps that count in odd places."""

from __future__ import annotations

import copy
import cProfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optx

# ---- memory that overlaps ------------------------------------------------------------------------------


def overlapping_weights(n: int) -> tuple[list[nn.Parameter], list[Tensor]]:
    buffer = torch.linspace(-1, 1, 3 * n)
    params = [nn.Parameter(buffer[: 2 * n]), nn.Parameter(buffer[n:])]
    return params, [torch.ones(2 * n), torch.full((2 * n,), -2.0)]


def gradients_that_are_weights(n: int) -> tuple[list[nn.Parameter], list[Tensor]]:
    params = [nn.Parameter(torch.linspace(-1, 1, n)), nn.Parameter(torch.linspace(2, 1, n))]
    return params, [params[1].data, params[0].data]


def a_gradient_that_meets_a_weight(n: int) -> tuple[list[nn.Parameter], list[Tensor]]:
    buffer = torch.linspace(-1, 1, 2 * n)
    return [nn.Parameter(buffer[:n]), nn.Parameter(torch.ones(n))], [torch.ones(n), buffer[n - 1 : -1]]


@pytest.mark.parametrize(
    "make", [overlapping_weights, gradients_that_are_weights, a_gradient_that_meets_a_weight]
)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_tensors_that_overlap_are_stepped_as_torch_steps_them(make: Callable[[int], Any], base: Any) -> None:
    """Kernels write all at once, in any order."""
    weights: list[list[Tensor]] = []
    for wrapped in (True, False):
        params, grads = make(50)
        opt: Any = base(params, lr=0.1, foreach=False)
        opt = optx.wrap(opt) if wrapped else opt
        for late in (False, True):  # known from the start, or found when the gradient is given
            for p, g in zip(params, grads, strict=True):
                p.grad = torch.ones_like(p) if not late and "gradient" in make.__name__ else g
            opt.step()
        if wrapped:
            assert "memory" in str(opt.plan())
        weights.append([p.detach().clone() for p in params])
    torch.testing.assert_close(weights[0], weights[1])


def test_moments_that_overlap_are_stepped_as_torch_steps_them() -> None:
    weights: list[list[Tensor]] = []
    for wrapped in (True, False):
        params = [nn.Parameter(torch.ones(40)), nn.Parameter(torch.zeros(40))]
        opt: Any = torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False)
        opt = optx.wrap(opt) if wrapped else opt
        for t in range(3):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + t)
            opt.step()
            if t == 1:
                buffer = torch.linspace(0, 1, 60)
                for p, part in zip(params, (buffer[:40], buffer[20:]), strict=True):
                    opt.state[p]["momentum_buffer"] = part
        weights.append([p.detach().clone() for p in params])
    torch.testing.assert_close(weights[0], weights[1])


# ---- closures that edit --------------------------------------------------------------------------------


def add_group(opt: Any, late: nn.Parameter) -> None:
    if len(opt.param_groups) == 1:
        opt.add_param_group({"params": [late]})


def switch_off(opt: Any, late: nn.Parameter) -> None:
    opt.param_groups[0]["perp_grad"] = False


@pytest.mark.parametrize("act", [add_group, switch_off])
@pytest.mark.parametrize("base", [torch.optim.RAdam, torch.optim.RMSprop, torch.optim.AdamW])
def test_groups_edited_in_a_closure_count_in_that_step(base: Any, act: Callable[..., None]) -> None:
    weights: list[list[Tensor]] = []
    for inside in (True, False):
        p, late = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([2.0, -1.0]))
        opt = optx.wrap(base([p], lr=0.1), optx.PerpGrad())

        def closure(opt: Any = opt, p: Any = p, late: Any = late, inside: bool = inside) -> Tensor:
            if inside:
                act(opt, late)
            opt.zero_grad()
            loss = (p - 3.0).square().sum() + (late * late).sum()
            loss.backward()
            return loss

        if not inside:
            act(opt, late)
        opt.step(closure)
        weights.append([p.detach().clone(), late.detach().clone()])
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_an_option_out_of_range_set_in_a_closure_is_refused() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = optx.wrap(torch.optim.RAdam([p], lr=0.1), optx.AdamR())

    def closure() -> float:
        p.grad = torch.ones(2)
        opt.param_groups[0]["adamr_weight"] = -3.0
        return 1.0

    with pytest.raises(optx.TransformError, match="adamr_weight"):
        opt.step(closure)
    assert p.tolist() == [1.0, 2.0]


def test_remove_in_a_closure_says_so() -> None:
    p = nn.Parameter(torch.ones(2))
    opt = optx.wrap(torch.optim.RAdam([p], lr=0.1), optx.PerpGrad())

    def closure() -> float:
        p.grad = torch.ones(2)
        opt.remove()
        return 1.0

    with pytest.raises(optx.OptxError, match="after remove"):
        opt.step(closure)


# ---- what a scheduler sets ------------------------------------------------------------------------------


def test_numbers_set_before_every_step_do_not_remake_the_tables() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = optx.wrap(torch.optim.AdamW([p], lr=0.1, weight_decay=0), optx.AdamR(), fused="cpu")
    p.grad = torch.ones(2)
    opt.step()
    kernels = opt._stepper.paths.groups()[0].fused
    for t in range(3):
        opt.adamr.weight = 0.1 * t  # 0 at first
        opt.param_groups[0]["betas"] = (0.8 + 0.05 * t, 0.99)
        opt.step()
    assert opt._stepper.paths.groups()[0].fused is kernels
    opt.param_groups[0]["betas"] = (1.5, 0.99)
    for _ in range(2):
        with pytest.raises(optx.OptxError, match="betas"):
            opt.step()


def test_wrapping_many_groups_is_work_in_proportion() -> None:
    def calls(count: int) -> int:
        base = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(2))]} for _ in range(count)])
        profile = cProfile.Profile()
        profile.enable()
        optx.wrap(base, optx.PerpGrad())
        profile.disable()
        return sum(entry.callcount for entry in profile.getstats())

    calls(2)
    assert calls(200) < 12 * calls(20)  # 100 times where every group looks at all


# ---- bases ------------------------------------------------------------------------------------------------


class CountsOddly(torch.optim.Optimizer):
    """Counts in a tensor of its group, as optimi does, and in itself, as StableSPAM; fails when told."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "step": torch.zeros(())})
        self.total_step = 0
        self.fail = False

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.total_step += 1
        for group in self.param_groups:
            group["step"].add_(1.0)
            for p in group["params"]:
                with torch.no_grad():
                    p.add_(p.grad, alpha=-group["lr"] / self.total_step)
        if self.fail:
            raise ArithmeticError


def test_counts_of_a_failed_step_are_taken_back_wherever_they_are() -> None:
    p = nn.Parameter(torch.ones(2))
    base = CountsOddly([p])
    opt = optx.wrap(base, optx.PerpGrad())
    p.grad = torch.tensor([1.0, -1.0])
    opt.step()
    before = p.tolist()
    base.fail = True
    with pytest.raises(ArithmeticError):
        opt.step()
    assert p.tolist() == before
    assert base.total_step == 1
    assert opt.param_groups[0]["step"].item() == 1.0


def test_a_step_that_was_put_on_the_base_is_the_one_that_runs() -> None:
    p = nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([p], lr=0.1)
    calls: list[int] = []
    plain = base.step

    def step(closure: Any = None) -> Any:
        calls.append(1)
        return plain(closure)

    base.step = step  # type: ignore[method-assign]
    opt = optx.wrap(base)
    p.grad = torch.ones(2)
    opt.step()
    assert calls == [1]
    assert "replaced" in str(opt.plan())
    with pytest.raises(optx.FusedError, match="replaced"):
        optx.wrap(opt, fused="cpu")


def test_copies_are_let_go_where_no_base_runs() -> None:
    p = nn.Parameter(torch.ones(1000))
    opt = optx.wrap(torch.optim.AdamW([p]), optx.PerpGrad(), fused=False)
    p.grad = torch.ones(1000)
    opt.step()
    kept = opt._stepper.copies
    assert kept._kept
    opt.remove()
    assert not kept._kept


# ---- checkpoints of others ---------------------------------------------------------------------------------


def state_of(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> dict[str, Any]:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = make([p])
    opt.step()
    return opt.state_dict()


OTHERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
}


@pytest.mark.parametrize("into", OTHERS)
@pytest.mark.parametrize("saved", OTHERS)
def test_another_optimizers_checkpoint_is_told_at_load(saved: str, into: str) -> None:
    p = nn.Parameter(torch.ones(3))
    opt = optx.wrap(OTHERS[into]([p]), optx.PerpGrad())
    before = repr(opt.state_dict())
    checkpoint = state_of(OTHERS[saved])
    if saved.split()[0] == into.split()[0]:
        opt.load_state_dict(checkpoint)
        return
    with pytest.raises(optx.OptxError, match="saved by another optimizer"):
        opt.load_state_dict(checkpoint)
    assert repr(opt.state_dict()) == before


def test_what_is_no_state_dict_is_told() -> None:
    opt = optx.wrap(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1))
    with pytest.raises(optx.OptxError, match=r"no 'state'.*'weight'"):
        opt.load_state_dict(nn.Linear(2, 2).state_dict())


@pytest.mark.parametrize("value", [np.float64(1.0), 2.0, None])
def test_a_slot_that_is_no_tensor_is_told_at_load(value: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    opt = optx.wrap(torch.optim.AdamW([p], weight_decay=0), optx.AdamR())
    p.grad = torch.ones(3)
    opt.step()
    for slot in ("anchor", "v_sum"):
        saved = copy.deepcopy(opt.state_dict())
        saved["state"][0][f"optx.adamr.{slot}"] = value
        with pytest.raises(optx.OptxError, match=f"{slot}.*must be a tensor"):
            opt.load_state_dict(saved)


def test_a_shallow_copy_is_refused() -> None:
    opt = optx.wrap(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1))
    with pytest.raises(optx.OptxError, match="deepcopy"):
        copy.copy(opt)


@pytest.mark.parametrize("left_out", [False, True])
def test_skip_nonfinite_looks_into_sparse_gradients(left_out: bool) -> None:
    table = nn.Embedding(4, 2, sparse=True)
    transforms = [optx.PerpGrad()] if left_out else []
    group: dict[str, Any] = {"params": list(table.parameters())}
    if left_out:
        group["perp_grad"] = False
    opt = optx.wrap(torch.optim.SGD([group], lr=0.1), *transforms, skip_nonfinite=True)
    for scale, skipped in ((1.0, False), (float("nan"), True), (2.0, False)):
        before = table.weight.detach().clone()
        opt.zero_grad()
        (table(torch.tensor([1, 3, 1])).sum() * scale).backward()
        opt.step()
        assert opt.skipped_last is skipped
        assert torch.equal(table.weight[0], before[0])
        assert torch.equal(table.weight, before) is skipped
