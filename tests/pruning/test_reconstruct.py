"""Blocks that are pruned and fitted, one after the other, to what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_models import gpt2, llama
from torch import Tensor, nn

import optx
from optx import OptxError, Perp


def ids(seed: int, padded: bool = False) -> Any:
    tokens = torch.randint(3, 64, (3, 10), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, 6:] = 0
    return {"input_ids": tokens, "attention_mask": mask} if padded else tokens


DATA = [ids(seed, seed % 2 == 0) for seed in range(4)]


def block_outputs(model: Any, x: Tensor, block: int) -> Tensor:
    """Hidden states that a block hands on."""
    with torch.no_grad():
        return model(x, output_hidden_states=True).hidden_states[block + 1]


@pytest.mark.parametrize("adapter", ["none", "mask", "scale", "lora_prune"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_every_block_comes_nearer_and_keeps_its_zeros(make: Any, adapter: Any) -> None:
    model, alone = make(), make()
    done = optx.reconstruct(model, optx.Magnitude(), Perp(adapter=adapter, rank=4), DATA, steps=8, lr=3e-3)
    done.masks.verify(model)
    first = optx.prune(alone, optx.Magnitude())
    assert done.masks == first  # magnitudes are of dense weights
    assert all(row.rebuilt < row.pruned for row in done.blocks)
    assert [row.trained > 0 for row in done.blocks] == [True, True]
    assert len(str(done).splitlines()) == 3
    assert not any(name.startswith("optx") or ".optx." in name for name, _ in model.named_modules())
    x, dense = ids(1), make()
    want = block_outputs(dense, x, 0)
    error = {m: float((block_outputs(m, x, 0) - want).norm()) for m in (model, alone)}
    assert error[model] < error[alone]
    unpruned = [name for name, p in dense.named_parameters() if torch.equal(p, model.get_parameter(name))]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} & {
        n for n, _ in model.named_parameters()
    } <= set(unpruned)


def test_the_error_is_that_of_the_blocks_on_what_the_finished_ones_before_hand_on() -> None:
    model, dense = llama(), llama()
    done = optx.reconstruct(model, optx.Wanda(), Perp(adapter="mask", rank=4), DATA[1:2], steps=5)
    x = DATA[1]
    with torch.no_grad():
        given: list[Any] = []
        hook = model.model.layers[1].register_forward_pre_hook(
            lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True
        )
        model(x, use_cache=False)
        hook.remove()
        args, kwargs = given[0]
        made, want = model.model.layers[1](*args, **kwargs), dense.model.layers[1](*args, **kwargs)
    error = float((made - want).square().sum() / want.square().sum())
    assert error == pytest.approx(done.blocks[1].rebuilt, rel=1e-3)


def test_by_masks_that_are_given() -> None:
    model, other = llama(), llama()
    masks = optx.prune(other, optx.SparseGPT(pattern="2:4"), DATA)
    done = optx.reconstruct(model, masks, Perp(adapter="mask", rank=4), DATA, steps=5)
    assert done.masks == masks
    masks.verify(model)
    with pytest.raises(OptxError, match="pruned by these masks already"):
        optx.reconstruct(model, masks, Perp(), DATA)


def test_what_does_not_come_nearer_is_left_as_it_was_pruned() -> None:
    model, alone = llama(), llama()
    done = optx.reconstruct(model, optx.Wanda(), Perp(adapter="mask", rank=4), DATA, steps=3, lr=1e4)
    optx.prune(alone, optx.Wanda(), DATA)
    assert all(row.rebuilt == row.pruned for row in done.blocks)
    assert all(map(torch.equal, model.parameters(), alone.parameters()))


def test_it_leaves_no_trace_and_is_the_same_again() -> None:
    model, again = llama().train(), llama().train()
    model.lm_head.weight.requires_grad_(False)
    seed = torch.get_rng_state()
    optx.reconstruct(model, optx.Wanda(), Perp(adapter="mask", rank=4), DATA, steps=3)
    assert torch.equal(seed, torch.get_rng_state())
    torch.rand(3)
    optx.reconstruct(again, optx.Wanda(), Perp(adapter="mask", rank=4), DATA, steps=3)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True] * (len(list(model.parameters())) - 1) + [
        False
    ]
    assert all(module.training for module in model.modules())


def of_embeddings() -> optx.Masks:
    """Masks of what no block has beside a layer's."""
    model = llama()
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    return optx.Masks.from_bool({name: model.get_parameter(name) > 0 for name in names})


def test_wrapped_models_are_what_they_wrap() -> None:
    model, compiled, parallel = llama(), llama(), llama()
    for one in (model, torch.compile(compiled), nn.DataParallel(parallel)):
        optx.reconstruct(one, optx.Magnitude(), Perp(adapter="mask", rank=2), DATA, steps=2)
    for other in (compiled, parallel):
        assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_what_is_refused_by_arguments() -> None:
    model = llama()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(OptxError, match="seed is 'a'"):
        optx.reconstruct(model, optx.Wanda(), Perp(), DATA, seed="a")  # pyright: ignore[reportArgumentType]
    with torch.inference_mode(), pytest.raises(OptxError, match="inference_mode forbids"):
        optx.reconstruct(model, optx.Wanda(), Perp(), DATA)
    assert all(map(torch.equal, before, model.parameters()))


class Loop(nn.Module):
    """A block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.blocks[0](x))


@pytest.mark.parametrize(
    ("make", "method", "perp", "match"),
    [
        (llama, optx.Wanda(), Perp(norm=False), "no trainable parameter"),
        (llama, optx.Wanda(), Perp(adapter="lora"), "fills zeros in"),
        (llama, optx.Wanda(), optx.LoRA(), "perp is LoRA"),
        (llama, "wanda", Perp(), "method is 'wanda'"),
        (Loop, optx.Wanda(), Perp(), "'blocks.0' is in no row of blocks"),
        (llama, optx.Wanda(), Perp(adapter="mask", rank=64), "rank=64 is larger than the weight of"),
        (llama, of_embeddings(), Perp(), "masks have 'model.embed_tokens.weight' .* no linear layer"),
    ],
)
def test_mistakes_change_nothing(make: Any, method: Any, perp: Any, match: str) -> None:
    model = make()
    before = [p.detach().clone() for p in model.parameters()]
    data = [torch.randn(3, 4)] if make is Loop else DATA
    with pytest.raises(OptxError, match=match):
        optx.reconstruct(model, method, perp, data)
    assert all(map(torch.equal, before, model.parameters()))
