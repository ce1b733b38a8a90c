"""SaRA: the paper's arithmetic, what stays bit-identical, which entries are selected, and when again."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from bases import BASES, loss_of, make_net
from bases import train as train_base
from hypothesis import given, settings
from hypothesis import strategies as st
from sara_runs import adamw, assert_same, copies, loss, masks, net, train, wrapped
from torch import Tensor, nn

import optx
from optx.transforms._small_entries import small, threshold_of_share

W = [0.001, -0.0015, 0.01, -0.5, 0.0]


@pytest.mark.parametrize("fused", ["auto", False])
@pytest.mark.parametrize("compact", [False, True])
def test_the_specs_own_step(fused: Any, compact: bool) -> None:
    w = nn.Parameter(torch.tensor(W))
    base = torch.optim.AdamW([w], lr=5e-4, weight_decay=0.01)
    opt = optx.wrap(base, optx.SaRA(2e-3, compact=compact), fused=fused)
    assert opt.sara._mask(w).tolist() == [True, True, False, False, True]
    w.grad = torch.tensor([1.0, -2.0, 3.0, 4.0, -0.5])
    opt.step()
    wanted = torch.tensor([4.99995005e-4, -9.99992503e-4, 0.01, -0.5, 4.9999999e-4])
    assert torch.allclose(w, wanted, rtol=1e-6, atol=0)
    assert w[2:4].tolist() == torch.tensor(W)[2:4].tolist()


MAKERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "Adam l2": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True, maximize=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3, weight_decay=0.1),
}


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(
        [
            *(("AdamW", d, "auto") for d in (torch.float32, torch.bfloat16)),
            *((base, d, False) for base in MAKERS for d in (torch.float32, torch.float64, torch.bfloat16)),
        ]
    ),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.floats(0.05, 2.5),
)
def test_selected_entries_are_the_bases_own_run_of_them_and_others_stay_whatever_their_gradient(
    case: tuple[str, torch.dtype, Any], shape: list[int], threshold: float
) -> None:
    base, dtype, fused = case
    generator = torch.Generator().manual_seed(len(shape))
    w = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    start, mask = w.detach().clone(), small(w, threshold)
    alone = nn.Parameter(w.detach()[mask].clone())
    if not bool(mask.any()):
        return
    opt = optx.wrap(MAKERS[base]([w]), optx.SaRA(threshold), fused=fused)
    # float32's rounding apart, each step is the base's own.
    same = optx.wrap(MAKERS[base]([alone]), fused=fused)
    for _ in range(100):
        g = torch.randn(shape, generator=generator).to(dtype)
        w.grad, alone.grad = g.masked_fill(~mask, torch.nan), g[mask]
        opt.step()
        same.step()
    assert torch.equal(w[~mask], start[~mask])
    if dtype != torch.bfloat16:  # whose stochastic rounding draws by place
        assert torch.allclose(w[mask], alone, rtol=1e-6, atol=1e-7)


@pytest.mark.long(keep=5)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_any_base_keeps_unselected_entries(base: Any) -> None:
    model = make_net()
    start = {p: p.detach().clone() for p in model.parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        if base.modes:
            with pytest.raises(optx.TransformError, match=r"moves weights in train\(\) and eval\(\)"):
                optx.wrap(base.make(model.parameters()), optx.SaRA(fraction=0.3))
            return
        # A kernel for each base would be compiled: for one, as the mask is the same on all paths.
        fused = "auto" if base.name == "AdamW" else False
        opt = optx.wrap(base.make(model.parameters()), optx.SaRA(fraction=0.3), fused=fused)
        train_base(model, opt, range(4), closure=base.closure)
    moved = 0
    for p, old in start.items():
        mask = opt.sara._mask(p)
        assert torch.equal(p[~mask], old[~mask])
        moved += int((p[mask] != old[mask]).sum())
    assert moved > 10


def test_threshold_of_all_is_the_base_and_of_none_moves_nothing() -> None:
    a, b, c = net(), net(), net()
    plain = optx.wrap(adamw(a))
    train(a, plain, range(5))
    train(b, wrapped(b, threshold=float("inf")), range(5))
    assert_same(a, b)
    with pytest.warns(UserWarning, match="no weight is below 0 in size"):
        opt = wrapped(c, threshold=0.0)
    train(c, opt, range(5))
    assert_same(c, net())


# ---- which entries -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.floats(-4, 4, width=16), max_size=30), min_size=1, max_size=3),
    st.floats(0.001, 1.0),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_a_fraction_is_the_least_threshold_with_as_many_below(
    rows: list[list[float]], share: float, dtype: torch.dtype
) -> None:
    weights = [torch.tensor(row, dtype=dtype) for row in rows]
    every = torch.cat([w.abs().float() for w in weights]).sort().values
    if not len(every):
        return
    threshold = threshold_of_share(weights, share)
    wanted = max(1, round(share * len(every)))
    below = sum(int(small(w, threshold).sum()) for w in weights)
    assert below == int((every <= every[wanted - 1]).sum())  # its ties among them
    smaller = float(torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)))
    assert sum(int(small(w, smaller).sum()) for w in weights) < wanted


def test_one_threshold_serves_all_tensors_and_low_precision_is_compared_as_stored() -> None:
    model = net()
    opt = wrapped(model, fraction=0.1)
    every = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    table = opt.sara.density()
    assert table.selected == int((every.abs() < opt.sara.threshold).sum())
    assert table.selected == 106  # of 1,056
    gains = next(row for row in table if row.name == "1.weight")
    assert (gains.selected, gains.numel, gains.shape) == (0, 24, (24,))
    assert "of 1,056 numbers trained" in str(table)
    # The threshold rounded to bfloat16 is the first entry, which would not be below it.
    w = torch.tensor([0.0020, 0.0021], dtype=torch.bfloat16)
    assert (w < 2e-3).tolist() == [False, False]
    assert small(w, 2e-3).tolist() == [True, False]


# ---- selecting again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_reselection_only_drops_and_what_left_stays(compact: bool, reset: bool) -> None:
    model = net()
    opt = wrapped(model, reselect_at=10, compact=compact, reset_state_on_reselect=reset)
    first, threshold = masks(opt, model), opt.sara.threshold
    train(model, opt, range(9))
    before = masks(opt, model)
    assert all(torch.equal(before[n], first[n]) for n in first)
    train(model, opt, [9])
    now, at = masks(opt, model), copies(model)
    for name, p in model.named_parameters():
        assert torch.equal(now[name], first[name] & (p.abs() < threshold)), name
    left = sum(int((first[n] & ~now[n]).sum()) for n in now)
    assert left > 20
    assert opt.sara.density().reselected
    assert bool(opt.base.state) is not reset
    train(model, opt, range(10, 20))
    for name, p in model.named_parameters():
        assert torch.equal(p[~now[name]], at[name][~now[name]]), name
        assert not now[name].any() or not torch.equal(p[now[name]], at[name][now[name]]), name
    assert all(torch.equal(m, now[n]) for n, m in masks(opt, model).items())  # once only


def test_pytorch_optimizers_sara_gives_the_same_weights() -> None:
    from pytorch_optimizer import SaRA

    a, b = net(), net()
    opt = wrapped(a, threshold=0.05, reselect_at=10)
    peer = SaRA(b.parameters(), lr=1e-2, weight_decay=0.1, threshold=0.05, progressive_iter=10)
    train(a, opt, range(20))
    train(b, peer, range(20))
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        # Its selection after the tenth step is of weights that differ in the last bits.
        assert int((opt.sara._mask(p) != peer.state[q]["mask"]).sum()) == 0, name
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7), name


# ---- life ----------------------------------------------------------------------------------------------


def saved(opt: Any) -> Any:
    """Through a file that holds no code."""
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("at", [3, 7])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(compact: bool, at: int) -> None:
    options: dict[str, Any] = {"reselect_at": 5, "compact": compact}
    whole = net()
    opt = wrapped(whole, **options)
    train(whole, opt, range(at))
    state, weights = saved(opt), copy.deepcopy(whole.state_dict())
    train(whole, opt, range(at, 12))
    again = net(seed=3)
    again.load_state_dict(weights)
    resumed = wrapped(again, **options)  # selects from what is trained already, until the load
    resumed.load_state_dict(state)
    train(again, resumed, range(at, 12))
    assert_same(again, whole)
    assert resumed.sara.steps == 12
    assert resumed.sara.threshold == opt.sara.threshold
    assert all(torch.equal(m, masks(opt, whole)[n]) for n, m in masks(resumed, again).items())


@pytest.mark.parametrize("compact", [False, True])
def test_copies_of_model_and_optimizer_go_on_alike(compact: bool) -> None:
    model = net()
    opt = wrapped(model, compact=compact, reselect_at=6)
    train(model, opt, range(4))
    other, copied = copy.deepcopy((model, opt))
    train(model, opt, range(4, 9))
    train(other, copied, range(4, 9))
    assert_same(other, model)
    assert copied.sara.steps == opt.sara.steps == 9


@pytest.mark.parametrize("compact", [False, True])
def test_new_groups_are_selected_from_and_a_group_left_out_is_the_bases(compact: bool) -> None:
    model, alone, head = net(), nn.Linear(24, 2), nn.Linear(24, 2)
    alone.load_state_dict(head.state_dict())
    opt = wrapped(model, compact=compact)
    train(model, opt, range(2))
    extra = nn.Parameter(torch.tensor([0.0, 9.0]))
    opt.add_param_group({"params": [("extra", extra)]})
    opt.add_param_group({"params": list(head.named_parameters()), "sara": False})
    plain = optx.wrap(adamw(alone))
    for _ in range(3):
        for layer, optimizer in ((head, opt), (alone, plain)):
            optimizer.zero_grad()
            (layer(torch.ones(3, 24)).square().sum() + (extra * 3).sum()).backward()
            optimizer.step()
    assert_same(head, alone)
    assert extra[0].item() != 0.0
    assert extra[1].item() == 9.0
    opt.remove()
    assert all(s["exp_avg"].shape == p.shape for p, s in opt.base.state.items())


def test_a_rehearsal_step_of_distributed_checkpoint_counts_nothing() -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    for compact in (False, True):
        model, again = net(), net()
        opt = wrapped(model, reselect_at=4, compact=compact)
        dcp.get_optimizer_state_dict(model, opt)  # makes the state by a step with lr 0
        assert opt.state
        assert opt.sara.steps == 0
        train(model, opt, range(3))
        kept = dcp.get_optimizer_state_dict(model, opt)
        resumed = wrapped(again, reselect_at=4, compact=compact)
        again.load_state_dict(model.state_dict())
        dcp.set_optimizer_state_dict(again, resumed, copy.deepcopy(kept))
        assert resumed.sara.steps == 3
        train(model, opt, range(3, 8))
        train(again, resumed, range(3, 8))
        assert_same(again, model)


def test_closures_and_skipped_steps() -> None:
    a, b = net(), net()
    one, two = wrapped(a, reselect_at=3), wrapped(b, reselect_at=3)
    train(a, one, range(6))
    for step in range(6):

        def closure(step: int = step) -> Tensor:
            two.zero_grad()
            found = loss(b, step)
            found.backward()
            return found

        two.step(closure)
    assert_same(a, b)
    opt = optx.wrap(adamw(b), optx.SaRA(fraction=0.2), skip_nonfinite=True)
    before = copies(b)
    for p in b.parameters():
        p.grad = torch.full_like(p, torch.nan)
    opt.step()
    assert opt.skipped_steps == 1
    assert opt.sara.steps == 0
    assert all(torch.equal(p, before[n]) for n, p in b.named_parameters())


def test_loss_of_falls() -> None:
    model = make_net()
    opt = optx.wrap(torch.optim.AdamW(model.parameters(), lr=0.05), optx.SaRA(fraction=0.5))
    before = loss_of(model, 0).item()
    train_base(model, opt, [0] * 30)
    assert loss_of(model, 0).item() < 0.7 * before
