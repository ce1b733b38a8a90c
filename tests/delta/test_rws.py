"""Robust weight signatures' laws (arXiv 2302.12480), the numbered properties of its specification first."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import optx
from optx import Signature, rws


def vectors(*values: list[float]) -> list[dict[str, Tensor]]:
    return [{"w": torch.tensor(v)} for v in values]


def net(seed: int = 0) -> nn.Sequential:
    """Two convolutions with a norm, one without bias, and a classifier."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def signature(model: nn.Module, seed: int, layers: int = 2) -> Signature:
    g = torch.Generator().manual_seed(seed)
    now = model.state_dict()
    return Signature(
        {n: 0.1 * torch.randn(now[n].shape, generator=g) for n in optx.shallowest(model, layers)}
    )


# ---- 1 to 8: the specification's properties ------------------------------------------------------------


def test_1_the_numbers() -> None:
    pre, std, rob = vectors([0.0, 0, 0], [1.0, 1, 0], [2.0, 0, 3])
    found = rws.extract(pre, std, rob)
    assert found["w"].tolist() == [1, -1, 3]
    patched: Any = found.delta().apply(std)
    assert patched["w"].tolist() == [2, 0, 3]


@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(1,), (7,), (5, 3), (4, 2, 3, 3)]))
@settings(max_examples=30)
def test_2_and_4_orthogonal(seed: int, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(seed)
    pre, std, rob = (torch.randn(shape, generator=g) for _ in range(3))
    left = rws.extract({"w": pre}, {"w": std}, {"w": rob})["w"]
    a, t = std - pre, rob - pre
    assert (left * a).sum().abs() <= 1e-5 * t.norm() * a.norm()
    torch.testing.assert_close(rws.orthogonal(left, a), left, rtol=1e-5, atol=1e-6)
    assert left.norm() <= t.norm() * (1 + 1e-6)
    share = (t * a).sum() / (a * a).sum()
    torch.testing.assert_close(std + left - rob, (1 - share) * a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("c", [-3.0, 0.0, 0.5, 1.0, 7.0])
def test_3_no_robustness_no_signature(c: float) -> None:
    g = torch.Generator().manual_seed(0)
    pre, change = torch.zeros(50), torch.randn(50, generator=g)
    left = rws.extract({"w": pre}, {"w": pre + change}, {"w": pre + c * change})["w"]
    assert left.norm() <= 1e-6 * max(abs(c), 1) * change.norm()


def test_a_tensor_that_the_standard_model_left_alone() -> None:
    pre, std, rob = vectors([1.0, 2.0], [1.0, 2.0], [3.0, 5.0])
    assert rws.extract(pre, std, rob)["w"].tolist() == [2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_5_patch_and_remove(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    before = state(model)
    one, two = signature(model, 1), signature(model, 2)
    handle = optx.patch(model, [one, two], alpha=[1.0, 0.5])
    expected = before["0.weight"].double() + one["0.weight"] + 0.5 * two["0.weight"]
    torch.testing.assert_close(model[0].weight.double(), expected, rtol=0, atol=0.02)
    handle.set_alpha(0, 0.0)
    handle.set_alpha(1, 0.0)
    assert same(model, before)
    handle.set_alpha(1, -2.0)
    assert not same(model, before)
    assert handle.alpha == [0.0, -2.0]
    handle.remove()
    handle.remove()
    assert same(model, before)


def test_5_patches_commute_and_come_off_in_any_order() -> None:
    model, other = net(), net()
    before = state(model)
    one, two = signature(model, 1), signature(model, 2, layers=1)
    first, second = optx.patch(model, [one]), optx.patch(model, [two], alpha=0.3)
    optx.patch(other, [two], alpha=0.3)
    optx.patch(other, [one])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    first.remove()
    alone = net()
    optx.patch(alone, [two], alpha=0.3)
    assert same(model, state(alone))
    second.remove()
    assert same(model, before)


def test_6_linear_levels() -> None:
    x = Signature({"w": torch.tensor([-1, -0.4, 0.1, 0.2, 1])})
    assert x.quantize(4)["w"].tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1 / 3, 1])
    assert x.quantize(5)["w"].tolist() == pytest.approx([-1, -0.5, 0, 0, 1])


@given(
    seed=st.integers(0, 1000),
    levels=st.integers(2, 256),
    shape=st.sampled_from([(), (1,), (5,), (3, 7), (0, 4)]),
)
@settings(max_examples=40)
def test_6_linear_error(seed: int, levels: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made = Signature({"w": x}).quantize(levels)["w"]
    assert made.shape == x.shape
    if x.numel():
        step = (x.max() - x.min()) / (levels - 1)
        assert ((made - x).abs() <= step / 2 + 1e-6).all()
        assert len(made.unique()) <= levels


def test_log_and_tanh_levels() -> None:
    x = torch.tensor([-8.0, -1.0, 0.26, 1.0, 4.1, 0.0])
    made = Signature({"w": x}).quantize(12, "log")["w"]  # 6 magnitudes of 0.26 .. 8, even in their logs
    ratio = (8 / 0.26) ** (1 / 5)
    grid = torch.tensor([0.26 * ratio**i for i in range(6)])
    nearest = grid[(x.abs().clamp(min=0.26).log2()[:, None] - grid.log2()).abs().argmin(1)]
    torch.testing.assert_close(made, torch.where(x < 0, -nearest, nearest), rtol=1e-5, atol=0)
    assert torch.equal(Signature({"w": torch.zeros(3)}).quantize(16, "log")["w"], torch.zeros(3))
    small = 0.3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    error = (Signature({"w": small}).quantize(256, "tanh")["w"] - small).abs().max()
    assert error < 0.02


def vgg16() -> nn.Sequential:
    parts: list[nn.Module] = []
    into = 3
    for out in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        parts.append(nn.Conv2d(into, out, 3, padding=1) if out else nn.MaxPool2d(2))
        into = out or into
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(512, 512), nn.Linear(512, 10))


def test_7_storage_of_the_first_five_layers_of_vgg16() -> None:
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in vgg16().state_dict().items()}
        names = optx.shallowest(vgg16(), 5)
    assert len(names) == 10
    small = Signature({n: torch.zeros(shapes[n]) for n in names}).quantize(16)
    numbers = sum(shapes[n].numel() for n in names)
    assert (numbers, small.nbytes) == (555_328, 555_328 // 2 + 8 * len(names))
    whole = 4 * sum(shape.numel() for shape in shapes.values())
    assert whole / small.nbytes == pytest.approx(215.8, abs=0.1)


def test_8_bias_free_layers_and_integer_buffers() -> None:
    pre, std, rob = net(0), net(1), net(2)
    std[1].num_batches_tracked += 5
    found = rws.extract(pre, std, rob, layers=optx.shallowest(pre, 2))
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight"]
    every = rws.extract(pre, std, rob)
    assert "1.num_batches_tracked" not in every
    assert "1.running_mean" in every
    untouched = {n: t for n, t in std.state_dict(keep_vars=True).items() if n not in found}
    values = {n: t.clone() for n, t in untouched.items()}
    optx.patch(std, [found])
    now = std.state_dict(keep_vars=True)
    assert all(now[n] is t and torch.equal(t, values[n]) for n, t in untouched.items())


# ---- patches on live models ----------------------------------------------------------------------------


def test_merge_keeps_the_patched_weights() -> None:
    model = net()
    before = state(model)
    with optx.patch(model, [signature(model, 1)]) as kept:
        under = optx.patch(model, [signature(model, 2)])
        kept.merge()
        under.remove()
    alone = net()
    optx.patch(alone, [signature(alone, 1)]).merge()
    assert same(model, state(alone))
    assert not same(model, before)
    with pytest.raises(optx.OptxError, match="was taken off or merged"):
        kept.set_alpha(0, 1.0)


def test_state_dict_has_the_patched_weights_and_copies_are_free() -> None:
    model = net()
    handle = optx.patch(model, [signature(model, 1)])
    twin = copy.deepcopy(model)
    patched = state(model)
    handle.remove()
    assert same(twin, patched)


def test_weights_that_changed_under_a_patch_are_not_lost() -> None:
    model = net()
    handle = optx.patch(model, [signature(model, 1)])
    with torch.no_grad():
        model[0].weight += 1
    now = state(model)
    for act in (handle.remove, handle.merge, lambda: handle.set_alpha(0, 0.5)):
        with pytest.raises(optx.MergeError, match=r"'0.weight' was changed since it was patched"):
            act()
    assert same(model, now)
    assert handle.alpha == [1.0]


def test_a_patch_does_not_keep_its_model_alive() -> None:
    model = net()
    handle = optx.patch(model, [signature(model, 1)])
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None
    with pytest.raises(optx.OptxError, match="the model is gone"):
        handle.remove()


def test_transfer_to_a_model_with_another_head() -> None:
    source, target = net(), net(5)
    target[5] = nn.Linear(256, 100)
    every = rws.extract(source, net(1), net(2), layers=r"\d\.(weight|bias)")
    with pytest.raises(optx.ShapeError, match=r"'5.weight' has shape \(10, 256\) in signatures\[0\]"):
        optx.patch(target, [every])
    before = state(target)
    handle = optx.patch(target, [every], strict=False)
    assert sorted(handle.skipped) == ["5.bias", "5.weight"]
    torch.testing.assert_close(target[0].weight, before["0.weight"] + every["0.weight"], rtol=0, atol=1e-6)
    handle.remove()
    assert same(target, before)


def test_alpha_of_the_authors_code() -> None:
    model, ours = net(), net()
    pair = [signature(model, 1), signature(model, 2)]
    optx.patch(model, pair, compat="repo")
    optx.patch(ours, pair, alpha=0.25)
    assert same(model, state(ours))


def test_tied_weights_are_patched_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    before = model.a.weight.detach().clone()
    change = torch.ones(3, 3)
    handle = optx.patch(model, [{"a.weight": change, "b.weight": change}])
    torch.testing.assert_close(model.a.weight.detach(), before + 1)
    handle.remove()
    assert torch.equal(model.a.weight, before)


def test_recalibrated_statistics_come_back() -> None:
    model = net().train()
    model(torch.randn(8, 1, 8, 8))
    before = state(model)
    batches = [3 + 2 * torch.randn(64, 1, 8, 8) for _ in range(4)]
    handle = optx.patch(model, [signature(model, 1)])
    handle.recalibrate(batches, alpha=0.5)
    with torch.no_grad():
        seen = torch.cat([model[0](batch) for batch in batches])
    half = 0.5 * before["1.running_mean"] + 0.5 * seen.mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, half, rtol=1e-4, atol=1e-4)
    assert model.training
    assert model[1].momentum == 0.1
    assert torch.equal(model[1].num_batches_tracked, before["1.num_batches_tracked"])
    handle.recalibrate(batches)
    torch.testing.assert_close(model[1].running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    now = state(model)
    with pytest.raises(optx.OptxError, match="batches is empty"):
        handle.recalibrate([])
    assert same(model, now)
    handle.remove()
    assert same(model, before)


# ---- which layers, files, errors -----------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(4, 2)


def test_shallowest_takes_blocks_whole() -> None:
    stem = ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert optx.shallowest(ResNet(), 1) == stem
    block = [f"layer1.0.{name}" for name in (*stem, *(name.replace("1", "2") for name in stem))]
    assert optx.shallowest(ResNet(), 2) == stem + block
    assert optx.shallowest(ResNet(), 4)[-2:] == ["fc.weight", "fc.bias"]
    with pytest.raises(optx.OptxError, match="count is 5, and the model has 4 layers"):
        optx.shallowest(ResNet(), 5)


def test_shallowest_of_a_transformer_begins_with_the_embeddings() -> None:
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(9, 4),
            "places": nn.Embedding(5, 4),
            "norm": nn.LayerNorm(4),
            "layers": nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 8) for _ in range(2)),
        }
    )
    first = optx.shallowest(model, 1)
    assert first == ["words.weight", "places.weight", "norm.weight", "norm.bias"]
    assert {name.split(".")[0] + name.split(".")[1] for name in optx.shallowest(model, 2)[4:]} == {"layers0"}


@pytest.mark.parametrize("form", ["linear", "log", "tanh", None])
def test_a_saved_signature_is_the_same(form: Any, tmp_path: Path) -> None:
    found = signature(net(), 1)
    if form:
        found = found.quantize(16, form)
    path = found.save(tmp_path / "fog.safetensors")
    again = Signature.load(path)
    assert again.keys() == found.keys()
    assert again.nbytes == found.nbytes
    assert all(torch.equal(again[n], found[n]) for n in found)
    assert [p.name for p in tmp_path.iterdir()] == ["fog.safetensors"]


def test_extracted_from_files_and_applied_to_a_file(tmp_path: Path) -> None:
    models = {name: state(net(i)) for i, name in enumerate(("pre", "std", "rob", "later"))}
    for name, sd in models.items():
        save_file(sd, tmp_path / f"{name}.safetensors")
    found = rws.extract(*(tmp_path / f"{n}.safetensors" for n in ("pre", "std", "rob")), layers=r"0\..*")
    assert sorted(found) == ["0.bias", "0.weight"]
    out: Any = found.delta().apply(tmp_path / "later.safetensors", tmp_path / "out.safetensors")
    made = load_file(out)
    torch.testing.assert_close(made["0.weight"], models["later"]["0.weight"] + found["0.weight"])
    assert torch.equal(made["5.weight"], models["later"]["5.weight"])


def test_errors(tmp_path: Path) -> None:
    model, x = net(), torch.ones(1)
    save_file({"w": torch.zeros(2)}, tmp_path / "plain.safetensors")
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: rws.extract(*vectors([1.0], [1.0]), {"v": x}), optx.OptxError, "robust lacks 'w'"),
        (lambda: rws.extract(*vectors([1.0], [1.0, 2.0], [1.0])), optx.ShapeError, "shape (2,) in standard"),
        (lambda: rws.extract(*vectors([1.0], [1.0], [1.0]), layers=["x"]), optx.OptxError, "no floating 'x'"),
        (lambda: rws.extract(*vectors([1.0], [1.0], [1.0]), layers="x"), optx.OptxError, "chooses nothing"),
        (lambda: rws.extract(*vectors([1.0], [1.0], [1.0]), quantize=1), optx.OptxError, "levels is 1"),
        (lambda: signature(model, 1).quantize(7, "log"), optx.OptxError, "needs an even number"),
        (lambda: Signature({"w": 20 * x}).quantize(8, "tanh"), optx.OptxError, "Use form='linear'"),
        (lambda: signature(model, 1).quantize(8, "cube"), optx.OptxError, "form is 'cube'"),  # type: ignore[arg-type]
        (lambda: Signature.load(tmp_path / "plain.safetensors"), optx.FileError, "is no signature's file"),
        (lambda: Signature.load(tmp_path / "none.safetensors"), optx.FileError, "There is no file"),
        (lambda: optx.patch(model, []), optx.OptxError, "at least one signature"),
        (lambda: optx.patch(model, [3]), optx.OptxError, "signatures[0] is a int; it is no signature"),  # type: ignore[list-item]
        (lambda: optx.patch(model, signature(model, 1)), optx.OptxError, "at least one signature"),  # type: ignore[arg-type]
        (lambda: optx.patch(model, [{"x": torch.ones(1)}]), optx.OptxError, "signatures[0] has 'x'"),
        (lambda: optx.patch(model, [{"x": torch.ones(1)}], strict=False), optx.OptxError, "no tensor of"),
        (lambda: optx.patch(model, [signature(model, 1)], [1, 2]), optx.OptxError, "there are 1 signatures"),
        (lambda: optx.patch({}, [signature(model, 1)]), optx.OptxError, "it must be a module"),  # type: ignore[arg-type]
        (lambda: optx.patch(nn.Linear(1, 1), vectors([1.0])), optx.OptxError, "signatures[0] has 'w'"),
    ]  # fmt: skip
    before = state(model)
    for act, kind, message in cases:
        with pytest.raises(kind) as caught:
            act()
        assert message in str(caught.value)
    assert same(model, before)
    handle = optx.patch(model, [signature(model, 1)])
    with pytest.raises(optx.OptxError, match=r"set_alpha\(1, ...\): there are 1 changes"):
        handle.set_alpha(1, 0.0)


@pytest.mark.long
def test_digits_get_robust_against_low_contrast() -> None:
    """The specification's experiment: the more of the first four layers is patched, the more robust."""
    datasets = pytest.importorskip("sklearn.datasets")
    torch.set_num_threads(1)  # two only wait for one another here
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    dull = 0.2 * x + 0.4
    torch.manual_seed(0)
    train_on, test_on = torch.randperm(len(x)).tensor_split([1200])

    def train(model: nn.Module, x: Tensor, which: Tensor, epochs: int) -> nn.Module:
        optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
        for _ in range(epochs):
            for batch in which[torch.randperm(len(which))].split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        return model

    def accuracy(model: nn.Module, x: Tensor) -> float:
        return float((model(x[test_on]).argmax(1) == y[test_on]).float().mean())

    convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    rest = [nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64)]
    pre = train(nn.Sequential(*convolutions, *rest, nn.ReLU(), nn.Linear(64, 10)), x, train_on[:300], 3)
    std, rob = (train(copy.deepcopy(pre), data, train_on, 10) for data in (x, dull))
    before = state(std)
    robust = [accuracy(std, dull)]
    for layers in (2, 4):
        found = rws.extract(pre, std, rob, layers=optx.shallowest(std, layers), quantize=16)
        with optx.patch(std, [found]):
            robust.append(accuracy(std, dull))
            assert accuracy(std, x) > 0.75
        assert same(std, before)
    assert robust[0] + 0.2 < robust[1] + 0.1 < robust[2]
