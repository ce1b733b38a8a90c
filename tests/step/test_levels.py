"""Step counters, totals of groups that differ, numbers per row and column, bases with sums of their own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_cases import draw
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import optx

F32 = torch.float32
PATHS = pytest.mark.parametrize("fused", [False, "cpu"])


# ---- counters ----------------------------------------------------------------------------------------------


@optx.rule(writes="w")
def by_steps(w: Any, steps: Any) -> Any:
    return w + steps


class Counted(optx.Transform):
    name = "counted"
    slots = {"steps": optx.counter()}  # noqa: RUF012
    rules = {"after": by_steps}  # noqa: RUF012


def counted(fused: Any, **settings: Any) -> tuple[list[nn.Parameter], Any]:
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    return weights, optx.wrap(torch.optim.SGD(weights, lr=0.5), Counted(), fused=fused, **settings)


def take(opt: Any, *grads: tuple[nn.Parameter, float]) -> None:
    opt.zero_grad()
    for p, value in grads:
        p.grad = torch.full_like(p, value)
    opt.step()


def steps(opt: Any, p: nn.Parameter) -> float:
    return float(opt.slot(p, opt.counted, "steps"))


@PATHS
def test_a_counter_counts_each_weights_steps(fused: Any) -> None:
    (a, b), opt = counted(fused, skip_nonfinite=True)
    take(opt, (a, 0.0))
    take(opt, (a, 0.0), (b, 0.0))
    take(opt, (a, float("nan")), (b, 0.0))  # skipped
    assert (steps(opt, a), steps(opt, b)) == (2.0, 1.0)
    assert (a[0].item(), b[0].item()) == (3.0, 1.0)
    saved = copy.deepcopy(opt.state_dict())
    (c, _), other = counted(fused)
    other.load_state_dict(saved)
    take(other, (c, 0.0))
    assert c[0].item() == 3.0


@PATHS
def test_a_step_without_rate_and_gradient_does_not_count(fused: Any) -> None:
    (a, b), opt = counted(fused)
    opt.param_groups[0]["lr"] = 0.0
    take(opt, (a, 0.0), (b, 0.0))
    assert (steps(opt, a), steps(opt, b)) == (0.0, 0.0)
    take(opt, (a, 0.0), (b, 1.0))  # a warmup's first step is one
    assert (steps(opt, a), steps(opt, b)) == (1.0, 1.0)


@PATHS
def test_distributed_checkpoints_first_step_does_not_count(fused: Any) -> None:
    model = nn.Linear(2, 2)
    opt = optx.wrap(torch.optim.SGD(model.parameters(), lr=0.5), Counted(), fused=fused)
    get_optimizer_state_dict(model, opt)
    assert [steps(opt, p) for p in model.parameters()] == [0.0, 0.0]  # type: ignore[arg-type]


# ---- totals of groups that differ --------------------------------------------------------------------------


@optx.rule(writes="size")
def size(g: Any) -> Any:
    return g * g


@optx.rule(writes="g")
def by_all(g: Any, total_size: Any) -> Any:
    return g * total_size


@optx.rule(writes="went")
def went(w: Any, w0: Any) -> Any:
    return (w - w0) * (w - w0)


@optx.rule(writes="w")
def by_way(w: Any, w0: Any, total_went: Any) -> Any:
    return w0 + (w - w0) * total_went


def scaled(key: str) -> optx.Transform:
    """Multiplies the gradient by its squared norm over all, then the way by its squared length over all."""
    rules = {
        **{"sums": size, "totals": ("size",), "gradient": by_all},
        **{"after_sums": went, "after_totals": ("went",), "after": by_way},
    }
    return type("Scaled", (optx.Transform,), {"name": key, "rules": rules})()


@pytest.mark.parametrize("fused", [False, "cpu", "mixed"])
def test_totals_are_over_all_groups_whatever_else_they_leave_out(fused: Any) -> None:
    """The second group leaves the first transform out, and takes the second one's sums a pass earlier."""
    a, b = (nn.Parameter(w) for w in draw([(5,), (2, 3)], 1, torch.float64))
    if fused == "mixed":  # not dense
        b = nn.Parameter(torch.zeros(2, 6, dtype=torch.float64)[:, ::2].copy_(b.detach()))
    groups = [{"params": [a]}, {"params": [b], "first": False}]
    opt = optx.wrap(
        torch.optim.SGD(groups, lr=0.1),
        *(scaled("first"), scaled("second")),
        fused="auto" if fused == "mixed" else fused,
    )
    starts, grads = (a.detach().clone(), b.detach().clone()), draw([(5,), (2, 3)], 2, torch.float64)
    assert [one.path == "foreach" for one in opt.plan()] == [not fused, fused in (False, "mixed")]
    a.grad, b.grad = (g.clone() for g in grads)
    opt.step()
    ga = grads[0] * grads[0].square().sum()
    r = ga.square().sum() + grads[1].square().sum()
    da, db = -0.1 * r * ga, -0.1 * r * grads[1]
    da = da * da.square().sum()
    way = da.square().sum() + db.square().sum()
    torch.testing.assert_close(a.detach(), starts[0] + way * da, rtol=1e-12, atol=0)
    torch.testing.assert_close(b.detach(), starts[1] + way * db, rtol=1e-12, atol=0)


# ---- rows and columns ------------------------------------------------------------------------------------


@optx.rule(writes=("row_g", "row_wg"))
def row_sums(w: Any, g: Any) -> Any:
    return g * 1.0, w * g


@optx.rule(writes="column_sq")
def column_sums(g: Any) -> Any:
    return g * g


@optx.rule(writes=("usual", "factor"))
def per_row(row_g: Any, row_wg: Any, usual: Any, columns: Any, along: Any) -> Any:
    usual = 0.5 * usual + row_g / columns
    return usual, usual * usual / (1.0 + usual * usual) + 0.001 * row_wg + 0.001 * along


@optx.rule(writes=("seen", "part"))
def per_column(column_sq: Any, seen: Any, rows: Any, ndim: Any) -> Any:
    seen = 0.9 * seen + 0.1 * column_sq / rows
    return seen, ndim / (1.0 + seen)


@optx.rule(writes="along")
def tensor_sum(w: Any, g: Any) -> Any:
    return w * g


@optx.rule(writes="g")
def bend(g: Any, row_g: Any, factor: Any, part: Any, usual: Any, column_sq: Any) -> Any:
    return (g - 0.1 * row_g) * (1.0 + factor) * part + 0.01 * usual * column_sq


@optx.rule(writes="w")
def part_way(w: Any, w0: Any, factor: Any, part: Any) -> Any:
    return w + 0.1 * factor * part * (w - w0)


@optx.rule(writes="spread")
def left(w: Any, part: Any) -> Any:
    return w * part


class Matrices(optx.Transform):
    """Sums over rows, columns and all, state of each, and rules that read it."""

    name = "matrices"
    slots = {"usual": optx.per_row(), "seen": optx.per_column(), "spread": optx.per_tensor()}  # noqa: RUF012
    rules = {  # noqa: RUF012
        **{"sums": tensor_sum, "row_sums": row_sums, "column_sums": column_sums},
        **{"rows": per_row, "columns": per_column, "gradient": bend, "after": part_way, "observe": left},
    }


SHAPES = [(5,), (), (0,), (3, 7), (4, 3, 2, 2), (0, 4), (4, 0), (2, 9000), (3000, 30), (130, 1)]


def by_hand(weights: list[torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    """`Matrices` on SGD, in float64 and torch's words."""
    out: list[dict[str, torch.Tensor]] = []
    for i, w in enumerate(weights):
        ndim, shape = w.ndim, w.shape
        w = w.double().reshape(
            shape[0] if ndim > 1 else 1, -1 if w.numel() else 1 * (shape[-1] if ndim else 1)
        )
        usual, seen = torch.zeros(w.shape[0], 1).double(), torch.zeros(w.shape[1]).double()
        for seed in range(count):
            g = draw(SHAPES, 50 + seed, F32)[i].double().reshape(w.shape)
            usual = 0.5 * usual + g.sum(1, keepdim=True) / w.shape[1]
            seen = 0.9 * seen + 0.1 * g.square().sum(0) / w.shape[0]
            factor = usual.square() / (1 + usual.square()) + 0.001 * (w * g).sum(1, keepdim=True)
            factor = factor + 0.001 * (w * g).sum()
            part = ndim / (1 + seen)
            bent = (g - 0.1 * g.sum(1, keepdim=True)) * (1 + factor) * part
            new = w - 0.1 * (bent + 0.01 * usual * g.square().sum(0))
            w = new + 0.1 * factor * part * (new - w)
        out.append({"w": w, "usual": usual[:, 0], "seen": seen, "spread": (w * part).sum()})
    return out


@pytest.mark.parametrize(("fused", "dtype"), [(False, F32), ("cpu", F32), ("cpu", torch.float64)])
def test_numbers_per_row_and_column(fused: Any, dtype: torch.dtype) -> None:
    starts = draw(SHAPES, 3, F32)
    weights = [nn.Parameter(w.clone().to(dtype)) for w in starts]
    opt = optx.wrap(torch.optim.SGD(weights, lr=0.1), Matrices(), fused=fused)
    for seed in range(2):
        for p, g in zip(weights, draw(SHAPES, 50 + seed, F32), strict=True):
            p.grad = g.to(dtype)
        opt.step()
    assert opt.plan()[0].passes == 2
    for p, wanted in zip(weights, by_hand(starts, 2), strict=True):
        wanted["w"] = wanted["w"].reshape(p.shape)
        for name, value in wanted.items():
            got = p.detach() if name == "w" else opt.slot(p, opt.matrices, name)  # type: ignore[attr-defined]
            assert got.shape == value.shape
            torch.testing.assert_close(got.double(), value, rtol=2e-4, atol=2e-5, equal_nan=True)


def test_rows_of_weights_in_another_order_take_the_foreach_path() -> None:
    p = nn.Parameter(torch.ones(3, 2).t())
    opt = optx.wrap(torch.optim.SGD([p], lr=0.1), Matrices())
    p.grad = torch.ones(2, 3)
    opt.step()
    assert "not contiguous" in str(opt.plan()[0].reason)


def test_formats_that_no_tile_takes_are_told() -> None:
    weights = [nn.Parameter(torch.ones(2, 3))]
    with pytest.raises(optx.OptxError, match=r"rows or columns"):
        optx.wrap(torch.optim.AdamW(weights), Matrices(), state="8bit")


# ---- refusals ----------------------------------------------------------------------------------------------


def rules_of(slots: Any = None, **rules: Any) -> optx.Transform:
    made = type("Mine", (optx.Transform,), {"name": "mine", "rules": rules})()
    made.slots = slots or {}
    return made


def writes(name: str, reads: str) -> Any:
    scope: dict[str, Any] = {}
    exec(f"def sends({reads}):\n    return {reads} * 1.0\n", scope)
    return optx.rule(scope["sends"], writes=name)


ROW, COUNT = {"kept": optx.per_row()}, {"steps": optx.counter()}
REFUSED = {
    "after_sums write a sum again": (
        rules_of(sums=writes("s", "g"), after_sums=writes("s", "w")),
        r"\(after_sums\) writes 's', which sums has computed",
    ),
    "after_scalars write a cell again": (
        rules_of({"c": optx.per_tensor()}, scalars=writes("c", "lr"), after_scalars=writes("c", "lr")),
        "writes 'c', which scalars has computed",
    ),
    "gradient reads what comes after": (
        rules_of(after_sums=writes("s", "w"), gradient=writes("g", "s")),
        "reads 's' in gradient, and after_sums computes it only later",
    ),
    "after_totals": (rules_of(after_totals=("s",)), "after_totals has 's', which neither after_sums nor"),
    "after_totals as a string": (rules_of(after_totals="s"), "after_totals is 's'; it must be a tuple"),
    "a counter is written": (rules_of(COUNT, scalars=writes("steps", "lr")), "'steps', a counter"),
    "a counter is observed": (rules_of(COUNT, observe=writes("steps", "w")), "writes 'steps'"),
    "rows read g": (rules_of(rows=writes("x", "g")), "runs per row; take a sum of it in row_sums"),
    "columns read rows": (
        rules_of(row_sums=writes("s", "g"), columns=writes("x", "s")),
        "reads 's', which has a value per row; columns has none",
    ),
    "scalars read rows": (
        rules_of(row_sums=writes("s", "g"), scalars=writes("x", "s")),
        "reads 's', which has a value per row; scalars has none",
    ),
    "an element reads what no rule wrote": (
        rules_of(ROW, gradient=writes("g", "kept")),
        "reads 'kept', which has a value per row; only what the rule of 'rows' writes is",
    ),
    "gradient writes rows": (rules_of(ROW, gradient=writes("kept", "g")), "writes 'kept'; gradient may"),
    "columns write rows": (rules_of(ROW, columns=writes("kept", "lr")), "writes 'kept'; columns may write"),
    "sums write rows": (rules_of(ROW, row_sums=writes("kept", "g")), "writes 'kept'; row_sums may write new"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused(case: str) -> None:
    made, said = REFUSED[case]
    with pytest.raises(optx.TransformError, match=said):
        optx.wrap(torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1), made)


# ---- bases with sums of their own ------------------------------------------------------------------------


def lamb(weights: Any, **options: Any) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_optimizer
    return torch_optimizer.Lamb(weights, lr=0.01, **options)


def lars(weights: Any, **options: Any) -> torch.optim.Optimizer:
    import pytorch_optimizer

    return pytorch_optimizer.LARS(weights, lr=0.1, trust_coefficient=0.1, **options)


def adafactor(weights: Any, **options: Any) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(weights, **options)


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "lamb": lambda p: lamb(p, weight_decay=0.1, debias=True),
    "lamb as adam": lambda p: lamb(p, adam=True),
    "lars": lambda p: lars(p, weight_decay=0.1, dampening=0.1, nesterov=True, maximize=True),
    "lars without momentum": lambda p: lars(p, momentum=0.0),
    "torch's adafactor, vectors": lambda p: torch.optim.Adafactor(p[:2], lr=0.01, weight_decay=0.1),
    "torch's adafactor": lambda p: torch.optim.Adafactor(p[2:], lr=0.01, maximize=True, eps=(1e-3, 1e-3)),
    "adafactor, vectors": lambda p: adafactor(p[:2], weight_decay=0.01, warmup_init=True),
    "adafactor": lambda p: adafactor(p[2:], lr=0.01, relative_step=False, scale_parameter=False, beta1=0.9),
}


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("name", BASES)
def test_bases_with_sums_step_as_their_libraries_have_them(name: str) -> None:
    """Over 50 steps, with states changed over half-way: each goes on from what the other had."""
    shapes = [(5,), (), (3, 7), (60, 50)]
    plain, ours = ([nn.Parameter(w) for w in draw(shapes, 3, F32)] for _ in range(2))
    plain[0].data.zero_(), ours[0].data.zero_()  # no length, no ratio
    library, opt = BASES[name](plain), optx.wrap(BASES[name](ours), fused=True)
    for step in range(50):
        for p, q, g in zip(plain, ours, draw(shapes, 100 + step, F32), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        library.step()
        opt.step()
        if step in (0, 25):
            states = copy.deepcopy((opt.state_dict(), library.state_dict()))
            library.load_state_dict(states[0])
            opt.load_state_dict(states[1])
    for p, q in zip(plain, ours, strict=True):
        torch.testing.assert_close(q, p, rtol=3e-6, atol=1e-6)
    first = next((i for i, p in enumerate(plain) if p in library.state), 0)
    assert set(library.state[plain[first]]) == set(opt.state[ours[first]])


def test_adafactor_says_what_it_cannot_serve() -> None:
    for shapes, why in (([(2, 3), (3,)], "a param group of their own"), ([(2, 3, 4)], "last two dimensions")):
        opt = optx.wrap(torch.optim.Adafactor([nn.Parameter(torch.ones(shape)) for shape in shapes]))
        assert why in str(opt.plan()[0].reason)
