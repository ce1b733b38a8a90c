"""DSP-Reg's numbers: the properties of its equations, against variances of whole stacks, on both paths."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from dsp_loops import give, loss_of, net, one, same, train, wrapped
from fused_cases import BF16, F16, F32, F64, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DSPReference, normalised
from torch import Tensor, nn

import optx

both = pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
WORKED = [[1.0, 2.0, 0.0], [3.0, 2.0, -4.0]]  # mean [2, 2, -2], variance [1, 0, 4]
AT = [1.0, 1.0, -0.5]
BASES: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def s_of(opt: optx.Wrapped, p: Tensor) -> Tensor:
    return opt.slot(p, opt.dsp_reg, "sensitivity")


def plain_sgd(model: nn.Module, fused: bool, **numbers: Any) -> torch.optim.Optimizer:
    """The base alone on the same path: kernels and torch round a product and sum differently."""
    base = torch.optim.SGD(model.parameters(), **numbers)
    return optx.wrap(base, fused=True) if fused else base


def near(a: Any, b: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), rtol=0, atol=atol
    )


# ---- the worked example ---------------------------------------------------------------------------------


@both
def test_the_worked_example(fused: bool) -> None:
    opt, p = one(WORKED, AT, fused, weight=0.5)
    near(p.grad, [2.0, 2.0, -2.0])
    opt.step()
    near(torch.tensor(AT) - p.detach(), [2.3, 2.0, -2.6])
    near(s_of(opt, p), [1.0, 0.0, 4.0])
    near(opt.dsp_reg.sensitivity()["param_groups[0]['params'][0]"], [0.6, 0.0, 2.4])
    near(p.grad, [2.0, 2.0, -2.0])  # the person's gradient is not the penalised one


@both
@pytest.mark.parametrize(
    ("norm", "scaled"),
    [
        ("mean", [0.6, 0.0, 2.4]),
        ("layer", [0.6, 0.0, 2.4]),
        ("max", [0.25, 0.0, 1.0]),
        ("none", [1.0, 0, 4.0]),
    ],
)
def test_every_norm(fused: bool, norm: Any, scaled: list[float]) -> None:
    opt, p = one(WORKED, AT, fused, weight=0.5, norm=norm)
    opt.step()
    added = 0.5 * torch.tensor(scaled) * torch.tensor(AT)
    near(torch.tensor(AT) - p.detach(), torch.tensor([2.0, 2.0, -2.0]) + added)
    near(opt.dsp_reg.sensitivity()["param_groups[0]['params'][0]"], scaled)


@both
def test_decoupled_acts_on_the_weight_that_the_base_left(fused: bool) -> None:
    opt, p = one(WORKED, AT, fused, weight=0.5, decoupled=True)
    opt.param_groups[0]["lr"] = 0.1
    opt.step()
    after_sgd = torch.tensor(AT) - 0.1 * torch.tensor([2.0, 2.0, -2.0])
    near(p.detach(), after_sgd * (1 - 0.1 * 0.5 * torch.tensor([0.6, 0.0, 2.4])))


@both
def test_decoupled_takes_at_most_the_whole_weight(fused: bool) -> None:
    opt, p = one(WORKED, AT, fused, weight=50.0, decoupled=True)
    opt.param_groups[0]["lr"] = 0.1
    opt.step()  # 0.1 * 50 * [0.6, 0, 2.4] = [3, 0, 12]
    near(p.detach(), [0.0, 0.8, 0.0])


@both
def test_the_variance_may_be_unbiased(fused: bool) -> None:
    opt, p = one([[1.0], [2.0], [6.0]], [1.0], fused, unbiased=True)
    opt.step()
    near(s_of(opt, p), [7.0])
    opt, p = one([[1.0], [2.0], [6.0]], [1.0], fused)
    opt.step()
    near(s_of(opt, p), [14.0 / 3.0])


@both
def test_the_running_average_starts_with_the_first_variance(fused: bool) -> None:
    opt, p = one([[2.0], [-2.0]], [1.0], fused)
    opt.step()
    near(s_of(opt, p), [4.0])
    opt.zero_grad()
    give(opt, [p], [[torch.ones(1)], [torch.ones(1)]])
    opt.step()
    near(s_of(opt, p), [3.6])


# ---- laws -----------------------------------------------------------------------------------------------


@both
def test_at_weight_0_it_is_the_base_to_the_bit(fused: bool) -> None:
    """On the mean of the domains' gradients, which is that of the mean loss."""
    models = net(), net(), net()
    ours = wrapped(models[0], fused=fused, weight=0.0)
    plain = plain_sgd(models[1], fused, lr=0.05, momentum=0.9)
    mean = torch.optim.SGD(models[2].parameters(), lr=0.05, momentum=0.9)
    random = torch.get_rng_state()
    for step in range(6):
        train(models[0], ours, [step])
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            q.grad = p.grad.clone()
        plain.step()
        mean.zero_grad()
        (sum(loss_of(models[2], step, d) for d in range(3)) / 3).backward()
        mean.step()
    assert same(models[0], models[1])
    assert torch.equal(random, torch.get_rng_state())
    for p, q in zip(models[0].parameters(), models[2].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert not same(models[0], net())


@pytest.mark.parametrize(
    ("fused", "norm"), [(True, "mean"), *((False, norm) for norm in ("mean", "layer", "max", "none"))]
)
@pytest.mark.parametrize("decoupled", [False, True])
def test_equal_domains_add_exactly_nothing(fused: bool, norm: Any, decoupled: bool) -> None:
    models = net(), net()
    ours = wrapped(models[0], fused=fused, norm=norm, decoupled=decoupled, weight=100.0)
    plain = plain_sgd(models[1], fused, lr=0.05, momentum=0.9)
    for step in range(4):
        ours.zero_grad()
        for d in range(3):
            with ours.dsp_reg.domain(d):
                loss_of(models[0], step, 0).backward()
        ours.step()
        plain.zero_grad()
        loss_of(models[1], step, 0).backward()
        plain.step()
    assert same(*models)
    assert not any(s.any() for s in ours.dsp_reg.sensitivity().values())


@both
def test_one_domain_adds_exactly_nothing_and_is_told(fused: bool) -> None:
    models = net(), net()
    base = torch.optim.SGD(models[0].parameters(), lr=0.05)
    with pytest.warns(UserWarning, match="there is one domain, 'only'"):
        ours = optx.wrap(base, optx.DSPReg(["only"], weight=100.0), fused=fused)
    plain = plain_sgd(models[1], fused, lr=0.05)
    for step in range(3):
        for model, opt in zip(models, (ours, plain), strict=True):
            opt.zero_grad()
            if opt is ours:
                with ours.dsp_reg.domain("only"):
                    loss_of(model, step, 1).backward()
            else:
                loss_of(model, step, 1).backward()
            opt.step()
    assert same(*models)


@both
def test_equal_sensitivities_are_an_l2_decay(fused: bool) -> None:
    """Domains whose gradients differ by the same everywhere."""
    w, g = draw([(6, 5), (6, 5)], 0, F32)
    params = [nn.Parameter(w.clone()) for _ in range(2)]
    ours = optx.wrap(torch.optim.SGD(params[:1], lr=0.1), optx.DSPReg(2, weight=0.3), fused=fused)
    plain = torch.optim.SGD(params[1:], lr=0.1, weight_decay=0.3)
    for _ in range(5):
        ours.zero_grad()
        give(ours, params[:1], [[g + 0.5], [g - 0.5]])
        ours.step()
        params[1].grad = g.clone()
        plain.step()
    torch.testing.assert_close(params[0], params[1], rtol=0, atol=1e-6)


@both
def test_the_order_of_domains_and_the_loss_scale_do_not_count(fused: bool) -> None:
    grads = [draw([(4, 3), (7, 2)], seed, F32) for seed in range(4)]

    def run(order: list[int], by: float) -> tuple[list[Tensor], dict[str, Tensor]]:
        params = [nn.Parameter(w) for w in draw([(4, 3), (7, 2)], 9, F32)]
        opt = optx.wrap(torch.optim.SGD(params, lr=0.1), optx.DSPReg(4), fused=fused)
        give(opt, params, [[by * g for g in grads[d]] for d in order])
        opt.step()
        return [p.detach() for p in params], opt.dsp_reg.sensitivity()

    weights, scaled = run([0, 1, 2, 3], 1.0)
    for order in ([3, 1, 0, 2], [2, 3, 1, 0]):
        permuted, again = run(order, 1.0)
        torch.testing.assert_close(permuted, weights, rtol=0, atol=1e-6)
        torch.testing.assert_close(again, scaled, rtol=1e-5, atol=1e-6)
    for by in (1e-3, 300.0):
        torch.testing.assert_close(run([0, 1, 2, 3], by)[1], scaled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["mean", "layer", "max"])
def test_what_the_norms_make_1(norm: Any) -> None:
    model = net()
    opt = wrapped(model, norm=norm)
    train(model, opt, range(3))
    found = opt.dsp_reg.sensitivity()
    assert sorted(found) == ["0.weight", "2.weight"]  # no biases
    flat = torch.cat([s.flatten() for s in found.values()])
    if norm == "mean":
        assert float(flat.mean()) == pytest.approx(1.0, rel=1e-5)
        assert abs(float(found["0.weight"].mean()) - 1.0) > 0.01  # jointly, not by layer
    elif norm == "max":
        assert float(flat.max()) == pytest.approx(1.0, rel=1e-6)
    else:
        assert [float(s.mean()) for s in found.values()] == pytest.approx([1.0, 1.0], rel=1e-5)


def test_biases_are_left_out_and_embeddings_of_a_model() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.words(ids).mean(1))

    torch.manual_seed(0)
    model = Bag()
    start = copy.deepcopy(model)
    opt = optx.wrap(torch.optim.SGD(model.parameters(), lr=0.1), optx.DSPReg(2, weight=0.5, model=model))
    for d in range(2):
        with opt.dsp_reg.domain(d):
            model(torch.arange(10).view(2, 5).remainder(d + 4)).logsumexp(1).sum().backward()
    opt.step()
    assert list(opt.dsp_reg.sensitivity()) == ["head.weight"]
    for name, p in model.named_parameters():
        plain = start.get_parameter(name) - 0.1 * p.grad
        penalised = plain - 0.1 * 0.5 * opt.dsp_reg.sensitivity().get(name, 0.0) * start.get_parameter(name)
        torch.testing.assert_close(p, penalised, rtol=0, atol=1e-6)
        assert torch.allclose(p, plain, rtol=0, atol=1e-6) == (name != "head.weight")


@both
def test_groups_may_opt_out_and_override(fused: bool) -> None:
    w, a, b = draw([(3, 4)] * 3, 3, F32)
    params = [nn.Parameter(w.clone()) for _ in range(3)]
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "dsp_reg": False},
        {"params": params[2:], "dsp_reg_weight": 0.0},
    ]
    opt = optx.wrap(torch.optim.SGD(groups, lr=0.1), optx.DSPReg(2), fused=fused)
    give(opt, params, [[a] * 3, [b] * 3])
    opt.step()
    plain = w - 0.1 * (a + b) / 2
    scaled = normalised([((a - b) / 2) ** 2], "mean")[0]
    torch.testing.assert_close(params[0].detach(), plain - 0.1 * scaled * w, rtol=0, atol=1e-6)
    assert torch.equal(params[1], params[2])
    torch.testing.assert_close(params[1].detach(), plain, rtol=0, atol=1e-6)
    assert not opt.state[params[1]].get("optx.dsp_reg.sensitivity")


# ---- against whole stacks -------------------------------------------------------------------------------


def compare(fused: bool, base: str, dtype: torch.dtype, seed: int, count: int, **options: Any) -> None:
    """Five steps beside the reference, from other gradients each."""
    shapes = [(3, 5), (17,), (), (6, 2, 4)]
    numbers = {"lr": 0.05} if base == "sgd" else {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1}
    params = [nn.Parameter(w) for w in draw(shapes, seed, dtype)]
    anchored = options.get("anchor") == "init"
    known = {k: v for k, v in options.items() if k != "anchor"}
    reference = DSPReference(params, base, numbers, anchored=anchored, **known)
    dsp = optx.DSPReg(count, min_dim=0, **options)
    opt = optx.wrap(BASES[base](params, **numbers), dsp, fused=fused, rounding="nearest" if fused else None)
    for step in range(5):
        grads = [draw(shapes, 1000 * seed + 10 * step + d, dtype) for d in range(count)]
        opt.zero_grad()
        give(opt, params, grads)
        opt.step()
        reference.step(grads)
        for p, wanted in zip(params, reference.s, strict=True):
            torch.testing.assert_close(s_of(opt, p).double(), wanted, rtol=3e-6, atol=1e-12)
        if dtype not in (F32, F64):  # each step rounds the weight
            reference.weights = [p.detach().double() for p in params]
    if dtype in (F32, F64):
        for p, wanted in zip(params, reference.weights, strict=True):
            torch.testing.assert_close(p.detach().double(), wanted, rtol=0, atol=3e-6)


FUSED = [
    ("sgd", {"norm": "mean"}),
    ("adamw", {"norm": "mean", "decoupled": True, "anchor": "init", "unbiased": True}),
    ("adam", {"norm": "layer", "decoupled": False, "warmup": 2, "anchor": "init"}),
    ("sgd", {"norm": "max", "decoupled": True, "weight": 3.0}),
    ("adamw", {"norm": "none", "decoupled": True, "ema": 0.5}),
]


@pytest.mark.long(keep=3)
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("base", "options"), FUSED)
def test_the_fused_path_against_the_reference(base: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    for seed, count in ((1, 2), (2, 5)):
        compare(True, base, dtype, seed, count, **{"decoupled": False, **options})


@settings(max_examples=25)
@given(
    base=st.sampled_from(["sgd", "adam", "adamw"]),
    dtype=st.sampled_from([F32, F64, BF16, F16]),
    seed=st.integers(0, 1000),
    count=st.integers(2, 6),
    weight=st.floats(0.0, 5.0, width=32),
    ema=st.floats(0.0, 1.0, width=32),
    norm=st.sampled_from(["mean", "layer", "max", "none"]),
    warmup=st.integers(0, 6),
    decoupled=st.booleans(),
    anchor=st.sampled_from([None, "init"]),
    unbiased=st.booleans(),
)
def test_any_options_against_the_reference(
    base: str, dtype: torch.dtype, seed: int, count: int, **options: Any
) -> None:
    compare(False, base, dtype, seed, count, **options)


@given(seed=st.integers(0, 10_000), count=st.integers(2, 9), scale=st.integers(-6, 6), shift=st.floats(-9, 9))
def test_the_recurrence_is_the_variance_of_the_stack(seed: int, count: int, scale: int, shift: float) -> None:
    grads = [(draw([(5, 7)], seed + d, F32)[0] + shift) * 10.0**scale for d in range(count)]
    p = nn.Parameter(torch.ones(5, 7))
    opt = optx.wrap(torch.optim.SGD([p], lr=0.1), optx.DSPReg(count), fused=False)
    give(opt, [p], [[g] for g in grads])
    spread = opt.slot(p, opt.dsp_reg, "spread").double()
    by_hand = np.cov(np.stack([g.flatten().double().numpy() for g in grads]), rowvar=False, bias=True)
    wanted = torch.from_numpy(np.diag(by_hand).copy()).view(5, 7)
    # Float32 gradients know their differences to 2^-24 of their own size.
    size = max(float(g.abs().max()) for g in grads)
    torch.testing.assert_close(spread, wanted, rtol=1e-5, atol=1e-6 * size * float(wanted.max()) ** 0.5)
    torch.testing.assert_close(p.grad, torch.stack(grads).mean(0), rtol=1e-6, atol=1e-6 * size)


def test_the_covariance_of_a_models_gradients_by_hand() -> None:
    """In float64, from gradients of each domain alone, through a model's own backward passes."""
    model, alone = net().double(), net().double()
    opt = wrapped(model, fused=False)

    def loss(m: nn.Module, d: int) -> Tensor:
        x = torch.randn(9, 4, generator=torch.Generator().manual_seed(d), dtype=F64)
        return m(x).logsumexp(1).mean() * (d + 1)

    stacks: dict[str, list[Tensor]] = {name: [] for name, _ in alone.named_parameters()}
    for d in range(3):
        alone.zero_grad()
        loss(alone, d).backward()
        for name, p in alone.named_parameters():
            stacks[name].append(p.grad.clone())
        with opt.dsp_reg.domain(d):
            loss(model, d).backward()
    opt.step()
    variances = {
        name: torch.stack(g).var(0, unbiased=False) for name, g in stacks.items() if "weight" in name
    }
    wanted = dict(zip(variances, normalised(list(variances.values()), "mean"), strict=True))
    for name, s in opt.dsp_reg.sensitivity().items():
        torch.testing.assert_close(s.double(), wanted[name], rtol=1e-6, atol=1e-7)
