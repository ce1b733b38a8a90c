"""FTWT in evaluation mode: what is skipped changes nothing, and what it saves is counted exactly."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from conv_models import MODELS, images, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import optx
from optx.inject._ftwt_parts import Predictor

x1, x3 = images(1), images(3)


def predictors(handle: optx.Handle) -> list[Any]:
    return [one.part for one in handle.served if isinstance(one.part, Predictor)]


def biased(handle: optx.Handle, value: float) -> None:
    with torch.no_grad():
        for part in predictors(handle):
            part.weight.zero_()
            part.bias.fill_(value)


def scattered(handle: optx.Handle, share: float = 0.5, seed: int = 3) -> None:
    """Of each layer some filters, which ones depends on the sample."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in predictors(handle):
            part.weight.copy_(8 * torch.randn(part.weight.shape, generator=generator))
            part.bias.copy_(torch.randn(part.bias.shape, generator=generator) + 2 * (2 * share - 1))


def served(kind: str, **options: Any) -> tuple[nn.Module, optx.FilterPruning]:
    model = trained(kind)
    handle = optx.attach(model, optx.FTWT(**options))
    scattered(handle)
    return model, handle


def both(model: nn.Module, handle: optx.Handle, x: Tensor) -> list[Tensor]:
    """Gathered and masked."""
    outputs: list[Tensor] = []
    with torch.no_grad():
        for way in ("gather", "mask"):
            for part in predictors(handle):
                part.inference = way
            outputs.append(model(x))
    return outputs


@pytest.mark.parametrize("kind", MODELS)
def test_gathered_is_masked(kind: str) -> None:
    model, handle = served(kind)
    for share in (0.7, 0.3):
        scattered(handle, share)
        for x in (x1, x3, x3.contiguous(memory_format=torch.channels_last)):
            gathered, masked = both(model, handle, x)
            kept = [mask.float().mean().item() for mask in handle.masks().values()]
            assert 0 < sum(kept) < len(kept)
            torch.testing.assert_close(gathered, masked, rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(
    st.sampled_from([(1, 0, 1), (2, 1, 1), (1, "same", 2), (1, "valid", 1), (3, 2, 2)]),
    st.sampled_from(["zeros", "circular", "reflect"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_all_geometries(shape: Any, mode: str, depthwise: bool, bias: bool, seed: int) -> None:
    """Two convolutions, of which the second sees masked channels; also none or all of them."""
    stride, padding, dilation = shape
    torch.manual_seed(seed)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode, "bias": bias}
    second = nn.Conv2d(6, 6, 3, groups=6 if depthwise else 1, **options)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), second, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 1, 1)
    )
    model = nn.Sequential(*model, nn.Flatten(), nn.LazyLinear(2)).eval()
    x = torch.randn(2, 3, 9, 8)
    model(x)
    handle = optx.attach(model, optx.FTWT(), targets=["0", "2"])
    for part in predictors(handle):
        with torch.no_grad():
            part.bias.copy_(torch.randn(6) + (seed % 3 - 1) * 1.5)
    gathered, masked = both(model, handle, x)
    torch.testing.assert_close(gathered, masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_all_kept_is_the_dense_model_and_none_is_zero(kind: str) -> None:
    model = trained(kind)
    dense = [model(x) for x in (x1, x3)]
    handle = optx.attach(model, optx.FTWT())
    for value in (None, 20.0):
        if value:
            biased(handle, value)
        for x, wanted in zip((x1, x3), dense, strict=True):
            for found in both(model, handle, x):
                assert torch.equal(found, wanted)
    work = handle.flops(reset=True)
    assert work.kept == work.total == dense_work(trained(kind))
    biased(handle, -20.0)
    both(model, handle, x3)
    assert not torch.cat([mask.flatten() for mask in handle.masks().values()]).any()
    for one in handle.flops().layers:
        assert one.kept == 0 or "downsample" in one.module
    handle.force(keep_all=True)
    assert torch.equal(both(model, handle, x3)[0], dense[1])


def dense_work(model: nn.Module) -> int:
    """Multiply-adds of a sample's convolutions, by hooks."""
    total = 0

    def add(conv: Any, args: Any, y: Tensor) -> None:
        nonlocal total
        total += conv.weight.numel() * y.shape[-1] * y.shape[-2]

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    model(x1)
    return total


def test_halving_a_layer_halves_the_next() -> None:
    model = trained("vgg")
    handle = optx.attach(model, optx.FTWT(inference="mask"))
    biased(handle, 1.0)
    with torch.no_grad():
        handle.served[1].part.bias[:6] = -1
    for inference in ("mask", "gather"):
        for part in predictors(handle):
            part.inference = inference
        model(x1)
        first, second, third = handle.flops(reset=True).layers
        assert (first.kept, second.kept, third.kept) == (first.total, second.total / 2, third.total / 2)
    assert second.predictor == 8 * 12 + 12 - 12 + 8 * 64


def test_pairs_of_groups_count_and_depthwise_is_not_free() -> None:
    """Each depthwise filter has its own channel: a filter without it costs nothing, one with it does."""
    model = trained("mobilenet")
    handle = optx.attach(model, optx.FTWT())
    biased(handle, 1.0)
    with torch.no_grad():
        handle.served[0].part.bias[:4] = -1
        handle.served[1].part.bias[2:6] = -1
    gathered, masked = both(model, handle, x3)
    torch.testing.assert_close(gathered, masked)
    work = {one.module: one.kept / one.total for one in handle.flops().layers}
    assert work["3"] == 2 / 8  # filters 6 and 7; 0 and 1 are kept and have no input
    assert work["6"] == 4 / 8


class Twice(nn.Module):
    """A convolution that is called twice, so that its work is that of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.last(torch.relu(self.twice(torch.relu(self.twice(y)))).mean((2, 3)))


def test_each_call_of_a_convolution_counts() -> None:
    model = Twice().eval()
    handle = optx.attach(model, optx.FTWT())
    with FlopCounterMode(display=False) as counter:
        model(x3)
    model(x1)
    work = handle.flops()
    assert 2 * 3 * work.total == counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert work.samples == 4
    assert work.kept == work.total


@pytest.mark.parametrize("between", [torch.sigmoid, partial(torch.softmax, dim=1), torch.tanh, nn.GLU(1)])
def test_masked_channels_that_are_not_zero_any_more_count(between: Any) -> None:
    """What is counted of masked calls is what gathered ones compute."""
    torch.manual_seed(0)

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            glu = isinstance(between, nn.GLU)
            self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.last, self.out = nn.Conv2d(4 if glu else 8, 6, 3), nn.Linear(6, 2)
            self.bend = (lambda y: y) if glu else torch.relu

        def forward(self, x: Tensor) -> Tensor:
            y = between(self.bend(self.norm(self.first(x))))
            return self.out(torch.relu(self.last(y)).mean((2, 3)))

    model = Between().eval()
    handle = optx.attach(model, optx.FTWT())
    scattered(handle)
    counts: list[float] = []
    for way in ("gather", "mask"):
        for part in predictors(handle):
            part.inference = way
        model(x3)
        counts.append(handle.flops(reset=True).kept)
    assert counts[0] == pytest.approx(counts[1])
    model.train()(x3)
    assert handle.loss().isfinite()


def test_training_masks_as_evaluation_does() -> None:
    """With norms at rest, as in much fine-tuning; and without any."""
    for kind in ("resnet", "vgg, no norm"):
        model, handle = served(kind)
        evaluated = model(x3)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        torch.testing.assert_close(model(x3), evaluated, rtol=1e-5, atol=1e-5)
        assert handle.loss() > 0
        assert handle.flops(reset=True).samples == 3  # of the first call alone


def test_random_masks_of_the_same_size() -> None:
    model, handle = served("resnet")
    model(x3)
    kept = {path: mask.sum(1) for path, mask in handle.masks().items()}
    before = handle.masks()
    handle.force("random")
    torch.manual_seed(0)
    model(x3)
    after = handle.masks()
    assert torch.equal(after["0"].sum(1), kept["0"])
    assert not torch.equal(after["0"], before["0"])
    handle.force()
    model(x3)
    assert all(map(torch.equal, before.values(), handle.masks().values()))


def test_autocast() -> None:
    model, handle = served("resnet")
    with torch.autocast("cpu", torch.bfloat16):
        gathered, masked = both(model, handle, x1)
        torch.testing.assert_close(gathered, masked, rtol=0.05, atol=0.05)
        model.train()
        model(x3)
        assert handle.loss().dtype == torch.float32
    half, handle = trained("resnet").bfloat16(), None
    handle = optx.attach(half, optx.FTWT())
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    scattered(handle)
    assert both(half, handle, x3.bfloat16())[0].dtype == torch.bfloat16


def test_compiled_whole_and_checkpointed() -> None:
    torch._dynamo.reset()
    model, handle = served("vgg")
    twin, own = copy.deepcopy((model, handle))
    for one in (model, twin):
        one.train()
    call = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = images(seed=seed)
        (model(x).square().sum() + handle.loss()).backward()
        (call(x).square().sum() + own.loss()).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    third = copy.deepcopy(model)
    third.zero_grad()
    model.zero_grad()
    model(x3).square().sum().backward()
    wanted = handle.loss()
    checkpoint(third, x3, use_reentrant=False).square().sum().backward()
    layers: Any = third[0].optx.ftwt.layer
    assert len(layers.collected.values) == 3
    torch.testing.assert_close(torch.stack([v[0] for v in layers.collected.values.values()]).mean(), wanted)


def test_what_else_acts_on_a_layer_is_not_skipped() -> None:
    model, handle = served("vgg", inference="gather")
    lora = optx.attach(model, optx.LoRA(rank=2), targets=["3"])
    with torch.no_grad():
        for p in lora.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    gathered, masked = both(model, handle, x3)
    torch.testing.assert_close(gathered, masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["vgg", "vgg, no norm"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_mask_is_behind_what_others_add(kind: str, first: bool, training: bool) -> None:
    """Shifts of norms and convolutions, attached before or after, are of kept filters alone."""
    model = trained(kind)
    others: list[optx.Handle] = []

    def attach() -> None:
        others.append(optx.attach(model, optx.BitFit(), targets=["0", "1"] if kind == "vgg" else ["0", "2"]))
        others.append(optx.attach(model, optx.LoRA(rank=2), targets=["0"]))
        with torch.no_grad():
            for p in (p for one in others for p in one.parameters()):
                p.add_(torch.randn(p.shape))

    if first:
        attach()
    handle = optx.attach(model, optx.FTWT(inference="gather"))
    scattered(handle)
    if not first:
        attach()
    seen: list[Tensor] = []
    end: Any = model[1 if kind == "vgg" else 0]  # pyright: ignore[reportIndexIssue]
    model.train(training)
    with end.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone())):
        model(x3)
    dropped = ~handle.masks()["0"]
    assert dropped.any()
    assert not seen[0][dropped].any()
    assert seen[0][~dropped].any()
    for one in others:
        one.remove()
    gathered, masked = both(model.eval(), handle, x3)
    torch.testing.assert_close(gathered, masked, rtol=1e-5, atol=1e-5)


def test_an_output_changed_before_its_norm_is_an_error() -> None:
    model, _ = served("vgg", inference="gather")
    hook = model[0].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(
        optx.OptxError, match=r"the output of '0' was changed before its norm.*inference='mask'"
    ):
        model(x1)
    hook.remove()
    assert torch.isfinite(model(x1)).all()


class Switched(nn.Module):
    """What the last convolution reads was another one's when it was traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.other = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3), False

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.last(torch.ones_like(y) if self.other else y)


def test_a_channel_is_skipped_only_where_it_is_zero() -> None:
    torch.manual_seed(0)
    model = Switched().eval()
    handle = optx.attach(model, optx.FTWT(), targets=["first", "last"])
    scattered(handle)
    for other in (False, True):
        model.other = other
        gathered, masked = both(model, handle, x3)
        torch.testing.assert_close(gathered, masked, rtol=1e-5, atol=1e-5)


def test_auto_skips_what_is_worth_it() -> None:
    """Large layers; small ones are faster computed whole."""
    model = trained("vgg")
    handle = optx.attach(model, optx.FTWT())
    small, large = images(1, 8), images(1, 96)
    answers = [[part.gathers(conv, x) for x in (small, large)] for part, conv in _pairs(handle, model)]
    assert answers == [[False, False], [False, True], [False, True]]


def _pairs(handle: Any, model: Any) -> list[tuple[Any, Any]]:
    convs = [model[0], model[3], model[7]]
    return list(zip(predictors(handle), convs, strict=True))


@pytest.mark.parametrize("way", ["gather", "mask"])
def test_what_is_not_finite_is_not_hidden(way: str) -> None:
    """Neither in an image, nor in predictors that went astray (which leave the dense model)."""
    model, handle = served("vgg", inference=way)
    bad = x1.clone()
    bad[0, 1, 2, 3] = float("nan")
    assert model(bad).isnan().all()
    biased(handle, float("nan"))
    assert torch.equal(model(x1), trained("vgg")(x1))


def test_nothing_counted_is_an_error() -> None:
    model, handle = served("vgg")
    for ask in (handle.flops, handle.agreement):
        with pytest.raises(optx.OptxError, match="Call the model in"):
            ask()
    model(x3)
    text = str(handle.flops())
    assert "multiply-adds of a sample" in text
    assert "in all" in text
    with pytest.raises(optx.OptxError, match="force: masks is 'none'"):
        handle.force("none")  # type: ignore[arg-type]
