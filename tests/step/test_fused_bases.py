"""Each base that has rules, against its library's own step: from a fresh and a loaded state, both ways."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bases import through_a_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_optimizer
    import torch_optimizer

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)

Make = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True, eq=False)
class Case:
    """One structure of one base: what hypothesis draws changes none of it."""

    kind: Any
    options: dict[str, Any]
    drawn: tuple[str, ...] = ()

    def make(self, params: Sequence[Any], **more: Any) -> torch.optim.Optimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.kind(list(params), **{**self.options, **more})

    def __str__(self) -> str:
        library = self.kind.__module__.partition(".")[0]
        return f"{library}.{self.kind.__name__}"


def of(**options: Any) -> dict[str, Any]:
    return options


o, p, t = torch.optim, pytorch_optimizer, torch_optimizer
MOMENTS = ("lr", "betas", "weight_decay", "eps")
CASES = [
    Case(o.NAdam, of(weight_decay=0.1, decoupled_weight_decay=True), (*MOMENTS, "momentum_decay")),
    Case(o.RAdam, of(weight_decay=0.1, maximize=True), MOMENTS),
    Case(o.Adamax, of(weight_decay=0.1), MOMENTS),
    Case(o.RMSprop, of(weight_decay=0.1), ("lr", "alpha", "weight_decay", "eps")),
    Case(o.RMSprop, of(centered=True, momentum=0.9, maximize=True), ("lr", "momentum", "eps")),
    Case(o.Adagrad, of(lr_decay=0.1, initial_accumulator_value=0.1), ("lr", "lr_decay")),
    Case(o.Adadelta, of(weight_decay=0.1), ("lr", "rho", "weight_decay")),
    Case(o.Rprop, of(step_sizes=(1e-4, 0.05)), ("lr", "etas")),
    Case(o.ASGD, of(lambd=0.01, t0=10, weight_decay=0.1), ("lr", "lambd", "alpha", "weight_decay")),
    Case(p.Lion, of(weight_decay=0.1), ("lr", "betas", "weight_decay")),
    Case(p.AdaBelief, of(weight_decay=0.1, maximize=True, ams_bound=True), MOMENTS),
    Case(p.Yogi, of(weight_decay=0.1, fixed_decay=True), (*MOMENTS, "initial_accumulator")),
    Case(p.Adan, of(weight_decay=0.1), ("lr", "weight_decay")),
    Case(p.NovoGrad, of(weight_decay=0.1, grad_averaging=True), MOMENTS),
    Case(t.AdaBelief, of(weight_decay=0.1), MOMENTS),
    Case(t.Yogi, of(weight_decay=0.1), MOMENTS),
    Case(t.NovoGrad, of(weight_decay=0.1, amsgrad=True), MOMENTS),
]
# A kernel for each takes seconds to compile: where two libraries have a method, one of them is long.
LATER = (p.Yogi, p.NovoGrad, t.AdaBelief)
every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.long] * (case.kind in LATER)) for case in CASES],
    ids=str,
)
SHAPES = ((7, 11), (40,), ())


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def take(opt: Any, params: Sequence[Tensor], steps: Iterable[int]) -> None:
    """Steps on gradients that depend on their numbers only; the last weight has none in every fourth."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in params:
            g = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) + 0.2
            parameter.grad = g.to(parameter.dtype)
        if step % 4 == 0:
            params[-1].grad = None
        opt.step()


def close(a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max() + 1e-2))


@functools.cache
def trained(case: Case) -> tuple[Any, Any, Any, Any]:
    """After 50 steps: ours and the library's weights, and their optimizers."""
    ours, own = weights(), weights()
    opt, plain = optx.wrap(case.make(ours), fused=True), case.make(own)
    take(opt, ours, range(50))
    take(plain, own, range(50))
    return ours, own, opt, plain


@every_case
def test_fifty_steps_from_a_fresh_state_are_the_librarys(case: Case) -> None:
    ours, own, opt, plain = trained(case)
    assert opt.plan()[0].path == "fused cpu"
    assert not any(torch.equal(a, b) for a, b in zip(ours, weights(), strict=True))
    close(ours, own)
    for a, b in zip(ours, own, strict=True):
        mine, theirs = opt.state[a], plain.state[b]
        assert mine.keys() == theirs.keys() - {"rho_inf"}  # which only rectify=True reads
        for name in mine:
            assert type(mine[name]) is type(theirs[name])
            close([torch.as_tensor(mine[name])], [torch.as_tensor(theirs[name])])


@every_case
def test_each_goes_on_from_the_others_file_and_ours_bit_for_bit(case: Case) -> None:
    ours, _, opt, plain = trained(case)
    start = [w.detach().clone() for w in ours]
    files = [through_a_file(one.state_dict()) for one in (opt, plain)]
    results: list[list[Tensor]] = []
    for wrapped, file in ((True, 0), (False, 0), (True, 1), (True, 0)):
        params = [nn.Parameter(w.clone()) for w in start]
        one = optx.wrap(case.make(params), fused=True) if wrapped else case.make(params)
        one.load_state_dict(copy.deepcopy(files[file]))
        take(one, params, range(50, 70))
        results.append([w.detach() for w in params])
    close(results[0], results[1])
    close(results[2], results[1], 1e-4)  # its state was the library's, equal to rounding
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[3], strict=True))
    # And without a file in between.
    params = [nn.Parameter(w.clone()) for w in start]
    one = optx.wrap(case.make(params), fused=True)
    one.load_state_dict(opt.state_dict())
    take(one, params, range(50, 70))
    assert all(torch.equal(a, b) for a, b in zip(results[0], params, strict=True))


UNIT = st.floats(0.01, 0.99)
DRAWN: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.floats(1e-4, 0.3),
    "betas": st.tuples(st.floats(0.0, 0.99), UNIT),
    "weight_decay": st.floats(0.01, 0.5),
    "eps": st.floats(1e-6, 1e-2),
    "momentum_decay": st.floats(1e-4, 0.1),
    "alpha": UNIT,
    "rho": UNIT,
    "lambd": st.floats(1e-4, 0.1),
    "lr_decay": st.floats(0.0, 1.0),
    "momentum": UNIT,
    "etas": st.tuples(st.floats(0.1, 0.9), st.floats(1.05, 3.0)),
    "initial_accumulator": st.floats(1e-6, 0.1),
}


@every_case
def test_any_numbers(case: Case) -> None:
    @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.fixed_dictionaries({name: DRAWN[name] for name in case.drawn}))
    def check(numbers: dict[str, Any]) -> None:
        ours, own = weights(), weights()
        opt, plain = optx.wrap(case.make(ours, **numbers), fused=True), case.make(own, **numbers)
        for one, params in ((opt, ours), (plain, own)):
            take(one, params, range(5))
            one.param_groups[0]["lr"] *= 0.5  # a schedule
            take(one, params, range(5, 8))
        close(ours, own, 1e-4)

    check()


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (p.Lion, of(cautious=True), "its rules don't know cautious=True"),
        (p.Lion, of(use_gc=True), "its rules don't know use_gc=True"),
        (p.AdaBelief, of(rectify=True), "its rules don't know rectify=True"),
        (t.AdaBelief, of(rectify=True), "its rules don't know rectify=True"),
        (p.Adan, of(maximize=True), "its rules don't know maximize=True"),
        (p.Adan, of(max_grad_norm=1.0), "its rules don't know max_grad_norm"),
        (p.NovoGrad, of(adam_debias=True), "its rules don't know adam_debias=True"),
        (o.RAdam, of(differentiable=True), "differentiable=True needs autograd through the step"),
    ],
)
def test_what_has_no_rules_is_named(kind: Any, options: dict[str, Any], words: str) -> None:
    plan = optx.wrap(Case(kind, options).make(weights())).plan()
    assert plan[0].reason is not None
    assert plan[0].reason.startswith(words)


def test_another_version_of_a_library_is_not_taken_for_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from optx.bases import _common

    monkeypatch.setattr(_common.importlib.metadata, "version", lambda name: "5.0.1")
    _common._other_version.cache_clear()
    plan = optx.wrap(p.Lion(weights())).plan()
    assert plan[0].reason == "its rules are those of pytorch_optimizer 4.1, and this is 5.0.1"
    _common._other_version.cache_clear()


def test_sparse_gradients_are_left_to_adagrad() -> None:
    made: list[nn.Embedding] = []
    for wrapped in (True, False):
        torch.manual_seed(0)
        layer = nn.Embedding(5, 3, sparse=True)
        opt: Any = o.Adagrad(layer.parameters(), lr=0.1)
        opt = optx.wrap(opt) if wrapped else opt
        for _ in range(3):
            opt.zero_grad()
            layer(torch.tensor([1, 3])).square().sum().backward()
            opt.step()
        made.append(layer)
    assert torch.equal(made[0].weight, made[1].weight)


def test_a_flag_set_in_training_takes_effect() -> None:
    """The rules are asked in every step."""
    ours, own = weights(), weights()
    opt, plain = optx.wrap(p.Lion(ours, lr=0.01)), p.Lion(own, lr=0.01)
    for one, params, base in ((opt, ours, opt.base), (plain, own, plain)):
        take(one, params, range(3))
        base.maximize = True
        take(one, params, range(3, 6))
    close(ours, own)


def test_moments_of_bfloat16_weights_stay_near_the_librarys() -> None:
    """Libraries round each operation; we round once."""
    for case in (CASES[1], CASES[10]):
        ours, own = weights(torch.bfloat16), weights(torch.bfloat16)
        opt, plain = optx.wrap(case.make(ours), fused=True, rounding="nearest"), case.make(own)
        take(opt, ours, range(20))
        take(plain, own, range(20))
        close(ours, own, 0.04)
