"""A step happens whole or not at all: after an error everything is as if the step had never been tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

both = pytest.mark.parametrize("fused", ["auto", False], ids=["fused", "foreach"])


class Boom(Exception):
    """Not one that anything here catches."""


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: climbs, evaluates again, comes back, and lets another optimizer step."""

    def __init__(self, params: Any, rho: float = 0.05) -> None:
        super().__init__(params, {"rho": rho})
        self.inner = torch.optim.SGD(self.param_groups, lr=0.005, momentum=0.5)
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        moves = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    moves.append((p, group["rho"] * p.grad / (p.grad.norm() + 1e-12)))
                    p.add_(moves[-1][1])
        with torch.enable_grad():
            closure()
        for p, e in moves:
            p.sub_(e)
        self.inner.step()
        return loss


def mixed(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The second group can't be fused: its weight has gaps."""
    return torch.optim.AdamW(params_groups(params), lr=0.01, weight_decay=0.1)


def params_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:]}]


BASES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "mixed": mixed,
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.01),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=4),
    "SAM": SAM,
}


class Run:
    """A small regression; weights may have gaps, so that no kernel takes them."""

    def __init__(self, base: str, fused: Any, **options: Any) -> None:
        torch.manual_seed(0)
        gaps = torch.randn(4, 6)
        self.params = [
            nn.Parameter(torch.randn(3, 4)),
            nn.Parameter(gaps[:, ::2] if base == "mixed" else gaps),
        ]
        self.bases = BASES[base](self.params)
        chain = [optx.PerpGrad(), optx.AdamR(0.1, normalize=False)]
        self.opt = optx.wrap(self.bases, *chain, fused=fused, **options)
        self.several = base in ("LBFGS", "SAM")
        self.evaluations = 0
        self.spoil: Callable[[int], None] = lambda _: None

    def closure(self) -> Tensor:
        """Evaluate; then whatever a test does to the gradients."""
        self.opt.zero_grad()
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(5, 3, generator=generator)
        loss = ((x @ self.params[0] @ self.params[1]).square().mean(1) - 1).square().mean()
        loss.backward()
        self.evaluations += 1
        self.spoil(self.evaluations)
        return loss

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.opt.step(self.closure)

    def everything(self) -> dict[str, Any]:
        """Weights, gradients, groups and state, copied."""
        return {
            "weights": [p.detach().clone() for p in self.params],
            "grads": [None if p.grad is None else p.grad.clone() for p in self.params],
            "groups": [{k: copied(v) for k, v in g.items() if k != "params"} for g in self.opt.param_groups],
            "state": [copied(dict(self.opt.state.get(p, {}))) for p in self.params],
            "pending": [copied(dict(self.opt.slot_store.of(p))) for p in self.params],
            "inner": [copied(dict(self.bases.inner.state.get(p, {}))) for p in self.params]
            if isinstance(self.bases, SAM)
            else [],
            "counted": (self.opt.skipped_steps,),
        }


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return [copied(v) for v in value] if isinstance(value, list | tuple) else value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def fails(kind: type[BaseException]) -> Callable[..., Any]:
    def failing(*_: Any) -> None:
        raise kind

    return failing


def pre_hook(run: Run, kind: type[BaseException]) -> Any:
    return run.bases.register_step_pre_hook(fails(kind)).remove


def in_first_closure(run: Run, kind: type[BaseException]) -> Any:
    return at_evaluation(run, kind, 1)


def in_second_closure(run: Run, kind: type[BaseException]) -> Any:
    return at_evaluation(run, kind, 2)


def at_evaluation(run: Run, kind: type[BaseException], number: int) -> Any:
    start = run.evaluations

    def spoil(evaluations: int) -> None:
        if evaluations == start + number:
            raise kind

    run.spoil = spoil
    return lambda: setattr(run, "spoil", lambda _: None)


def base_before(run: Run, kind: type[BaseException]) -> Any:
    """The base's own step fails before it does anything."""
    run.bases.step = fails(kind)  # type: ignore[method-assign]
    return lambda: delattr(run.bases, "step")


def base_half_way(run: Run, kind: type[BaseException]) -> Any:
    """It has moved a weight, and its state."""

    def step(closure: Any = None) -> Any:
        if closure is not None:
            closure()
        with torch.no_grad():
            run.params[1].add_(1.0)
            for value in run.bases.state[run.params[1]].values():
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.add_(1.0)
            run.bases.param_groups[0]["lr"] = 77.0
            run.bases.state[run.params[1]]["new"] = torch.ones(1)
        raise kind

    run.bases.step = step  # type: ignore[method-assign]
    return lambda: delattr(run.bases, "step")


def base_after(run: Run, kind: type[BaseException]) -> Any:
    """It has done all of its step."""
    own = type(run.bases).step

    def step(closure: Any = None) -> Any:
        own(run.bases) if closure is None else own(run.bases, closure)
        raise kind

    run.bases.step = step  # type: ignore[method-assign]
    return lambda: delattr(run.bases, "step")


PLACES = [pre_hook, in_first_closure, in_second_closure, base_before, base_half_way, base_after]
LOOSE = {base_before, base_half_way, base_after}  # a kernel replaces the base's step
CASES = [
    (base, place)
    for base in BASES
    for place in PLACES
    if (place is not in_second_closure or base in ("LBFGS", "SAM"))
]


@pytest.mark.long(keep=3)
@both
@pytest.mark.parametrize(("base", "place"), CASES, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_a_failed_step_was_never_tried(base: str, place: Any, first: bool, fused: Any) -> None:
    if place in LOOSE and fused == "auto" and base in ("AdamW", "SGD"):
        pytest.skip("the base's own step does not run")
    kind = KeyboardInterrupt if first else Boom
    run, plain = Run(base, fused), Run(base, fused)
    if not first:
        run.steps(2)
        plain.steps(2)
    if not run.several:
        run.closure()  # the gradients that a failed closure leaves are its own
    before = run.everything()
    undo = place(run, kind)
    with pytest.raises(kind):
        run.opt.step(run.closure if run.several or place is in_first_closure else None)
    undo()
    after = run.everything()
    for part in ("weights", "state", "groups", "pending", "inner", "counted"):
        assert same(before[part], after[part]), part
    if place is not in_first_closure and not run.several:
        assert same(before["grads"], after["grads"])
    run.steps(3)
    plain.steps(3)
    assert same(run.everything(), plain.everything())
    assert all(bool(p.isfinite().all()) for p in plain.params)


@both
def test_an_error_in_a_transforms_hook_changes_nothing(fused: Any) -> None:
    run = Run("AdamW", fused)
    run.steps(1)
    before = run.everything()
    object.__setattr__(run.opt.adamr, "before_step", fails(Boom))
    with pytest.raises(Boom):
        run.opt.step()
    assert same(run.everything(), before)


# ---- skip_nonfinite ----------------------------------------------------------------------------------------


@pytest.mark.long(keep=4)
@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("base", BASES)
def test_a_skipped_step_leaves_everything_and_the_next_works(base: str, value: float, fused: Any) -> None:
    last = 3 if base == "LBFGS" else 2 if base == "SAM" else 1
    run, plain = Run(base, fused, skip_nonfinite=True), Run(base, fused, skip_nonfinite=True)
    run.steps(1)
    plain.steps(1)
    before = run.everything()
    start = run.evaluations

    def spoil(evaluations: int) -> None:
        if evaluations == start + last:
            assert run.params[1].grad is not None
            run.params[1].grad[0, 0] = value

    run.spoil = spoil
    loss = run.opt.step(run.closure)
    assert isinstance(loss, Tensor)
    assert run.opt.skipped_last
    assert run.opt.skipped_steps == 1
    after = run.everything()
    for part in ("weights", "state", "groups", "pending", "inner"):
        assert same(before[part], after[part]), part
    run.spoil = lambda _: None
    run.steps(2)
    plain.steps(2)
    assert not run.opt.skipped_last
    mine, theirs = run.everything(), plain.everything()
    assert mine.pop("counted") == (1,)
    theirs.pop("counted")
    assert same(mine, theirs)


@both
@pytest.mark.parametrize("chain", [[], [optx.PerpGrad]], ids=["bare", "PerpGrad"])
def test_a_large_float64_gradient_is_finite(chain: list[Any], fused: Any) -> None:
    """The sum of its squares is not."""
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = optx.wrap(torch.optim.SGD([p], lr=1e-160), *(t() for t in chain), fused=fused, skip_nonfinite=True)
    p.grad = torch.tensor([1e160, -1e160], dtype=torch.float64)
    opt.step()
    assert not opt.skipped_last
    assert opt.skipped_steps == 0
    assert bool(p.isfinite().all())
    assert p.tolist() == pytest.approx([0.0, 2.0])
    p.grad[0] = float("inf")
    opt.step()
    assert opt.skipped_last


def test_schedulefree_skips_whole() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    p = nn.Parameter(torch.ones(3))
    base = schedulefree.AdamWScheduleFree([p], lr=0.1)
    opt: Any = optx.wrap(base, optx.PerpGrad(), skip_nonfinite=True)
    opt.train()
    p.grad = torch.linspace(1, 2, 3)
    opt.step()
    before = (
        copied({k: v for k, v in opt.param_groups[0].items() if k != "params"}),
        copied(dict(opt.state[p])),
    )
    weights = p.detach().clone()
    p.grad = torch.full((3,), float("nan"))
    opt.step()
    after = (
        copied({k: v for k, v in opt.param_groups[0].items() if k != "params"}),
        copied(dict(opt.state[p])),
    )
    assert opt.skipped_last
    assert torch.equal(p, weights)
    assert same(list(before), list(after))


def test_a_moment_that_a_person_took_away_is_still_away_after_a_failed_step() -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))]
    opt = optx.wrap(torch.optim.AdamW(params, lr=0.1), fused="cpu")
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.state[params[0]]["exp_avg_sq"] = None
    opt.state[params[1]]["exp_avg"] = torch.ones(2)
    with pytest.raises(optx.ShapeError):
        opt.step()
    assert opt.state[params[0]]["exp_avg_sq"] is None
    opt.state[params[1]]["exp_avg"] = torch.ones(4)
    opt.step()
    assert opt.state[params[0]]["exp_avg_sq"] is not None
