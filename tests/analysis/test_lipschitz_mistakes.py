"""`lipschitz`: what is refused, in words that name it; and that a model is left as it was, also then."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lipschitz_nets import random_net, random_weights, weights
from torch import Tensor, nn

import optx
from optx._errors import OptxError, ShapeError


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, 2))


def nan() -> nn.Sequential:
    net = chain(nn.ReLU())
    net[2].weight.data[0, 1] = math.nan
    return net


def zero_normal() -> nn.Sequential:
    net = chain(optx.Householder(4))
    net[1].weight.data.zero_()
    return net


class Twice(nn.Module):
    def __init__(self, combine: Any) -> None:
        super().__init__()
        self.inner, self.combine = nn.Linear(4, 4), combine

    def forward(self, x: Tensor) -> Any:
        return self.combine(x, self.inner(x))


def decides(x: Tensor, y: Tensor) -> Tensor:
    return y if x.sum() > 0 else x


def in_place(x: Tensor, y: Tensor) -> Tensor:
    return F.relu(x, inplace=True) + y + x


def view_in_place(x: Tensor, y: Tensor) -> Tensor:
    flat = y.view(-1, 4)
    flat += 1
    return F.relu(flat).relu_() + y.relu_() + y


REFUSED: dict[str, tuple[Any, str]] = {
    "softmax": (
        lambda: chain(nn.Softmax(-1)),
        r"at '1' \(Softmax\): Softmax has no quadratic constraint. Bound",
    ),
    "layer_norm": (lambda: chain(nn.LayerNorm(4)), r"at '1' \(LayerNorm\): .*divides by the sample's own"),
    "max_pool": (lambda: nn.Sequential(nn.Linear(4, 4), nn.MaxPool1d(2)), "MaxPool1d has no .* Use AvgPool"),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 1, 4),
        "TransformerEncoderLayer has no .* not Lipschitz",
    ),
    "hardshrink": (
        lambda: chain(nn.Hardshrink()),
        r"Hardshrink has no .*slopes=\{Hardshrink: \(low, high\)\}",
    ),
    "batch_norm": (
        lambda: chain(nn.BatchNorm1d(4)),
        r"at '1' \(BatchNorm1d\): .*training mode.*model.eval\(\)",
    ),
    "no_statistics": (
        lambda: chain(nn.BatchNorm1d(4, track_running_stats=False)).eval(),
        "no running statistics",
    ),
    "dropout": (lambda: chain(nn.Dropout(0.1)), r"at '1' \(Dropout\): Dropout drops units in training mode"),
    "nan": (nan, r"at '2' \(Linear\): its weight is not finite"),
    "zero_normal": (zero_normal, r"at '1' \(Householder\): Householder has a weight of zeros"),
    "celu": (lambda: chain(nn.CELU(-1.0)), "CELU has slopes that are no interval of finite numbers"),
    "product": (lambda: Twice(lambda x, y: x * y), r"at node 'mul' \(mul\): branches may be added"),
    "maximum": (lambda: Twice(torch.maximum), r"at node 'maximum' \(maximum\): branches may be added"),
    "chunk": (lambda: Twice(lambda x, y: torch.chunk(y, 2, 1)[0]), r"at node 'chunk' \(chunk\)"),
    "softmax_call": (lambda: Twice(lambda x, y: y.softmax(1)), r"at node 'softmax' \(softmax\)"),
    "decides": (lambda: Twice(decides), "cannot be read by torch.fx: .*lipschitz_form"),
    "in_place": (lambda: Twice(in_place), r"'relu' \(relu\) writes in place .* Use inplace=False"),
    "view_in_place": (
        lambda: Twice(view_in_place),
        "writes in place what 'inner' gave, which is read again later",
    ),
    "batch": (lambda: Twice(lambda x, y: y.view(-1)), r"'view' \(view\): it mixes the batch"),
    "transposed": (
        lambda: Twice(lambda x, y: y.transpose(0, 1)),
        r"'transpose' \(transpose\): .*batch first",
    ),
    "constant": (
        lambda: Twice(lambda x, y: torch.ones(1, 2)),
        "must return one tensor that depends on its input",
    ),
    "pair": (lambda: Twice(lambda x, y: (x, y)), "must return one tensor"),
    "batch_groups": (
        lambda: chain(optx.MaxMin(0)),
        r"at '1' \(MaxMin\): MaxMin has dim=0, which is the batch",
    ),
    "odd_groups": (
        lambda: chain(optx.GroupSort(3)),
        r"at '1' \(GroupSort\): GroupSort: dimension -1 of x is 4",
    ),
    "embedding": (lambda: nn.Embedding(4, 4), "the model .Embedding.: Embedding has no quadratic"),
    "hook": (lambda: hooked(), r"'0' \(Linear\) has a forward hook \(.*\), which may change"),
    "old_norm": (lambda: chain(nn.utils.weight_norm(nn.Linear(4, 4))), r"'1' \(Linear\) has a forward hook"),
    "patched": (lambda: patched(), r"'0' \(Linear\) has been given another forward than its class has"),
    "data_parallel": (lambda: nn.DataParallel(chain()), "DataParallel has no .* Pass its .module"),
}


def hooked() -> nn.Sequential:
    net = chain(nn.ReLU())
    net[0].register_forward_hook(lambda module, args, out: 2 * out)
    return net


def patched() -> nn.Sequential:
    net = chain(nn.ReLU())
    net[0].forward = lambda x: 2 * x
    return net


def everything(model: nn.Module) -> list[Any]:
    state = {name: one.clone() for name, one in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    grads = [(p.requires_grad, p.grad) for p in model.parameters()]
    return [
        state,
        hooks,
        grads,
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        list(dict(model.named_modules())),
    ]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_bounded_is_named_and_left_alone(name: str) -> None:
    made, message = REFUSED[name]
    model = made()
    before = everything(model)
    with pytest.raises(OptxError, match=message) as caught:
        optx.analysis.lipschitz(model, 4)
    assert str(caught.value).startswith("lipschitz: ")
    assert equal(everything(model), before)


def test_a_model_is_left_alone() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), optx.Householder(6), nn.Sequential(nn.Linear(6, 2), nn.Tanh())
    ).train()
    model[0].requires_grad_(False)
    model[2].weight = None
    before = everything(model)
    for norm in ("l2", "linf"):
        optx.analysis.lipschitz(model, norm=norm)
    assert equal(everything(model), before)


def test_attached_adapters_are_refused_until_merged() -> None:
    model = random_net(0).float()
    handle = optx.attach(model, optx.LoRA(rank=1), targets="0")
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_()
    with pytest.raises(OptxError, match=r"has a forward hook .*handle.merge_and_unload\(\)"):
        optx.analysis.lipschitz(model)
    handle.merge()
    merged = weights(*(model[k].weight.detach() for k in (0, 2, 4)))
    assert optx.analysis.lipschitz(model).bound == pytest.approx(
        optx.analysis.lipschitz(merged).bound, rel=1e-5
    )
    handle.remove() if False else None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l1"}, "norm is 'l1'; it must be one of 'l2', 'linf'"),
        ({"method": "network"}, "method is 'network'; it must be one of 'neuron', 'layer', 'product'"),
        ({"split": 0}, "split is 0"),
        ({"samples": -1}, "samples is -1"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"solver": "MOSEC"}, r"solver is 'MOSEC'; it must be 'first-order' or one of \['CLARABEL'"),
        ({"slopes": {nn.Softmax: (1, 0)}}, r"slopes has .*Softmax.*: \(1, 0\); it must be"),
        ({"data": torch.ones(3, 5)}, r"data has shape \(3, 5\); it must be \(n, 4\)"),
        ({"data": torch.ones(3, 4).long()}, "data must be finite floating-point numbers"),
        ({"input_shape": (0,)}, "input_shape is 0"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptxError, match=message):
        optx.analysis.lipschitz(random_net(0), **options)


def test_models() -> None:
    with pytest.raises(
        OptxError,
        match=r"input_shape is needed, as the model .* begin with a Linear but with Conv2d.*\(784,\)",
    ):
        optx.analysis.lipschitz(nn.Sequential(nn.Conv2d(1, 1, 3)))
    with pytest.raises(OptxError, match=r"model is a function; it must be a torch.nn.Module"):
        optx.analysis.lipschitz(random_net)  # type: ignore[arg-type]
    with pytest.raises(OptxError, match="the model is on the meta device"):
        optx.analysis.lipschitz(nn.Linear(2, 2, device="meta"))
    with pytest.raises(OptxError, match=r"at '0' \(Conv2d\): its matrix would be 65536 x 4096"):
        optx.analysis.lipschitz(nn.Sequential(nn.Conv2d(1, 16, 3, padding=1)), (1, 64, 64))


def test_what_is_too_large_says_so() -> None:
    with pytest.raises(OptxError, match=r"the inequality has 20 rows .* above 19, .*Pass split=2"):
        optx.analysis.lipschitz(random_net(0), max_rows=19)
    wide = random_net(0, sizes=(4, 800, 800, 2))
    with pytest.raises(OptxError, match=r"has 1604 rows .* above 1500, and first-order"):
        optx.analysis.lipschitz(wide, samples=0)
    with pytest.raises(OptxError, match="above 400, and SCS"):
        optx.analysis.lipschitz(wide, samples=0, solver="SCS")
    assert math.isfinite(optx.analysis.lipschitz(wide, samples=0, method="product").bound)


def test_a_solver_that_ends_early_gives_its_status_and_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from optx.analysis.bounds import _solve

    monkeypatch.setitem(_solve._OPTIONS, "CLARABEL", {"max_iter": 1})
    with pytest.raises(OptxError, match=r"CLARABEL (ended with 'user_limit' and no bound|failed: )"):
        optx.analysis.lipschitz(random_net(0))


def test_multipliers_that_prove_nothing_are_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    from optx.analysis.bounds import _solve

    def none(problem: Any, solver: str) -> Any:
        return torch.zeros(problem.multipliers).double(), "optimal"

    monkeypatch.setattr(_solve, "_multipliers", none)
    monkeypatch.setattr(_solve.Inequality, "inside", lambda self: None)
    with pytest.raises(OptxError, match="ended with 'optimal', but its multipliers prove no bound"):
        optx.analysis.lipschitz(random_net(0))


def test_an_implicit_net_that_has_no_certificate() -> None:
    two = 2 * torch.eye(3).double()
    with pytest.raises(OptxError, match=r"CLARABEL (ended with 'infeasible|failed|ended)"):
        optx.analysis.lipschitz(optx.Implicit(two, two, two), 3, samples=0)
    with pytest.raises(OptxError, match="no multipliers are known from which"):
        optx.analysis.lipschitz(optx.Implicit(two, two, two), 3, samples=0, solver="first-order")
    with pytest.raises(ShapeError, match=r"Implicit: U has shape \(2, 2\); of 3 units"):
        optx.Implicit(two, two[:2, :2], two)
    with pytest.raises(OptxError, match="no fixed point was found"):
        optx.Implicit(two, two, two)(torch.ones(1, 3).double())


def test_without_cvxpy(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cvxpy" else found(name))
    plain = optx.analysis.lipschitz(random_net(0), samples=0)
    assert plain.solver == "first-order"
    assert plain.bound == pytest.approx(1.9234, abs=1e-4)
    with pytest.raises(OptxError, match=r"cvxpy is not installed. pip install cvxpy clarabel scs"):
        optx.analysis.lipschitz(random_net(0), solver="SCS")


def test_a_model_that_computes_something_else_is_noticed() -> None:
    class Sly(nn.Linear):
        """Is read as Linear is: it has no forward of its own."""

        def __call__(self, x: Tensor) -> Tensor:
            return 10 * super().__call__(x)

    W = random_weights(0)[0]
    sly = Sly(4, 8, bias=False).double()
    sly.weight.data = W.clone()
    with pytest.raises(OptxError, match=r"above the bound .* of what was read: it computes something else"):
        optx.analysis.lipschitz(sly)
    assert optx.analysis.lipschitz(weights(W)).lower_bound > 0
