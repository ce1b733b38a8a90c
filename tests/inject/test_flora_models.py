"""FLoRA where a model goes: files, compiled, checkpointed, copied, autocast, and trained in fewer numbers."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import llama, move, part_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from weight_modules import MODULES, PIXELS, TOKENS, resnet, serve

import optx
from optx import FLoRA

BF16 = torch.bfloat16
REAL: dict[str, tuple[Any, Tensor, FLoRA]] = {
    "llama": (lambda: llama(use_cache=False), TOKENS, FLoRA(rank=3)),
    "resnet": (resnet, PIXELS, FLoRA(rank=3, kernel_rank=None)),
}


def out_of(output: Any) -> Tensor:
    return getattr(output, "logits", output)


def train(model: nn.Module, x: Tensor, opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        out = out_of(model(x.roll(step, -1)))
        F.cross_entropy(out.flatten(0, -2), torch.arange(out.numel() // out.shape[-1]) % 5).backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("kind", REAL)
def test_state_goes_to_a_fresh_model_and_a_resumed_run_is_the_same_run(kind: str, tmp_path: Path) -> None:
    build, x, injection = REAL[kind]

    def start(seed: int) -> tuple[nn.Module, optx.Handle, torch.optim.Optimizer]:
        model = build()
        torch.manual_seed(seed)
        handle = optx.attach(model, injection)
        optx.trainable_only(model, handle)
        return model, handle, torch.optim.AdamW(handle.parameters(), lr=1e-2)

    whole, _, opt = start(1)
    train(whole, x, opt, range(6))
    first, handle, opt = start(1)
    train(first, x, opt, range(3))
    torch.save({"adapter": handle.state_dict(), "opt": opt.state_dict()}, tmp_path / "half.pt")
    second, other, opt = start(2)
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    other.load_state_dict(saved["adapter"])
    assert torch.equal(out_of(second(x)), out_of(first(x)))
    opt.load_state_dict(saved["opt"])
    train(second, x, opt, range(3, 6))
    assert torch.equal(out_of(second(x)), out_of(whole(x)))
    assert not torch.equal(out_of(second(x)), out_of(first(x)))


@pytest.mark.long
@pytest.mark.parametrize("kind", REAL)
def test_compiles_in_one_graph(kind: str) -> None:
    build, x, injection = REAL[kind]
    model = build()
    handle = optx.attach(model, injection)
    move(handle)
    compiled = out_of(torch.compile(model, fullgraph=True, backend="aot_eager")(x))
    plain = out_of(model(x))
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(out.square().mean(), handle.parameters()) for out in (plain, compiled)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d in groups"])
def test_activation_checkpointing_deepcopy_pickle_and_functional_call(kind: str) -> None:
    build, x = MODULES[kind]
    model, handle = serve(build(), FLoRA(rank=2, dropout=0.5), 0.3)
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    plain = torch.autograd.grad(model(x).square().sum(), [x, *handle.parameters()])
    torch.manual_seed(0)
    again: Any = checkpoint(model, x, use_reentrant=False)
    again = torch.autograd.grad(again.square().sum(), [x, *handle.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        with torch.no_grad():
            twin[0].optx.flora.core.zero_()
        assert not torch.equal(twin(x), model(x))
    zero = {"0.optx.flora.core": torch.zeros_like(part_of(handle).core)}
    assert torch.equal(torch.func.functional_call(model, zero, (x,)), model[0].forward(x))


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d in groups"])
def test_dropout_is_on_the_updates_input_while_training(kind: str) -> None:
    build, x = MODULES[kind]
    model, handle = serve(build(), FLoRA(rank=2, dropout=0.999999), 0.3)
    bare = model[0].forward(x)
    assert torch.equal(model(x), bare)
    model.eval()
    assert not torch.allclose(model(x), bare, atol=1e-3)
    assert len(handle) == 1


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d in groups", "embedding"])
def test_bf16_autocast(kind: str) -> None:
    build, x = MODULES[kind]
    model, handle = serve(build(), FLoRA(rank=2))
    with torch.autocast("cpu", BF16):
        bare = model[0].forward(x)
        assert torch.equal(model(x), bare)
    move(handle)
    with torch.autocast("cpu", BF16):  # another one, for it keeps the weights it has cast
        low = model(x)
        assert low.dtype == bare.dtype
        low.float().square().sum().backward()
    full = model(x)
    torch.testing.assert_close(low.float(), full, rtol=0, atol=0.03 * full.abs().max().item())
    assert part_of(handle).core.grad.abs().max() > 0


def test_linears_form_no_matrix_of_the_weights_size() -> None:
    model, handle = serve(nn.Linear(300, 200), FLoRA(rank=2), 0.1)
    shapes: list[tuple[int, ...]] = []
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in own:
                shapes.append(tuple(out.shape))
            return out

    with Watch():
        model(torch.randn(3, 300))
    assert (3, 200) in shapes
    assert max(map(math.prod, shapes)) == 3 * 300
    assert len(handle) == 1


def test_convolutions_of_a_resnet_train_in_fewer_numbers_than_they_have() -> None:
    model = resnet()
    handle = optx.attach(model, FLoRA(rank=3))
    optx.trainable_only(model, handle)
    opt = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    labels = torch.tensor([0, 1])
    before = F.cross_entropy(model(PIXELS), labels).item()
    train(model, PIXELS, opt, range(0, 12))
    assert F.cross_entropy(model(PIXELS), labels).item() < before - 0.1
