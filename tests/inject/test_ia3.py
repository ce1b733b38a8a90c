"""IA3's laws, and PEFT's own numbers (arXiv 2205.05638)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import (
    assert_close,
    attached,
    bert,
    gpt2,
    ids,
    in_peft,
    llama,
    outputs,
    peft_talk,
    plain,
    shake,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@st.composite
def modules(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Everything IA3 serves, with an input."""
    kind = draw(st.sampled_from(["linear", "conv1d of transformers", "conv1", "conv2", "conv3"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    bias = draw(st.booleans())
    if kind == "linear":
        return nn.Linear(5, 3, bias=bias), torch.randn(*draw(st.sampled_from([(), (3,), (2, 3)])), 5)
    if kind == "conv1d of transformers":
        from transformers.pytorch_utils import Conv1D

        return Conv1D(3, 5), torch.randn(2, 3, 5)
    axes, groups = int(kind[-1]), draw(st.sampled_from([1, 2]))
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    batch = draw(st.sampled_from([(), (2,)]))
    module = make(4, 6, 3, stride=draw(st.integers(1, 2)), padding=1, groups=groups, bias=bias)
    return module, torch.randn(*batch, 4, *(5,) * axes)


@settings(max_examples=60)
@given(drawn=modules(), dtype=st.sampled_from([F32, F64, BF16]), feedforward=st.booleans())
def test_laws(drawn: tuple[nn.Module, Tensor], dtype: torch.dtype, feedforward: bool) -> None:
    """Exactly nothing at the start; merged is attached; unmerged and removed are exactly the base."""
    module, x = drawn[0].to(dtype), drawn[1].to(dtype)
    model = nn.ModuleDict({"it": module})
    base, before = module(x), {k: t.clone() for k, t in model.state_dict().items()}
    handle = optx.attach(model, optx.IA3(feedforward="it" if feedforward else ()), targets="it")
    assert torch.equal(module(x), base)

    shake(handle.parameters(), by=0.5)
    wanted = module(x)
    assert wanted.dtype == dtype
    assert (wanted - base).abs().max() > 1e-3
    handle.merge()
    tolerance = {F32: 1e-5, F64: 1e-12, BF16: 0.05}[dtype]
    torch.testing.assert_close(module(x), wanted, rtol=tolerance, atol=tolerance)
    handle.unmerge()
    assert torch.equal(module(x), wanted)
    handle.remove()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_the_output_is_the_formulas() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    x = torch.randn(2, 5, dtype=F64)
    attached(model, optx.IA3(feedforward="1"), targets="0|1")
    first, second = (layer.optx.ia3.scale for layer in model)  # type: ignore[union-attr]
    assert (first.shape, second.shape) == ((4, 1), (1, 4))
    hidden = first[:, 0] * (x @ model[0].weight.T + model[0].bias)  # type: ignore[operator]
    assert_close(model(x), (second[0] * hidden) @ model[1].weight.T + model[1].bias, 1e-14)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "outputs_of", "inputs_of"),
    [
        (llama, ["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]),
        (bert, ["attention.self.key", "attention.self.value"], ["output.dense"]),
        (gpt2, ["attn.c_attn"], ["mlp.c_proj"]),
    ],
)
def test_defaults_are_keys_values_and_the_ffns_second_module(
    make: Callable[[], Any], outputs_of: list[str], inputs_of: list[str]
) -> None:
    handle = optx.attach(make(), optx.IA3())
    sides: dict[bool, set[str]] = {False: set(), True: set()}
    for one in handle.served:
        sides[one.part.folds_input].add(one.path.split(".", 3 if "encoder" not in one.path else 4)[-1])
    blocks = 2
    assert len(handle) == blocks * (len(outputs_of) + len(inputs_of))
    for found, wanted in ((sides[False], outputs_of), (sides[True], inputs_of)):
        assert all(any(path.endswith(end) for path in found) for end in wanted)
        assert all(path.endswith(tuple(wanted)) for path in found)
    assert not any("attention.output" in path for path in sides[True])


def test_numbers_of_the_paper() -> None:
    """Section 3.3: d_k + d_v + d_ff per block."""
    assert optx.attach(llama(), optx.IA3()).report().trainable == 2 * (8 + 8 + 24)


@pytest.mark.parametrize("feedforward", ["0", ()])
@pytest.mark.parametrize("first", [optx.LoRA(rank=2), optx.IA3()])
def test_stacked_with_lora_it_merges_in_the_order_of_the_call(
    feedforward: Any, first: optx.Injection
) -> None:
    """The input's scale comes first in the call, so it folds last, whichever was attached first."""
    ia3 = optx.IA3(feedforward=feedforward)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4)), torch.randn(3, 5)
    stack = [first, ia3] if isinstance(first, optx.LoRA) else [ia3, optx.LoRA(rank=2)]
    handles = [attached(model, one, targets="0") for one in stack]
    wanted = model(x)
    inner, outer = handles if isinstance(first, optx.LoRA) or not feedforward else handles[::-1]
    with pytest.raises(optx.MergeError, match=r"acts on '0' too and is not merged"):
        outer.merge()
    for handle in (inner, outer):
        handle.merge()
        assert_close(model(x), wanted)
    for handle in (outer, inner):
        handle.unmerge()
        assert_close(model(x), wanted)
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_merging_into_half_precision_is_as_exact_as_pefts(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama().to(dtype)
    start = copy.deepcopy(model)
    attached(model, optx.IA3()).save(tmp_path)
    exact = copy.deepcopy(start).double()
    optx.attach(exact, tmp_path).merge_and_unload()
    ours = copy.deepcopy(start)
    optx.attach(ours, tmp_path).merge_and_unload()
    with peft_talk():
        theirs = in_peft(copy.deepcopy(start), tmp_path).merge_and_unload()
    errors = [
        sum(float((one.state_dict()[k].double() - t).abs().sum()) for k, t in exact.state_dict().items())
        for one in (ours, theirs)
    ]
    assert errors[0] <= errors[1]


def test_gradients_are_pefts(tmp_path: Path) -> None:
    from peft import PeftModel

    model = llama()
    handle = attached(model, optx.IA3())
    handle.save(tmp_path)
    with peft_talk():
        other = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    for one in (model, other):
        one(ids()).logits.square().mean().backward()
    theirs = {name.replace(".default", ""): p.grad for name, p in other.named_parameters() if p.requires_grad}
    assert len(theirs) == len(handle)
    for one in handle.served:
        assert_close(one.part.scale.grad, theirs[f"base_model.model.{one.path}.ia3_l"], 1e-6)


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    def steps(model: Any, opt: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            model(ids()).logits.square().mean().backward()
            opt.step()
            opt.zero_grad()

    def start() -> tuple[Any, optx.Handle, torch.optim.Optimizer]:
        model = llama()
        handle = optx.attach(model, optx.IA3())
        return model, handle, torch.optim.AdamW(handle.parameters(), lr=0.01)

    whole, _, opt = start()
    steps(whole, opt, 6)
    model, handle, opt = start()
    steps(model, opt, 3)
    handle.save(tmp_path / "adapter")
    torch.save(opt.state_dict(), tmp_path / "optimizer")
    fresh, again, opt = start()
    again.load(tmp_path / "adapter")
    opt.load_state_dict(torch.load(tmp_path / "optimizer", weights_only=True))
    steps(fresh, opt, 3)
    assert torch.equal(outputs(fresh), outputs(whole))


def test_small_changes_of_a_scale_reach_half_precision_outputs() -> None:
    """A float32 scale of 1.003 is 1 in bfloat16: the product is taken in float32 and rounded once."""
    model = nn.Sequential(nn.Linear(64, 64)).to(BF16)
    x = torch.randn(64, 64, dtype=BF16)
    base = model(x)
    optx.attach(model, optx.IA3(), targets="0")
    with torch.no_grad():
        model[0].optx.ia3.scale.mul_(1.003)  # type: ignore[union-attr]
    changed = (model(x) != base).float().mean()
    assert changed > 0.3


@pytest.mark.parametrize(
    ("make", "injection", "targets", "message"),
    [
        (plain, optx.IA3(), "emb", r"IA3 serves Linear, .*'emb' is a Embedding"),
        (plain, optx.IA3(feedforward="f"), "fc", r"feedforward='f' is none of the targets. Near: 'fc'"),
        (plain, optx.IA3(feedforward=("fcc",)), "fc", r"feedforward=\('fcc',\) is none of the targets"),
    ],
)
def test_targets_it_cannot_serve(
    make: Callable[[], nn.Module], injection: optx.IA3, targets: str, message: str
) -> None:
    with pytest.raises(optx.TargetError, match=message):
        optx.attach(make(), injection, targets=targets)


@pytest.mark.parametrize("value", ["(", 3, [1], ("a", 2)])
def test_bad_feedforward(value: Any) -> None:
    with pytest.raises(optx.OptxError, match="IA3: feedforward"):
        optx.IA3(feedforward=value)


def test_lists_of_feedforward_modules_are_names() -> None:
    ia3 = optx.IA3(feedforward=["fc"])  # type: ignore[arg-type]
    handle = optx.attach(plain(), ia3, targets=r"fc|block\.fc|head")
    assert {one.path for one in handle.served if one.part.folds_input} == {"fc", "block.fc"}
    assert hash(ia3) == hash(optx.IA3(feedforward=("fc",)))
