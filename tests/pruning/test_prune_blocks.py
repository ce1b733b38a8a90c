"""The walk through a model's blocks: each pruned by what the pruned blocks before it hand on."""

from __future__ import annotations

import gc
import random
from typing import Any

import numpy as np
import pytest
import torch
from adapter_models import Plain, bert, gpt2, llama
from torch import Tensor, nn
from walk_by_hand import assert_same, walk

import optx


def ids(count: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(seed))


BATCHES = [ids(seed=seed, length=8 + seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (llama, ["model.layers.0", "model.layers.1"]),
        (gpt2, ["transformer.h.0", "transformer.h.1"]),
        (bert, ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
    ],
)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_it_is_what_running_the_whole_model_for_each_block_gives(
    make: Any, blocks: list[str], method: str
) -> None:
    model, by_hand = make(), make()
    masks = optx.prune(model, optx.Wanda() if method == "wanda" else optx.SparseGPT(), BATCHES)
    kept = walk(by_hand, blocks, lambda: [by_hand(batch) for batch in BATCHES], method)
    assert_same(masks, kept, 1.0 if method == "wanda" else 0.98)
    masks.verify(model)
    for name, p in model.named_parameters():
        want = by_hand.get_parameter(name)
        if method == "wanda" or name not in masks:
            assert torch.equal(p, want), name
        else:
            assert (p - want).norm() < 0.05 * want.norm(), name


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(side: str) -> None:
    model, by_hand = llama(), llama()
    tokens, mask = ids(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[0, 5:] = mask[1, 2:] = 0
    if side == "left":
        mask = mask.flip(1)
    padded = {"input_ids": tokens * mask, "attention_mask": mask, "labels": tokens}
    masks = optx.prune(model, optx.Wanda(), [padded])
    positional = (tokens * mask, mask)
    assert optx.prune(llama(), optx.Wanda(), [positional]) == masks
    with torch.inference_mode():
        assert optx.prune(llama(), optx.Wanda(), [positional]) == masks
    kept = walk(by_hand, ["model.layers.0", "model.layers.1"], lambda: by_hand(**padded), counted=mask.bool())
    assert_same(masks, kept)


def test_other_models_layer_by_layer_in_the_order_in_which_they_run() -> None:
    class Late(nn.Module):
        """What is defined first runs last."""

        def __init__(self) -> None:
            super().__init__()
            self.out, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
            self.inner, self.first = nn.Linear(8, 6), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.out(self.inner(self.first(x).tanh()).relu()))

    torch.manual_seed(0)
    model, by_hand = Late(), Late()
    by_hand.load_state_dict(model.state_dict())
    batches = list(torch.randn(3, 16, 4))
    masks = optx.prune(model, optx.Wanda(), batches)
    assert_same(masks, walk(by_hand, ["first", "inner", "out"], lambda: list(map(by_hand, batches))))


class Twice(nn.Module):
    """Blocks that are gone through twice, as in Universal Transformers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "twice":
            for block in (*self.blocks, *self.blocks):
                x = block(x)
        if self.how == "skips":  # an early output is used late
            early = x = self.blocks[0](x)
            for block in self.blocks[1:]:
                x = block(x + early)
        if self.how == "not called":
            for block in self.blocks:
                x = block[1](block[0](x))
        return x


@pytest.mark.parametrize("how", ["twice", "skips", "not called"])
def test_blocks_that_do_not_follow_one_another_are_reached_by_running_the_model(how: str) -> None:
    torch.manual_seed(0)
    model, by_hand = Twice(how), Twice(how)
    by_hand.load_state_dict(model.state_dict())
    batches = list(torch.randn(2, 16, 8))
    masks = optx.prune(model, optx.Wanda(), batches, targets=nn.Linear)
    kept = walk(by_hand, [f"blocks.{i}" for i in range(3)], lambda: list(map(by_hand, batches)))
    assert_same(masks, kept)


class Value(nn.Module):
    """A block that adds the first block's output, which it gets beside its hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, value: Tensor | None = None) -> Tensor:
        made = self.fc(x).tanh()
        return made if value is None else made + value


class Values(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Value() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.blocks[0](x)
        for block in list(self.blocks)[1:]:
            x = block(x, value=first)
        return x


def test_what_blocks_are_given_beside_hidden_states_may_depend_on_these() -> None:
    torch.manual_seed(0)
    model, by_hand = Values(), Values()
    by_hand.load_state_dict(model.state_dict())
    batches = list(torch.randn(2, 16, 8))
    masks = optx.prune(model, optx.Wanda(), batches, targets=nn.Linear)
    kept = walk(by_hand, [f"blocks.{i}" for i in range(3)], lambda: list(map(by_hand, batches)))
    assert_same(masks, kept)


@pytest.mark.parametrize("fails", [False, True])
def test_it_leaves_no_trace(fails: bool) -> None:
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].mlp.eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    if fails:
        model.model.layers[1].mlp.down_proj.weight.data.mul_(0).add_(3e38)
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    seeds = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    if fails:  # what the last norm would be given is inf, and what this block's layers are given is not
        extra = torch.full((1, 4), 5)
        with pytest.raises(optx.OptxError, match="inf or nan"):
            optx.prune(model, optx.Wanda(), [extra], targets=[nn.Linear])
    else:
        optx.prune(model, optx.Wanda(), torch.utils.data.DataLoader(ids(4), batch_size=2, shuffle=True))
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), seeds[0])
    assert np.array_equal(np.random.get_state()[1], seeds[1])
    assert random.getstate() == seeds[2]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", [optx.Wanda(), optx.SparseGPT(pattern="2:4"), optx.Magnitude()])
def test_weights_of_other_dtypes(dtype: torch.dtype, method: Any) -> None:
    model = llama().to(dtype)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = optx.prune(model, method, [ids()])
    for name, p in model.named_parameters():
        assert p.dtype == dtype
        if name not in masks or not isinstance(method, optx.SparseGPT):
            kept = masks[name] if name in masks else torch.ones_like(p, dtype=torch.bool)
            assert torch.equal(p, dense[name].masked_fill(~kept, 0)), name
        else:
            assert (p[~masks[name]] == 0).all()
            assert p.isfinite().all()


def test_a_weight_that_grows_too_large_for_its_dtype() -> None:
    layer, x = nn.Linear(2, 1, bias=False).half(), torch.randn(20, 1) + 0.01 * torch.randn(20, 2)
    layer.weight.data.fill_(6e4)  # what is kept takes over what goes
    with pytest.raises(optx.OptxError, match=r"'weight' would be inf or nan in torch.float16"):
        optx.prune(layer, optx.SparseGPT(damping=0), [x.half() / 100])
    assert layer.weight.tolist() == [[6e4, 6e4]]


def test_a_compiled_model_is_pruned_as_the_one_it_was_made_from() -> None:
    model, alone = llama(), llama()
    masks = optx.prune(torch.compile(model), optx.Wanda(), [ids()])
    assert masks == optx.prune(alone, optx.Wanda(), [ids()])
    masks.verify(model)


def test_a_cache_of_keys_is_not_added_to() -> None:
    class Caching(nn.Module):
        """Makes a cache whatever it is told, as some models do."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, x: Tensor) -> Any:
            return self.inner(x, use_cache=True)

    torch.manual_seed(0)
    masks = optx.prune(Caching(), optx.Wanda(), [ids()], targets=r".*_proj")
    assert dict_of(masks) == dict_of(optx.prune(llama(), optx.Wanda(), [ids()]))


def dict_of(masks: optx.Masks) -> dict[str, list[bool]]:
    return {name.removeprefix("inner."): mask.flatten().tolist() for name, mask in masks.items()}


def test_it_holds_the_activations_between_two_blocks_and_no_more() -> None:
    torch.manual_seed(0)
    width, batches = 32, [torch.randn(4, 50, 32) for _ in range(6)]
    block = [
        nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(10)
    ]
    model = nn.Sequential(*block)
    most, calls = [0], [0]

    def measure(*_: Any) -> None:
        calls[0] += 1
        if calls[0] % 5:  # all that Python knows is gone through: at a few places
            return
        known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *batches]}
        found = {
            one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
            for one in gc.get_objects()
            if type(one) in (Tensor, nn.Parameter)  # isinstance would wake torch's deprecated names
            and one.layout == torch.strided  # other tests' sparse tensors have no storage
        }
        most[0] = max(most[0], sum(size for place, size in found.items() if place not in known))

    calls[0] = 4
    measure()
    before = most[0]
    block[7][1].register_forward_hook(measure)
    optx.prune(model, optx.Wanda(), batches, targets=nn.Linear)
    assert calls[0] >= 18
    activations = sum(batch.numel() * 4 for batch in batches)
    inside = (
        2 * 2 * batches[0].numel() * 4
    )  # of one block on one batch: inputs of its second layer, and GELU's
    assert most[0] - before <= activations + 2 * batches[0].numel() * 4 + inside
    assert most[0] - before >= activations  # they are what was measured


def test_plain_models_with_convolutions() -> None:
    torch.manual_seed(0)
    model = Plain()
    masks = optx.prune(model, optx.SparseGPT(), [torch.randint(0, 12, (4, 7))])
    assert set(masks) == {f"{n}.weight" for n in ("conv1", "conv", "one", "fc", "block.fc")}
    assert {name: int((~masks[name]).sum()) for name in masks} == {
        name: model.get_parameter(name).numel() // 2 for name in masks
    }


def test_progress_is_shown_by_what_wraps_the_blocks_names() -> None:
    seen: list[str] = []

    def bar(names: Any) -> Any:
        for name in names:
            seen.append(name)
            yield name

    optx.prune(llama(), optx.Wanda(), [ids()], progress=bar)
    assert seen == ["model.layers.0", "model.layers.1"]
