"""`optx.KeepMask`: what it finds, refuses, keeps and saves, and packed slots on both paths."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from bases import through_a_file
from torch import Tensor, nn

import optx
from optx._mask_bits import pack

KEY = "optx.keep_mask.kept"


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 5), nn.Linear(5, 3)).to(dtype)


def masks_of(model: nn.Module, share: float = 0.5) -> optx.Masks:
    g = torch.Generator().manual_seed(1)
    masks = optx.Masks.from_bool(
        {n: torch.rand(p.shape, generator=g) > share for n, p in model.named_parameters() if p.ndim >= 2}
    )
    masks.apply_(model)
    return masks


def give(model: nn.Module, step: int, poison: optx.Masks | None = None) -> None:
    g = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        if poison is not None and name in poison:
            p.grad[~poison[name]] = float("nan")


def run(opt: Any, model: nn.Module, steps: range, poison: optx.Masks | None = None) -> None:
    for step in steps:
        give(model, step, poison)
        opt.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.named_parameters(), lr=0.01, weight_decay=0.1, **options)


def test_forms_of_the_slot() -> None:
    """Bits where rows are multiples of 8, bytes elsewhere, one number where nothing is pruned."""
    model = net()
    masks = masks_of(model)
    opt = optx.wrap(adamw(model), optx.KeepMask(masks))
    run(opt, model, range(1))
    kept = {n: opt.state[p][KEY] for n, p in model.named_parameters()}
    assert torch.equal(kept["0.weight"], pack(masks["0.weight"]))
    assert kept["0.weight"].shape == (8, 2)
    assert torch.equal(kept["1.weight"], pack(masks["1.weight"]))
    assert torch.equal(kept["2.weight"], masks["2.weight"])
    assert kept["2.weight"].dtype == torch.bool
    assert kept["0.bias"].shape == ()
    assert kept["0.bias"] == 1
    assert opt.keep_mask.current() == masks
    assert opt.plan()[0].path == "fused cpu"


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_place_among_transforms_does_not_matter(first: bool) -> None:
    """PerpGrad's sums see masked gradients, and a pull to anchors that are not 0 brings no zero back."""
    model = net()
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = masks_of(model)
    others = [optx.PerpGrad(), optx.AdamR(0.5, anchor=dense, norm="l1", normalize=False)]
    keep = optx.KeepMask(masks)
    opt = optx.wrap(adamw(model), *((keep, *others) if first else (*others, keep)), fused=False)
    run(opt, model, range(4), poison=masks)
    masks.verify(model)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    other = net()
    masks.apply_(other)
    again = optx.wrap(adamw(other), *others_of(dense), optx.KeepMask(masks), fused=False)
    for step in range(4):
        give(other, step)
        for n in masks:
            g = other.get_parameter(n).grad
            assert g is not None
            g[~masks[n]] = 0.0
        again.step()
    assert same(model, other)


def others_of(dense: dict[str, Tensor]) -> list[optx.Transform]:
    return [optx.PerpGrad(), optx.AdamR(0.5, anchor=dense, norm="l1", normalize=False)]


def test_fused_is_foreach() -> None:
    """More than a run of 128 and no multiple of it, in two chunks; moments are 0 where weights are pruned."""
    weights: list[Tensor] = []
    kept = torch.rand(1033, 72, generator=torch.Generator().manual_seed(3)) > 0.4
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(72, 1033, bias=False)
        model.weight.data[~kept] = 0.0
        opt = optx.wrap(adamw(model), optx.KeepMask({"weight": kept}), fused=fused)
        run(opt, model, range(3), poison=optx.Masks.from_bool({"weight": kept}))
        assert not model.weight[~kept].any()
        assert not opt.state[model.weight]["exp_avg"][~kept].any()
        assert bool(opt.state[model.weight]["exp_avg"][kept].all())
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_low_precision(rounding: Any) -> None:
    """Neither random bits nor the compensation grow on a zero."""
    model = nn.Linear(32, 8, bias=False, dtype=torch.bfloat16)
    masks = masks_of(model)
    opt = optx.wrap(adamw(model), optx.KeepMask(masks), rounding=rounding)
    run(opt, model, range(20), poison=masks)
    masks.verify(model)
    assert not torch.signbit(model.weight.detach()[~masks["weight"]]).any()
    if rounding == "kahan":
        assert not opt.state[model.weight]["optx.kahan"][~masks["weight"]].any()


def test_a_kept_weight_that_is_zero_is_trained() -> None:
    model = net()
    masks = masks_of(model)
    row, column = (int(x) for x in masks["0.weight"].nonzero()[0])
    with torch.no_grad():
        model.get_parameter("0.weight")[row, column] = 0.0
    opt = optx.wrap(adamw(model), optx.KeepMask(masks), fused=False)
    run(opt, model, range(1))
    assert float(model.get_parameter("0.weight").detach()[row, column]) != 0.0


@pytest.mark.parametrize("fused", ["auto", False], ids=["auto", "foreach"])
def test_resume_is_exact(fused: Any) -> None:
    """Through a file, into an optimizer whose own mask is another; the checkpoint's is in force then."""
    whole = net()
    masks = masks_of(whole)
    run(optx.wrap(adamw(whole), optx.KeepMask(masks), fused=fused), whole, range(6))
    half = net()
    masks.apply_(half)
    opt = optx.wrap(adamw(half), optx.KeepMask(masks), fused=fused)
    run(opt, half, range(3))
    saved = through_a_file({"net": half.state_dict(), "opt": opt.state_dict()})
    again = net(seed=4)
    other = masks_of(again, 0.2)
    resumed = optx.wrap(adamw(again), optx.KeepMask(other), fused=fused)
    resumed.load_state_dict(saved["opt"])
    with pytest.raises(
        optx.OptxError, match=r"'0\.weight' has \d+ masked weights that are not 0, and 2 other"
    ):
        run(resumed, again, range(1))
    again.load_state_dict(saved["net"])
    assert resumed.keep_mask.current() == masks != other
    run(resumed, again, range(3, 6))
    assert same(whole, again)


def test_masks_of_before_a_second_pruning() -> None:
    """Pruned further, trained on: a state from before must not let the new zeros go without a word."""
    model = net()
    first = masks_of(model)
    opt = optx.wrap(adamw(model), optx.KeepMask(first), fused=False)
    run(opt, model, range(2))
    saved = through_a_file(opt.state_dict())
    second = masks_of(model, 0.8)  # of the same draw: what it keeps, the first keeps too
    again = optx.wrap(adamw(model), optx.KeepMask(second), fused=False)
    with pytest.warns(UserWarning, match=r"checkpoint has other masks.* keep \d+ weights .*call remove\(\)"):
        again.load_state_dict(saved)
    assert again.keep_mask.current() == first
    plain = adamw(model)
    plain.load_state_dict(saved)
    wrapped = optx.wrap(plain, optx.KeepMask(second), fused=False)  # masks= is newer than what was loaded
    assert wrapped.keep_mask.current() == second
    wrapped.state.clear()
    run(wrapped, model, range(2))
    second.verify(model)
    plain = adamw(model)
    plain.load_state_dict(saved)
    with pytest.warns(UserWarning, match="state has masks already.* pass masks="):
        optx.wrap(plain, optx.KeepMask(), fused=False)


def test_through_safetensors_and_an_optimizer_without_it(tmp_path: Any) -> None:
    """torch casts what it does not know to the weight's dtype; 255 survives that in bfloat16 too."""
    model = net(dtype=torch.bfloat16)
    masks = masks_of(model)
    opt = optx.wrap(adamw(model), optx.KeepMask(masks), fused=False)
    run(opt, model, range(2))
    optx.save_optimizer(opt, tmp_path / "opt.safetensors")
    plain = adamw(model)
    plain.load_state_dict(opt.state_dict())
    again = optx.wrap(adamw(model), optx.KeepMask(masks))
    again.load_state_dict(plain.state_dict())
    assert again.keep_mask.current() == masks
    assert again.state[model.get_parameter("0.weight")][KEY].dtype == torch.uint8
    optx.load_optimizer(again, tmp_path / "opt.safetensors")
    assert again.keep_mask.current() == masks


def test_outlasts_a_cleared_state_and_copies() -> None:
    model = net()
    masks = masks_of(model)
    opt = optx.wrap(adamw(model), optx.KeepMask(masks), fused=False)
    run(opt, model, range(2))
    opt.state.clear()
    run(opt, model, range(2, 4), poison=masks)
    masks.verify(model)
    twin, other = copy.deepcopy((model, opt))
    run(opt, model, range(4, 6))
    run(other, twin, range(4, 6), poison=masks)
    assert same(model, twin)
    assert opt.remove() is opt.base
    assert not any(k.startswith("optx.") for entry in opt.base.state.values() for k in entry)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_another_memory_order(fused: bool) -> None:
    """A convolution in channels_last has no rows in memory: bits become bytes, and back."""
    model = nn.Conv2d(8, 4, 2)
    masks = masks_of(model)
    opt = optx.wrap(adamw(model), optx.KeepMask(masks), fused=fused)
    run(opt, model, range(1))
    assert opt.state[model.weight][KEY].dtype == torch.uint8
    model.to(memory_format=torch.channels_last)
    for step in (1, 2):
        give(model, step, masks)
        opt.step()
    assert opt.state[model.weight][KEY].dtype == torch.bool
    masks.verify(model)
    model.weight.data = model.weight.data.contiguous()
    run(opt, model, range(3, 5), poison=masks)
    assert opt.state[model.weight][KEY].dtype == torch.uint8
    masks.verify(model)
    assert opt.keep_mask.current() == masks


def test_parameters_that_are_replaced_or_added() -> None:
    model = net()
    masks = masks_of(model)
    opt = optx.wrap(adamw(model), optx.KeepMask(masks, model), fused=False)
    group = opt.param_groups[0]
    group["params"][0] = new = nn.Parameter(model[0].weight.detach().clone())
    model[0].weight = new
    pruned, dense = nn.Parameter(torch.eye(8)), nn.Parameter(torch.ones(8))
    opt.add_param_group({"params": [("pruned", pruned), ("dense", dense)]})
    for step in range(2):
        pruned.grad, dense.grad = torch.ones(8, 8), torch.ones(8)
        run(opt, model, range(step, step + 1), poison=masks)
    masks.verify(model)
    assert (pruned != 0).all()  # these masks are of others; without masks=, zeros are what is there
    model = net()
    masks = masks_of(model)
    opt = optx.wrap(adamw(model), optx.KeepMask(), fused=False)
    opt.add_param_group({"params": [("pruned", again := nn.Parameter(torch.eye(8)))]})
    again.grad = torch.ones(8, 8)
    opt.step()
    assert torch.equal(again != 0, torch.eye(8).bool())


def test_a_group_that_is_left_out() -> None:
    model = net()
    masks = masks_of(model)
    base = torch.optim.SGD(
        [
            {"params": [("0.weight", model[0].weight)]},
            {"params": [("1.weight", model[1].weight)], "keep_mask": False},
        ],
        lr=0.1,
    )
    opt = optx.wrap(base, optx.KeepMask(masks, model), fused=False)
    run(opt, model, range(1))
    assert not model[0].weight[~masks["0.weight"]].any()
    assert model[1].weight[~masks["1.weight"]].all()


def test_grad_scaler_and_closure() -> None:
    model = net()
    masks = masks_of(model)
    opt = optx.wrap(adamw(model), optx.KeepMask(masks), fused=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        give(model, step)
        scaler.scale(torch.zeros((), requires_grad=True)).backward()
        scaler.step(opt)
        scaler.update()
    masks.verify(model)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(torch.ones(2, 16)).square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    masks.verify(model)


def test_from_zeros() -> None:
    """Biases at 0, a few zeros, and what starts at 0 are not pruned."""
    model = net()
    masks = masks_of(model)
    nn.init.zeros_(model[0].bias)
    model.register_parameter("starts", nn.Parameter(torch.zeros(4, 8)))
    model.register_parameter("few", nn.Parameter(torch.ones(20, 8)))
    model.few.data[0, 0] = 0.0
    with pytest.warns(UserWarning, match=r"1 weights have nothing but zeros.*'starts'"):
        opt = optx.wrap(adamw(model), optx.KeepMask(), fused=False)
    run(opt, model, range(1))
    assert opt.keep_mask.current() == masks
    assert model[0].bias.all()
    assert model.starts.all()
    assert model.few.all()


def test_mistakes_are_told_at_wrap() -> None:
    model, dense = net(), net()
    masks = masks_of(model)

    def wrap(model: nn.Module, keep: optx.KeepMask, make: Any = adamw) -> None:
        before = [p.detach().clone() for p in model.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optx.wrap(make(model), keep)
        assert all(map(torch.equal, before, model.parameters()))

    def unnamed(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    for told, given in {
        r"has 6\d masked weights that are not 0, and 2 other weights": (dense, optx.KeepMask(masks)),
        r"no weight is pruned": (dense, optx.KeepMask()),
        r"has no parameter '0.weight', which the masks have. Near": (
            nn.Linear(4, 4),
            optx.KeepMask(optx.Masks.from_bool(dict(masks))),
        ),
        r"does not know its parameters' names": (model, optx.KeepMask(dict(masks)), unnamed),
        r"none of the 3 weights that have a mask": (
            model,
            optx.KeepMask(masks, model),
            lambda m: unnamed(nn.Linear(2, 2)),
        ),
        r"is of shape \(8, 16\), the weight has \(4, 4\)": (
            nn.Sequential(nn.Linear(4, 4)),
            optx.KeepMask({"0.weight": masks["0.weight"]}),
        ),
    }.items():
        with pytest.raises(optx.OptxError, match=told):
            wrap(*given)
    for bad in (3, {"0.weight": torch.ones(8, 16)}):
        with pytest.raises(optx.OptxError, match=r"must be optx\.Masks|it must be a bool tensor"):
            optx.KeepMask(bad)  # type: ignore[arg-type]
    with pytest.raises(optx.OptxError, match="model is a int"):
        optx.KeepMask(masks, 3)  # type: ignore[arg-type]
    with pytest.raises(optx.OptxError, match="wrap one with it first"):
        optx.KeepMask(masks).current()


def test_lbfgs_with_a_history_is_refused() -> None:
    model = net()
    base = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def closure() -> Tensor:
        base.zero_grad()
        loss = model(torch.ones(2, 16)).square().sum()
        loss.backward()
        return loss

    base.step(closure)
    saved = base.state_dict()
    masks = masks_of(model)
    with pytest.raises(optx.TransformError, match="LBFGS has stepped before the model was pruned"):
        optx.wrap(base, optx.KeepMask(masks))
    opt = optx.wrap(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2), optx.KeepMask(masks))
    with pytest.raises(optx.TransformError, match="LBFGS has stepped before the model was pruned"):
        opt.load_state_dict(saved)
    opt.step(closure)
    opt.load_state_dict(opt.state_dict())  # made under the mask
    opt.step(closure)
    masks.verify(model)


def test_packed_slots_of_ones_own() -> None:
    with pytest.raises(optx.TransformError, match=r"packed=True is for dtype=torch\.bool"):
        optx.like_weight(torch.float32, packed=True)

    class Writes(optx.Transform):
        name = "writes"
        slots = {"flags": optx.like_weight(torch.bool, packed=True)}  # noqa: RUF012
        rules = {"gradient": write_flags}  # noqa: RUF012

    with pytest.raises(optx.TransformError, match="writes 'flags', a packed slot, which rules can only read"):
        optx.wrap(adamw(net()), Writes())


@optx.rule(writes=("g", "flags"))
def write_flags(g: Any, flags: Any) -> Any:
    return g, flags


def test_a_slot_of_another_weight_is_told() -> None:
    model = net()
    for fused in (True, False):
        masks = masks_of(model)
        opt = optx.wrap(adamw(model), optx.KeepMask(masks), fused=fused)
        run(opt, model, range(1))
        opt.state[model[0].weight][KEY] = torch.ones(8, 3, dtype=torch.uint8)
        with pytest.raises(optx.ShapeError, match=r"optx\.keep_mask\.kept"):
            run(opt, model, range(1))
    again = optx.wrap(adamw(model), optx.KeepMask(masks), fused=False)
    with pytest.raises(optx.ShapeError, match=r"'optx\.keep_mask\.kept' that was saved for it has \(8, 3\)"):
        again.load_state_dict(opt.state_dict())
