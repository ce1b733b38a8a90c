"""What a step computes, number by number: faults of one line that other tests let pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

BF16 = torch.bfloat16


# ---- rounding on the foreach path -------------------------------------------------------------------


@optx.rule(writes="w")
def nudge(w, amount):  # type: ignore[no-untyped-def]
    return w + amount


class Before(optx.Transform):
    """Adds a number to the weights before the base's update."""

    name = "nudge"
    rules = {"weight": nudge}  # noqa: RUF012

    def __init__(self, amount: float) -> None:
        self.options = {"amount": amount}


class After(Before):
    """The same, after it."""

    rules = {"after": nudge}  # noqa: RUF012


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def nudged(base: str, transform: optx.Transform, rounding: Any, start: Tensor, steps: int) -> Tensor:
    """Weights after steps without a gradient to follow, on the foreach path; None rounds stochastically."""
    p = nn.Parameter(start.clone())
    opt = optx.wrap(
        BASES[base]([{"params": [p], "weight_decay": 0.0}]), transform, rounding=rounding, fused=False
    )
    assert "foreach" in str(opt.plan())
    for _ in range(steps):
        p.grad = torch.zeros_like(p)
        opt.step()
    return p.detach()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", [Before, After])
def test_nearest_drops_what_is_below_half_a_unit_and_stochastic_keeps_it_on_average(
    base: str, kind: type[Before]
) -> None:
    start, ulp, steps = torch.ones(4000, dtype=BF16), 2.0**-7, 8
    still = nudged(base, kind(ulp / 16), "nearest", start, steps)
    assert torch.equal(still, start)
    moved = nudged(base, kind(ulp / 16), None, start, steps).double() - 1
    # A sum of coins that fall right once in 16: variance at most 8 / 16 ulp^2 each.
    assert float(moved.mean()) == pytest.approx(steps * ulp / 16, abs=4 * ulp * (steps / 16 / 4000) ** 0.5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", [Before, After])
def test_nearest_is_torchs_own_rounding(base: str, kind: type[Before]) -> None:
    start = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(BF16)
    made = nudged(base, kind(0.0123), "nearest", start, 1)
    assert torch.equal(made, start.clone().copy_(start.float() + torch.tensor(0.0123)))
    assert not torch.equal(made, nudged(base, kind(0.0123), None, start, 1))


# ---- where slots are ------------------------------------------------------------------------------------


@optx.rule(writes=("w", "moved"))
def count_up(w, moved):  # type: ignore[no-untyped-def]
    return w, moved + 1.0


class Counts(optx.Transform):
    """Keeps what a weight was when it was wrapped, for which no rule asks, and counts its steps."""

    name = "counts"
    rules = {"after": count_up}  # noqa: RUF012
    slots = {"start": optx.Slot(), "moved": optx.like_weight(), "aside": optx.Slot(saved=False)}  # noqa: RUF012

    def init_slot(self, name: str, p: Tensor, optimizer: Any) -> Tensor:
        return p.detach().float().clone() if name != "moved" else super().init_slot(name, p, optimizer)


class Watching(torch.optim.RAdam):
    """Notes what its step finds in its state."""

    seen: set[str]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.seen = {key for entry in self.state.values() for key in entry}
        return super().step(closure)


@pytest.mark.parametrize("fused", [False, "auto"])
@pytest.mark.parametrize("base", [Watching, torch.optim.AdamW, torch.optim.SGD])
def test_slots_are_made_at_wrap_shown_after_a_step_and_hidden_from_the_base(base: Any, fused: Any) -> None:
    params = [nn.Parameter(torch.full((3,), float(i + 1))) for i in range(2)]
    opt = optx.wrap(base(params, lr=0.1), Counts(), fused=fused)
    with torch.no_grad():
        params[0].mul_(5.0)
    pending = opt.state_dict()["optx_pending"]
    assert [pending[i]["optx.counts.start"].tolist() for i in range(2)] == [[1.0] * 3, [2.0] * 3]
    assert "optx.counts.aside" not in pending[0]
    params[0].grad, params[1].grad = torch.ones(3), torch.ones(3)
    opt.step()
    params[1].grad = None
    opt.step()
    for p, steps in zip(params, (2.0, 1.0), strict=True):
        assert opt.state[p]["optx.counts.moved"].tolist() == [steps] * 3
    assert opt.state[params[0]]["optx.counts.start"].tolist() == [1.0] * 3
    assert not opt.state_dict().get("optx_pending")
    if base is Watching:
        assert {"exp_avg", "exp_avg_sq"} <= opt.base.seen  # type: ignore[attr-defined]
        assert not [key for key in opt.base.seen if key.startswith("optx")]  # type: ignore[attr-defined]


def test_slots_follow_a_parameter_that_is_replaced_before_its_first_step() -> None:
    """As Accelerate does: the anchor is the old object's."""
    old = nn.Parameter(torch.ones(3))
    opt = optx.wrap(torch.optim.SGD([old], lr=0.0), Counts())
    new = nn.Parameter(torch.full((3,), 7.0))
    opt.param_groups[0]["params"][0] = new
    new.grad = torch.zeros(3)
    opt.step()
    assert opt.state[new]["optx.counts.start"].tolist() == [1.0] * 3


@pytest.mark.parametrize("fused", [False, True])
def test_plain_sgd_keeps_no_state_as_torchs(fused: bool) -> None:
    p = nn.Parameter(torch.ones(3))
    opt = optx.wrap(torch.optim.SGD([p], lr=0.1), optx.PerpGrad(), fused=fused)
    p.grad = torch.ones(3)
    opt.step()
    assert dict(opt.state_dict()["state"]) == {}


def test_the_base_is_not_stepped_by_its_old_name_and_an_idle_step_warns_once() -> None:
    p = nn.Parameter(torch.ones(3))
    base = torch.optim.SGD([p], lr=0.1)
    opt = optx.wrap(base, optx.PerpGrad())
    with pytest.raises(optx.OptxError, match=r"step\(\) was called on the SGD that optx.wrap wraps"):
        base.step()
    with pytest.warns(UserWarning, match="no gradient on any parameter"):
        opt.step()
    opt.step()  # a second warning would be an error here


# ---- what is kept from step to step -----------------------------------------------------------------


def pulled(fused: bool) -> tuple[nn.Parameter, Any]:
    """AdamW with AdamR, five steps on."""
    p = nn.Parameter(torch.linspace(0.5, 2.0, 7))
    opt = optx.wrap(torch.optim.AdamW([p], lr=0.05, weight_decay=0.0), optx.AdamR(weight=0.5), fused=fused)
    run(p, opt, 5)
    return p, opt


def run(p: nn.Parameter, opt: Any, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        p.grad = torch.randn(7, generator=generator)
        opt.step()


def scale_in_place(p: nn.Parameter, opt: Any) -> None:
    opt.state[p]["exp_avg_sq"].mul_(9.0)


def replace(p: nn.Parameter, opt: Any) -> None:
    opt.state[p]["exp_avg_sq"] = opt.state[p]["exp_avg_sq"] * 9.0


def leave_out(p: nn.Parameter, opt: Any) -> None:
    opt.param_groups[0]["adamr"] = False
    run(p, opt, 2, seed=3)
    opt.param_groups[0]["adamr"] = True


def clear(p: nn.Parameter, opt: Any) -> None:
    opt.state.clear()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("change", [scale_in_place, replace, leave_out, clear])
def test_after_a_change_of_its_state_adamr_steps_as_one_that_was_just_made(change: Any, fused: bool) -> None:
    """What it keeps of the second moment is taken anew; the anchor is what it was."""
    p, opt = pulled(fused)
    anchor = torch.linspace(0.5, 2.0, 7)
    change(p, opt)
    q = nn.Parameter(p.detach().clone())
    fresh = torch.optim.AdamW([("q", q)], lr=0.05, weight_decay=0.0)
    if opt.state[p]:
        names = ("step", "exp_avg", "exp_avg_sq")
        fresh.state[q] = {name: opt.state[p][name].clone() for name in names if name in opt.state[p]}
    other = optx.wrap(fresh, optx.AdamR(weight=0.5, anchor={"q": anchor}), fused=fused)
    for i in range(2):
        run(p, opt, 1, seed=10 + i)
        run(q, other, 1, seed=10 + i)
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0)


def test_a_failed_first_step_leaves_the_base_as_new() -> None:
    class Failing(torch.optim.RAdam):
        fails = True

        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            if self.fails:
                raise RuntimeError("afterwards")
            return result

    p = nn.Parameter(torch.ones(3))
    opt = optx.wrap(Failing([p], lr=0.1), Counts())
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="afterwards"):
        opt.step()
    assert torch.equal(p, torch.ones(3))
    assert not opt.state.get(p)
    opt.base.fails = False  # type: ignore[attr-defined]
    opt.step()
    assert float(opt.state[p]["step"]) == 1.0
    assert opt.state[p]["optx.counts.moved"].tolist() == [1.0] * 3


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_state_that_is_no_tensor_is_named(key: str) -> None:
    p = nn.Parameter(torch.ones(7))
    opt = optx.wrap(torch.optim.AdamW([p], lr=0.05), Counts(), fused=True)
    run(p, opt, 1)
    before = p.detach().clone()
    opt.state[p][key] = [0.0] * 7
    p.grad = torch.ones(7)
    with pytest.raises(optx.OptxError, match=rf"{key}.* is a list; it must be a tensor"):
        opt.step()
    assert torch.equal(p, before)


# ---- checkpoints --------------------------------------------------------------------------------------


class Counting(torch.optim.RAdam):
    """Keeps a number of its own in its state, beside those of the parameters, as some optimizers do."""

    def step(self, closure: Any = None) -> Any:
        self.state["steps"] = self.state.get("steps", 0) + 1
        return super().step(closure)


def test_state_that_belongs_to_no_parameter_is_saved_and_loaded() -> None:
    made: list[Any] = []
    for _ in range(2):
        p = nn.Parameter(torch.ones(3))
        made.append((p, optx.wrap(Counting([p], lr=0.1), Counts())))
    (p, opt), (_, other) = made
    p.grad = torch.ones(3)
    opt.step()
    other.load_state_dict(opt.state_dict())
    assert other.state["steps"] == 1
    assert other.state_dict()["state"][0]["optx.counts.moved"].tolist() == [1.0] * 3


@pytest.mark.long
def test_moments_of_more_bits_are_loaded_as_torch_does_where_the_base_computes_itself() -> None:
    """RAdam's own step can't take float32 moments of a bfloat16 weight; its kernel can, and AdamW's."""

    class Own(torch.optim.RAdam):
        """Another class, which nobody has given rules."""

    kernels = torch.float32
    for base, kept in ((Own, BF16), (torch.optim.RAdam, kernels), (torch.optim.AdamW, kernels)):
        p = nn.Parameter(torch.ones(3, dtype=BF16))
        opt = optx.wrap(base([p], lr=0.1), Counts())
        p.grad = torch.ones(3, dtype=BF16)
        opt.step()
        saved = opt.state_dict()
        saved["state"][0] = {k: v.float() if k == "exp_avg" else v for k, v in saved["state"][0].items()}
        opt.load_state_dict(saved)
        assert opt.state[p]["exp_avg"].dtype == kept
        opt.step()


# ---- settings after wrap --------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [("adamr_weigth", 0.1), ("adam_r", False), ("adamr_weight", -1.0)])
@pytest.mark.parametrize("fused", [False, True])
def test_a_setting_of_a_group_is_checked_where_it_changes(key: str, value: Any, fused: bool) -> None:
    p, opt = pulled(fused)
    before = p.detach().clone()
    opt.param_groups[0][key] = value
    p.grad = torch.ones(7)
    with pytest.raises(optx.OptxError, match=key):
        opt.step()
    assert torch.equal(p, before)
    if key != "adamr_weight":
        del opt.param_groups[0][key]
    else:
        opt.param_groups[0][key] = 0.5
    opt.step()
    assert not torch.equal(p, before)


SETTINGS: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (torch.optim.SGD, {}, {"weight_decay": 0.1}),
    (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, {"weight_decay": 0.0}),
    (torch.optim.SGD, {"momentum": 0.9}, {"nesterov": True}),
    (torch.optim.SGD, {"momentum": 0.9}, {"maximize": True}),
    (torch.optim.SGD, {"momentum": 0.9}, {"momentum": 0.0}),
    (torch.optim.Adam, {}, {"weight_decay": 0.1}),
    (torch.optim.AdamW, {}, {"weight_decay": 0.0, "maximize": True}),
    (torch.optim.Adam, {}, {"lr": 0.5, "betas": (0.5, 0.6), "eps": 0.1}),
]


@pytest.mark.long(keep=3)
@pytest.mark.parametrize(
    ("base", "options", "later"), SETTINGS, ids=[f"{b.__name__}-{l}" for b, _, l in SETTINGS]
)
@pytest.mark.parametrize("fused", [False, True])
def test_settings_that_change_between_steps_are_the_bases(
    base: Any, options: dict[str, Any], later: dict[str, Any], fused: bool
) -> None:
    p, q = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    opt, plain = optx.wrap(base([p], lr=0.1, **options), Counts(), fused=fused), base([q], lr=0.1, **options)
    for changed in ({}, later, later):
        for one in (opt, plain):
            one.param_groups[0].update(changed)
        run(p, opt, 2)
        run(q, plain, 2)
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert opt.state[p]["optx.counts.moved"].tolist() == [6.0] * 7


def test_a_kahan_buffer_is_loaded_without_a_word() -> None:
    made: list[Any] = []
    for _ in range(2):
        p = nn.Parameter(torch.ones(7, dtype=BF16))
        made.append((p, optx.wrap(torch.optim.AdamW([p], lr=1e-3), Counts(), fused=True, rounding="kahan")))
    (p, opt), (q, other) = made
    p.grad = torch.ones(7, dtype=BF16)
    opt.step()
    other.load_state_dict(opt.state_dict())  # a warning would be an error
    assert torch.equal(other.state[q]["optx.kahan"], opt.state[p]["optx.kahan"])
    assert bool(opt.state[p]["optx.kahan"].ne(0).any())


@pytest.mark.parametrize("fused", [False, True])
def test_the_sum_of_the_second_moment_is_not_taken_anew_in_each_step(fused: bool) -> None:
    class Counted(optx.AdamR):
        taken = 0

        def init_slot(self, name: str, p: Tensor, optimizer: Any) -> Tensor:
            Counted.taken += name == "v_sum"
            return super().init_slot(name, p, optimizer)

    p = nn.Parameter(torch.linspace(0.5, 2.0, 7))
    opt = optx.wrap(torch.optim.AdamW([p], lr=0.05, weight_decay=0.0), Counted(), fused=fused)
    run(p, opt, 3)
    before = Counted.taken
    run(p, opt, 5)
    assert Counted.taken == before


def test_defaults_that_are_set_are_the_bases() -> None:
    _, opt = pulled(fused=True)
    opt.defaults = {**opt.defaults, "lr": 0.25}
    assert opt.base.defaults["lr"] == 0.25
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert opt.param_groups[1]["lr"] == 0.25


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_first_step_leaves_nothing_that_the_next_would_use(fused: bool) -> None:
    p, q = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    opt = optx.wrap(torch.optim.AdamW([p], lr=0.1), Counts(), fused=fused, skip_nonfinite=True)
    plain = torch.optim.AdamW([q], lr=0.1)
    p.grad = torch.full((7,), float("inf"))
    opt.step()
    assert opt.skipped_last
    assert not opt.state.get(p)
    run(p, opt, 3)
    run(q, plain, 3)
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert float(opt.state[p]["step"]) == 3.0
    assert opt.state[p]["optx.counts.moved"].tolist() == [3.0] * 7
