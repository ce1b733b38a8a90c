"""A person's own transform: fused like the built-in ones, or not, and then with the reason."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from fused_cases import BF16, F32, F64, draw
from torch import nn
from user_rules import LIMIT, SHARP, Everything, SoftClip

import optx
from optx.ops import where
from optx.step.foreach import GroupRun

SHAPES = [(7, 3), (), (0,), (300,)]


def run(transform: optx.Transform, fused: Any, dtype: torch.dtype = F32) -> tuple[list[torch.Tensor], Any]:
    params = [nn.Parameter(w) for w in draw(SHAPES, 0, dtype)]
    opt = optx.wrap(torch.optim.SGD(params, lr=0.1), transform, fused=fused)
    for seed in range(1, 4):
        for p, g in zip(params, draw(SHAPES, seed, dtype), strict=True):
            p.grad = g
        opt.step()
    return [p.detach() for p in params], opt


def test_the_documentations_example_is_fused() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = optx.wrap(torch.optim.SGD([w], lr=1.0), SoftClip(limit=1.0), fused=True)
    w.grad = torch.tensor([1.0, -3.0])
    opt.step()
    assert opt.plan()[0].path == "fused cpu"
    assert w.tolist() == [0.5, 2.75]


def by_hand() -> list[torch.Tensor]:
    """`Everything` on SGD, in float64 and plain Python."""
    weights = draw(SHAPES, 0, F64)
    traces = [torch.zeros_like(w) for w in weights]
    for seed in range(1, 4):
        for w, t, g in zip(weights, traces, draw(SHAPES, seed, F64), strict=True):
            norm = math.sqrt(float((g * g).sum()))
            bent = g.sign() * (1 + g.abs() * SHARP).log()
            damped = torch.where(w.abs() > LIMIT, bent * (-w.abs()).exp(), bent.abs().sqrt() * 0.1)
            t.copy_(0.5 * t + damped.clamp(-0.25, 0.25) / (1 + norm) ** 2)
            w -= 0.1 * (t + g)
    return weights


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 2e-6), (F64, 1e-14)])
def test_helpers_constants_and_every_function(fused: bool, dtype: torch.dtype, tolerance: float) -> None:
    got, opt = run(Everything(), fused, dtype)
    assert opt.plan()[0].path == ("fused cpu" if fused else "foreach")
    for a, b in zip(got, by_hand(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance)


def test_options_of_groups_override_without_recompiling() -> None:
    a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    groups = [{"params": [a]}, {"params": [b], "soft_clip_limit": 3.0}]
    opt = optx.wrap(torch.optim.SGD(groups, lr=1.0), SoftClip(1.0), fused=True)
    a.grad = b.grad = torch.tensor([3.0])
    opt.step()
    assert (a.item(), b.item()) == (-0.75, -1.5)


def clip_of(rule: Any, key: str = "mine") -> optx.Transform:
    class Mine(optx.Transform):
        name = key
        rules: ClassVar = {"gradient": rule}

    return Mine()


def outside_knowledge(g: Any) -> Any:
    return g * torch.tensor(2.0)


def with_method(g: Any) -> Any:
    return g.clamp(-1.0, 1.0)


def with_function(g: Any) -> Any:
    def twice(x: Any) -> Any:
        return x * 2.0

    return twice(g)


def exec_rule() -> Any:
    scope: dict[str, Any] = {"optx": optx}
    exec("@optx.rule(writes='g')\ndef twice(g):\n    return g * 2.0\n", scope)
    return scope["twice"]


NOT_FUSED = {
    "exec": (exec_rule, 2.0, "has no source file to compile"),
    "lambda": (lambda: optx.rule(lambda g: g * 2.0, writes="g"), 2.0, "is a lambda; write it with def"),
    "torch": (
        lambda: optx.rule(outside_knowledge, writes="g"),
        2.0,
        "uses 'torch.tensor', which no kernel compiler",
    ),
    "function": (lambda: optx.rule(with_function, writes="g"), 2.0, "is more than assignments and a return"),
    "method": (lambda: optx.rule(with_method, writes="g"), 1.0, "uses 'clamp', which no kernel compiler"),
}


@pytest.mark.parametrize("kind", NOT_FUSED)
def test_rules_that_cannot_be_compiled_take_the_foreach_path(kind: str) -> None:
    make, factor, reason = NOT_FUSED[kind]
    w = nn.Parameter(torch.zeros(2))
    with pytest.raises(optx.FusedError, match=reason):
        optx.wrap(torch.optim.SGD([w], lr=1.0), clip_of(make()), fused=True)
    opt = optx.wrap(torch.optim.SGD([w], lr=1.0), clip_of(make()))
    assert opt.plan()[0].path == "foreach"
    assert reason in str(opt.plan())
    w.grad = torch.tensor([1.0, 3.0])
    opt.step()
    assert w.tolist() == [-1.0 * factor, -1.0 if kind == "method" else -3.0 * factor]


def scaled(factor: float) -> Any:
    @optx.rule(writes="g")
    def scale(g: Any) -> Any:
        return g * factor

    return scale


@pytest.mark.parametrize("fused", [True, False])
def test_one_source_with_two_constants(fused: bool) -> None:
    """Rules from one factory differ in what they close over only."""
    w = nn.Parameter(torch.zeros(2))
    chain = clip_of(scaled(2.0), "double"), clip_of(scaled(5.0), "quintuple")
    opt = optx.wrap(torch.optim.SGD([w], lr=1.0), *chain, fused=fused)
    w.grad = torch.ones(2)
    opt.step()
    assert w.tolist() == [-10.0, -10.0]


def test_a_rule_reading_what_nobody_provides_is_named() -> None:
    @optx.rule(writes="g")
    def needs(g: Any, momentun: Any) -> Any:
        return g * momentun

    w = nn.Parameter(torch.zeros(2))
    with pytest.raises(optx.TransformError, match="rule 'needs' reads 'momentun'"):
        optx.wrap(torch.optim.SGD([w], lr=1.0), clip_of(needs))


def test_low_precision_weights_run_rules_in_float32() -> None:
    got, _ = run(SoftClip(0.1), True, BF16)
    wanted, _ = run(SoftClip(0.1), True, F32)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2**-6, atol=2**-8)


# ---- what is not elementwise -------------------------------------------------------------------------------


@optx.rule(writes=("x", "y"))
def pair(x: Any, limit: Any) -> Any:
    return x * limit, x


@optx.rule(writes="x")
def asking(x: Any, limit: Any) -> Any:
    return x if limit > 1.0 else x * 2.0


def and_(g: Any, w: Any) -> Any:
    return where(g > 0.0 and w > 0.0, g, w)


def or_(g: Any, w: Any) -> Any:
    return where(g > 0.0 or w > 0.0, g, w)


def not_(g: Any) -> Any:
    positive = g > 0.0
    return where(not positive, g, -g)


def chain(g: Any, limit: Any) -> Any:
    return where(-limit < g < limit, g, 0.0)


def if_(g: Any) -> Any:
    large = g * g
    if large > 1.0:
        return g / large
    return g


def else_(g: Any, limit: Any) -> Any:
    return limit if g > limit else g


def while_(g: Any) -> Any:
    while g > 1.0:
        g = g / 2.0
    return g


def assert_(g: Any) -> Any:
    assert g > 0.0
    return g


def in_(g: Any) -> Any:
    return where(g in (0.0, 1.0), g, 0.0)


def for_(g: Any) -> Any:
    return [x * 2.0 for x in g]


def largest(g: Any, limit: Any) -> Any:
    return max(g, limit)


def root(g: Any) -> Any:
    return math.sqrt(g)


def through_a_helper(g: Any, limit: Any) -> Any:
    return asking(limit, g)


def per_tensor(g: Any, numel: Any) -> Any:
    return g if numel > 1.0 else -g


def first(g: Any) -> Any:
    return g[0]


def row(w: Any, g: Any) -> Any:
    both = g * w
    return g - both[..., 0]


def mean(g: Any) -> Any:
    return g - g.mean()


def of_torch(g: Any) -> Any:
    return g / torch.max(g)


ASKS = [
    and_,
    or_,
    not_,
    chain,
    if_,
    else_,
    while_,
    assert_,
    in_,
    for_,
    largest,
    root,
    through_a_helper,
    per_tensor,
]
MIXES = [first, row, mean, of_torch]


@pytest.mark.parametrize("fused", ["auto", False])
@pytest.mark.parametrize("function", [*ASKS, *MIXES], ids=lambda f: f.__name__)
def test_what_is_not_elementwise_is_refused_at_wrap(function: Any, fused: Any) -> None:
    transform = clip_of(optx.rule(function, writes="g"))
    transform.options = {"limit": 1.0}
    said = (
        "one answer; use optx.ops.where" if function in ASKS else "looks at several elements, and a rule sees"
    )
    w = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(optx.TransformError, match=rf"rule '{function.__name__}' \(gradient\) .*{said}"):
        optx.wrap(torch.optim.SGD([w], lr=1.0), transform, fused=fused)


def test_scalars_are_asked_as_little() -> None:
    class Halves(optx.Transform):
        name = "halves"
        rules: ClassVar = {
            "scalars": optx.rule(halved, writes="factor"),
            "gradient": optx.rule(times, writes="g"),
        }

    with pytest.raises(optx.TransformError, match=r"rule 'halved' \(scalars\) has 'if'"):
        optx.wrap(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0), Halves())


def halved(grad_sq: Any) -> Any:
    return 0.5 if grad_sq > 1.0 else 1.0


def times(g: Any, factor: Any) -> Any:
    return g * factor


def numbers_are_asked(g: Any, limit: Any, lr: Any) -> Any:
    if limit > 0.5 and not lr > 2.0 and 0.0 < limit < 2.0 and g.dtype == torch.float32 and g is not None:
        scaled, _ = pair(g, max(limit, 1.0))
        return pair(scaled, limit)[0]
    return -g


def test_what_is_one_number_or_about_a_tensor_may_be_asked() -> None:
    transform = clip_of(optx.rule(numbers_are_asked, writes="g"))
    transform.options = {"limit": 1.5}
    w = nn.Parameter(torch.zeros(2))
    opt = optx.wrap(torch.optim.SGD([w], lr=1.0), transform)
    assert opt.plan()[0].path == "foreach"
    w.grad = torch.tensor([1.0, 2.0])
    opt.step()
    assert w.tolist() == [-2.25, -4.5]


def between(w: Any, g: Any, limit: Any) -> Any:
    inside = (-limit < g) & (g < limit) | (g == 2.0)
    return where(~inside & (w != 3.0), limit, 2.0**g)


@pytest.mark.parametrize("path", ["fused", "foreach", "lists"])
def test_conditions_are_joined_by_operators(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "lists":  # as on a device where launches cost more than memory
        made = GroupRun.__init__

        def with_lists(self: GroupRun, *args: Any) -> None:
            made(self, *args)
            self._lists, self._as_floats = True, False

        monkeypatch.setattr(GroupRun, "__init__", with_lists)
    transform = clip_of(optx.rule(between, writes="g"))
    transform.options = {"limit": 1.5}
    w = nn.Parameter(torch.tensor([0.0, 0.0, 0.0, 3.0]))
    opt = optx.wrap(torch.optim.SGD([w], lr=1.0), transform, fused=path == "fused")
    w.grad = torch.tensor([1.0, 2.0, 5.0, 5.0])
    opt.step()
    assert w.tolist() == [-2.0, -4.0, -1.5, 3.0 - 32.0]


def test_a_result_of_another_shape_is_no_number_for_all() -> None:
    w = nn.Parameter(torch.ones(3, 2))
    opt = optx.wrap(torch.optim.SGD([w], lr=1.0), clip_of(optx.rule(lambda g: g[0], writes="g")))
    w.grad = torch.ones(3, 2)
    with pytest.raises(
        optx.TransformError, match=r"returns a tensor of shape \(2,\) for elements of shape \(3, 2\)"
    ):
        opt.step()
