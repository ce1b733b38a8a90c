"""What a base or a model may be: closures (SAM, LBFGS), HeavyBall, flags, moved and cast parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import loss_of, make_net, same, train
from torch import Tensor, nn

import optx
from optx import AdamR, PerpGrad

both_paths = pytest.mark.parametrize("path", ["auto", False], ids=["fused", "foreach"])


pytestmark = pytest.mark.usefixtures("one_thread")


def close(a: nn.Module, b: nn.Module, off: float = 1e-6) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all((x - y).detach().abs().max().item() <= off for x, y in pairs)


def closure_of(net: nn.Module, opt: Any, step: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(net, step)
        loss.backward()
        return loss

    return closure


# ---- closures ---------------------------------------------------------------------------------------------


def project(net: nn.Module) -> None:
    """perpGrad without rescaling, by hand."""
    with torch.no_grad():
        for p in net.parameters():
            if p.numel() > 1:
                p.grad -= (p * p.grad).sum() / (p * p).sum().clamp(min=1e-30) * p


@both_paths
def test_inside_sam(path: Any) -> None:
    """The base that SAM steps with is wrapped: the gradient at the perturbed weights is projected."""
    from pytorch_optimizer import SAM

    def inner(groups: Any, **options: Any) -> optx.Wrapped:
        return optx.wrap(torch.optim.SGD(groups, **options), PerpGrad(rescale=False), fused=path)

    net, plain = make_net(), make_net()
    opt = SAM(net.parameters(), inner, rho=0.05, lr=0.1)
    reference = SAM(plain.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    for step in range(4):
        closure_of(net, opt, step)()
        opt.step(closure_of(net, opt, step))
        closure_of(plain, reference, step)()
        old = [p.detach().clone() for p in plain.parameters()]
        reference.first_step()
        closure_of(plain, reference, step)()
        with torch.no_grad():
            for p, w in zip(plain.parameters(), old, strict=True):
                p.copy_(w)
        project(plain)
        for p in plain.parameters():
            reference.state[p].pop("old_p")
        reference.base_optimizer.step()
    assert close(net, plain)


def test_around_sam() -> None:
    """A base that moves the weights before it evaluates, and puts them back: no edit of ours gets lost."""
    from pytorch_optimizer import SAM

    net, plain = make_net(), make_net()
    anchors = [p.detach().clone() + 0.5 for p in plain.parameters()]
    anchor = {name: a for (name, _), a in zip(net.named_parameters(), anchors, strict=True)}
    pull = AdamR(weight=0.5, normalize=False, anchor=anchor, model=net)
    opt = optx.wrap(SAM(net.parameters(), torch.optim.SGD, rho=0.05, lr=0.1), pull)
    reference = SAM(plain.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    for step in range(3):
        closure_of(net, opt, step)()
        opt.step(closure_of(net, opt, step))
        closure_of(plain, reference, step)()
        pulls = [0.05 * (p.detach() - a) for p, a in zip(plain.parameters(), anchors, strict=True)]
        reference.step(closure_of(plain, reference, step))
        with torch.no_grad():
            for p, d in zip(plain.parameters(), pulls, strict=True):
                p.sub_(d)
    assert close(net, plain)


def test_lbfgs_gets_projected_gradients_at_every_evaluation() -> None:
    net, plain = make_net(), make_net()
    opt = optx.wrap(torch.optim.LBFGS(net.parameters(), lr=0.3, max_iter=4), PerpGrad(rescale=False))
    reference = torch.optim.LBFGS(plain.parameters(), lr=0.3, max_iter=4)
    evaluations = 0
    for step in range(3):

        def projected(step: int = step) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            loss = closure_of(plain, reference, step)()
            project(plain)
            return loss

        losses = opt.step(closure_of(net, opt, step)), reference.step(projected)
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert evaluations > 6
    assert close(net, plain, off=1e-5)


# ---- HeavyBall --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop", "LaProp", "ADOPT"])
def test_heavyball(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heavyball: Any = pytest.importorskip("heavyball")  # .ci/lowest has a NumPy that is too old for it
    monkeypatch.setattr(heavyball.utils, "compile_mode", None)  # else the first step compiles for a minute
    make = lambda net: getattr(heavyball, name)(net.parameters(), lr=0.01)  # noqa: E731
    some = lambda: [PerpGrad(), AdamR(normalize=False)]  # noqa: E731
    plain, net, acted, whole = make_net(), make_net(), make_net(), make_net()
    train(plain, make(plain), range(4))
    train(net, optx.wrap(make(net)), range(4))
    assert same(net, plain)
    train(whole, optx.wrap(make(whole), *some()), range(4))
    assert not same(whole, plain)
    opt = optx.wrap(make(acted), *some())
    train(acted, opt, range(2))
    saved = copy.deepcopy((acted.state_dict(), opt.state_dict()))
    other = make_net(seed=3)
    other.load_state_dict(saved[0])
    again = optx.wrap(make(other), *some())
    again.load_state_dict(saved[1])
    train(acted, opt, range(2, 4))
    train(other, again, range(2, 4))
    assert same(acted, whole)
    assert same(acted, other)


# ---- flags of the base ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@both_paths
def test_the_implementation_flag_of_the_base_changes_nothing(flag: str, path: Any) -> None:
    nets = []
    for options in ({}, {flag: True}):
        net = make_net()
        opt = torch.optim.AdamW(net.parameters(), lr=0.01, **options)
        train(net, optx.wrap(opt, PerpGrad(), AdamR(), fused=path), range(5))
        nets.append(net)
    assert close(*nets)


@pytest.mark.long(keep=2)
@pytest.mark.parametrize(
    ("base", "path"),
    [
        *(
            (base, False)
            for base in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam)
        ),
        *((base, "auto") for base in (torch.optim.SGD, torch.optim.AdamW)),  # seconds of compiling each
    ],
)
def test_maximize_is_minimising_the_negative(base: Any, path: Any) -> None:
    up, down = make_net(), make_net()
    for net, sign, options in ((up, -1.0, {"maximize": True}), (down, 1.0, {})):
        opt = base(net.parameters(), lr=0.01, **options)
        opt = optx.wrap(opt, PerpGrad(), AdamR(normalize=base is not torch.optim.SGD), fused=path)
        for step in range(4):
            opt.zero_grad()
            (sign * loss_of(net, step)).backward()
            opt.step()
    assert close(up, down)


def test_capturable_is_left_to_the_base() -> None:
    """torch refuses it on a CPU in the bare base; what has a kernel of its own needs no such favour."""
    net, plain = make_net(), make_net()
    opt = optx.wrap(torch.optim.AdamW(net.parameters(), lr=0.01, capturable=True), PerpGrad(), fused=True)
    train(net, opt, range(3))
    train(plain, optx.wrap(torch.optim.AdamW(plain.parameters(), lr=0.01), PerpGrad()), range(3))
    assert close(net, plain)


def test_differentiable_without_a_transform_is_the_bases_own() -> None:
    """The derivative of the stepped weight by the gradient that stepped it."""
    found = []
    for wrapped in (False, True):
        start = torch.tensor([1.0, 2.0], requires_grad=True)
        w = start.clone()
        g = torch.tensor([0.3, -0.2], requires_grad=True)
        w.retain_grad()
        w.grad = g
        opt: Any = torch.optim.SGD([w], lr=0.1, differentiable=True)
        opt = optx.wrap(opt) if wrapped else opt
        opt.step()
        w.square().sum().backward()
        found.append((w.detach().clone(), g.grad, start.grad))
    assert found[0][1].abs().min() > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- parameters that change after wrapping ----------------------------------------------------------------


@pytest.mark.long(keep=2)
@pytest.mark.parametrize(
    ("dtype", "path"),
    [
        *((dtype, False) for dtype in (torch.float64, torch.float16, torch.bfloat16)),
        *((dtype, "auto") for dtype in (torch.float64, torch.bfloat16)),  # seconds of compiling each
    ],
    ids=str,
)
def test_the_model_is_cast_after_wrapping(dtype: torch.dtype, path: Any) -> None:
    def wrapped(net: nn.Module) -> optx.Wrapped:
        base = torch.optim.AdamW(net.parameters(), lr=0.01, eps=1e-4)  # 1e-8 is 0 in float16
        return optx.wrap(base, PerpGrad(), AdamR(), fused=path)

    net, plain = make_net(), make_net(dtype=dtype)
    opt = wrapped(net)
    net.to(dtype)
    train(net, opt, range(4))
    assert all(p.dtype == dtype for p in net.parameters())
    train(plain, wrapped(plain), range(4))
    assert close(net, plain, {torch.float64: 1e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype])
    assert not close(net, make_net(dtype=dtype), 0.02)


@both_paths
def test_parameters_are_moved_by_data(path: Any) -> None:
    """As gathering and offloading do: the same Parameter lies elsewhere in every step."""
    net, plain = make_net(), make_net()
    opt = optx.wrap(torch.optim.AdamW(net.parameters(), lr=0.01), PerpGrad(), AdamR(), fused=path)
    reference = optx.wrap(torch.optim.AdamW(plain.parameters(), lr=0.01), PerpGrad(), AdamR(), fused=path)
    for step in range(5):
        train(net, opt, [step])
        train(plain, reference, [step])
        kept = [p.data for p in net.parameters()]  # so that the memory is not handed out again
        for p in net.parameters():
            p.data = p.data.clone()
        old = [k.clone() for k in kept]
        train(net, opt, [100 + step])
        train(plain, reference, [100 + step])
        assert all(torch.equal(k, o) for k, o in zip(kept, old, strict=True))
    assert same(net, plain)


@both_paths
def test_loading_a_model_in_place_or_by_assignment_is_seen(path: Any) -> None:
    target = make_net(seed=4).state_dict()
    nets = []
    for assign in (False, True):
        net = make_net()
        opt = optx.wrap(torch.optim.AdamW(net.parameters(), lr=0.01), PerpGrad(), AdamR(), fused=path)
        train(net, opt, range(2))
        old = list(net.parameters())
        net.load_state_dict(copy.deepcopy(target), assign=assign)
        if assign:  # other objects: the person puts them into the groups, state follows
            assert all(p is not q for p, q in zip(old, net.parameters(), strict=True))
            opt.param_groups[0]["params"] = list(net.parameters())
        train(net, opt, range(2, 5))
        nets.append(net)
    assert same(*nets)


def test_wrapping_again_is_the_same_optimizer_with_its_hooks_schedulers_and_rounds() -> None:
    from hft_models import Residual

    models: list[nn.Module] = []
    for again in (False, True):
        torch.manual_seed(0)
        model = Residual()
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        hft = optx.HFT(model, rounds_every=3)
        inner = optx.wrap(base, hft) if again else optx.wrap(base, AdamR(), hft)
        scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, 0.9)
        calls: list[Any] = []
        inner.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        opt = optx.wrap(inner, AdamR()) if again else inner
        assert opt is inner
        for step in range(7):
            opt.zero_grad()
            model(torch.ones(2, 4) * step).square().sum().backward()
            for p in model.parameters():
                if not p.requires_grad:
                    p.grad = torch.ones_like(p)  # by hand: HFT's hook drops it
            opt.step()
            scheduler.step()
        assert (len(calls), opt.hft.round) == (7, 2)
        assert scheduler.get_last_lr() == [opt.param_groups[0]["lr"]]
        models.append(model)
    assert same(*models)
