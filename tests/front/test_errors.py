"""Bad input: one sentence that names what is wrong and a way out, before anything has changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from bases import LooseAdam, make_net, same
from hft_models import encoder
from torch import Tensor, nn

import optx
from optx import AdamR, FusedError, OptxError, PerpGrad, ShapeError, TransformError, wrap
from optx._errors import check_whole


@optx.rule(writes="g")
def scale_by(g: Any, factor: Any) -> Any:
    return g * factor


@optx.rule(writes="speed")
def into_nothing(g: Any) -> Any:
    return g


class UnknownRead(optx.Transform):
    name = "unknown_read"
    rules: ClassVar = {"gradient": scale_by}


class UnknownWrite(optx.Transform):
    name = "unknown_write"
    rules: ClassVar = {"gradient": into_nothing}


class UnknownMoment(optx.Transform):
    name = "unknown_moment"
    rules: ClassVar = {"gradiant": scale_by}


class NoName(optx.Transform):
    pass


class TakenName(optx.Transform):
    name = "state"


class Snapshot:
    """Everything about an optimizer and its model that an error must leave alone."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.groups = [dict(group) for group in base.param_groups]
        self.state = {p: dict(entry) for p, entry in base.state.items()}
        self.hooks = {k: list(v) for k, v in vars(base).items() if k.endswith("_hooks")}
        params = [p for group in base.param_groups for p in group["params"]]
        self.params = [(p, p.requires_grad, p.grad if p.is_leaf else None, p._version) for p in params]

    def check(self) -> None:
        now = Snapshot(self.base)
        assert now.hooks == self.hooks
        assert [g.keys() for g in now.groups] == [g.keys() for g in self.groups]
        pairs = [
            (a[k], b[k]) for a, b in zip(now.groups, self.groups, strict=True) for k in a if k != "params"
        ]
        assert all(x is y or x == y for x, y in pairs)
        assert {p: s.keys() for p, s in now.state.items()} == {p: s.keys() for p, s in self.state.items()}
        assert all(now.state[p][k] is v for p, entry in self.state.items() for k, v in entry.items())
        for (p, *ours), (q, *theirs) in zip(now.params, self.params, strict=True):
            assert p is q
            assert ours == theirs or (ours[1] is theirs[1] and ours[::2] == theirs[::2])


NET = make_net()
Bad = tuple[Callable[[], torch.optim.Optimizer], list[Any], dict[str, Any], type[Exception], str]


def adamw(**options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(NET.parameters(), **options)


def named() -> torch.optim.Optimizer:
    return torch.optim.AdamW(NET.named_parameters())


def other_shape() -> dict[str, Tensor]:
    return {**NET.state_dict(), "second.weight": torch.zeros(3, 7)}


def without_bias() -> dict[str, Tensor]:
    return {name: t for name, t in NET.state_dict().items() if name != "second.bias"}


def frozen() -> torch.optim.Optimizer:
    return torch.optim.SGD(make_net().requires_grad_(False).parameters(), lr=0.1)


def parameter(kind: str) -> Callable[[], torch.optim.Optimizer]:
    makes = {
        "complex": lambda: torch.ones(2, dtype=torch.complex64),
        "sparse": lambda: torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True),
    }

    def make() -> torch.optim.Optimizer:
        good, bad = nn.Parameter(torch.ones(2)), nn.Parameter(makes[kind]())
        return torch.optim.SGD([("good", good), ("bad", bad)], lr=0.1)

    return make


def sparse_gradient() -> torch.optim.Optimizer:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    return torch.optim.SGD(table.named_parameters(), lr=0.1)


def differentiable() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.ones(2, requires_grad=True).clone()], lr=0.1, differentiable=True)


def group_key(**keys: Any) -> Callable[[], torch.optim.Optimizer]:
    return lambda: torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(2))], **keys}])


BAD: dict[str, Bad] = {
    "no trainable parameter": (frozen, [PerpGrad()], {}, TransformError, "no trainable parameter"),
    "given twice": (adamw, [PerpGrad(), PerpGrad()], {}, TransformError, "'perp_grad' is given 2 times"),
    "a class": (
        adamw, [PerpGrad], {}, TransformError, r"PerpGrad'> is not a transform. Call it, as optx.PerpGrad\(\)"
    ),
    "a list": (adamw, [[PerpGrad()]], {}, TransformError, r"one by one: wrap\(opt, \*them\)"),
    "an injection": (
        adamw, [optx.FTWT()], {}, TransformError, r"goes into the model: optx.attach\(model, optx.FTWT\("
    ),
    "masks": (
        adamw,
        [optx.Masks.from_bool({"weight": torch.ones(2, 2).bool()})],
        {},
        TransformError,
        r"not a transform. Pass optx.KeepMask\(masks\)",
    ),
    "a module": (adamw, [nn.ReLU()], {}, TransformError, r"ReLU\(\) is not a transform"),
    "no name": (adamw, [NoName()], {}, TransformError, "NoName.name is None; it must be an identifier"),
    "taken name": (adamw, [TakenName()], {}, TransformError, "TakenName.name is 'state'"),
    "unknown read": (
        adamw, [UnknownRead()], {}, TransformError, "'scale_by' reads 'factor', which is no slot .* of this"
    ),
    "unknown write": (adamw, [UnknownWrite()], {}, TransformError, "'speed', which is no slot"),
    "unknown moment": (
        adamw, [UnknownMoment()], {}, TransformError, "has 'gradiant', which is no moment .* Near: 'gradient'"
    ),
    "fused": (adamw, [], {"fused": 2}, OptxError, "fused is 2; it must be 'auto', True, False, 'cpu' or"),
    "rounding": (adamw, [], {"rounding": "up"}, OptxError, "rounding is 'up'; it must be 'stochastic',"),
    "skip": (adamw, [], {"skip_nonfinite": "x"}, OptxError, "skip_nonfinite is 'x'; it must be True or"),
    "metrics": (adamw, [], {"metrics": "loss"}, OptxError, "metrics is 'loss'; it must be True or False"),
    "complex, PerpGrad": (
        parameter("complex"), [PerpGrad()], {}, TransformError,
        r"PerpGrad: parameter 'bad' is complex \(torch.complex64\). Train torch.view_as_real of it, or put "
        "it in a param group with perp_grad=False",
    ),
    "complex, AdamR": (
        parameter("complex"), [AdamR(normalize=False)], {}, TransformError, "AdamR: parameter 'bad' is compl"
    ),
    "complex, AdamR to zero": (
        parameter("complex"), [AdamR(anchor="zero", normalize=False)], {}, TransformError, "'bad' is complex"
    ),
    "sparse": (parameter("sparse"), [PerpGrad()], {}, TransformError, r"'bad' is sparse \(torch.sparse_coo"),
    "sparse gradient": (
        sparse_gradient, [PerpGrad()], {}, TransformError, "gradient of 'weight' is sparse. Use sparse=False"
    ),
    "differentiable": (
        differentiable, [PerpGrad()], {}, TransformError, "differentiable=True, and autograd cannot follow"
    ),
    "a base without a second moment": (
        lambda: torch.optim.SGD(NET.parameters(), lr=0.1), [PerpGrad(), AdamR()], {}, TransformError,
        r"AdamR: normalize=True needs Adam's second moment, and SGD has none. Use torch's Adam, .* or "
        r"AdamR\(normalize=False\)",
    ),
    "maximize with coupled decay": (
        lambda: torch.optim.Adam(NET.parameters(), maximize=True, weight_decay=0.1), [AdamR()], {},
        TransformError, "AdamR: maximize=True with a coupled weight_decay is not served; use AdamW",
    ),
    "anchor's shape": (
        named, [PerpGrad(), AdamR(anchor=other_shape())], {}, ShapeError,
        r"AdamR: anchor for 'second.weight' has shape \(3, 7\), the weight has \(3, 8\)",
    ),
    "anchor missing": (
        named, [PerpGrad(), AdamR(anchor=without_bias())], {}, TransformError,
        r"AdamR: no anchor for 'second.bias'. Near: 'second.weight'.* with adamr=False",
    ),
    "no names": (
        adamw, [PerpGrad(), AdamR(anchor=NET.state_dict())], {}, TransformError,
        r"Build it from model.named_parameters\(\), or pass model=model",
    ),
    "another model": (
        adamw, [AdamR(anchor=nn.Linear(2, 2))], {}, TransformError, "parameters do not pair up in order"
    ),
    "no file": (named, [AdamR(anchor="/nowhere")], {}, TransformError, "cannot read anchor='/nowhere' as a"),
    "no safetensors": (named, [AdamR(anchor=__file__)], {}, TransformError, "test_errors.py' as a safeten"),
    "typo in a group": (
        group_key(adamr_wieght=0.1), [AdamR()], {}, TransformError,
        "a param group has 'adamr_wieght', which is no option of AdamR. Near: 'adamr_weight'",
    ),
    "no number in a group": (
        group_key(adamr_weight="high"), [AdamR()], {}, TransformError, "adamr_weight='high'; it must be a num"
    ),
    "fused without rules": (
        lambda: LooseAdam(NET.parameters()), [PerpGrad()], {"fused": True}, FusedError,
        "fused=True cannot be honoured for param group 0: LooseAdam has no fused form",
    ),
    "fused on gaps": (
        lambda: torch.optim.SGD([torch.ones(4, 4)[:, ::2].requires_grad_()], lr=0.1), [], {"fused": True},
        FusedError, r"a parameter of shape \(4, 2\) has gaps in memory",
    ),
    "fused cpu on meta": (
        lambda: torch.optim.SGD([nn.Parameter(torch.ones(2, device="meta"))], lr=0.1), [], {"fused": "cpu"},
        FusedError, "no fused kernels for tensors on meta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("before", ["fresh", "stepped", "wrapped"])
def test_wrap_refuses_and_changes_nothing(case: str, before: str) -> None:
    make, transforms, options, kind, words = BAD[case]
    base = make()
    steps = not {"sparse", "gradient", "differentiable", "meta"}.intersection(case.split())
    if before == "stepped" and steps:
        for group in base.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        base.step()
    wrapped = before == "wrapped" and case != "no trainable parameter"
    inner = wrap(base, fused=False) if wrapped else base
    snapshot, attributes = Snapshot(base), dict(vars(inner))
    with pytest.raises(kind, match=words) as caught:
        wrap(inner, *transforms, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    snapshot.check()
    assert vars(inner).keys() == attributes.keys()
    assert all(vars(inner)[k] is v for k, v in attributes.items())


@pytest.mark.parametrize("thing", [NET, NET.parameters(), torch.optim.AdamW, None], ids=lambda t: str(t)[:9])
def test_only_an_optimizer_is_wrapped(thing: Any) -> None:
    words = rf"optimizer is a {type(thing).__name__}; it must be a torch.optim.Optimizer"
    with pytest.raises(TransformError, match=words):
        wrap(thing, PerpGrad())


def test_a_bind_that_fails_takes_back_those_before_it() -> None:
    """HFT has frozen half of the model by the time that AdamR finds no anchors."""
    model = encoder()
    base = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    base.step()
    hft = optx.HFT(model)
    snapshot = Snapshot(base)
    with pytest.raises(TransformError, match="anchors are found by name"):
        wrap(base, hft, AdamR(anchor={"x": torch.ones(1)}))
    snapshot.check()
    assert len(base.state) == len(list(model.parameters()))
    opt = wrap(base, hft)  # it is free to serve another time
    assert any(not p.requires_grad for p in model.parameters())
    assert opt.hft is hft


ARGUMENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "weight": (lambda: AdamR(weight=-0.1), "AdamR: weight is -0.1; it must be at least 0.0"),
    "weight nan": (lambda: AdamR(weight=float("nan")), "AdamR: weight is nan; it must be at least"),
    "weight word": (lambda: AdamR(weight="high"), "AdamR: weight is 'high'; it must be at least"),  # type: ignore
    "norm": (lambda: AdamR(norm="l3"), "AdamR: norm is 'l3'; it must be 'l2' or 'l1'"),  # type: ignore
    "save_anchor": (lambda: AdamR(save_anchor=False), "save_anchor=False needs an anchor that can be found"),
    "rescale": (lambda: PerpGrad(rescale=0.5), "PerpGrad: rescale is 0.5; it must be True or False"),  # type: ignore
    "ratio": (lambda: optx.HFT(encoder(), ratio=1.5), "HFT: ratio is 1.5; it must be between 0"),
    "level": (lambda: optx.HFT(encoder(), level="matrix"), "HFT: level is 'matrix'"),  # type: ignore
    "balance": (lambda: optx.HFT(encoder(), balance="size"), "HFT: balance is 'size'"),  # type: ignore
    "rounds": (lambda: optx.HFT(encoder(), rounds_every=0), "HFT: rounds_every is 0; it must be at least 1"),
    "model": (lambda: optx.HFT(adamw()), "HFT: model is a AdamW; it must be the model"),  # type: ignore
    "blocks": (lambda: optx.HFT(encoder(), blocks="layer("), "is no regular expression"),
    "no blocks": (lambda: optx.HFT(encoder(), blocks=r"stages\.\d+"), "matches no module. Near: '"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_of_transforms(case: str) -> None:
    make, words = ARGUMENTS[case]
    with pytest.raises(OptxError, match=re.escape(words)):
        make()


def test_a_rule_takes_plain_arguments() -> None:
    with pytest.raises(TypeError, match="argument 'limit' has a default or is variadic"):

        @optx.rule(writes="g")
        def clip(g: Tensor, limit: float = 1.0) -> Tensor:
            return g * limit


@pytest.mark.parametrize("path", ["cpu", "triton"])
def test_a_path_of_another_device_is_refused(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = "cpu" if path == "triton" else "meta"
    base = torch.optim.AdamW([nn.Parameter(torch.ones(3, device=device))])
    with pytest.raises(FusedError, match=rf"fused='{path}' cannot be honoured .* on {device}"):
        wrap(base, PerpGrad(), fused=path)


def test_a_rule_that_no_compiler_can_read_is_named_where_fused_is_demanded() -> None:
    @optx.rule(writes="g")
    def cumulated(g: Any) -> Any:
        return torch.cumsum(g, 0)

    class Cumulated(optx.Transform):
        name = "cumulated"
        rules: ClassVar = {"gradient": cumulated}

    w = nn.Parameter(torch.ones(3))
    with pytest.raises(FusedError, match=r"rule 'cumulated' uses 'torch.cumsum', which no kernel"):
        wrap(torch.optim.SGD([w], lr=1.0), Cumulated(), fused=True)
    opt = wrap(torch.optim.SGD([w], lr=1.0), Cumulated())
    assert "which no kernel compiler knows" in str(opt.plan())
    w.grad = torch.tensor([1.0, 2.0, 3.0])
    opt.step()
    assert torch.equal(w, 1.0 - torch.tensor([1.0, 3.0, 6.0]))


def test_fused_that_cannot_be_honoured_later_raises_then() -> None:
    net = make_net()
    opt = wrap(torch.optim.AdamW(net.parameters()), PerpGrad(), fused=True)
    assert [p.path for p in opt.plan()] == ["fused cpu"]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    opt.param_groups[0]["differentiable"] = True
    before = copy.deepcopy(net)
    with pytest.raises(FusedError, match="differentiable=True needs autograd through the step"):
        opt.step()
    assert same(net, before)


# ---- parameters that come later ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "words"), [("complex", "is complex"), ("shape", "no anchor for")])
def test_add_param_group_refuses_and_adds_nothing(kind: str, words: str) -> None:
    net = make_net()
    opt = wrap(torch.optim.AdamW(net.named_parameters()), AdamR(anchor=net.state_dict()))
    extra = torch.ones(2, dtype=torch.complex64 if kind == "complex" else torch.float32)
    snapshot = Snapshot(opt.base)
    with pytest.raises(TransformError, match=words):
        opt.add_param_group({"params": [("extra", nn.Parameter(extra))]})
    snapshot.check()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    opt.add_param_group({"params": [("extra", nn.Parameter(extra))], "adamr": False})
    assert len(opt.param_groups) == 2


@pytest.mark.parametrize("fused", ["auto", False])
def test_a_sparse_gradient_in_a_step_changes_nothing(fused: Any) -> None:
    table, head = nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2)
    opt = wrap(torch.optim.AdamW([*head.parameters(), *table.parameters()]), AdamR(), fused=fused)
    head(table(torch.tensor([1, 2]))).sum().backward()
    snapshot = Snapshot(opt.base)
    with pytest.raises(OptxError, match=r"a sparse gradient .*\(4, 3\).* use sparse=False in the embedding"):
        opt.step()
    snapshot.check()


@pytest.mark.parametrize("fused", ["auto", False])
def test_a_sparse_gradient_is_served_where_no_transform_acts(fused: Any) -> None:
    nets = []
    for wrapped in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2))
        groups = [{"params": net[0].parameters()}, {"params": net[1].parameters()}]
        if wrapped:
            groups[0]["perp_grad"] = groups[1]["perp_grad"] = False
        opt = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        opt = wrap(opt, PerpGrad(), fused=fused) if wrapped else opt
        for row in (1, 2, 1):
            opt.zero_grad()
            net(torch.tensor([row])).square().sum().backward()
            opt.step()
        nets.append(net)
    assert all(torch.allclose(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RAdam])
def test_complex_parameters_are_served_where_no_transform_acts(base: Any) -> None:
    start = torch.tensor([1.0 + 2.0j, 0.5 - 1.0j])
    both: list[Tensor] = []
    for transforms in ([PerpGrad()], None):
        c, w = nn.Parameter(start.clone()), nn.Parameter(torch.ones(3))
        opt = base([{"params": [c], **({"perp_grad": False} if transforms else {})}, {"params": [w]}], lr=0.1)
        opt = wrap(opt, *transforms) if transforms else opt
        for _ in range(3):
            c.grad, w.grad = c.detach().conj() * 2, torch.ones(3)
            opt.step()
        both.append(c.detach())
    assert torch.equal(*both)
    assert not torch.equal(both[0], start)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.5, r"n is 1\.5; it must be a whole number\."),
        (True, r"n is True; it must be a whole number\."),
        (torch.tensor(True), r"it must be a whole number\."),
        (torch.tensor([3]), r"n is tensor\(\[3\]\); it must be a whole number\."),
        (torch.tensor(3.0), r"it must be a whole number\."),
        ("3", r"n is '3'; it must be a whole number\."),
        (1, r"n is 1; it must be at least 2\."),
    ],
)
def test_whole_numbers(value: Any, words: str) -> None:
    """Of Python, NumPy or a tensor of no dimension; a row of one is a batch, say, and no number."""
    for good in (3, np.int64(3), np.uint8(3), torch.tensor(3)):
        number = check_whole("Owner", "n", good, 2)
        assert number == 3
        assert type(number) is int
    with pytest.raises(OptxError, match=f"Owner: .*{words}"):
        check_whole("Owner", "n", value, 2)
    with pytest.raises(OptxError, match=r"n is .*; it must be two or more"):
        check_whole("Owner", "n", value, 2, "two or more")
