"""`optx.register_base`: whose rules serve whom, and what is refused."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch

import optx
from optx.step import bases


class Signed(torch.optim.Optimizer):
    """A person's own, which looks ahead: it has a slot, a cell, a count and a tuple of numbers."""

    def __init__(self, params: Any, lr: float = 0.1, rates: tuple[float, float] = (0.9, 0.5)) -> None:
        super().__init__(params, {"lr": lr, "rates": rates})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                self.move(p, p.grad, group)
        return loss

    def move(self, p: torch.Tensor, g: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, average=torch.full_like(p, group["lr"]), power=torch.tensor(1.0))
        first, second = group["rates"]
        state["step"] += 1
        state["power"] *= first
        state["average"].mul_(first).add_(g, alpha=1 - first)
        ahead = state["average"] + second * g
        p.sub_(group["lr"] / state["step"] * ahead / (1.0 + state["power"]))


@optx.rule(writes=("size", "power"))
def signed_scalars(lr: Any, step: Any, power: Any, rate1: Any) -> Any:
    new = power * rate1
    return lr / step / (1.0 + new), new


@optx.rule(writes=("average", "ahead"))
def signed_average(g: Any, average: Any, rate1: Any, rate2: Any) -> Any:
    new = rate1 * average + (1.0 - rate1) * g
    return new, new + rate2 * g


@optx.rule(writes="w")
def signed_move(w: Any, ahead: Any, size: Any) -> Any:
    return w - size * ahead


RULES = optx.BaseRules(
    update=(signed_average, signed_move),
    scalars=(signed_scalars,),
    slots={"average": optx.like_weight(None), "power": optx.per_tensor(torch.float32)},
    initial={"average": "lr", "power": 1.0},
    counted="number",
)
optx.register_base(Signed, RULES)


class Inherits(Signed):
    """Steps just as its parent, and is another class."""


def stepped(opt: Any, params: list[torch.Tensor], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        opt.step()


def weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(9)
    return [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (5, 70)]


def close(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_a_persons_own_optimizer_is_fused_and_goes_both_ways() -> None:
    ours, own = weights(), weights()
    opt, plain = optx.wrap(Signed(ours)), Signed(own)
    assert opt.plan()[0].path == "fused cpu"
    stepped(opt, ours, range(4))
    stepped(plain, own, range(4))
    close(ours, own)
    # Each goes on from the other's state.
    state, other = opt.state_dict(), plain.state_dict()
    assert {k: type(v) for k, v in state["state"][0].items()} == {
        k: type(v) for k, v in other["state"][0].items()
    }
    opt.load_state_dict(other)
    plain.load_state_dict(state)
    stepped(opt, ours, range(4, 8))
    stepped(plain, own, range(4, 8))
    close(ours, own)
    assert opt.state[ours[0]]["step"] == 8
    assert float(opt.state[ours[0]]["power"]) == pytest.approx(0.9**8)


def test_a_schedule_reaches_a_tuple_and_a_first_state() -> None:
    ours, own = weights(), weights()
    opt, plain = optx.wrap(Signed(ours)), Signed(own)
    for one, params in ((opt, ours), (plain, own)):
        stepped(one, params[:1], range(2))
        one.param_groups[0].update(lr=0.3, rates=(0.5, 0.25))
        stepped(one, params, range(2, 4))  # the second begins with an average of 0.3
    close(ours, own)


def test_a_skipped_step_counts_nothing() -> None:
    params = weights()
    opt = optx.wrap(Signed(params), skip_nonfinite=True)
    stepped(opt, params, range(2))
    before = dict(opt.state[params[0]])
    params[0].grad.fill_(float("nan"))  # type: ignore[union-attr]
    opt.step()
    assert opt.skipped_steps == 1
    assert opt.state[params[0]]["step"] == before["step"] == 2
    params = weights()
    opt = optx.wrap(Signed(params), skip_nonfinite=True)
    params[0].grad = torch.full((5,), float("inf"))
    opt.step()
    assert not opt.state


@pytest.mark.parametrize("kind", [Inherits, type("Signed", (Signed,), {"__module__": Signed.__module__})])
def test_a_subclass_is_not_its_parent(kind: Any) -> None:
    opt = optx.wrap(kind(weights()))
    assert opt.plan()[0].reason == f"{kind.__name__} has no fused form (optx.register_base gives it one)"


def test_what_is_replaced_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights()
    opt = optx.wrap(Signed(params))
    stepped(opt, params, range(1))
    assert opt.plan()[0].reason is None
    own = Signed.step
    with monkeypatch.context() as patch:
        patch.setattr(Signed, "step", lambda self, closure=None: own(self, closure))
        assert opt.plan()[0].reason == "Signed.step was replaced by another"
        stepped(opt, params, range(1, 2))
    assert opt.plan()[0].reason is None
    stepped(opt, params, range(2, 3))
    with monkeypatch.context() as patch:
        patch.setattr(Signed, "move", lambda *_: None)
        assert optx.wrap(Signed(weights())).plan()[0].reason == "Signed.move was replaced by another"
    one = Signed(weights())
    one.move = lambda *_: None  # type: ignore[method-assign]
    assert optx.wrap(one).plan()[0].reason == "its move() was replaced by another"


class Late(torch.optim.Optimizer):
    """Known by its name before its rules are asked for."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None: ...


def test_a_class_may_be_named_before_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "_NAMED", {})
    monkeypatch.setattr(bases, "_KNOWN", {})
    monkeypatch.delattr(sys.modules[__name__], "Late")
    optx.register_base(f"{__name__}.Late", lambda group, base: "it is late")
    assert optx.wrap(LATE(weights())).plan()[0].reason.startswith("Late has no fused form")  # type: ignore[union-attr]
    monkeypatch.setattr(sys.modules[__name__], "Late", LATE, raising=False)
    assert optx.wrap(LATE(weights())).plan()[0].reason == "it is late"
    # It may have been patched before it was first seen.
    monkeypatch.setattr(bases, "_KNOWN", {})
    monkeypatch.setattr(LATE, "step", FOREIGN)
    assert optx.wrap(LATE(weights())).plan()[0].reason == "Late.step was replaced by another"


LATE, FOREIGN = Late, torch.optim.LBFGS.step


def make_rules(**changes: Any) -> Any:
    return lambda: optx.BaseRules(**{"update": (signed_move,), "slots": {}, **changes})


@optx.rule(writes="power")
def writes_a_cell(power: Any) -> Any:
    return power * 1.0


@optx.rule(writes=("w", "size"))
def writes_a_number(w: Any, g: Any) -> Any:
    return w - g, 1.0


@optx.rule(writes=("w", "average"))
def forgets_the_average(w: Any, g: Any, average: Any) -> Any:
    return w - g


CELL = {"power": optx.per_tensor()}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (make_rules(update=()), "no rule of update writes 'w'"),
        (make_rules(update=signed_move), "update is .* must be a tuple of rules"),
        (make_rules(update=(len,)), "update has .*len.*decorate it with @optx.rule"),
        (make_rules(scalars=(signed_average,)), "'signed_average' .scalars. uses 'g', which has a value per"),
        (make_rules(update=(forgets_the_average,)), "'forgets_the_average' .update. returns 1 value; "),
        (make_rules(update=(writes_a_cell,), slots=CELL), "uses 'power', which is one number per tensor"),
        (make_rules(slots={"power": 1.0}), r"slots\['power'\] is 1.0; it must be optx.like_weight"),
        (make_rules(slots={"w": optx.like_weight()}), "slots has 'w'; it must be an identifier other than"),
        (make_rules(initial={"power": 1.0}), "initial has 'power', which is no slot"),
        (make_rules(counted="often"), "counted is 'often'; it must be False, True, 'number' or 'group'"),
        (lambda: optx.register_base(Signed, RULES), "Signed has rules already; replace=True"),
        (lambda: optx.register_base("torch.optim.AdamW", RULES), "AdamW has rules already"),
        (lambda: optx.register_base(dict, RULES), "cls is <class 'dict'>; it must be a class of optimizers"),
        (lambda: optx.register_base(Inherits, signed_move.text), "rules is .* it must be an optx.BaseRules"),
    ],
)
def test_mistakes_are_told_at_registration(build: Any, message: str) -> None:
    with pytest.raises(optx.OptxError, match=message):
        build()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (optx.BaseRules((signed_move,)), "'signed_move' reads 'ahead', which is no slot"),
        (
            dataclasses.replace(RULES, initial={"average": "lrate"}),
            r"initial\['average'\]='lrate', which is no number of the param group",
        ),
        (
            optx.BaseRules((signed_average, writes_a_number), (signed_scalars,), RULES.slots,
                           counted="number"),
            "'writes_a_number' .update. writes 'size', a number that scalars computed",
        ),
        ("a word", "fused=True cannot be honoured for param group 0: a word"),
        (7, "rules of Another returned 7; they must return an optx.BaseRules"),
    ],
)  # fmt: skip
def test_mistakes_are_told_when_wrapped(rules: Any, message: str) -> None:
    class Another(Signed):
        pass

    optx.register_base(Another, rules if isinstance(rules, optx.BaseRules) else lambda group, base: rules)
    with pytest.raises(optx.OptxError, match=message):
        optx.wrap(Another(weights()), fused=True)


def test_state_under_other_names_is_noticed() -> None:
    params = weights()
    base = Signed(params)
    stepped(base, params, range(1))
    for state in base.state.values():
        state["mean"] = state.pop("average")
    opt = optx.wrap(base)
    with pytest.raises(optx.OptxError, match="has 'mean', and its rules 'average'"):
        stepped(opt, params, range(1, 2))
