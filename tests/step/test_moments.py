"""What every name means in every moment: the table of `optx.Moments` on the paths of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import moment_rules as m
import pytest
import torch
from fused_cases import BF16, F16, F32, F64, draw
from moment_table import BASES, Table
from torch import Tensor, nn

import optx
from optx.step.foreach import GroupRun
from optx.step.tensor_list import PerTensor, TensorList

CHAIN = [m.Names, m.Soften, m.SecondNames]


@pytest.mark.parametrize("base", BASES)
def test_every_name_in_every_moment_on_foreach(base: str) -> None:
    Table(CHAIN, base, fused=False).run().check()


@pytest.mark.long(keep=3)
@pytest.mark.parametrize("base", ["sgd nesterov maximize l2", "sgd momentum dampening", "adam l2 amsgrad"])
def test_every_name_in_every_moment_fused(base: str) -> None:
    Table(CHAIN, base, fused="cpu").run().check()


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("fused", [False, "cpu"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_slots_and_cells_of_every_dtype(fused: Any, dtype: torch.dtype) -> None:
    Table([m.Dtypes, m.Trace], "sgd", fused, dtype).run().check()


@pytest.mark.parametrize(("base", "fused"), [("radam", False), ("adamw", False), ("adamw", "cpu")])
def test_the_bases_state_in_every_moment(base: str, fused: Any) -> None:
    Table([m.Moving], base, fused).run().check()


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("fused", [False, "cpu"])
@pytest.mark.parametrize("skip", [False, True])
def test_sums_see_the_gradient_as_it_stands(fused: Any, skip: bool) -> None:
    """Rules that depend on no sum stand between transforms whose sums would fit into one pass."""
    Table([m.Pull, m.Soften, optx.PerpGrad], "sgd", fused, skip_nonfinite=skip).run(2).check()


@pytest.mark.parametrize("fused", [False, "cpu"])
def test_a_norm_is_the_one_at_its_place(fused: Any) -> None:
    """PerpGrad replaces the squared norm that Pull's finish and weight rules read."""
    Table([m.Pull, optx.PerpGrad, m.Trace], "sgd", fused).run(2).check()


@pytest.mark.parametrize("chain", [CHAIN, [m.Dtypes, m.Trace], [m.Pull, optx.PerpGrad]])
def test_lists_of_tensors_mean_the_same(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of the foreach path that GPUs take."""
    start = GroupRun.__init__

    def with_lists(self: GroupRun, *args: Any) -> None:
        start(self, *args)
        self._lists, self._as_floats = True, False

    monkeypatch.setattr(GroupRun, "__init__", with_lists)
    # In float64 only where what is kept in float32 is exact.
    for dtype in (F32,) if m.Names in chain else (F32, F64):
        Table(chain, "sgd momentum dampening", False, dtype).run().check()


def test_numbers_of_a_list_have_arithmetic() -> None:
    a, b = (PerTensor(torch.tensor([x, 2.0 * x]).unbind()) for x in (1.0, 3.0))
    t = TensorList([torch.ones(2), torch.full((3,), 2.0)])
    for rule in (
        lambda g, a, b: a * b * g,
        lambda g, a, b: (1.0 - a + b) / b * g - a,
        lambda g, a, b: optx.ops.where(a + b > 5.0, g, b - g),
        lambda g, a, b: optx.ops.maximum(a**2, optx.ops.sqrt(b)) + g,
    ):
        got = rule(t, a, b).tensors
        wanted = [rule(*row) for row in zip(t.tensors, a.tensors, b.tensors, strict=True)]
        assert all(map(torch.equal, got, wanted))
        assert type(a * b + 1.0) is PerTensor


# ---- what was stored -------------------------------------------------------------------------------------


@optx.rule(writes=("w", "trace"))
def thirds(w: Any, g: Any, trace: Any) -> Any:
    return w + g / 3.0, trace + w / 3.0


@optx.rule(writes=("sum_w", "sum_trace"))
def look_after(w: Any, trace: Any) -> Any:
    return w, trace


class Thirds(optx.Transform):
    name = "thirds"
    rules = {"after": thirds, "observe": look_after}  # noqa: RUF012

    def __init__(self, dtype: torch.dtype) -> None:
        self.slots = {
            "trace": optx.like_weight(dtype),
            "sum_w": optx.per_tensor(),
            "sum_trace": optx.per_tensor(),
        }


def stored_sums(fused: Any, dtype: torch.dtype, slot: torch.dtype, rounding: str) -> None:
    p = nn.Parameter(torch.linspace(0.3, 2.1, 300).to(dtype))
    transform = Thirds(slot)
    opt = optx.wrap(torch.optim.SGD([p], lr=0.1), transform, fused=fused, rounding=rounding)  # type: ignore[arg-type]
    for g in draw([(300,)] * 3, 5, dtype):
        p.grad = g
        opt.step()
        kahan = opt.state[p].get("optx.kahan", torch.zeros_like(p)).double()
        for name, wanted in (
            ("sum_w", p.detach().double() + kahan),
            ("sum_trace", opt.slot(p, transform, "trace").double()),
        ):
            got = float(opt.slot(p, transform, name))
            assert got == pytest.approx(float(wanted.sum()), rel=1e-6), name


STORED = [
    (BF16, BF16, "stochastic"),
    (BF16, F16, "kahan"),
    (BF16, F64, "kahan"),
    (F16, F32, "nearest"),
    (F64, F32, "nearest"),
]


@pytest.mark.long(keep=2)
@pytest.mark.parametrize(("dtype", "slot", "rounding"), STORED)
@pytest.mark.parametrize("fused", [False, "cpu"])
def test_observed_is_what_was_stored(
    fused: Any, dtype: torch.dtype, slot: torch.dtype, rounding: str
) -> None:
    # A base that writes its own bfloat16 weights rounds to nearest.
    stored_sums(fused, dtype, slot, rounding if fused else "nearest")


@optx.rule(writes="average")
def creep(average: Any) -> Any:
    return average + 2.0**-12


class Creep(optx.Transform):
    name = "creep"
    slots = {"average": optx.like_weight(BF16)}  # noqa: RUF012
    rules = {"gradient": creep}  # noqa: RUF012

    def init_slot(self, name: str, p: Tensor, optimizer: Any) -> Tensor:
        return torch.ones_like(p, dtype=BF16)


@pytest.mark.parametrize("fused", [False, "cpu"])
def test_slow_averages_in_bfloat16_move(fused: Any) -> None:
    """2**-12 is a thirty-second of the unit at 1: rounded to nearest, it would be lost each time."""
    p = nn.Parameter(torch.ones(20000, dtype=BF16))
    opt = optx.wrap(torch.optim.SGD([p], lr=0.0), Creep(), fused=fused)
    for _ in range(4):
        p.grad = torch.zeros_like(p)
        opt.step()
    mean = float(opt.slot(p, opt.creep, "average").double().mean())  # type: ignore[attr-defined]
    assert mean == pytest.approx(1.0 + 4 * 2.0**-12, abs=4 * 2.0**-7 * (4 / 32 / 20000) ** 0.5)


# ---- when things are kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, "cpu"])
def test_a_skipped_step_keeps_nothing_of_what_scalars_wrote(fused: Any) -> None:
    table = Table([m.Names], "sgd", fused, skip_nonfinite=True).run(1)
    for p in table.weights:
        p.grad = torch.full_like(p, float("inf"))
    table.opt.step()
    assert table.opt.skipped_steps == 1
    table.check()
    assert [float(table.opt.slot(p, table.transforms[0], "count")) for p in table.weights] == [1.0] * 4


class Careless(torch.optim.Optimizer):
    """Overwrites the gradient, as some optimizers of other libraries do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(-10.0)
                p.data.add_(p.grad, alpha=0.01)


def test_a_base_may_overwrite_its_gradient() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = optx.wrap(Careless([p]), m.Names())
    p.grad = torch.ones(3)
    opt.step()
    wanted = nn.Parameter(torch.ones(3))
    fused = optx.wrap(torch.optim.SGD([wanted], lr=0.1), m.Names(), fused=True)
    wanted.grad = torch.ones(3)
    fused.step()
    torch.testing.assert_close(p, wanted)
    got, other = opt.slot(p, opt.first, "slope"), fused.slot(wanted, fused.first, "slope")  # type: ignore[attr-defined]
    torch.testing.assert_close(got, other, rtol=1e-5, atol=1e-6)


@optx.rule(writes=("w", "one"))
def constants(one: Any, rate: Any) -> Any:
    return optx.ops.minimum(1.0 / rate, 3.0), 1.0


@optx.rule(writes="count")
def ones(rate: Any) -> Any:
    return 1.0


class Constants(optx.Transform):
    name = "constants"
    slots = {"one": optx.like_weight(torch.int8), "count": optx.per_tensor(torch.int32)}  # noqa: RUF012
    options = {"rate": 0.0}  # noqa: RUF012
    rules = {"weight": constants, "observe": ones}  # noqa: RUF012


@pytest.mark.parametrize("fused", [False, "cpu"])
def test_rules_may_return_numbers(fused: Any) -> None:
    """And 1 / 0 is inf, as on tensors."""
    p = nn.Parameter(torch.ones(3, 2))
    opt = optx.wrap(torch.optim.SGD([p], lr=0.0), Constants(), fused=fused)
    p.grad = torch.zeros(3, 2)
    opt.step()
    assert p.tolist() == [[3.0] * 2] * 3
    assert opt.slot(p, opt.constants, "one").tolist() == [[1, 1]] * 3  # type: ignore[attr-defined]
    assert opt.slot(p, opt.constants, "count").item() == 6  # type: ignore[attr-defined]


# ---- refusals ----------------------------------------------------------------------------------------------


def transform(
    slots: Any = None, options: Any = None, name: str = "mine", **rules: Any
) -> Callable[[], optx.Transform]:
    def make() -> optx.Transform:
        kind = type("Mine", (optx.Transform,), {"name": name, "rules": rules})
        made = kind()
        made.slots, made.options = slots or {}, options or {}
        return made

    return make


def plain(g: Any) -> Any:
    return g * 2.0


@optx.rule(writes="g")
def double(g: Any) -> Any:
    return g * 2.0


def writes(*names: str, reads: str = "g") -> Any:
    """A rule that reads one name and writes some."""
    source = f"def sends({reads}):\n    return {', '.join([f'{reads} * 1.0' for _ in names])}\n"
    scope: dict[str, Any] = {}
    exec(source, scope)
    return optx.rule(scope["sends"], writes=names)


@optx.rule(writes=("g", "seen"))
def returns_one(g: Any, seen: Any) -> Any:
    made = g * 2.0
    return made


@optx.rule(writes="g")
def returns_two(g: Any) -> Any:
    return g * 2.0, g


@optx.rule(writes="g")
def returns_nothing(g: Any) -> Any:
    _ = g * 2.0


@optx.rule(writes="g")
def through_a_helper(g: Any, seen: Any) -> Any:
    return returns_one(g, seen)


CELL, EACH = {"cell": optx.per_tensor()}, {"seen": optx.like_weight()}
REFUSED: dict[str, tuple[Callable[[], optx.Transform], str]] = {
    "no rule": (transform(gradient=plain), "gradient is 'plain', a function and no rule; decorate"),
    "rules in a list": (transform(gradient=[double]), "gradient is .* a list and no rule"),
    "totals as a string": (transform(sums=writes("s"), totals="s"), r"totals is 's'; it must be a tuple"),
    "unknown total": (transform(sums=writes("long"), totals=("lng",)), "totals has 'lng'.* Near: 'long'"),
    "total of finish": (transform(finish=writes("t", reads="lr"), totals=("t",)), "totals has 't'"),
    "gradient writes w": (
        transform(gradient=writes("w")),
        r"'sends' \(gradient\) writes 'w'; .* may write 'g'",
    ),
    "gradient writes a cell": (
        transform(CELL, gradient=writes("cell")),
        "writes 'cell'; gradient may write 'g'",
    ),
    "weight writes g": (transform(weight=writes("g")), r"\(weight\) writes 'g'; weight may write 'w'"),
    "after writes g": (transform(after=writes("w", "g")), r"\(after\) writes 'g'; after may write 'w'"),
    "after writes w0": (transform(after=writes("w0")), "writes 'w0'; after may write 'w'"),
    "weight writes base": (transform(weight=writes("exp_avg")), "writes 'exp_avg', which is no slot"),
    "near slot": (transform(EACH, weight=writes("sen")), "writes 'sen', which is no slot.* Near: 'seen'"),
    "sums write a slot": (transform(EACH, sums=writes("seen")), "writes 'seen'; sums may write new names"),
    "sums write a cell": (transform(CELL, sums=writes("cell")), "writes 'cell'; sums may write new names"),
    "sums write g": (transform(sums=writes("g")), "writes 'g'; sums may write new names"),
    "scalars write a slot": (
        transform(EACH, scalars=writes("seen", reads="lr")),
        "writes 'seen'; scalars may",
    ),
    "scalars write an option": (
        transform(None, {"rate": 1.0}, scalars=writes("rate", reads="lr")),
        "writes 'rate'; scalars may write new names",
    ),
    "scalars write numel": (
        transform(scalars=writes("numel", reads="lr")),
        "writes 'numel'; scalars may write",
    ),
    "finish writes grad_sq": (
        transform(finish=writes("grad_sq", reads="lr")),
        "writes 'grad_sq'; finish may",
    ),
    "promise without gradient": (transform(scalars=writes("grad_sq", reads="lr")), "and there is none"),
    "observe writes w": (transform(observe=writes("w")), r"writes 'w'; observe may write cells"),
    "observe writes a slot": (
        transform(EACH, observe=writes("seen")),
        "writes 'seen'; observe may write cells",
    ),
    "observe writes news": (transform(CELL, observe=writes("sum")), "writes 'sum', which is no slot"),
    "scalars read g": (transform(scalars=writes("k")), "reads 'g', which has a value per element"),
    "finish reads a slot": (
        transform(EACH, finish=writes("k", reads="seen")),
        "reads 'seen', which has a value",
    ),
    "scalars read moments": (transform(scalars=writes("k", reads="exp_avg")), "reads 'exp_avg', which has a"),
    "sums read a scalar": (
        transform(sums=writes("s", reads="k"), scalars=writes("k", reads="lr")),
        "reads 'k' in sums, and scalars computes it only later",
    ),
    "scalars read themselves": (
        transform(scalars=writes("k", reads="k")),
        "reads 'k' in scalars, and scalars",
    ),
    "scalars read a total": (
        transform(scalars=writes("k", reads="total_numel"), totals=("numel",)),
        "reads 'total_numel' in scalars, and the totals computes it only later",
    ),
    "sums read the norm": (
        transform(sums=writes("s", reads="grad_sq")),
        "reads 'grad_sq' in sums, which are",
    ),
    "near name": (transform(gradient=writes("g", reads="exp_avh")), "reads 'exp_avh'.* Near: 'exp_avg'"),
    "fresh": (transform(gradient=writes("g", reads="fresh")), "reads 'fresh', which is no slot"),
    "one of two": (transform(EACH, gradient=returns_one), "returns 1 value; it must return one per name"),
    "two of one": (transform(gradient=returns_two), "returns 2 values; it must"),
    "nothing": (transform(gradient=returns_nothing), "returns 0 values"),
    "a helper's two": (transform(EACH, gradient=through_a_helper), "'through_a_helper' .* returns 2 values"),
    "slot is a dtype": (transform({"x": F32}), r"slots\['x'\] is torch.float32; it must be optx.like_weight"),
    "slot is a function": (transform({"x": optx.like_weight}), "it must be optx.like_weight\\(\\) or"),
    "slot named w": (transform({"w": optx.like_weight()}, gradient=double), "a slot is named 'w'"),
    "option named g": (transform(None, {"g": 1.0}, gradient=double), "an? option is named 'g'"),
    "slot and option": (transform(EACH, {"seen": 1.0}, gradient=double), "'seen' is a slot and an option"),
}


@pytest.mark.parametrize("fused", ["auto", False])
@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused_at_wrap(case: str, fused: Any) -> None:
    make, message = REFUSED[case]
    p = nn.Parameter(torch.ones(2))
    base = torch.optim.AdamW([p])
    with pytest.raises(optx.TransformError, match=message) as error:
        optx.wrap(base, make(), fused=fused)
    assert str(error.value).startswith("Mine(")
    assert not base.state
    assert "mine" not in base.param_groups[0]


def test_names_that_a_kernel_cannot_tell_apart() -> None:
    chain = [
        transform({tail: optx.like_weight()}, name=name, gradient=writes("g", tail))()
        for name, tail in (("a", "b_c"), ("a_b", "c"))
    ]
    with pytest.raises(optx.TransformError, match=r"'a.b_c' and 'a_b.c' .*can't be told apart"):
        optx.wrap(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), *chain)


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "step"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "momentum_buffer"),
        (lambda p: torch.optim.AdamW(p), "max_exp_avg_sq"),
        (lambda p: torch.optim.RAdam(p), "max_exp_avg_sq"),
        (lambda p: torch.optim.Adamax(p), "exp_avg_sq"),
        (lambda p: torch.optim.LBFGS(p), "step"),
    ],
)
@pytest.mark.parametrize("fused", ["auto", False])
def test_names_that_this_base_does_not_have(base: Any, name: str, fused: Any) -> None:
    with pytest.raises(optx.TransformError, match=f"'sends' reads '{name}', which is no slot"):
        optx.wrap(
            base([nn.Parameter(torch.ones(2))]), transform(gradient=writes("g", reads=name))(), fused=fused
        )


class Foreign(torch.optim.Optimizer):
    """Another library's: betas, but moments by other names."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99)})

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("m", torch.zeros_like(p))
            p.data.sub_(p.grad, alpha=0.1)


def test_a_foreign_base_is_asked_once_it_has_state() -> None:
    p = nn.Parameter(torch.ones(2))
    base = Foreign([p])
    opt = optx.wrap(base, transform(gradient=writes("g", reads="exp_avg"))())
    p.grad = torch.ones(2)
    opt.step()
    with pytest.raises(optx.TransformError, match="reads 'exp_avg'"):
        opt.step()
    opt.remove()
    with pytest.raises(optx.TransformError, match="reads 'exp_avg', which is no slot"):
        optx.wrap(base, transform(gradient=writes("g", reads="exp_avg"))())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16, float, "float32"])
def test_slots_of_other_dtypes_are_refused_when_declared(dtype: Any) -> None:
    for make in (optx.like_weight, optx.per_tensor):
        with pytest.raises(
            optx.TransformError, match=f"{make.__name__}: dtype is .*; it must be a torch dtype"
        ):
            make(dtype)


@pytest.mark.parametrize("names", ["w, g", (), ("g", "g"), ("g", 1)])
def test_results_without_a_name_are_refused(names: Any) -> None:
    with pytest.raises(TypeError, match="rule 'plain': writes is"):
        optx.rule(plain, writes=names)


@optx.rule(writes="g")
def own_library(g: Any, F: Any) -> Any:
    return g * 0.5 * F


@optx.rule(writes=("g", "seen"))
def hidden_tuple(g: Any, seen: Any) -> Any:
    both = plain(g), seen
    both = (both[0], g)
    return both


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (transform(None, {"F": 1.0}, gradient=own_library), "rename it"),
        (transform(EACH, gradient=hidden_tuple), "knows|uses"),
    ],
)
def test_rules_that_kernels_cannot_follow_say_so(chain: Any, reason: str) -> None:
    p = nn.Parameter(torch.zeros(2))
    opt = optx.wrap(torch.optim.SGD([p], lr=1.0), chain())
    assert opt.plan()[0].path == "foreach"
    assert opt.plan()[0].reason is not None
    p.grad = torch.ones(2)
    opt.step()
    assert p.tolist() in ([-0.5, -0.5], [-2.0, -2.0])
