"""What a kernel is pointed at is what it thinks it is: shapes, dtypes, storage and kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import optx

both = pytest.mark.parametrize("fused", ["cpu", False], ids=["fused", "foreach"])
N = 300


def made(fused: Any = "auto", n: int = N, **options: Any) -> tuple[nn.Parameter, optx.Wrapped]:
    """One parameter called ``w`` that has taken a step."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(n, 4))
    base = torch.optim.AdamW([("w", p)], lr=0.01, weight_decay=0.0, **options)
    opt = optx.wrap(base, optx.PerpGrad(), optx.AdamR(normalize=False), fused=fused)
    step(p, opt)
    return p, opt


def step(p: nn.Parameter, opt: torch.optim.Optimizer) -> None:
    p.grad = torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape)
    opt.step()


def grown(p: nn.Parameter, opt: optx.Wrapped) -> None:
    p.data = torch.cat([p.data, torch.ones(70_000, 4)])


def shrunk(p: nn.Parameter, opt: optx.Wrapped) -> None:
    p.data = p.data[:5].clone()


def transposed(p: nn.Parameter, opt: optx.Wrapped) -> None:
    """The same number of elements."""
    p.data = p.data.t().contiguous()


def replaced(p: nn.Parameter, opt: optx.Wrapped) -> None:
    new = nn.Parameter(torch.ones(N + 500, 4))
    opt.param_groups[0]["params"][0] = new
    opt.state[new] = opt.state.pop(p)


def moment_cut(p: nn.Parameter, opt: optx.Wrapped) -> None:
    opt.state[p]["exp_avg_sq"] = opt.state[p]["exp_avg_sq"][:7].clone()


def moment_resized(p: nn.Parameter, opt: optx.Wrapped) -> None:
    opt.state[p]["exp_avg"].resize_(3)


def moment_data(p: nn.Parameter, opt: optx.Wrapped) -> None:
    opt.state[p]["exp_avg"].data = torch.zeros(4, 2)


def anchor_cut(p: nn.Parameter, opt: optx.Wrapped) -> None:
    opt.state[p]["optx.adamr.anchor"] = torch.zeros(2, 4)


SHAPES = {
    grown: ("'exp_avg'", (70_300, 4), (N, 4)),
    shrunk: ("'exp_avg'", (5, 4), (N, 4)),
    transposed: ("'exp_avg'", (4, N), (N, 4)),
    replaced: ("'exp_avg'", (N + 500, 4), (N, 4)),
    moment_cut: ("'exp_avg_sq'", (N, 4), (7, 4)),
    moment_resized: ("'exp_avg'", (N, 4), (3,)),
    moment_data: ("'exp_avg'", (N, 4), (4, 2)),
    anchor_cut: ("'optx.adamr.anchor'", (N, 4), (2, 4)),
}


@both
@pytest.mark.parametrize("edit", SHAPES, ids=lambda edit: edit.__name__)
def test_another_shape_is_one_sentence_before_anything_moves(edit: Callable[..., None], fused: Any) -> None:
    p, opt = made(fused)
    edit(p, opt)
    what, shape, other = SHAPES[edit]
    (q,) = opt.param_groups[0]["params"]
    before = q.detach().clone()
    count = float(opt.state[q]["step"])
    with pytest.raises(optx.ShapeError) as raised:
        step(q, opt)
    said = str(raised.value)
    assert "parameter 'w'" in said
    # The anchor is looked at first where nothing else is: either may be named.
    assert what in said or "'optx.adamr.anchor'" in said
    assert str(shape) in said
    assert str(other) in said
    assert torch.equal(q, before)
    assert float(opt.state[q]["step"]) == count


@both
def test_a_gradient_of_another_shape_is_refused_or_torchs_own_error(fused: Any) -> None:
    p, opt = made(fused)
    before = p.detach().clone()
    p.grad.data = torch.ones(2, 2)  # type: ignore[union-attr]
    with pytest.raises((optx.ShapeError, RuntimeError)):
        opt.step()
    assert torch.equal(p, before)
    step(p, opt)
    assert not torch.equal(p, before)


@both
def test_state_deleted_after_growing_is_the_way_out(fused: Any) -> None:
    p, opt = made(fused)
    grown(p, opt)
    del opt.state[p]
    with pytest.raises(optx.ShapeError, match=r"'optx.adamr.anchor' has \(300, 4\)"):
        step(p, opt)  # the anchor lasts: it can't be made again
    opt.param_groups[0]["adamr"] = False
    step(p, opt)
    assert opt.state[p]["exp_avg"].shape == p.shape
    assert float(opt.state[p]["step"]) == 1.0


def test_a_load_in_another_order_is_refused_then_and_changes_nothing() -> None:
    def pair(*sizes: int) -> tuple[list[nn.Parameter], optx.Wrapped]:
        params = [nn.Parameter(torch.ones(n)) for n in sizes]
        names = [(f"w{n}", p) for n, p in zip(sizes, params, strict=True)]
        opt = optx.wrap(torch.optim.AdamW(names))
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        return params, opt

    _, saved = pair(4, 3000)
    params, opt = pair(3000, 4)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(
        optx.ShapeError, match=r"'w3000' has shape \(3000,\), the 'exp_avg' that was saved for it has \(4,\)"
    ):
        opt.load_state_dict(copy.deepcopy(saved.state_dict()))
    after = opt.state_dict()
    assert all(torch.equal(after["state"][i][k], v) for i, s in before["state"].items() for k, v in s.items())
    opt.step()
    assert float(opt.state[params[0]]["step"]) == 2.0


@both
def test_an_anchor_of_another_shape_is_refused_at_load(fused: Any) -> None:
    p, opt = made(fused)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["optx.adamr.anchor"] = torch.zeros(3, 4)
    with pytest.raises(optx.ShapeError, match=r"'w' has shape \(300, 4\).*optx.adamr.anchor.*\(3, 4\)"):
        opt.load_state_dict(saved)
    step(p, opt)
    assert float(opt.state[p]["step"]) == 2.0


# ---- dtypes ----------------------------------------------------------------------


@pytest.mark.long(keep=7)
@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moments_recast_between_steps_are_served_as_they_are_now(dtype: torch.dtype, fused: Any) -> None:
    p, opt = made(fused)
    q, twin = made(fused)
    for k in ("exp_avg", "exp_avg_sq"):
        opt.state[p][k] = opt.state[p][k].to(dtype)
    try:
        step(p, opt)
    except RuntimeError:
        assert not fused  # torch's own step does not take them: everything is as it was
        assert torch.equal(p, q)
        return
    step(q, twin)
    assert opt.state[p]["exp_avg"].dtype == dtype
    off = (p - q).detach().abs()
    assert float(off.median()) < 1e-4  # where a gradient is near zero its square is none in float16
    assert float(off.max()) < 0.02


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("exp_avg", torch.int32),
        ("exp_avg", torch.complex64),
        ("exp_avg", torch.bool),
        ("optx.adamr.anchor", torch.complex64),  # integers are read, as those of any slot
    ],
)
def test_a_dtype_that_no_kernel_reads_is_named(key: str, dtype: torch.dtype) -> None:
    p, opt = made("cpu")
    before = p.detach().clone()
    opt.state[p][key] = torch.ones(p.shape, dtype=dtype)
    with pytest.raises(optx.OptxError, match=f"'{key}' of parameter 'w' is {dtype}"):
        step(p, opt)
    assert torch.equal(p, before)


def test_state_that_is_no_tensor_is_named() -> None:
    p, opt = made("cpu")
    opt.state[p]["exp_avg"] = 0.0
    with pytest.raises(optx.OptxError, match="'exp_avg' of parameter 'w' is a float; it must be a tensor"):
        step(p, opt)


@both
def test_the_model_is_cast_to_and_fro(fused: Any) -> None:
    """Moments stay as they are kept; every step is finite and goes the right way."""
    p, opt = made(fused)
    opt.param_groups[0]["adamr"] = False
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        p.grad = None
        p.data = p.data.to(dtype)
        if not fused:
            for k in ("exp_avg", "exp_avg_sq"):
                opt.state[p][k] = opt.state[p][k].to(dtype)
        before = p.detach().clone()
        step(p, opt)
        assert p.dtype == dtype
        assert bool(p.isfinite().all())
        assert 0.0 < float((p.detach() - before).abs().max()) < 0.05


# ---- kinds of tensors ----------------------------------------------------------------------


def test_a_wrapper_subclass_steps_as_in_torch_and_the_plan_says_why() -> None:
    def run(wrapped: bool) -> tuple[Any, Any]:
        p = nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
        opt = torch.optim.SGD([p], lr=0.1)
        opt = optx.wrap(opt) if wrapped else opt
        p.grad = TwoTensor(torch.ones(3), torch.ones(3))
        opt.step()
        return p, opt

    (p, opt), (q, _) = run(True), run(False)
    assert torch.equal(p.a, q.a)
    assert opt.plan()[0].path == "foreach"
    assert "TwoTensor, which answers torch's functions in its own way" in str(opt.plan())
    with pytest.raises(optx.FusedError, match="TwoTensor"):
        optx.wrap(opt, fused=True)


@both
def test_a_subclass_that_only_has_a_name_is_served(fused: Any) -> None:
    class Named(nn.Parameter):
        pass

    p = Named(torch.ones(8))
    opt = optx.wrap(torch.optim.SGD([p], lr=1.0), fused=fused)
    p.grad = torch.ones(8)
    opt.step()
    assert not p.any()


def lazy_negation() -> Tensor:
    return torch._neg_view(-torch.linspace(1, 2, 8))


def zero_tensor() -> Tensor:
    return torch._efficientzerotensor(8)


@pytest.mark.parametrize("make", [lazy_negation, zero_tensor], ids=lambda f: f.__name__)
def test_lazy_gradients_are_computed(make: Callable[[], Tensor]) -> None:
    p, q = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    opt, plain = optx.wrap(torch.optim.SGD([p], lr=0.5), fused=True), torch.optim.SGD([q], lr=0.5)
    for _ in range(2):  # into the table, and on the quick way
        p.grad, q.grad = make(), make().clone()
        opt.step()
        plain.step()
        assert torch.equal(p, q)
    p.grad = torch.ones(8)
    opt.step()
    p.grad = make()
    before = p.detach().clone()
    opt.step()
    assert torch.equal(p, before - 0.5 * make())


def test_a_lazy_state_tensor_takes_the_foreach_path_and_comes_back() -> None:
    p, opt = made()
    q, twin = made()
    exp_avg = opt.state[p]["exp_avg"]
    opt.state[p]["exp_avg"] = torch._neg_view(-exp_avg)
    step(p, opt)
    step(q, twin)
    assert "lazy conjugate or negation" in str(opt.plan())
    torch.testing.assert_close(p, q)
    opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].resolve_neg()
    step(p, opt)
    assert opt.plan()[0].path == "fused cpu"


def test_freed_storage_is_noticed() -> None:
    """FSDP1 frees a parameter's storage between steps."""
    p, opt = made("cpu")
    opt.state[p]["exp_avg"].untyped_storage().resize_(0)
    with pytest.raises(optx.FusedError, match="'exp_avg' of a parameter has lost its memory"):
        step(p, opt)
    p, opt = made("cpu")
    p.grad = torch.ones_like(p)
    p.untyped_storage().resize_(16)
    with pytest.raises(optx.FusedError, match="a parameter has lost its memory"):
        opt.step()


def test_state_on_meta_is_noticed() -> None:
    p, opt = made("cpu")
    before = p.detach().clone()
    opt.state[p]["exp_avg_sq"] = torch.empty_like(p, device="meta")
    with pytest.raises(optx.OptxError, match="meta"):
        step(p, opt)
    assert torch.equal(p, before)


def test_a_parameter_on_meta_is_planned_without_a_kernel() -> None:
    p = nn.Parameter(torch.empty(4, device="meta"))
    opt = optx.wrap(torch.optim.SGD([p], lr=0.1))
    assert opt.plan()[0].path == "foreach"
    assert "meta" in str(opt.plan())


def test_state_that_shares_memory_between_elements_is_laid_out_anew() -> None:
    """An expanded moment would be written at one place for all elements."""
    p, opt = made("cpu")
    q, twin = made("cpu")
    for o, w, lay in ((opt, p, lambda t: t.expand(N, 4)), (twin, q, lambda t: t.expand(N, 4).clone())):
        o.state[w]["exp_avg"] = lay(torch.zeros(1, 1))
        step(w, o)
    assert torch.equal(p, q)
    assert torch.equal(opt.state[p]["exp_avg"], twin.state[q]["exp_avg"])


def test_a_step_without_gradients_after_a_refused_one() -> None:
    """The tables of before the refusal are not taken for those of no parameter at all."""
    p = nn.Parameter(torch.ones(3))
    opt = optx.wrap(torch.optim.SGD([p], lr=0.1, momentum=0.9))
    p.grad = torch.ones(3)
    opt.step()
    kept, opt.state[p]["momentum_buffer"] = opt.state[p]["momentum_buffer"], 1.0
    with pytest.raises(optx.OptxError, match="it must be a tensor"):
        opt.step()
    opt.state[p]["momentum_buffer"] = kept
    p.grad, before = None, p.detach().clone()
    with pytest.warns(UserWarning, match="found no gradient"):
        opt.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_state_is_found_after_some_or_all_of_it_was_deleted(keep: int) -> None:
    """Where it lies among that of all parameters is remembered from step to step."""
    params = [nn.Parameter(torch.full((3,), float(i + 1))) for i in range(3)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]

    def wrapped(weights: list[nn.Parameter], fused: Any) -> optx.Wrapped:
        base = torch.optim.AdamW([{"params": [p]} for p in weights], lr=0.1, weight_decay=0)
        return optx.wrap(base, optx.AdamR(), fused=fused)

    opt, plain = wrapped(params, "cpu"), wrapped(twins, False)
    for t in range(6):
        if t == 3:
            for o, weights in ((opt, params), (plain, twins)):
                weights.append(nn.Parameter(torch.ones(3)))
                o.add_param_group({"params": weights[-1:]})  # its anchor waits outside of `state`
                for p in list(o.state)[keep:]:
                    del o.state[p]
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.full_like(p, float(t - 2))
            q.grad = p.grad.clone()
        opt.step()
        plain.step()
        torch.testing.assert_close(params, twins)
