"""Functions of whole matrices amid a step: torch's Muon, and what `optx.Matrices` promises."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from bases import through_a_file
from torch import Tensor, nn

import optx

SHAPES = ((7, 11), (40, 16), (7, 11))
OPTIONS: dict[str, dict[str, Any]] = {
    "nesterov": {},
    "plain": {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3, "momentum": 0.3},
}
LR = 0.02
# A last bit of float32 is another bfloat16 once in 65,000 numbers, and the iteration rounds to bfloat16 some
# ten times: then a step of one matrix differs by 2^-8 of itself here and there.
LOW = 2.0**-8


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def take(opt: Any, params: Sequence[Tensor], steps: Iterable[int]) -> None:
    """Steps on gradients that depend on their numbers only; the last weight has none in every fourth."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) + 0.2).to(p.dtype)
        if step % 4 == 0:
            params[-1].grad = None
        opt.step()


def muon(params: Sequence[Tensor], **options: Any) -> Any:
    return torch.optim.Muon(list(params), **{"lr": LR, **options})  # type: ignore[arg-type]


def apart(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x.detach() - y.detach()).abs().max()) for x, y in zip(a, b, strict=True))


@functools.cache
def trained(name: str) -> tuple[Any, Any, Any, Any]:
    """After 50 steps: ours and torch's weights, and their optimizers."""
    ours, own = weights(), weights()
    opt, plain = optx.wrap(muon(ours, **OPTIONS[name]), fused=True), muon(own, **OPTIONS[name])
    take(opt, ours, range(50))
    take(plain, own, range(50))
    return ours, own, opt, plain


@pytest.mark.parametrize("name", OPTIONS)
def test_fifty_steps_are_torchs(name: str) -> None:
    ours, own, opt, plain = trained(name)
    assert "2 passes, whole matrices in newton_schulz" in str(opt.plan())
    assert apart(ours, weights()) > 0.2
    assert apart(ours, own) < 50 * LR * LOW / 2
    for a, b in zip(ours, own, strict=True):
        assert opt.state[a].keys() == plain.state[b].keys() == {"momentum_buffer"}
        torch.testing.assert_close(opt.state[a]["momentum_buffer"], plain.state[b]["momentum_buffer"])


def test_each_goes_on_from_the_others_file_and_ours_bit_for_bit() -> None:
    ours, _, opt, plain = trained("nesterov")
    start = [w.detach().clone() for w in ours]
    files = [through_a_file(one.state_dict()) for one in (opt, plain)]
    results: list[list[Tensor]] = []
    for wrapped, file in ((True, 0), (False, 0), (True, 1), (True, 0)):
        params = [nn.Parameter(w.clone()) for w in start]
        one = optx.wrap(muon(params), fused=True) if wrapped else muon(params)
        one.load_state_dict(copy.deepcopy(files[file]))
        take(one, params, range(50, 60))
        results.append([w.detach() for w in params])
    assert apart(results[0], results[1]) < 10 * LR * LOW
    assert apart(results[2], results[1]) < 10 * LR * LOW
    assert apart(results[0], results[3]) == 0.0


@optx.rule(writes="agreeing")
def agree(w: Any, w0: Any, g: Any) -> Any:
    return optx.ops.where((w0 - w) * g > 0.0, 1.0, 0.0)


@optx.rule(writes="w")
def only_agreeing(w: Any, w0: Any, g: Any, agreeing: Any, numel: Any) -> Any:
    return optx.ops.where((w0 - w) * g > 0.0, w0 + numel / (agreeing + 1.0) * (w - w0), w0)


class Cautious(optx.Transform):
    """It sums what the products have made of the weight."""

    name = "cautious"
    rules: ClassVar[Any] = {"after_sums": agree, "after": only_agreeing}


def test_transforms_before_and_after_and_totals() -> None:
    results: list[list[nn.Parameter]] = []
    for fused in (True, False):
        params = weights()
        around = [optx.PerpGrad(), optx.Clip(1.0), optx.AdamR(weight=0.05, normalize=False), Cautious()]
        opt = optx.wrap(muon(params), *around, fused=fused)
        take(opt, params, range(6))
        results.append(params)
        assert fused == ("4 passes, whole matrices" in str(opt.plan()))
    # What is left out is told by a sign, and an element near 0 may be in one and not in the other.
    differ = torch.cat([(a - b).detach().abs().flatten() for a, b in zip(*results, strict=True)])
    assert float((differ > 6 * LR * LOW).float().mean()) < 0.01


def test_fewer_bits_and_steps_in_backward() -> None:
    net = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Tanh(), nn.Linear(32, 16, bias=False)).bfloat16()
    other = copy.deepcopy(net)
    settings: dict[str, Any] = {"state": "8bit", "master": "split"}
    opt, beside = (optx.wrap(muon(n.parameters(), lr=0.05), **settings) for n in (net, other))
    released = opt.release(net)
    losses: list[float] = []
    for _ in range(20):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
        with released:
            loss = (net(x) - x).float().square().mean()
            loss.backward()
        opt.step()
        beside.zero_grad()
        (other(x) - x).float().square().mean().backward()
        beside.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(map(torch.equal, net.parameters(), other.parameters()))
    assert {v.dtype for v in opt.state[net[0].weight].values()} == {torch.int8, torch.bfloat16}


# ---- of a person's own ------------------------------------------------------------------------------------

SEEN: list[tuple[tuple[int, ...], torch.dtype, float]] = []
FAILS: list[bool] = []


def halve(stack: Tensor) -> Tensor:
    SEEN.append((tuple(stack.shape), stack.dtype, float(stack.sum())))
    if FAILS:
        if FAILS[0]:
            raise RuntimeError("no memory left")
        return stack[0]
    return stack.mul_(0.5)


@optx.rule(writes="direction")
def ahead(g: Any, w: Any) -> Any:
    return g + 0.0 * w


@optx.rule(writes="length")
def squared(direction: Any) -> Any:
    return direction * direction


@optx.rule(writes="rate")
def by_length(length: Any, lr: Any) -> Any:
    return lr * length


@optx.rule(writes=("w", "kept"))
def walk(w: Any, direction: Any, rate: Any) -> Any:
    return w - rate * direction, direction * 1.0


class Halves(torch.optim.Optimizer):
    """Steps by half of the gradient, times half the gradient's squared length."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None: ...


def rules(function: Any = halve, name: str = "direction", dtype: Any = torch.float32) -> optx.BaseRules:
    products = optx.Matrices(name, function, dtype)
    update = (ahead, products, optx.Sums(squared, then=by_length), walk)
    return optx.BaseRules(update, slots={"kept": optx.like_weight(None)})


optx.register_base(Halves, lambda group, base: rules())


def own() -> tuple[list[nn.Parameter], Any]:
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (3,), (2, 3), (2, 2, 2), (0, 3), ())]
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, 2.0 + i)
    return params, optx.wrap(Halves(params), fused=True)


def test_a_function_is_given_stacks_by_shape_and_sums_see_what_it_made() -> None:
    params, opt = own()
    SEEN.clear()
    opt.step()
    assert sorted(shape for shape, _, _ in SEEN) == [(1, 1, 1), (1, 1, 3), (1, 2, 4), (2, 2, 3)]
    assert {dtype for _, dtype, _ in SEEN} == {torch.float32}
    assert next(total for shape, _, total in SEEN if shape == (2, 2, 3)) == 6 * 2.0 + 6 * 4.0
    for i, p in enumerate(params):
        half = (2.0 + i) / 2
        assert torch.equal(p.detach(), torch.full_like(p, -(half**3) * p.numel()))
        assert torch.equal(opt.state[p]["kept"], torch.full_like(p, half))


def test_where_it_fails_the_step_has_not_been_taken() -> None:
    params, opt = own()
    opt.step()
    before = copy.deepcopy((params, opt.state_dict()))
    FAILS.append(True)
    try:
        with pytest.raises(RuntimeError, match="no memory left"):
            opt.step()
    finally:
        FAILS.clear()
    assert all(map(torch.equal, params, before[0]))
    state = opt.state_dict()["state"]
    assert all(torch.equal(state[i]["kept"], s["kept"]) for i, s in before[1]["state"].items())
    opt.step()


def test_where_it_fails_in_backward_only_what_was_stepped_before_has_moved() -> None:
    """The tensor in hand counted as stepped."""
    net = nn.ParameterList([nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3))])
    opt = optx.wrap(Halves(net.parameters()), fused=True)
    released = opt.release(net)
    for _ in range(3):
        with released:
            (net[0] * net[1]).sum().backward()
        opt.step()
    before = [p.detach().clone() for p in net]
    FAILS.append(True)
    try:
        with pytest.raises(RuntimeError, match="no memory left"), released:
            (net[0] * net[1]).sum().backward()
    finally:
        FAILS.clear()
    assert all(map(torch.equal, net, before))
    with released:  # nothing was stepped, so no step is open
        sum(p.sum() for p in net).backward()
    opt.step()
    assert not any(map(torch.equal, net, before))


def test_it_must_return_the_same_shape() -> None:
    params, opt = own()
    FAILS.append(False)
    try:
        with pytest.raises(
            optx.OptxError, match=r"halve returned \(2, 3\) for matrices \(2, 2, 3\); it must"
        ):
            opt.step()
    finally:
        FAILS.clear()
    assert not any(p.any() for p in params)


def test_what_is_not_laid_out_as_matrices_is_left_to_the_base() -> None:
    w = nn.Parameter(torch.randn(6, 4).t())
    assert optx.wrap(muon([w])).plan()[0].reason == (
        "a parameter that is taken as a matrix is not contiguous (transposed, or channels_last)"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules(name="g"), r"Matrices has name='g'; it must be a new name .* one of \['direction'\]"),
        (lambda: rules(name="kept"), "Matrices has name='kept'"),
        (lambda: rules(function="svd"), "Matrices has function='svd'; it must be callable"),
        (lambda: rules(dtype=torch.int8), "Matrices has dtype=torch.int8; it must be one of torch.float32"),
    ],
)
def test_mistakes_are_told(make: Any, message: str) -> None:
    with pytest.raises(optx.OptxError, match=message):
        make()
