"""optx.Perp and masks: where they come from, what they must agree with, what is refused before it starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from injections import assert_same, move, snapshot
from torch import nn
from torch.nn.utils import prune

import optx
from optx import Masks, Perp


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return nn.Sequential(*layers)


def pruned(names: tuple[str, ...] = ("0.weight", "3.weight"), seed: int = 0) -> tuple[nn.Sequential, Masks]:
    model, generator = net(), torch.Generator().manual_seed(seed)
    shapes = {name: model.get_parameter(name).shape for name in names}
    masks = Masks.from_bool(
        {name: torch.rand(shape, generator=generator) > 0.5 for name, shape in shapes.items()}
    )
    masks.apply_(model)
    return model, masks


X = torch.linspace(-2, 2, 18).view(3, 6)


# ---- where masks come from ---------------------------------------------------------------------------------


def test_given_or_found_or_as_bool_tensors_they_are_the_same() -> None:
    model, masks = pruned()
    with optx.attach(model, Perp(adapter="mask", rank=2)) as handle:
        assert handle.masks == masks
    with optx.attach(model, Perp(adapter="mask", rank=2), masks=masks) as handle:
        assert handle.masks == masks
    with optx.attach(model, Perp(adapter="mask", rank=2, masks={n: masks[n] for n in masks})) as handle:
        assert handle.masks == masks
        assert str(handle.injection) == "Perp(adapter='mask', rank=2)"


def test_a_kept_weight_that_is_0_goes_on_learning() -> None:
    model, masks = pruned()
    i, j = (int(n) for n in masks["0.weight"].nonzero()[0])
    with torch.no_grad():
        model[0].weight[i, j] = 0  # type: ignore[index]
    handle = optx.attach(model, Perp(adapter="mask", rank=2), masks=masks)
    move(handle)
    handle.merge()
    assert model[0].weight[i, j] != 0  # type: ignore[index]


def test_what_is_served_by_default_and_by_targets() -> None:
    model, masks = pruned()
    served = lambda perp, *more, **options: {  # noqa: E731
        one.path: type(one.part).__name__ for one in optx.attach(model, perp, *more, **options).served
    }
    all_of_it = {"0": "UnderMask", "1": "Shift", "3": "UnderMask", "5": "BiasShift"}
    assert served(Perp(adapter="mask", rank=2), masks=masks, name="a") == all_of_it
    assert served(Perp(adapter="none"), name="b") == {**all_of_it, "0": "BiasShift", "3": "BiasShift"}
    assert served(Perp(adapter="mask", rank=2, bias=False, norm=False), name="c") == dict.fromkeys(
        "03", "UnderMask"
    )
    assert served(Perp(bias=False), name="d") == {"1": "Shift"}
    assert served(Perp(adapter="lora", rank=2), "0|1", masks=masks, name="e") == {
        "0": "MaskedLinearLoRA",
        "1": "Shift",
    }


def test_a_mask_that_keeps_all_is_one_like_others() -> None:
    model, masks = pruned()
    whole = Masks.from_bool({"0.weight": masks["0.weight"], "5.weight": torch.ones(4, 8).bool()})
    handle = optx.attach(model, Perp(adapter="mask", rank=2), masks=whole)
    assert [one.path for one in handle.served] == ["0", "1", "3", "5"]
    move(handle)
    y = model(X)
    handle.merge()
    torch.testing.assert_close(model(X), y)
    assert (model[5].weight == 0).sum() == 0  # type: ignore[operator]


def test_masked_weights_without_an_adapter_are_told() -> None:
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8))
    masks = Masks.from_bool({f"{name}": p.detach() > 0 for name, p in model.named_parameters() if p.ndim > 1})
    masks.apply_(model)
    with pytest.warns(UserWarning, match=r"no adapter for 1 of the masked weights.*'0\.weight'"):
        optx.attach(model, Perp(adapter="mask", rank=2), masks=masks)


# ---- refused before anything is changed --------------------------------------------------------------------

_OTHER = Masks.from_bool({"7.weight": torch.ones(2, 2).bool()})
_SHAPE = Masks.from_bool({"0.weight": torch.ones(8, 5).bool()})
_BIAS = Masks.from_bool({"0.weight": torch.ones(8, 6).bool(), "5.bias": torch.ones(4).bool()})
_LAST = Masks.from_bool({"5.weight": torch.ones(4, 8).bool()})
_FLIPPED = pruned(seed=1)[1]


@pytest.mark.parametrize(
    ("options", "attached", "says"),
    [
        ({"adapter": "mask"}, {"masks": _OTHER}, r"'7\.weight'"),
        ({"adapter": "none"}, {"masks": _OTHER}, r"'7\.weight'"),
        ({"adapter": "mask"}, {"masks": _SHAPE}, r"'0\.weight'.*\(8, 5\).*\(8, 6\)|\(8, 6\).*\(8, 5\)"),
        ({"adapter": "none"}, {"masks": _SHAPE}, r"the mask of '0\.weight' has shape \(8, 5\)"),
        ({"adapter": "mask"}, {"masks": _BIAS}, r"masks have '5\.bias', a bias or norm"),
        (
            {"adapter": "mask"},
            {"masks": _FLIPPED},
            r"0\.weight has \d+ numbers that are not 0.*masks\.apply_",
        ),
        ({"adapter": "lora"}, {"masks": _FLIPPED}, r"0\.weight has \d+ numbers that are not 0"),
        ({"adapter": "mask", "rank": 7}, {}, r"rank=7 is larger than the weight of '0', \(8, 6\)"),
        ({"adapter": "mask"}, {"masks": _LAST, "targets": "0|3"}, r"masks have none of the targets"),
        ({"adapter": "mask"}, {"targets": "2"}, r"adapter='mask'.*none of the targets"),
        ({"adapter": "none"}, {"targets": "2"}, r"'2', a ReLU, is not one"),
        ({"adapter": "none", "bias": False}, {"targets": "0"}, r"'0', a Linear, is not one"),
        ({"head": True}, {}, r"head=True, and this Sequential says of no module.*head='lm_head'"),
        ({"head": "9"}, {}, r"head='9' is no module"),
        ({"head": "5"}, {"targets": "1|5"}, r"head '5' is a target too"),
        ({"head": "5"}, {"masks": _LAST}, r"head '5' is pruned"),
        ({"adapter": "mask", "masks": _FLIPPED}, {"masks": _FLIPPED}, r"masks are given twice"),
    ],
)
def test_what_does_not_fit_changes_nothing(options: Any, attached: Any, says: str) -> None:
    model, _ = pruned()
    before = snapshot(model)
    with pytest.raises(optx.OptxError, match=says):
        optx.attach(model, Perp(**{"rank": 2, **options}), **attached)
    assert_same(model, before)


def test_what_could_not_be_merged_is_told_before_it_is_trained() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3, groups=2))
    masks = optx.prune(model, optx.Magnitude(0.5), targets=["0"], progress=False)
    before = snapshot(model)
    with pytest.raises(optx.TargetError, match=r"'0' is a convolution with groups=2.*adapter='mask'"):
        optx.attach(model, Perp(adapter="lora_prune", rank=2), masks=masks)
    assert_same(model, before)
    optx.attach(model, Perp(adapter="mask", rank=2), masks=masks).merge_and_unload()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"alpha": -1}, "alpha is -1"),
        ({"adapter": "masked"}, "adapter is 'masked'"),
        ({"adapter": "mask", "dropout": 0.1}, "dropout=0.1 is of plain LoRA"),
        ({"adapter": "lora", "dropout": 1.5}, "dropout is 1.5"),
        ({"bias": 1}, "bias is 1"),
        ({"head": ""}, "head is ''"),
        ({"bias": False, "norm": False}, "no trainable parameter"),
        ({"masks": [1]}, "masks is a list"),
        ({"masks": {"0.weight": torch.ones(2)}}, r"'0\.weight'.*bool"),
    ],
)
def test_options_out_of_range(options: Any, says: str) -> None:
    with pytest.raises(optx.OptxError, match=says):
        Perp(**options)


def test_nothing_to_train_and_nothing_pruned() -> None:
    bare = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(
        optx.TargetError, match=r"no trainable parameter in this Sequential: it has no bias and no norm"
    ):
        optx.attach(bare, Perp())
    with pytest.raises(optx.TargetError, match=r"for pruned weights, and no masks are given.*optx\.prune"):
        optx.attach(net(), Perp(adapter="scale", rank=2))
    with pytest.raises(optx.OptxError, match=r"masks= is for optx\.Perp; LoRA has no use"):
        optx.attach(net(), optx.LoRA(rank=2), "0", masks=_LAST)
    with pytest.raises(optx.OptxError, match="has no adapter, so it holds no masks"):
        _ = optx.attach(net(), Perp()).masks


def test_weights_that_are_made_at_every_call() -> None:
    model = net()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(optx.TargetError, match=r"'0' is made by L1Unstructured at every call.*prune\.remove"):
        optx.attach(model, Perp(adapter="mask", rank=2))
    prune.remove(model[0], "weight")
    handle = optx.attach(model, Perp(adapter="mask", rank=2))
    assert handle.masks.sparsity == 0.5


# ---- later ------------------------------------------------------------------------------------------------


def test_plain_lora_merges_only_when_asked() -> None:
    model, masks = pruned()
    before = snapshot(model)
    handle = optx.attach(model, Perp(adapter="lora", rank=2), masks=masks)
    move(handle)
    y = model(X)
    for merge in (handle.merge, handle.merge_and_unload):
        with pytest.raises(optx.MergeError, match=r"plain LoRA at '0' would fill in the zeros.*dense=True"):
            merge()
    assert not handle.merged
    handle.merge(dense=True)
    torch.testing.assert_close(model(X), y)
    handle.remove()
    assert_same(model, before)
    handle = optx.attach(model, Perp(adapter="lora", rank=2), masks=masks)
    move(handle)
    handle.merge_and_unload(dense=True)
    with pytest.raises(optx.OptxError, match="masked weights are not 0"):
        masks.verify(model)


@pytest.mark.parametrize("adapter", ["mask", "scale", "lora_prune"])
def test_a_base_that_has_become_dense_is_not_merged_into(adapter: Any) -> None:
    model, masks = pruned()
    handle = optx.attach(model, Perp(adapter=adapter, rank=2), masks=masks)
    move(handle)
    model.load_state_dict(net().state_dict())  # a checkpoint from before it was pruned
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(optx.MergeError, match=r"merge: 0\.weight has \d+ numbers that are not 0"):
        handle.merge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    masks.apply_(model)
    handle.merge()
    masks.verify(model)


def test_files_have_the_masks_and_want_the_same_model(tmp_path: Path) -> None:
    model, masks = pruned()
    handle = optx.attach(model, Perp(adapter="mask", rank=2, head="5"), masks=masks)
    move(handle)
    y = model(X)
    handle.save(tmp_path / "perp")
    other, other_masks = pruned(seed=1)
    before = snapshot(other)
    with pytest.raises(optx.TargetError, match=r"0\.weight has \d+ numbers that are not 0"):
        optx.attach(other, tmp_path / "perp")
    with pytest.raises(optx.OptxError, match="leave masks out"):
        optx.attach(other, tmp_path / "perp", masks=masks)
    assert_same(other, before)
    there = optx.attach(other, Perp(adapter="mask", rank=2, head="5"), masks=other_masks)
    state = {key: t.clone() for key, t in there.state_dict().items()}
    for load, given in ((there.load, tmp_path / "perp"), (there.load_state_dict, handle.state_dict())):
        with pytest.raises(optx.FileError, match=r"0\.perp\.mask' is not the mask that the weight has here"):
            load(given)  # type: ignore[operator]
    assert all(torch.equal(t, state[key]) for key, t in there.state_dict().items())
    with torch.no_grad():  # what is kept and 0 by now is no matter
        kept = model[0].weight.abs().argmax()  # type: ignore[operator]
        model[0].weight.view(-1)[kept] = 0  # type: ignore[operator]
    again, _ = pruned()
    with torch.no_grad():
        again[0].weight.view(-1)[kept] = 0  # type: ignore[operator]
    read = optx.attach(again, tmp_path / "perp")
    assert isinstance(read, optx.PerpHandle)
    assert read.masks == masks
    assert torch.equal(again(X), model(X))
    assert not torch.equal(again(X), y)
    smaller = nn.Sequential(nn.Linear(6, 7), *net()[1:])
    with pytest.raises(optx.FileError, match=re.escape("masks of the file are of another model")):
        optx.attach(smaller, tmp_path / "perp")
