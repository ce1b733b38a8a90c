"""Weights that are derived, offloaded or watched by others: cases parametrized.py, offload.py and "
"in_place.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from injections import llama, move, tokens
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm

import optx


def old_weight_norm(lin: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.nn.utils.weight_norm(lin)


DERIVED: dict[str, Callable[[nn.Module], Any]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight norm, old": old_weight_norm,
    "spectral norm, old": old_spectral_norm,
    "pruned": lambda lin: prune.l1_unstructured(lin, "weight", 0.5),
    "pruned bias": lambda lin: prune.l1_unstructured(lin, "bias", 0.5),
}
METHODS: dict[str, Callable[[], optx.Injection]] = {
    "LoRA": lambda: optx.LoRA(rank=2),
    "DoRA": lambda: optx.LoRA(rank=2, dora=True),
    "SVFit": lambda: optx.SVFit(rank=2),
    "FLoRA": lambda: optx.FLoRA(rank=2),
    "IA3": lambda: optx.IA3(feedforward=()),
    "BitFit": optx.BitFit,
    "adapter": lambda: optx.SequentialAdapter(rank=2),
}


@pytest.mark.parametrize("kind", DERIVED)
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "SVFit", "FLoRA", "IA3"])
def test_a_derived_weight_is_served_and_not_merged_into(kind: str, method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    DERIVED[kind](model[0])
    model.eval()
    x = torch.randn(3, 6)
    base = model(x)
    handle = optx.attach(model, METHODS[method](), targets="0")
    torch.testing.assert_close(model(x), base)
    move(handle)
    want = model(x)
    for merge in (handle.merge, handle.merge_and_unload):
        with pytest.raises(optx.MergeError, match=r"merge: 0\.(weight|bias) is made by .* at every call"):
            merge()
    assert not handle.merged
    assert torch.equal(model(x), want)
    handle.remove()
    assert torch.equal(model(x), base)


def test_a_weight_that_is_a_parameter_again_is_merged_into() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    parametrizations.weight_norm(model[0])
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
    move(handle)
    x = torch.randn(3, 6)
    want = model(x)
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    handle.merge()
    torch.testing.assert_close(model(x), want)


def test_looking_at_a_spectral_norm_takes_no_step_of_it() -> None:
    models = [nn.Sequential(nn.Linear(6, 6)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        torch.manual_seed(0)
        parametrizations.spectral_norm(model[0])
    optx.attach(models[1], optx.LoRA(rank=2, dora=True), targets="0")
    for _ in range(3):
        for model in models:
            model(torch.ones(2, 6))
    u, v = (model[0].parametrizations.weight[0]._u for model in models)
    assert torch.equal(u, v)


def test_the_mask_of_what_was_loaded_since_counts() -> None:
    """An older derived weight is made before a call: until then the attribute is that of another "
    "checkpoint."""
    model = nn.Sequential(nn.Linear(6, 6))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with torch.no_grad():
        model[0].weight_orig.mul_(3)
    handle = optx.attach(model, optx.LoRA(rank=2, dora=True), targets="0")
    want = (model[0].weight_orig * model[0].weight_mask).norm(dim=1)
    torch.testing.assert_close(handle.served[0].part.magnitude, want)


# ---- accelerate's offloading -------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval()


def to_disk(model: nn.Module, folder: Path) -> None:
    pytest.importorskip("accelerate").disk_offload(model, folder, execution_device="cpu")


def to_memory(model: nn.Module, folder: Path) -> None:
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")


def dispatched(model: nn.Module, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    spread = {"0": "cpu", "1": "cpu", "2": "disk"}
    accelerate.dispatch_model(model, spread, main_device="cpu", offload_dir=folder, force_hooks=True)


def undo(model: nn.Module) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)


OFFLOADS = [to_memory, to_disk, dispatched]


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_offloaded_after_attach(method: str, offload: Callable[..., None], tmp_path: Path) -> None:
    model, x = net(), torch.randn(2, 3, 8)
    base = model(x)
    handle = optx.attach(model, METHODS[method](), targets="0|2")
    move(handle)
    want, saved = model(x), handle.state_dict()
    saved = {key: tensor.clone() for key, tensor in saved.items()}
    offload(model, tmp_path / "weights")
    assert torch.equal(model(x), want)
    found = handle.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in saved.items())
    handle.save(tmp_path / "adapter")
    with pytest.raises(
        optx.MergeError, match="is offloaded by accelerate" if method != "adapter" else "not a change"
    ):
        handle.merge()
    assert torch.equal(model(x), want)
    undo(model)
    assert torch.equal(model(x), want)
    handle.remove()
    assert torch.equal(model(x), base)
    optx.attach(model, tmp_path / "adapter")
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("method", METHODS)
def test_attached_after_offload(method: str, offload: Callable[..., None], tmp_path: Path) -> None:
    plain, x = net(), torch.randn(2, 3, 8)
    torch.manual_seed(1)
    wanted = optx.attach(plain, METHODS[method](), targets="0|2")
    move(wanted)
    model = net()
    offload(model, tmp_path)
    torch.manual_seed(1)
    handle = optx.attach(model, METHODS[method](), targets="0|2")
    assert not any(p.is_meta for p in handle.parameters())
    move(handle)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for p, q in zip(handle.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    with pytest.raises(optx.MergeError, match="offloaded" if method != "adapter" else "not a change"):
        handle.merge()
    undo(model)
    if method != "adapter":
        handle.merge()
        torch.testing.assert_close(model(x), plain(x))
    handle.remove()
    assert torch.equal(model(x), net()(x))


@torch.no_grad()
def test_loading_into_what_is_offloaded(tmp_path: Path) -> None:
    model, x = net(), torch.randn(2, 3, 8)
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0|2")
    base = model(x)
    start = {key: tensor.clone() for key, tensor in handle.state_dict().items()}
    move(handle)
    to_memory(model, tmp_path)
    handle.load_state_dict(start)
    assert torch.equal(model(x), base)
    undo(model)
    to_disk(model, tmp_path)
    with pytest.raises(optx.OptxError, match="is offloaded to disk"):
        handle.load_state_dict(start)


def test_training_what_is_offloaded_is_warned_of() -> None:
    model = net().train()
    optx.attach(model, optx.LoRA(rank=2), targets="0")
    to_memory(model, Path())
    with pytest.warns(UserWarning, match="no gradient reaches it there"):
        model(torch.randn(2, 8))


@torch.no_grad()
def test_a_prefix_is_offloaded_too(tmp_path: Path) -> None:
    model: Any = llama()
    handle = optx.attach(model, optx.PrefixTuning(length=3))
    handle.save(tmp_path / "before")
    want = model(tokens()).logits
    to_memory(model, Path())
    assert torch.equal(model(tokens()).logits, want)
    assert all(p.is_meta for p in handle.parameters())
    handle.save(tmp_path / "after")
    before, after = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("before", "after")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---- outputs that others hold ------------------------------------------------------------------------------


def lora_on(model: nn.Module) -> optx.Handle:
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
    move(handle)
    return handle


def test_a_hook_on_all_modules_may_keep_outputs() -> None:
    model, kept = nn.Sequential(nn.Linear(8, 8, bias=False)), list[Tensor]()
    lora_on(model)
    everywhere = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: (
            kept.append(output.square().mean()) if type(module) is nn.Linear else None
        )
    )
    try:
        out = model(torch.randn(2, 3, 8))
    finally:
        everywhere.remove()
    (out.sum() + kept[0]).backward()


@pytest.mark.parametrize("where", ["module", "class"])
def test_a_forward_that_returns_what_it_was_given(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 3, 8)
    if where == "module":
        model[0].forward = lambda x: x
    else:
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    lora_on(model)
    before = x.clone()
    with torch.no_grad():
        assert not torch.equal(model(x), before)
    assert torch.equal(x, before)


def test_a_mode_that_keeps_outputs() -> None:
    """As selective activation checkpointing does."""
    from torch.utils._python_dispatch import TorchDispatchMode

    kept: list[tuple[Tensor, Tensor]] = []

    class Keep(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if "mm" in str(func):
                kept.append((out, out.clone()))
            return out

    model = nn.Sequential(nn.Linear(8, 8))
    lora_on(model)
    with torch.no_grad(), Keep():
        model(torch.randn(2, 3, 8))
    assert kept
    assert all(torch.equal(a, b) for a, b in kept)


def test_selective_checkpointing() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(2, 3, 8)
    handle = lora_on(model)
    model(x).sum().backward()
    want = [p.grad.clone() for p in handle.parameters()]
    handle.parameters()[0].grad = None

    def policy(*_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE

    model.zero_grad()
    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    checkpoint(model, x, use_reentrant=False, context_fn=contexts).sum().backward()
    for p, g in zip(handle.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_where_nobody_holds_it_the_output_is_written_to() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8, bias=False)), torch.randn(2, 3, 8)
    handle = lora_on(model)
    assert handle.served[0].part.owns(model[0])
    with torch.no_grad():
        assert model(x)._version == 1
