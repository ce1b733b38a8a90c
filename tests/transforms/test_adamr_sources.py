"""AdamR's anchors: from every kind of file, never another parameter's, never the live weights' own memory."""

from __future__ import annotations

import copy
import json
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import optx
from optx import AdamR


class Tiny(nn.Module):
    """Two layers of one shape, a vector, and a weight with two names."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.a.weight


def sgd(net: nn.Module, names: bool = True) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.named_parameters() if names else net.parameters(), lr=0.1)


def wrap(net: nn.Module, source: Any, *, names: bool = True, **options: Any) -> optx.Wrapped:
    return optx.wrap(sgd(net, names), AdamR(1.0, normalize=False, anchor=source, **options), fused=False)


def anchor_of(opt: optx.Wrapped, p: Tensor) -> Tensor:
    return opt.slot(p, opt.adamr, "anchor")


def assert_anchored(opt: optx.Wrapped, net: nn.Module, pretrained: nn.Module) -> None:
    theirs = dict(pretrained.named_parameters())
    for name, p in net.named_parameters():
        assert torch.equal(anchor_of(opt, p), theirs[name]), name


# ---- memory of their own ----------------------------------------------------------------------------


def flat(net: nn.Module) -> nn.Module:
    """Parameters that are views of one buffer, as Apex and DeepSpeed make them."""
    params = list(net.parameters())
    buffer = torch.cat([p.detach().flatten() for p in params])
    for p, part in zip(params, buffer.split([p.numel() for p in params]), strict=True):
        p.data = part.view_as(p)
    return net


LIVE: dict[str, Callable[[nn.Module], Any]] = {
    "model": lambda net: net,
    "state_dict": lambda net: net.state_dict(),
    "named_parameters": lambda net: dict(net.named_parameters()),
    "views": lambda net: OrderedDict((n, p.detach()[...]) for n, p in net.named_parameters()),
    "copy.copy": copy.copy,
    "numpy's memory": lambda net: {
        n: torch.from_numpy(p.detach().numpy()) for n, p in net.named_parameters()
    },
    "numpy": lambda net: {n: p.detach().numpy() for n, p in net.named_parameters()},
}


@pytest.mark.parametrize("kind", LIVE)
@pytest.mark.parametrize("prepare", [lambda net: net, flat], ids=["own", "flat"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_anchors_are_not_the_live_weights(kind: str, prepare: Any, fused: bool) -> None:
    net, plain = prepare(Tiny()), Tiny()
    start = copy.deepcopy(plain)
    transform = AdamR(1.0, normalize=False, anchor=LIVE[kind](net))
    opts = [
        (net, optx.wrap(sgd(net), transform, fused=fused)),
        (plain, optx.wrap(sgd(plain), AdamR(1.0, normalize=False), fused=fused)),
    ]
    for model, opt in opts:
        for _ in range(5):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            opt.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    assert_anchored(opts[0][1], net, start)


@pytest.mark.parametrize("change", ["trained", "loaded", "moved"])
def test_anchors_stay_when_their_model_changes(change: str) -> None:
    """A teacher that is trained besides, or an average of the weights."""
    net, teacher = Tiny(), Tiny(1)
    start = copy.deepcopy(teacher)
    opts = [wrap(net, teacher), wrap(net, teacher.state_dict())]
    if change == "moved":
        teacher.to(torch.float64)
    else:
        for p in teacher.parameters():
            p.data.add_(1.0) if change == "trained" else p.data.copy_(torch.zeros_like(p))
    for opt in opts:
        assert_anchored(opt, net, start)


def test_the_live_model_cannot_be_found_again() -> None:
    net = Tiny()
    for source in (net, net.state_dict()):
        with pytest.raises(
            optx.OptxError, match=r"save_anchor=False needs .* anchor= is the model that is tr"
        ):
            wrap(net, source, save_anchor=False)
    wrap(net, Tiny(1), save_anchor=False)


# ---- files ------------------------------------------------------------------------------------------


def split(net: nn.Module, folder: Path, suffix: str = "safetensors", stem: str = "model") -> list[Path]:
    """Two shards and their index, as transformers writes them."""
    state = {n: t.contiguous() for n, t in net.state_dict().items() if n != "tied.weight"}
    files, where = [folder / f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)], {}
    for i, file in enumerate(files):
        part = {n: t for n, t in state.items() if n.startswith("ab"[i])}
        save_file(part, file) if suffix == "safetensors" else torch.save(part, file)
        where.update(dict.fromkeys(part, file.name))
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    return files


def one(net: nn.Module, folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file({n: t for n, t in net.state_dict().items() if n != "tied.weight"}, file)
    return file


def torch_file(net: nn.Module, file: Path, **options: Any) -> Path:
    torch.save(net.state_dict(), file, **options)
    return file


def folder_of(made: Any, folder: Path) -> Path:
    return folder


FILES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "file": one,
    "folder": lambda net, d: folder_of(one(net, d), d),
    "shards": lambda net, d: folder_of(split(net, d), d),
    "text of a folder": lambda net, d: str(folder_of(split(net, d), d)),
    "list": lambda net, d: split(net, d),
    "tuple of text": lambda net, d: tuple(map(str, split(net, d))),
    "index": lambda net, d: folder_of(split(net, d), d) / "model.safetensors.index.json",
    ".pt": lambda net, d: torch_file(net, d / "model.pt"),
    ".pth": lambda net, d: str(torch_file(net, d / "model.pth")),
    "old .bin": lambda net, d: torch_file(net, d / "m.bin", _use_new_zipfile_serialization=False),
    "folder of .bin": lambda net, d: folder_of(torch_file(net, d / "pytorch_model.bin"), d),
    "shards of .bin": lambda net, d: folder_of(split(net, d, "bin", "pytorch_model"), d),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    net, pretrained = Tiny(), Tiny(1)
    source = FILES[kind](pretrained, tmp_path)
    assert_anchored(wrap(net, source), net, pretrained)
    assert_anchored(wrap(net, source, names=False, model=net), net, pretrained)


def test_an_index_that_is_named_is_the_one_that_is_read(tmp_path: Path) -> None:
    split(Tiny(1), tmp_path)
    split(Tiny(2), tmp_path, stem="variant")
    net = Tiny()
    assert_anchored(wrap(net, tmp_path / "variant.safetensors.index.json"), net, Tiny(2))


def test_a_tied_weight_is_found_under_any_of_its_names(tmp_path: Path) -> None:
    """Files hold it once, under whichever name; safetensors' save_model picks one."""
    net, pretrained = Tiny(), Tiny(1)
    state = {n: t for n, t in pretrained.state_dict().items() if n != "a.weight"}
    save_file(state, tmp_path / "m.safetensors")
    assert_anchored(wrap(net, tmp_path / "m.safetensors", model=net), net, pretrained)
    assert_anchored(wrap(net, pretrained), net, pretrained)


def written(path: Path, what: Any) -> Path:
    torch.save(what, path)
    return path


def broken(d: Path) -> Path:
    data = one(Tiny(), d).read_bytes()
    (d / "cut.safetensors").write_bytes(data[:-8])
    return d / "cut.safetensors"


def missing_shard(d: Path) -> Path:
    split(Tiny(), d)[1].unlink()
    return d


def twice(d: Path) -> list[Path]:
    return [one(Tiny(), d), *split(Tiny(), d)]


def saved_delta(d: Path) -> Path:
    state = [{n: t for n, t in Tiny(seed).state_dict().items() if n != "tied.weight"} for seed in (0, 1)]
    return optx.Delta.between(*state).save(d / "delta.safetensors")


def saved_optimizer(d: Path) -> Path:
    optx.save_optimizer(sgd(Tiny()), d / "opt.safetensors")
    return d / "opt.safetensors"


def noise(d: Path, name: str) -> Path:
    (d / name).write_bytes(b"no checkpoint" * 9)
    return d / name


WRONG_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda d: d / "absent", "There is no file"),
    "absent .pt": (lambda d: d / "absent.pt", "There is no file"),
    "absent index": (lambda d: d / "m.index.json", "There is no file"),
    "empty folder": (lambda d: d, "has no .*safetensors file"),
    "cut": (broken, "is cut short or damaged"),
    "a missing shard": (
        missing_shard,
        "names 'model-00002-of-00002.safetensors', which is not in the folder",
    ),
    "twice": (twice, "'a.bias' is in two of the files"),
    "delta": (saved_delta, "is a delta or an optimizer that optx saved"),
    "optimizer": (saved_optimizer, "is a delta or an optimizer that optx saved"),
    "a whole model": (lambda d: written(d / "m.pt", Tiny()), "holds more than tensors"),
    "a list": (lambda d: written(d / "m.pt", [torch.ones(2)]), "holds a list, not a state dict"),
    "a tensor": (lambda d: written(d / "m.pt", torch.ones(2)), "holds a Tensor, not a state dict"),
    "no torch file": (lambda d: noise(d, "m.bin"), "m.bin"),
    "no index": (lambda d: noise(d, "m.index.json"), "is damaged"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_files_that_are_no_weights(kind: str, tmp_path: Path) -> None:
    make, words = WRONG_FILES[kind]
    with pytest.raises(optx.TransformError, match=f"AdamR: cannot read anchor=.*{words}"):
        wrap(Tiny(), make(tmp_path))


def test_a_checkpoint_of_several_parts_is_told_which(tmp_path: Path) -> None:
    inside = {"epoch": 3, "optimizer": {"state": {}}, "state_dict": Tiny().state_dict()}
    path = written(tmp_path / "m.ckpt", inside)
    for source, way in ((inside, r"anchor\['state_dict'\]"), (path, r"torch.load\(.*\)\['state_dict'\]")):
        with pytest.raises(optx.TransformError, match=rf"several parts \('epoch'.*Pass anchor=.*{way}"):
            wrap(Tiny(), source)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_written_to_under_its_mapping_is_noticed(suffix: str, tmp_path: Path) -> None:
    """A loop that saves to where the pretrained weights were: garbage, or SIGBUS where it got shorter."""
    path = tmp_path / f"m.{suffix}"
    state = {n: t for n, t in Tiny(1).state_dict().items() if n != "tied.weight"}

    def save() -> None:
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)

    save()
    net = Tiny()
    opts = [wrap(net, path), wrap(net, path)]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    opts[0].step()
    opts[1].load_state_dict(copy.deepcopy(opts[0].state_dict()))  # these anchors are in memory
    before = copy.deepcopy(net.state_dict())
    with path.open("r+b") as file:
        file.write(file.read(1))
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(optx.TransformError, match=rf"{re.escape(str(path))}' was written to while"):
        opts[0].step()
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    opts[1].step()


def test_a_file_that_is_replaced_or_deleted_is_no_matter(tmp_path: Path) -> None:
    net, path = Tiny(), one(Tiny(1), tmp_path)
    opt = wrap(net, path)
    again = tmp_path / "new"
    save_file(load_file(path), again)
    again.replace(path)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    path.unlink()
    opt.step()
    assert_anchored(opt, net, Tiny(1))


# ---- by name, and by nothing else -------------------------------------------------------------------


class Inside(nn.Module):
    """What DDP does to names; or a person's own module of that name."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.module = net


def test_what_wrappers_put_into_names_is_no_matter() -> None:
    net, pretrained = Tiny(), Tiny(1)
    for ours, theirs in (
        (Inside(net), pretrained),
        (net, Inside(pretrained)),
        (Inside(net), Inside(pretrained)),
    ):
        for source in (theirs, theirs.state_dict()):
            assert_anchored(wrap(ours, source), net, pretrained)
            assert_anchored(wrap(net, source, names=False, model=ours), net, pretrained)


def test_a_name_that_is_like_two_others_is_neither() -> None:
    """``a.weight`` is not the anchor of ``a.module.weight`` where the model has both."""

    def both(seed: int) -> nn.Module:
        net = nn.Module()
        net.a = Tiny(seed).a
        net.a.module = Tiny(seed).b
        return net

    some = {n: t for n, t in both(1).state_dict().items() if "module" not in n}
    with pytest.raises(optx.TransformError, match=r"no anchor for 'a\.module\.weight'"):
        wrap(both(0), some)
    clash = {"a.module.weight": torch.ones(3, 3), "module.a.weight": torch.zeros(3, 3)}
    weight = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(optx.TransformError, match=r"no anchor for 'a\.weight'"):
        optx.wrap(torch.optim.SGD([("a.weight", weight)], lr=0.1), AdamR(normalize=False, anchor=clash))


def test_two_models_in_one_optimizer_with_the_same_names() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    base = torch.optim.SGD(
        [{"params": first.named_parameters()}, {"params": second.named_parameters()}], lr=0.1
    )
    with pytest.raises(
        optx.TransformError, match=r"two parameters of the optimizer are called 'weight'.*model="
    ):
        optx.wrap(base, AdamR(normalize=False, anchor=first.state_dict()))
    both = nn.ModuleDict({"first": first, "second": second})
    pretrained = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    opt = optx.wrap(base, AdamR(normalize=False, anchor=pretrained, model=both))
    assert_anchored(opt, both, pretrained)


def test_a_part_of_the_anchor_model_is_its_own_anchor() -> None:
    """Its name in the optimizer, ``0.weight``, is another layer's in the whole."""
    part = nn.Sequential(nn.Linear(3, 3))
    whole = nn.Sequential(nn.Linear(3, 3), part)
    opt = wrap(part, whole)
    assert torch.equal(anchor_of(opt, part[0].weight), part[0].weight)


def test_a_model_that_is_not_the_trained_one() -> None:
    with pytest.raises(optx.TransformError, match=r"model= has no such parameter as param_groups\[0\]"):
        wrap(Tiny(), Tiny(1), names=False, model=Tiny())


def test_a_prefix_is_told_with_near_names() -> None:
    state = {f"model.{n}": t for n, t in Tiny(1).state_dict().items()}
    with pytest.raises(
        optx.TransformError, match=r"no anchor for 'a.weight'. Near: .*'model.a.weight'.* rename"
    ):
        wrap(Tiny(), state)


# ---- what an anchor may be --------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_anchors_of_another_float_keep_it(dtype: torch.dtype, fused: bool) -> None:
    p = nn.Parameter(torch.ones(5))
    anchor = {"p": torch.full((5,), 1.2, dtype=dtype)}
    opt = optx.wrap(
        torch.optim.SGD([("p", p)], lr=0.5), AdamR(1.0, normalize=False, anchor=anchor), fused=fused
    )
    assert anchor_of(opt, p).dtype == dtype
    p.grad = torch.zeros(5)
    opt.step()
    torch.testing.assert_close(p.detach(), 1.0 - 0.5 * (1.0 - anchor["p"].float()), rtol=0, atol=1e-7)


NO_ANCHORS: dict[str, tuple[Any, str]] = {
    "int8": (torch.ones(3, dtype=torch.int8), "'p' is torch.int8; .* Dequantize it"),
    "int64": (torch.ones(3, dtype=torch.int64), "'p' is torch.int64"),
    "bool": (torch.ones(3, dtype=torch.bool), "'p' is torch.bool"),
    "complex": (torch.ones(3, dtype=torch.complex64), "'p' is torch.complex64"),
    "float8": (torch.ones(3).to(torch.float8_e4m3fn), "'p' is torch.float8_e4m3fn"),
    "sparse": (torch.ones(3).to_sparse(), "'p' is torch.sparse_coo"),
    "meta": (torch.ones(3, device="meta"), "'p' is on the meta device"),
    "numpy int": (np.ones(3, np.int32), "'p' is torch.int32"),
    "numpy words": (np.array(["a", "b", "c"]), "'p' is no tensor"),
    "list": ([1.0, 2.0, 3.0], "'p' is a list; it must be a tensor"),
    "None": (None, "'p' is a NoneType"),
}


@pytest.mark.parametrize("kind", NO_ANCHORS)
def test_what_is_no_anchor(kind: str) -> None:
    value, words = NO_ANCHORS[kind]
    base = torch.optim.SGD([("p", nn.Parameter(torch.ones(3)))], lr=0.1)
    with pytest.raises(optx.OptxError, match=f"AdamR: anchor (for )?{words}"):
        optx.wrap(base, AdamR(normalize=False, anchor={"p": value, "other": torch.ones(1)}))


SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = {
    "another head": ((10, 4), (2, 4), r"this layer is new \(another head\), put it in a .* adamr=False"),
    "its bias": ((10,), (2,), r"this layer is new \(another head\), put it in a .* adamr=False"),
    "a grown vocabulary": (
        (10, 4),
        (12, 4),
        r"a grown vocabulary\), add the 2 to the anchor too; .* adamr=False",
    ),
    "another model": (
        (10, 4),
        (10, 8),
        r"state_dict\(\) of the same model; if this layer is new, .*adamr=False",
    ),
    "a number": ((), (1,), "if this layer is new, .*adamr=False"),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_another_shape_has_a_way_out(kind: str) -> None:
    old, new, words = SHAPES[kind]
    base = torch.optim.SGD([("p", nn.Parameter(torch.ones(new)))], lr=0.1)
    with pytest.raises(optx.ShapeError, match=f"anchor for 'p' has shape .*{words}"):
        optx.wrap(base, AdamR(normalize=False, anchor={"p": torch.ones(old)}))
