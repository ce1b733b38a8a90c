"""Where AdamR's anchors come from, where they are kept, and what a resumed run does with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import Net, make_net, same, through_a_file, train
from fused_cases import BF16
from safetensors.torch import save_file
from torch import Tensor, nn

import optx

both = pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
WEIGHT = 0.05


def adam(net: nn.Module, names: bool = True) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.named_parameters() if names else net.parameters(), lr=0.01, weight_decay=0.0)


def anchors(opt: optx.Wrapped) -> list[Tensor]:
    params = [p for group in opt.param_groups for p in group["params"]]
    return [opt.slot(p, opt.adamr, "anchor") for p in params]


def file_of(net: nn.Module, folder: Path) -> Path:
    save_file(net.state_dict(), folder / "base.safetensors")
    return folder / "base.safetensors"


SOURCES: dict[str, Any] = {
    "model": lambda net, folder: net,
    "state dict": lambda net, folder: net.state_dict(),
    "safetensors": file_of,
    "safetensors as text": lambda net, folder: str(file_of(net, folder)),
}


@both
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("named", [True, False], ids=["named", "model="])
def test_every_source_gives_the_same_run(fused: bool, kind: str, named: bool, tmp_path: Path) -> None:
    base, net, plain = make_net(1), make_net(2), make_net(2)
    source = SOURCES[kind](base, tmp_path)
    transform = optx.AdamR(WEIGHT, anchor=source, model=None if named else net)
    opt = optx.wrap(adam(net, named), transform, fused=fused)
    assert all(torch.equal(a, p) for a, p in zip(anchors(opt), base.parameters(), strict=True))
    table = optx.AdamR(WEIGHT, anchor={n: p.detach().clone() for n, p in base.named_parameters()})
    train(net, opt, range(3))
    train(plain, optx.wrap(adam(plain), table, fused=fused), range(3))
    assert same(net, plain)
    assert all(torch.equal(a, p) for a, p in zip(anchors(opt), base.parameters(), strict=True))


def test_none_takes_the_weights_at_wrap_time() -> None:
    net = make_net()
    start = copy.deepcopy(net)
    opt = optx.wrap(adam(net, names=False), optx.AdamR(WEIGHT))
    train(net, opt, range(3))
    assert not same(net, start)
    assert all(torch.equal(a, p) for a, p in zip(anchors(opt), start.parameters(), strict=True))


def mapping_of(t: Tensor) -> str:
    """The line of /proc/self/maps that a tensor's memory lies in."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(x, 16) for x in line.split()[0].split("-"))
        if low <= t.data_ptr() < high:
            return line
    return ""


@both
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_anchors_stay_in_the_file(fused: bool, tmp_path: Path) -> None:
    """Memory-mapped: no copy is made, neither at wrap time nor by steps."""
    base, net = make_net(1), make_net(2)
    opt = optx.wrap(adam(net), optx.AdamR(WEIGHT, anchor=file_of(base, tmp_path)), fused=fused)
    for _ in range(2):
        assert all("base.safetensors" in mapping_of(a) for a in anchors(opt))
        train(net, opt, range(2))
    assert not any("base.safetensors" in mapping_of(p) for p in net.parameters())


@both
def test_float32_anchors_of_bfloat16_weights_stay_float32(fused: bool) -> None:
    base, net = make_net(1), make_net(2, BF16)
    opt = optx.wrap(adam(net), optx.AdamR(WEIGHT, anchor=base), fused=fused)
    train(net, opt, range(2))
    assert {a.dtype for a in anchors(opt)} == {torch.float32}
    again = optx.wrap(adam(make_net(3, BF16)), optx.AdamR(WEIGHT), fused=fused)
    again.load_state_dict(through_a_file(opt.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(anchors(again), anchors(opt), strict=True))


@both
@pytest.mark.parametrize("rounds", [0, 3], ids=["before the first step", "later"])
def test_a_resumed_run_keeps_the_first_anchors(fused: bool, rounds: int) -> None:
    """Also where a fresh wrap took other weights, or the resumed ones, for anchors before the load."""
    whole, net = make_net(), make_net()
    first = [p.detach().clone() for p in net.parameters()]
    straight = optx.wrap(adam(whole), optx.AdamR(WEIGHT), fused=fused)
    train(whole, straight, range(rounds + 3))
    opt = optx.wrap(adam(net), optx.AdamR(WEIGHT), fused=fused)
    train(net, opt, range(rounds))
    for order in ("weights, wrap, state", "wrap, weights, state"):
        checkpoint = through_a_file({"net": net.state_dict(), "opt": opt.state_dict()})
        resumed = make_net(9)
        if order.startswith("weights"):
            resumed.load_state_dict(checkpoint["net"])
        again = optx.wrap(adam(resumed), optx.AdamR(WEIGHT), fused=fused)
        resumed.load_state_dict(checkpoint["net"])
        again.load_state_dict(checkpoint["opt"])
        assert all(torch.equal(a, b) for a, b in zip(anchors(again), first, strict=True))
        train(resumed, again, range(rounds, rounds + 3))
        assert same(resumed, whole)


@both
def test_anchors_that_are_not_saved_are_found_again(fused: bool, tmp_path: Path) -> None:
    """save_anchor=False: a smaller checkpoint, and the same run."""
    path = file_of(make_net(1), tmp_path)

    def wrap(net: nn.Module) -> optx.Wrapped:
        return optx.wrap(adam(net), optx.AdamR(WEIGHT, anchor=path, save_anchor=False), fused=fused)

    whole, net, resumed = make_net(), make_net(), make_net(5)
    train(whole, wrap(whole), range(5))
    opt = wrap(net)
    train(net, opt, range(2))
    state = through_a_file(opt.state_dict())
    assert not [k for entry in state["state"].values() for k in entry if "anchor" in k]
    assert "optx.adamr.anchor" in next(iter(opt.state.values()))  # saving has not taken it away
    again = wrap(resumed)
    resumed.load_state_dict(net.state_dict())
    again.load_state_dict(state)
    train(resumed, again, range(2, 5))
    assert same(resumed, whole)


def test_not_saving_needs_a_source() -> None:
    with pytest.raises(optx.OptxError, match="save_anchor=False needs an anchor that can be found again"):
        optx.AdamR(save_anchor=False)


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = make_net()
        self.head = nn.Linear(3, 2)


@both
def test_groups_added_later(fused: bool) -> None:
    """Anchored at what they are when added, or by name, or left out."""
    net = _Head()
    opt = optx.wrap(adam(net.body), optx.AdamR(WEIGHT), fused=fused)
    train(net.body, opt, range(2))
    with torch.no_grad():
        net.head.weight.fill_(3.0)
    opt.add_param_group({"params": list(net.head.named_parameters())})
    assert torch.equal(opt.slot(net.head.weight, opt.adamr, "anchor"), torch.full((2, 3), 3.0))
    net.head.weight.grad = torch.ones(2, 3)
    opt.step()
    assert float(net.head.weight.detach().max()) < 3.0
    assert torch.equal(opt.slot(net.head.weight, opt.adamr, "anchor"), torch.full((2, 3), 3.0))
    by_name = optx.wrap(adam(net.body), optx.AdamR(WEIGHT, anchor=make_net(1).state_dict()), fused=fused)
    with pytest.raises(optx.TransformError, match=r"no anchor for 'weight'.*'first.weight'"):
        by_name.add_param_group({"params": [("weight", net.head.weight)]})
    assert len(by_name.param_groups) == 1
    by_name.add_param_group({"params": [("weight", net.head.weight)], "adamr": False})
    before = net.head.weight.detach().clone()
    net.head.weight.grad = torch.zeros(2, 3)
    by_name.step()
    assert torch.equal(net.head.weight, before)


def test_a_missing_anchor_is_named_with_near_ones() -> None:
    table = {("second.wieght" if n == "second.weight" else n): p for n, p in make_net(1).state_dict().items()}
    with pytest.raises(optx.TransformError, match=r"no anchor for 'second.weight'. Near: 'second.wieght'"):
        optx.wrap(adam(make_net()), optx.AdamR(anchor=table))


def test_an_anchor_of_another_shape_is_named_with_both() -> None:
    table = {**make_net(1).state_dict(), "first.weight": torch.zeros(6, 8)}
    wanted = r"'first.weight' has shape \(6, 8\), the weight has \(8, 6\)"
    with pytest.raises(optx.ShapeError, match=wanted):
        optx.wrap(adam(make_net()), optx.AdamR(anchor=table))


@pytest.mark.parametrize("order", ["same", "other"])
def test_without_names_nothing_pairs_up_but_the_model_itself(order: str) -> None:
    """Two models' parameters in order: with equal shapes a wrong pair would be pulled together in silence."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    groups = [{"params": part.parameters()} for part in (net if order == "same" else reversed(net))]
    base = torch.optim.SGD(groups, lr=0.1)
    for source in (copy.deepcopy(net), copy.deepcopy(net).state_dict(), nn.Linear(2, 2)):
        with pytest.raises(
            optx.TransformError, match=r"does not know its parameters' names .* or pass model="
        ):
            optx.wrap(base, optx.AdamR(1.0, normalize=False, anchor=source))
    opt = optx.wrap(base, optx.AdamR(1.0, normalize=False, anchor=net), fused=False)
    before = copy.deepcopy(net)
    for p in net.parameters():
        assert torch.equal(opt.slot(p, opt.adamr, "anchor"), p)
        p.grad = torch.zeros_like(p)
    opt.step()
    assert same(net, before)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", Path(__file__)):
        with pytest.raises(optx.TransformError, match=f"cannot read anchor='{path}' as a safetensors"):
            optx.wrap(adam(make_net()), optx.AdamR(anchor=path))


def test_the_anchors_model_is_never_changed() -> None:
    base, net = make_net(1), Net()
    before = copy.deepcopy(base.state_dict())
    opt = optx.wrap(adam(net), optx.AdamR(WEIGHT, anchor=base))
    train(net, opt, range(3))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), base.state_dict().values(), strict=True))
