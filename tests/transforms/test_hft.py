"""HFT: what stays bit-identical, what a round costs, and what is refused."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from hft_models import Residual, assert_equal, encoder, fresh, weights
from hft_runs import BASES, X, Y, train, with_state
from torch import nn

import optx
from optx import OptxError, TransformError
from optx.transforms.hft import HFT


def test_what_the_person_froze_stays_frozen_and_is_not_drawn() -> None:
    model = Residual(6)
    for name, p in model.named_parameters():
        p.requires_grad_(
            not name.startswith("blocks.0.") and name != "blocks.1.0.weight" and name != "head.bias"
        )
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    opt = optx.wrap(torch.optim.AdamW(model.parameters()), HFT(model))
    for _ in range(6):
        rows = {row.name: row for row in opt.hft.next_round()}
        for name, p in model.named_parameters():
            assert p.requires_grad <= flags[name]
            assert p.requires_grad == rows[name].trainable
            assert not rows[name].drawn or flags[name]
        per_block = Counter(
            r.block for r in rows.values() if r.drawn and r.trainable and r.name.endswith("weight")
        )
        assert "blocks.0" not in per_block
        assert all(per_block[f"blocks.{b}"] == 1 for b in range(2, 6))
    assert "never" in str(opt.hft.selected())
    opt.remove()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_a_group_that_opts_out_is_trained_as_if_hft_were_not_there() -> None:
    model = Residual()
    out = list(model.blocks[2].parameters())
    rest = [p for p in model.parameters() if all(p is not q for q in out)]
    opt = optx.wrap(
        torch.optim.AdamW([{"params": rest}, {"params": out, "hft": False}]), HFT(model, ratio=0.0)
    )
    assert all(p.requires_grad for p in out)
    train(model, opt, 2)
    before = [opt.state[p]["exp_avg"] for p in out]
    opt.hft.next_round()
    assert all(p.requires_grad and opt.state[p]["exp_avg"] is old for p, old in zip(out, before, strict=True))


# ---- training ------------------------------------------------------------------------------------------

PATHS = [("AdamW", "auto"), ("SGD", "auto"), *((name, False) for name in BASES)]


@pytest.mark.parametrize(("base", "fused"), PATHS)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_is_bit_identical_and_the_rest_as_without_it(
    base: str, fused: Any, warm: bool, dtype: torch.dtype
) -> None:
    """Property 2, also with momentum from before HFT came."""
    model = fresh(dtype)
    optimizer = BASES[base](model.parameters())
    if warm:
        train(model, optimizer, 3)
    plain = copy.deepcopy((model, optimizer))
    start = weights(model)
    opt = optx.wrap(optimizer, HFT(model, seed=3), fused=fused, rounding="nearest")
    chosen = set(opt.hft.selected().trainable)
    assert 0 < len(chosen) < len(start)

    other, loose = plain
    for name, p in other.named_parameters():
        p.requires_grad_(name in chosen)
    kept = [p for p in other.parameters() if p.requires_grad]
    # The fused kernels round bfloat16 moments stochastically, by the parameter's place in its group.
    alone = BASES[base](other.parameters() if dtype == torch.bfloat16 else kept)
    alone.state.update({p: state for p, state in loose.state.items() if p.requires_grad})
    train(model, opt, 5)
    train(other, optx.wrap(alone, fused=fused, rounding="nearest"), 5)
    assert_equal(weights(model), weights(other))
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name]) == (name not in chosen)
    assert with_state(opt) == len(chosen)


@pytest.mark.parametrize(("base", "fused"), PATHS)
def test_rounds_keep_what_is_frozen_and_only_that(base: str, fused: Any) -> None:
    """Property 2 over several rounds: momentum of an earlier round moves nothing, though it is kept."""
    model = fresh()
    opt = optx.wrap(BASES[base](model.parameters()), HFT(model, reset_state=False), fused=fused)
    seen: set[str] = set()
    for number in range(6):
        selection = opt.hft.selected()
        assert selection.round == opt.hft.round == number
        start = weights(model)
        train(model, opt, 3)
        for name, p in model.named_parameters():
            assert p.requires_grad == (name in selection.trainable)
            assert torch.equal(p, start[name]) == (name in selection.frozen)
        seen.update(selection.trainable)
        assert with_state(opt) == len(opt.state) == len(seen)
        opt.hft.next_round()
    assert len(seen) == len(start)


@pytest.mark.parametrize("fused", ["auto", False])
def test_a_new_round_starts_a_new_run(fused: Any) -> None:
    """reset_state=True is the paper's setting: each stage has an optimizer of its own."""
    model = fresh()
    opt = optx.wrap(BASES["AdamW"](model.parameters()), HFT(model), fused=fused)
    train(model, opt, 3)
    chosen = opt.hft.next_round().trainable
    assert len(opt.state) == 0
    other = copy.deepcopy(model)
    alone = optx.wrap(BASES["AdamW"]([p for p in other.parameters() if p.requires_grad]), fused=fused)
    train(model, opt, 3)
    train(other, alone, 3)
    assert_equal(weights(model), weights(other))
    assert with_state(opt) == len(chosen)


def test_reset_state_false_keeps_all_moments() -> None:
    model = fresh()
    opt = optx.wrap(BASES["AdamW"](model.parameters()), HFT(model, reset_state=False))
    train(model, opt, 3)
    first = set(opt.hft.selected().trainable)
    both = first.intersection(opt.hft.next_round().trainable)
    params = dict(model.named_parameters())
    assert both
    assert {name for name, p in params.items() if p in opt.state} == first
    train(model, opt, 1)
    steps = {name: float(opt.state[p]["step"]) for name, p in params.items() if p in opt.state}
    second = dict.fromkeys(opt.hft.selected().trainable, 1.0)
    assert steps == {**second, **dict.fromkeys(first, 3.0), **dict.fromkeys(both, 4.0)}


def test_ratio_one_is_the_base_and_ratio_zero_trains_what_is_outside() -> None:
    """Property 3."""
    plain, one, zero = fresh(), fresh(), fresh()
    train(plain, BASES["AdamW"](plain.parameters()), 5)
    train(one, optx.wrap(BASES["AdamW"](one.parameters()), HFT(one, ratio=1), fused=False), 5)
    assert_equal(weights(plain), weights(one))
    start = weights(zero)
    train(zero, optx.wrap(BASES["AdamW"](zero.parameters()), HFT(zero, ratio=0)), 5)
    moved = {name for name, w in weights(zero).items() if not torch.equal(w, start[name])}
    assert moved == {"enter.weight", "enter.bias", "head.weight", "head.bias"}


def test_frozen_halves_take_no_gradient_and_no_state() -> None:
    """The memory claim, in bytes: an encoder of 8 blocks, nearly all of it in the blocks."""
    model = encoder(8, 32)
    opt = optx.wrap(torch.optim.AdamW(model.parameters()), HFT(model))
    for _ in range(3):
        model(torch.randn(2, 3, 32)).square().mean().backward()
        selection = opt.hft.selected()
        with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
        assert with_grad == set(selection.trainable)
        opt.step()
        state = sum(t.nbytes for s in opt.state.values() for key, t in s.items() if key != "step")
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        assert state == 2 * trained
        assert trained < 0.62 * sum(p.nbytes for p in model.parameters())
        opt.hft.next_round()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_parameters_outside_of_the_optimizer_are_frozen_too() -> None:
    model = fresh()
    opt = optx.wrap(torch.optim.AdamW(model.head.parameters()), HFT(model))
    train(model, opt, 1)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(opt.hft.selected().frozen)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("fused", ["auto", False])
def test_gradients_set_by_hand_do_not_move_a_frozen_weight(fused: Any) -> None:
    """GEM projects and writes all gradients; and a backward may run through a graph of the last round."""
    model = fresh()
    opt = optx.wrap(BASES["SGD"](model.parameters()), HFT(model), fused=fused)
    start = weights(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    moved = {name for name, w in weights(model).items() if not torch.equal(w, start[name])}
    assert moved == set(opt.hft.selected().trainable)
    opt.zero_grad()
    loss = nn.functional.cross_entropy(model(X), Y)
    opt.hft.next_round()
    start = weights(model)
    loss.backward()
    opt.step()
    for name in opt.hft.selected().frozen:
        assert torch.equal(model.get_parameter(name), start[name])


def test_a_round_begun_between_backward_and_step() -> None:
    model = fresh()
    opt = optx.wrap(BASES["AdamW"](model.parameters()), HFT(model))
    first = set(opt.hft.selected().trainable)
    nn.functional.cross_entropy(model(X), Y).backward()
    both = first.intersection(opt.hft.next_round().trainable)
    start = weights(model)
    opt.step()
    assert {name for name, w in weights(model).items() if not torch.equal(w, start[name])} == both


# ---- rounds by steps -------------------------------------------------------------------------------------


def test_rounds_every() -> None:
    model = fresh()
    opt = optx.wrap(BASES["AdamW"](model.parameters()), HFT(model, rounds_every=3))
    rounds: list[int] = []
    for _ in range(8):
        rounds.append(opt.hft.round)
        train(model, opt, 1)
    assert rounds == [0, 0, 0, 1, 1, 1, 2, 2]
    assert opt.param_groups[0]["optx.hft.round"] == 2
    assert opt.param_groups[0]["optx.hft.steps"] == 2


def test_a_rehearsal_is_no_step_but_a_warmup_step_is() -> None:
    """torch.distributed.checkpoint makes state by a step with zero gradients and lr 0."""
    model = fresh()
    opt = optx.wrap(BASES["AdamW"](model.parameters()), HFT(model, rounds_every=2))
    start = weights(model)
    for group in opt.param_groups:
        group["lr"] = 0.0
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        opt.step()
        opt.zero_grad()
    assert opt.hft.round == 0
    assert_equal(weights(model), start)
    train(model, opt, 2)
    assert opt.hft.round == 1


def test_start_round_and_the_same_half_again() -> None:
    model = fresh()
    opt = optx.wrap(BASES["AdamW"](model.parameters()), HFT(model))
    zero, three = opt.hft.selected(), opt.hft.start_round(3)
    assert three.round == opt.hft.round == 3
    assert three.trainable != zero.trainable
    assert opt.hft.start_round(0).trainable == zero.trainable


# ---- with other transforms -------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", ["auto", False])
def test_with_adamr_only_the_bases_state_is_dropped(fused: Any) -> None:
    """Anchors survive rounds; what AdamR keeps about the dropped moments goes with them."""
    model, pretrained = fresh(), fresh()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    opt = optx.wrap(adam, HFT(model), optx.AdamR(weight=0.5, anchor=pretrained, model=model), fused=fused)
    train(model, opt, 3)
    for _ in range(3):
        opt.hft.next_round()
        assert with_state(opt) == 0
        other = copy.deepcopy(model)
        kept = [p for p in other.parameters() if p.requires_grad]
        alone = torch.optim.AdamW(kept, lr=1e-2, weight_decay=0.0)
        again = optx.wrap(alone, optx.AdamR(weight=0.5, anchor=pretrained, model=other), fused=fused)
        train(model, opt, 3)
        train(other, again, 3)
        assert_equal(weights(model), weights(other))
        assert with_state(opt) == len(opt.hft.selected().trainable)


# ---- messages --------------------------------------------------------------------------------------------


def test_parameters_of_another_model() -> None:
    model, other = fresh(), fresh()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(
        TransformError,
        match=r"HFT: param_groups\[0\]\['params'\]\[0\] of the optimizer, of shape \(8, 4\), is not a "
        r"parameter of the model \(20 in all\)\. Give HFT the model that the optimizer trains\.",
    ):
        optx.wrap(torch.optim.AdamW(other.parameters()), HFT(model))
    assert flags == [p.requires_grad for p in model.parameters()]
    opt = optx.wrap(torch.optim.AdamW(model.parameters()), HFT(model))
    with pytest.raises(TransformError, match="is not a parameter of the model"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(opt.param_groups) == 1


def test_nothing_left_to_train() -> None:
    model = fresh()
    with pytest.raises(
        TransformError, match=r"HFT: with ratio=0 the optimizer has nothing to train: .*Raise ratio"
    ):
        optx.wrap(torch.optim.AdamW(model.blocks.parameters()), HFT(model, ratio=0))
    assert all(p.requires_grad for p in model.parameters())


def test_one_hft_serves_one_optimizer() -> None:
    model = fresh()
    hft = HFT(model)
    with pytest.raises(TransformError, match=r"HFT: next_round|HFT: start_round\(\) needs an optimizer"):
        hft.next_round()
    with pytest.raises(TransformError, match=r"HFT: selected\(\) needs an optimizer"):
        hft.selected()
    opt = optx.wrap(torch.optim.AdamW(model.parameters()), hft)
    with pytest.raises(TransformError, match=r"wrap: this HFT\(.*\) serves another optimizer already"):
        optx.wrap(torch.optim.AdamW(model.parameters()), hft)
    with pytest.raises(OptxError, match=r"HFT: round is -1; it must be at least 0"):
        hft.start_round(-1)
    assert opt.remove() is opt.base
    assert all(p.requires_grad for p in model.parameters())
    again = optx.wrap(torch.optim.AdamW(model.parameters()), hft)  # free again
    assert again.hft.selected().round == 0


def test_add_param_group_of_a_layer_that_comes_later() -> None:
    model = fresh()
    opt = optx.wrap(torch.optim.AdamW(model.blocks.parameters()), HFT(model))
    opt.add_param_group({"params": list(model.head.parameters())})
    opt.hft.next_round()
    train(model, opt, 2)
    assert opt.param_groups[1]["optx.hft.round"] == 1
    assert all(p in opt.state for p in model.head.parameters())


@pytest.mark.usefixtures("group_of_one")
def test_data_parallel_that_would_wait() -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = fresh()
    waits = DistributedDataParallel(model)
    with pytest.raises(TransformError, match="Make it with find_unused_parameters=True"):
        optx.wrap(torch.optim.AdamW(waits.parameters()), HFT(waits))
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    opt = optx.wrap(torch.optim.AdamW(parallel.parameters()), HFT(parallel, rounds_every=2))
    alone = fresh()
    plain = optx.wrap(torch.optim.AdamW(alone.parameters()), HFT(alone, rounds_every=2))
    inner = fresh()
    outer = DistributedDataParallel(inner, find_unused_parameters=True)
    within = optx.wrap(torch.optim.AdamW(outer.parameters()), HFT(inner, rounds_every=2))
    train(parallel, opt, 5)
    train(alone, plain, 5)
    train(outer, within, 5)
    assert_equal(weights(model), weights(alone))
    assert_equal(weights(inner), weights(alone))
