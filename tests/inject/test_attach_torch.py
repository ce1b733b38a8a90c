"""What is attached runs under torch's own machinery: compile, checkpointing, functional calls, autocast."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from injections import ROWS, TRANSFORMERS, Row, checkpoint_layers, clone, llama, move, no_dropout, run, tokens
from torch import Tensor, nn

import optx

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
on_transformers = pytest.mark.parametrize(
    "row", [row for row in ROWS if row.model in TRANSFORMERS], ids=lambda row: row.label
)

# One of each way to be part of a forward pass: these are put through AOT autograd too, and compiled anew once
# disabled, each of which takes as long again.
ONE_OF_EACH = ("LoRA", "SVFit, conv", "IA3", "MAM", "PrefixTuning", "Aside", "STN")


def gradients(model: nn.Module, handle: optx.Handle) -> dict[str, Tensor]:
    """Gradients of everything attached, for a loss that sees every logit."""
    model.zero_grad(set_to_none=True)
    logits = run(model).double()
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return {name: p.grad.clone() for name, p in handle.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item() + 1e-8
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance * scale, msg=name)


@each_row
def test_everything_attached_gets_a_gradient(row: Row) -> None:
    model, handle = row.attached()
    optx.trainable_only(model, handle)
    found = gradients(model, handle)
    assert found.keys() == row.learning(handle).keys()
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.long(keep=9)
@each_row
def test_compile_fullgraph(row: Row) -> None:
    model, handle = row.attached(model=row.shortest())
    optx.trainable_only(model, handle)
    output, wanted = run(model), gradients(model, handle)
    backend = "aot_eager" if row.label in ONE_OF_EACH else "eager"
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(run(compiled), output, rtol=1e-5, atol=1e-5)
    model.zero_grad(set_to_none=True)
    logits = run(compiled).double()
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    found = {name: p.grad for name, p in handle.named_parameters() if p.grad is not None}
    assert_close(found, wanted, 1e-4)
    if row.label in ONE_OF_EACH:
        handle.disable()
        with torch.no_grad():
            torch.testing.assert_close(run(compiled), run(row.shortest()), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_attaching_to_a_compiled_model_warns() -> None:
    model = llama()
    compiled: Any = torch.compile(model, backend="eager")
    run(compiled)
    with pytest.warns(UserWarning, match=r"given to torch\.compile.*torch\._dynamo\.reset\(\)"):
        handle = optx.attach(model, optx.LoRA(rank=2))
    move(handle)
    torch._dynamo.reset()  # as the warning says
    torch.testing.assert_close(run(compiled), run(model))
    assert not torch.equal(run(compiled), run(llama()))


def test_attaching_after_module_compile_warns() -> None:
    model = llama()
    model.compile(backend="eager")
    run(model)
    with pytest.warns(UserWarning, match=r"torch\._dynamo\.reset\(\)"):
        optx.attach(model, optx.LoRA(rank=2))


def test_another_compiled_model_is_no_reason_to_warn() -> None:
    other = torch.compile(nn.Linear(2, 2), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optx.attach(nn.Sequential(nn.Linear(4, 4)), optx.LoRA(rank=2), targets="0")
    assert other is not None


@on_transformers
def test_activation_checkpointing(row: Row) -> None:
    model, handle = row.attached()
    optx.trainable_only(model, handle)
    model.train()
    no_dropout(model)
    wanted = gradients(model, handle)
    checkpoint_layers(model)
    assert_close(gradients(model, handle), wanted, 1e-6)


@each_row
def test_functional_call(row: Row) -> None:
    model, handle = row.attached()
    wanted = run(model)
    bare, other = row.attached(moved=False)
    values = {name: p.detach().clone() for name, p in handle.named_parameters()}
    held = {name: p.detach().clone() for name, p in other.named_parameters()}

    class Call(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.func.functional_call(bare, values, (x,))

        def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
            return bare.modules()

    torch.testing.assert_close(run(Call()), wanted, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(p, held[name]) for name, p in other.named_parameters())


def test_vmap_over_adapters() -> None:
    """An ensemble of adapters over one base, in one call."""
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 2))
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0|2")
    names = [name for name, _ in handle.named_parameters()]
    stacked = {name: torch.randn(3, *p.shape) for name, p in handle.named_parameters()}
    x = torch.randn(4, 6)

    def call(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,))

    together = torch.vmap(call)(stacked)
    for i in range(3):
        torch.testing.assert_close(
            together[i], call({name: stacked[name][i] for name in names}), rtol=1e-4, atol=1e-5
        )


@each_row
def test_autocast_bf16(row: Row) -> None:
    model, handle = row.attached()
    optx.trainable_only(model, handle)
    wanted = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model)
        output.float().square().sum().backward()
    scale = wanted.abs().max().item()
    torch.testing.assert_close(output.float(), wanted, rtol=0, atol=0.05 * scale)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in row.learning(handle).values())


@each_row
def test_two_forwards_before_one_backward(row: Row) -> None:
    model, handle = row.attached()
    optx.trainable_only(model, handle)
    once = gradients(model, handle)
    model.zero_grad(set_to_none=True)
    first, second = run(model).double(), run(model).double()
    weights = torch.linspace(-1, 1, first.numel()).view_as(first)
    ((first + second) * weights).sum().backward()
    found = {name: p.grad / 2 for name, p in handle.named_parameters() if p.grad is not None}
    assert_close(found, once, 1e-6)


@pytest.mark.long(keep=2)
@each_row
def test_resume_is_bit_identical(row: Row) -> None:
    def steps(model: nn.Module, opt: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            opt.zero_grad()
            run(model).square().mean().backward()
            opt.step()

    def start() -> tuple[nn.Module, optx.Handle, torch.optim.Optimizer]:
        model, handle = row.attached()
        optx.trainable_only(model, handle)
        return model, handle, torch.optim.AdamW(handle.parameters(), lr=1e-2)

    model, _, opt = start()
    steps(model, opt, 6)
    broken, handle, opt = start()
    steps(broken, opt, 3)
    saved, state = {k: t.clone() for k, t in handle.state_dict().items()}, clone_state(opt)
    resumed, again, fresh = start()
    again.load_state_dict(saved)
    fresh.load_state_dict(state)
    steps(resumed, fresh, 3)
    assert torch.equal(run(resumed), run(model))


def clone_state(opt: torch.optim.Optimizer) -> dict[str, Any]:
    import copy

    return copy.deepcopy(opt.state_dict())


@pytest.mark.long(keep=2)
@pytest.mark.filterwarnings("ignore:save. PEFT can't read this adapter")
@each_row
def test_save_and_load_in_a_fresh_model(row: Row, tmp_path: Any) -> None:
    model, handle = row.attached()
    handle.save(tmp_path / "adapter")
    fresh = row.model()
    again = optx.attach(fresh, tmp_path / "adapter")
    torch.testing.assert_close(run(fresh), run(model), rtol=0, atol=0)
    assert again.state_dict().keys() == handle.state_dict().keys()
    other = row.attach(row.model())
    other.load(tmp_path / "adapter")
    assert all(torch.equal(t, handle.state_dict()[key]) for key, t in other.state_dict().items())


@pytest.mark.parametrize("row", [row for row in ROWS if row.model is llama], ids=lambda row: row.label)
def test_cached_generation_equals_uncached(row: Row) -> None:
    model, _ = row.attached()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = tokens()
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **options)  # type: ignore[operator]
    plain = model.generate(prompt, attention_mask=mask, use_cache=False, **options)  # type: ignore[operator]
    assert torch.equal(cached, plain)


@pytest.mark.long(keep=2)
@each_row
def test_deepcopy_trains_apart(row: Row) -> None:
    model, handle = row.attached()
    twin = clone(model)
    optx.trainable_only(model, handle)
    gradients(model, handle)
    assert all(p.grad is None for p in twin.parameters())
