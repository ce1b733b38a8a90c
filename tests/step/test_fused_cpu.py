"""Steps on both paths against float64 references, over transforms, bases, dtypes, shapes and settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_cases import BASES, BF16, CHAINS, F16, F32, F64, L2, SHAPES, Case, Steps, draw
from hypothesis import given, settings
from hypothesis import strategies as st

import optx
from optx.kernels.step.layout import CHUNK
from optx.step.fused import FusedGroup

# Every base and every chain; a kernel takes 1 to 3 s to compile, so not every pair.
FUSED = [
    Case("sgd", "perp"),
    Case("sgd momentum dampening", "perp adamr plain"),
    Case("sgd nesterov maximize", "none"),
    Case("adam", "adamr"),
    Case("adam l2", "perp adamr"),
    Case("adam l2 amsgrad", "adamr l1"),
    Case("adamw amsgrad maximize", "perp adamr"),
    *(Case("adamw", chain) for chain in CHAINS),
]
FOREACH = [
    Case(b, c, fused=False)
    for b in BASES
    for c, chain in CHAINS.items()
    if not (b.startswith("sgd") and chain.adamr and chain.adamr.get("normalize", True))
]
BF16_STOCHASTIC = Case(weights=BF16, grads=BF16, rounding="stochastic")
# Not normalised: AdamR sums v before it is rounded to bfloat16, and the reference only sees it rounded.
BF16_KAHAN = Case(chain="perp adamr plain", weights=BF16, grads=BF16, rounding="kahan")
DTYPES = [
    Case(weights=F64, grads=F64),
    Case(weights=F32, grads=BF16),
    Case(chain="perp", weights=F32, grads=F16),
    Case(weights=F16, grads=F16),
    Case(chain="none", weights=BF16, grads=BF16, rounding="nearest"),
    BF16_STOCHASTIC,
    BF16_KAHAN,
]
FOREACH_64 = [case.on(weights=F64, grads=F64, fused=False) for case in FUSED[:7]]


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("case", [*FUSED, *FOREACH, *DTYPES, *FOREACH_64], ids=str)
def test_each_step_is_the_references(case: Case) -> None:
    """The reference starts each step where the optimizer stands, so that errors cannot hide in history."""
    steps = Steps(case)
    assert {g.path for g in steps.opt.plan()} == {"fused cpu" if case.fused else "foreach"}
    for number in range(4):
        before = [p.detach().clone() for p in steps.params]
        steps.step(missing=[0, 4] if number == 2 else [])
        steps.check()
        if number == 2:
            assert torch.equal(before[0], steps.params[0])
            assert not torch.equal(before[5], steps.params[5])


@pytest.mark.parametrize("case", [c for c in FUSED if "l1" not in c.chain], ids=str)
def test_paths_agree_after_many_steps(case: Case) -> None:
    """Twenty steps apart in rounding only: 5e-6 of the largest weight (L1's sign would magnify it)."""
    fused, foreach = (Steps(case.on(fused=f), shapes=[(3, 5), (), (0,), (257,)]) for f in (True, False))
    for _ in range(20):
        fused.step()
        foreach.step()
    for a, b in zip(fused.params, foreach.params, strict=True):
        if a.numel():
            assert float((a - b).detach().abs().max()) <= 5e-6 * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("groups", [2, 3])
def test_groups_share_what_is_global_and_nothing_else(groups: int) -> None:
    """AdamR's scale spans the groups; learning rates do not."""
    steps = Steps(Case(), groups=groups)
    for number, group in enumerate(steps.opt.param_groups):
        group["lr"] = 0.01 / (number + 1)
    for i, n in enumerate(steps.reference.numbers):
        n["lr"] = 0.01 / (i % groups + 1)
    for _ in range(3):
        steps.step(missing=[1])
        steps.check()


@st.composite
def problems(draw_: Any) -> tuple[Case, dict[str, Any]]:
    """Compositions whose kernels other tests compile anyway, with any shapes, settings and groups."""
    sizes = st.sampled_from([0, 1, 2, 3, 8, 17, 64, 511, 513])
    small = st.one_of(st.just(()), st.tuples(sizes), st.tuples(sizes, st.integers(1, 5)))
    long = st.sampled_from([(CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (3, CHUNK // 2)])
    shapes = draw_(st.lists(small, min_size=1, max_size=6)) + draw_(st.lists(long, max_size=1))
    case = draw_(st.sampled_from([*FUSED, *DTYPES]))
    numbers = {"lr": draw_(st.floats(0.0, 0.5)), "weight_decay": draw_(st.sampled_from([1e-3, 0.1, 1.0]))}
    if case.base.startswith("adam"):
        numbers["betas"] = (
            draw_(st.sampled_from([0.8, 0.9])),
            draw_(st.sampled_from([0.5, 0.99, 0.999])),
        )
        # Half precision cannot hold a smaller one.
        numbers["eps"] = draw_(st.sampled_from([1e-8, 1e-3]))
        if case.base == "adam":
            del numbers["weight_decay"]  # it would be another base
    elif "momentum" in case.base or "nesterov" in case.base:
        numbers["momentum"] = draw_(st.floats(0.1, 1.0))
    return case, {
        "shapes": shapes,
        "groups": draw_(st.integers(1, 3)),
        "numbers": numbers,
        "seed": draw_(st.integers(0, 100)),
    }


@settings(max_examples=30)
@given(
    problem=problems(), missing=st.sets(st.integers(0, 5), max_size=2), scale=st.sampled_from([1e-3, 1.0, 30])
)
@pytest.mark.filterwarnings(
    "ignore:AdamR. lr:UserWarning"
)  # some pulls overshoot, and are right all the same
@pytest.mark.filterwarnings("ignore:optx. step.. found no gradient")  # where all of them are missing
def test_any_shapes_settings_and_groups(
    problem: tuple[Case, dict[str, Any]], missing: set[int], scale: float
) -> None:
    case, arguments = problem
    steps = Steps(case, **arguments)
    for _ in range(2):
        steps.step(missing=sorted(missing), scale=scale if case.weights != F16 else 1.0)
        steps.check()


def run(threads: int, shapes: list[tuple[int, ...]], case: Case, steps: int = 3) -> list[torch.Tensor]:
    torch.set_num_threads(threads)
    s = Steps(case, shapes=shapes)
    for _ in range(steps):
        s.step()
    return [p.detach() for p in s.params]


@pytest.mark.parametrize("case", [Case(), BF16_STOCHASTIC, BF16_KAHAN, Case("sgd", "perp")], ids=str)
def test_threads_do_not_show(case: Case) -> None:
    """Sums are folded in a fixed order and random draws are counted, so not a bit depends on who did it."""
    shapes = [(200_003,), (70_000,), (5,)]
    one, two, four = (run(n, shapes, case) for n in (1, 2, 4))
    for a, b, c in zip(one, two, four, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def split_like(pieces: list[int], case: Case) -> torch.Tensor:
    """The same numbers in one tensor or in several, after three steps, joined."""
    n = sum(pieces)
    w, anchor = draw([(n,)], 0, case.weights)[0], draw([(n,)], 1, case.weights)[0]
    params = [torch.nn.Parameter(x.clone()) for x in w.split(pieces)]
    for p in params:
        p.grad_dtype = case.grads
    base, chain = BASES[case.base], CHAINS[case.chain]
    named = [(str(i), p) for i, p in enumerate(params)]
    opt = optx.wrap(
        base.make(named, **base.numbers),
        *chain.build(anchor.split(pieces)),
        fused=True,
        rounding=case.rounding,
    )
    for number in range(3):
        for p, g in zip(params, draw([(n,)], 10 + number, case.grads)[0].split(pieces), strict=True):
            p.grad = g.clone()
        opt.step()
    return torch.cat([p.detach() for p in params])


@pytest.mark.parametrize("case", [Case(chain="adamr plain"), Case(chain="none"), Case("sgd", "perp")])
def test_the_split_into_tensors_does_not_show(case: Case) -> None:
    whole = [70_001]
    parts = [1, 0, 30_000, 7, 39_993]
    if CHAINS[case.chain].perp is not None:
        # A projection is per tensor: here the split shows, and the comparison could fail.
        assert not torch.equal(split_like(whole, case), split_like(parts, case))
    else:
        assert torch.equal(split_like(whole, case), split_like(parts, case))


def test_number_of_threads_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.set_num_threads`` is followed from one step to the next."""
    from optx.kernels import cpu

    seen: list[int] = []
    openmp = cpu._openmp()
    if openmp is None:
        pytest.skip("no OpenMP runtime here")

    def spy(kernel: int, args: int, threads: int, flags: int) -> None:
        seen.append(threads)
        openmp(kernel, args, threads, flags)

    monkeypatch.setattr(cpu, "_openmp", lambda: spy)
    steps = Steps(Case(chain="none"), shapes=[(70_000,)])
    for threads in (2, 3, 1, 2):
        torch.set_num_threads(threads)
        steps.step()
        steps.check()
    assert seen == [2, 3, 2]  # alone, no other thread is woken


def test_steady_state_rebuilds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """New gradient tensors every step only change addresses; another set of gradients makes new tables."""
    built: list[int] = []
    rebuild = FusedGroup._rebuild
    monkeypatch.setattr(FusedGroup, "_rebuild", lambda self, params: (built.append(1), rebuild(self, params)))
    steps = Steps(Case())
    for _ in range(4):
        steps.step()  # a fresh gradient each time
    assert len(built) == 1
    steps.step(missing=[0])
    assert len(built) == 2
    steps.check()
    for group in steps.opt.param_groups:
        group["lr"] = 0.5  # a scheduler compiles nothing
    steps.reference.numbers = [dict(n, lr=0.5) for n in steps.reference.numbers]
    steps.step(missing=[0])
    assert len(built) == 2
    steps.check()


def test_gradients_beyond_the_range_of_their_squares() -> None:
    """1e-23 and 1e20 have no float32 square: sums over long tensors must not lose or overflow them."""
    for scale in (1e-23, 1e20):
        for shape in ((1000,), (CHUNK + 5,)):
            w, g = draw([shape, shape], 3, F32)
            p = torch.nn.Parameter(w.clone())
            p.grad = (g + w) * scale
            opt = optx.wrap(
                torch.optim.SGD([p], lr=1 / scale), optx.PerpGrad(), fused=True, skip_nonfinite=True
            )
            opt.step()
            assert opt.skipped_steps == 0
            moved = (w - p.detach()).double()
            assert float(moved.norm()) == pytest.approx(float((g + w).norm()), rel=1e-5)


def test_step_counts_in_float64() -> None:
    """Where float64 is the default dtype torch counts steps in it; wrapping such a base goes on counting."""
    torch.set_default_dtype(F64)
    try:
        results = []
        for fused in (True, False):
            p = torch.nn.Parameter(torch.ones(3))
            base = torch.optim.Adam([p], lr=0.1)
            opt: torch.optim.Optimizer = base
            for number in range(6):
                p.grad = torch.tensor([1.0, 2.0, 3.0]) * (-1) ** number
                if number == 3:
                    opt = optx.wrap(base, fused=fused)
                opt.step()
            assert float(opt.state[p]["step"]) == 6
            results.append(p.detach())
        torch.testing.assert_close(*results, rtol=0, atol=1e-14)
    finally:
        torch.set_default_dtype(F32)


def test_lr_may_be_a_tensor_and_change() -> None:
    lr = torch.tensor(0.1)
    p = torch.nn.Parameter(torch.ones(4))
    opt = optx.wrap(torch.optim.SGD([p], lr=lr), fused=True)
    for value, wanted in ((0.1, 0.9), (0.5, 0.4)):
        lr.fill_(value)
        p.grad = torch.ones(4)
        opt.step()
        torch.testing.assert_close(p.detach(), torch.full((4,), wanted))


def test_the_table_covers_what_it_says() -> None:
    assert {c.base for c in FUSED} == set(BASES)
    assert {c.chain for c in FUSED} == set(CHAINS)
    assert {len(s) for s in SHAPES} == {0, 1, 2}
    assert L2["norm"] == "l2"
