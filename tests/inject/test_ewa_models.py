"""EWA on models as they are: what an FFN is made of, what it is called with, and what is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from family_models import BY_LABEL
from ffn_models import FFN, patches, vit
from injections import no_dropout
from test_ewa import attached, holder, scattered
from torch import Tensor, nn

import optx

PLACES = {
    "BERT": {"bert.encoder.layer.1.intermediate", "bert.encoder.layer.1.output.dense"},
    "Bloom": {"transformer.h.1.mlp"},
    "BART": {f"model.{side}coder.layers.1.fc{i}" for side in ("en", "de") for i in (1, 2)},
    "ViT": {"vit.layers.1.mlp"},
    "T5": {"encoder.block.1.layer.1.DenseReluDense", "decoder.block.1.layer.2.DenseReluDense"},
}


def still(model: nn.Module) -> None:
    """No random numbers but EWA's in training."""
    model.train()
    no_dropout(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@pytest.mark.parametrize("label", PLACES)
def test_every_second_ffn_of_a_family(label: str) -> None:
    family = BY_LABEL[label]
    model = family.make()
    with torch.no_grad():
        want = family.run(model)
        handle = optx.attach(model, optx.EWA())
        assert {one.path for one in handle.served} == PLACES[label]
        assert torch.equal(family.run(model), want)
        still(model)
        with handle.disable():
            want = family.run(model)
        torch.testing.assert_close(family.run(model), want, atol=2e-6, rtol=2e-5)
    loss = family.run(model).float().square().sum()
    names = [name for name, _ in handle.named_parameters()]
    reached = dict.fromkeys((name.split(".experts.")[-1][2:] for name in names), False)
    for name, g in zip(names, torch.autograd.grad(loss, handle.parameters()), strict=True):
        name = name.split(".experts.")[-1][2:]
        reached[name] |= bool(g.any())  # by some expert: the head of a ViT looks at one token
    assert all(reached.values())


class Fused(nn.Module):
    """Returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = FFN()

    def forward(self, x: Tensor) -> Any:
        return self.ffn(x), None


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(-2, keepdim=True))


class Conditioned(FFN):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + shift


def test_pieces_of_one_ffn_deal_out_tokens_alike() -> None:
    model = nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(0), nn.Linear(5, 2))})
    handle = attached(model, "ffn", experts=2)
    assert [one.path for one in handle.served] == ["ffn.0", "ffn.3"]
    first, last = (one.part.experts for one in handle.served)  # type: ignore[attr-defined]
    with torch.no_grad():
        for i in range(2):
            first[i].bias.fill_(i)
            first[i].weight.zero_()
            last[i].bias.fill_(10 * i)
            last[i].weight.fill_(0.2)
    y = model["ffn"](torch.randn(7, 3))
    assert {round(float(v), 4) for v in y.detach().flatten()} == {
        0.0,
        11.0,
    }  # 0.2 · 5 · 1 + 10, never 1 or 10


def test_dropout_in_an_ffn_is_drawn_for_each_expert() -> None:
    block = holder(FFN())
    block["ffn"].fc2 = nn.Sequential(nn.Dropout(0.5), block["ffn"].fc2)  # type: ignore[union-attr]
    attached(block, "ffn", experts=2)
    x = torch.ones(1, 8, 6)
    torch.manual_seed(0)
    y = block["ffn"](x)
    torch.manual_seed(0)
    assert torch.equal(block["ffn"](x), y)
    assert len(y[0].unique(dim=0)) > 2
    still = block.eval()["ffn"](x)[0]
    torch.testing.assert_close(still, still[:1].expand_as(still))


@pytest.mark.parametrize(
    ("module", "args", "words"),
    [
        (Mixing, lambda: (torch.randn(2, 4, 6),), "'ffn' makes of a token depends on the other tokens"),
        (Fused, lambda: (torch.randn(2, 4, 6),), "'ffn' returns a tuple and no tensor"),
        (Conditioned, lambda: (torch.randn(2, 4, 6), torch.ones(6)), r"shapes \(2, 4, 6\) and \(6,\)"),
        (FFN, lambda: ([torch.randn(2, 4, 6)],), "without a tensor"),
    ],
)
def test_what_no_expert_can_be_called_with(module: Any, args: Any, words: str) -> None:
    model = holder(module())
    attached(model, "ffn")
    with pytest.raises((optx.OptxError, TypeError), match=words):
        model["ffn"](*args())


def test_more_tensors_of_tokens_are_dealt_out_too() -> None:
    torch.manual_seed(0)
    model = holder(Conditioned())
    attached(model, "ffn", experts=3)
    x, shift = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    torch.testing.assert_close(model["ffn"](x, shift=shift), copy.deepcopy(model).eval()["ffn"](x, shift))


class Normed(FFN):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)


def _frozen() -> nn.Module:
    return holder(FFN().requires_grad_(False))


def _tied() -> nn.Module:
    model = nn.ModuleDict({"ffn": FFN(), "other": nn.Linear(6, 10)})
    model["other"].weight = model["ffn"].fc1.weight  # type: ignore[union-attr]
    return model


def _served() -> nn.Module:
    model = holder(FFN())
    optx.attach(model, optx.LoRA(rank=2), "ffn.fc1")
    return model


@pytest.mark.parametrize(
    ("make", "targets", "words"),
    [
        (lambda: holder(Normed()), "ffn", "'norm' has the buffer 'num_batches_tracked'"),
        (_frozen, "ffn", "all its parameters are frozen"),
        (_tied, "ffn", "its 'fc1.weight' is tied to 'other.weight'"),
        (_served, "ffn", "something is attached in it already"),
        (lambda: holder(FFN()), r"ffn(\.fc1)?", "'ffn' and 'ffn.fc1', which is inside it"),
        (lambda: holder(nn.ReLU()), "ffn", "it has no parameters"),
        (lambda: holder(FFN().to("meta")), "ffn", "on the meta device"),
        (lambda: holder(nn.MultiheadAttention(6, 2)), "ffn", "it is attention"),
        (lambda: vit(depth=1), None, "no stack of this Vit has as many"),
        (lambda: holder(FFN()), None, "has default targets for"),
    ],
)
def test_what_can_have_no_experts(make: Any, targets: Any, words: str) -> None:
    model = make()
    before = list(model.state_dict())
    with pytest.raises(optx.TargetError, match=words):
        optx.attach(model, optx.EWA(), targets)
    assert list(model.state_dict()) == before


def test_what_is_attached_inside_later_would_not_act() -> None:
    model = vit()
    handle = attached(model)
    with pytest.raises(optx.TargetError, match=r"'blocks.0.mlp', in whose place 'ewa' computes"):
        optx.attach(model, optx.LoRA(rank=2), r".*fc1")
    handle.merge_and_unload()
    optx.attach(model, optx.LoRA(rank=2), r".*fc1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.76}, r"beta is 0.76; with 4 experts it must be at most 0.75"),
        ({"beta": 0.6, "experts": 2}, r"at most 0.5"),
        ({"beta": 1.1, "rule": "mean"}, "between 0 and 1"),
        ({"experts": 1}, "at least 2"),
        ({"schedule": "linear"}, "needs total_steps="),
        ({"schedule": "constant", "total_steps": 5}, "has no use for it"),
        ({"total_steps": 0}, "at least 1"),
        ({"every": 0}, "at least 1"),
        ({"init": "zero"}, "'copy', 'fresh'"),
        ({"grad_scale": 0.0}, "grad_scale is 0.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(optx.OptxError, match=words):
        optx.EWA(**options)
    assert optx.EWA(beta=0.75).pull_at(1) == 1.0
    assert optx.EWA(beta=1.0, rule="mean").pull_at(1) == 1.0


def test_every_is_of_default_targets() -> None:
    model = BY_LABEL["ViT"].make()
    with pytest.raises(optx.TargetError, match="every=1 is of its default targets"):
        optx.attach(holder(FFN()), optx.EWA(every=1), "ffn")
    with pytest.raises(optx.TargetError, match=r"each 3. block by default"):
        optx.attach(model, optx.EWA(every=3))
    assert len(optx.attach(model, optx.EWA(every=1)).served) == 2


def test_fresh_experts_are_drawn_one_by_one() -> None:
    model = vit()
    torch.manual_seed(0)
    handle = attached(model, init="fresh")
    some = [one.fc1.weight for one in model.blocks[0].mlp.optx.ewa.experts]  # type: ignore[union-attr]
    assert not torch.equal(some[0], some[1])
    assert handle.spread()["blocks.0.mlp"] > 0.5
    own = nn.Module()
    own.weight = nn.Parameter(torch.ones(3))
    with pytest.raises(optx.TargetError, match="has no reset_parameters"):
        attached(holder(own), "ffn", init="fresh")


def test_a_loop_that_never_averages_is_told_once() -> None:
    model = vit(depth=2)
    attached(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(12):
            model(patches()).sum().backward()
            optimizer.step()
    assert len([w for w in told if "not averaged" in str(w.message)]) == 1


def test_disabled_the_mean_computes() -> None:
    model = vit()
    handle = attached(model)
    scattered(model.blocks[2].mlp)
    with torch.no_grad():
        want = model.eval()(patches())
        model.train()
        with handle.disable():
            assert torch.equal(model(patches()), want)
        with pytest.warns(UserWarning, match="never averaged"):
            handle.merge()
        assert torch.equal(model(patches()), want)
        model.blocks[2].mlp.fc1.bias.add_(1)  # type: ignore[union-attr]
    with pytest.raises(optx.MergeError, match=r"'blocks.2.mlp' was changed after the merge"):
        handle.unmerge()


def test_unmerged_the_experts_go_on() -> None:
    model = vit()
    handle = attached(model)
    scattered(model.blocks[2].mlp)
    before = [p.clone() for p in handle.parameters()]
    with pytest.warns(UserWarning, match="never averaged"):
        handle.merge()
    with pytest.raises(optx.OptxError, match="the experts are merged"):
        handle.step()
    handle.unmerge()
    handle.step()
    assert not all(map(torch.equal, handle.parameters(), before))


def test_a_mean_that_is_none_of_the_experts_is_told_once() -> None:
    """In silence, a run too short or never averaged left a model that nobody had trained."""
    model = vit(depth=2)
    handle = attached(model)
    handle.merge()  # copies of one another
    handle.unmerge()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(patches()).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"'blocks.1.mlp' are .* were never averaged. Use optx.wrap"):
        handle.merge()
    handle.unmerge()
    handle.merge()
    handle.merge_and_unload()

    handle = attached(model, init="fresh", beta=0.3, schedule="linear", total_steps=1000)
    handle.step()
    with pytest.warns(UserWarning, match=r"'blocks.1.mlp' are 1.* averaged 1 times, .* larger beta"):
        handle.merge_and_unload()
    handle = attached(model, init="fresh", beta=0.7, schedule="constant")
    [handle.step() for _ in range(5)]
    handle.merge_and_unload()
    attached(model, init="fresh", beta=0).merge_and_unload()
