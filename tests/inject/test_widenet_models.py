"""WideNet on a model: coming off, files, optimizers, other people's models, what is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from family_models import BY_LABEL
from ffn_models import FFN, Block, patches, vit
from injections import assert_same, snapshot
from processes import on_processes
from safetensors.torch import load_file, save_file
from test_widenet import attached, still
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import optx


def train(model: nn.Module, handle: optx.WideHandle, opt: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        opt.zero_grad()
        (model(patches(seed=step)).square().mean() + handle.loss()).backward()
        opt.step()


def made(before: bool = True) -> tuple[nn.Module, optx.WideHandle, Any]:
    model = vit()
    base = torch.optim.AdamW(model.parameters(), lr=0.05)
    handle = attached(model)
    return model, handle, optx.wrap(base, handle)


# ---- coming off ------------------------------------------------------------------------------------------


def test_remove_gives_every_block_its_own_back() -> None:
    model = vit()
    output = model(patches())
    before = snapshot(model)
    handle = attached(model)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(1.0)
    del opt
    with handle.disable():
        assert torch.equal(model(patches()), output)
    assert not torch.equal(model.eval()(patches()), output)
    handle.remove()
    handle.remove()
    model.train()
    assert_same(model, before)
    assert torch.equal(model(patches()), output)


def test_no_dense_model_is_equal_and_the_mean_of_experts_is_one_way_out() -> None:
    model = vit()
    handle = attached(model, jitter=0.3)
    with pytest.raises(optx.MergeError, match=r"no dense FFN computes the same.*lossy=True"):
        handle.merge()
    with pytest.raises(optx.MergeError, match="lossy=True"):
        handle.merge_and_unload()
    mean = torch.stack([expert.fc2.weight.detach() for expert in handle.mixture.experts]).mean(0)
    plain = handle.merge_and_unload(lossy=True)
    assert list(plain.state_dict()) == list(vit().state_dict())
    for block in plain.blocks:  # type: ignore[union-attr]
        torch.testing.assert_close(block.mlp.fc2.weight.detach(), mean)
    assert len({id(block.attn) for block in plain.blocks}) == 4  # type: ignore[union-attr]
    assert all(p.requires_grad for p in plain.parameters())


# ---- files -----------------------------------------------------------------------------------------------


def test_files_hold_shared_tensors_once(tmp_path: Any) -> None:
    model, handle, opt = made()
    train(model, handle, opt, range(2))
    save_file(handle.model_state_dict(), tmp_path / "whole.safetensors")
    read = load_file(tmp_path / "whole.safetensors")
    assert sum(t.numel() for t in read.values()) == sum(p.numel() for p in model.parameters())
    model.eval()
    for state in (read, model.state_dict()):
        twin = vit()
        attached(twin, balance=0.0)
        twin.load_state_dict(state, strict=True)
        assert torch.equal(twin.eval()(patches()), model(patches()))
    handle.save(tmp_path / "shared")
    other = vit()
    other.load_state_dict({k: t for k, t in read.items() if "norm" in k or "blocks" not in k}, strict=False)
    again = optx.attach(other, tmp_path / "shared")
    assert again.injection == handle.injection
    assert torch.equal(other.eval()(patches()), model(patches()))


def test_a_checkpoint_of_before_is_refused() -> None:
    model = vit()
    attached(model)
    with pytest.raises(optx.OptxError, match=r"'blocks.0.attn.\w+.\w+' is shared .* Load it first"):
        model.load_state_dict(vit().state_dict(), strict=False)
    first = {k: t for k, t in vit().state_dict().items() if "blocks" not in k or "blocks.0" in k}
    with pytest.raises(optx.OptxError, match=r"'blocks.0.mlp.fc1.weight', of the FFN of a model before"):
        model.load_state_dict(first, strict=False)


# ---- training --------------------------------------------------------------------------------------------


def test_the_optimizer_has_each_shared_parameter_once() -> None:
    model = vit()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    base = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.01
    )
    handle = attached(model)
    opt = optx.wrap(base, handle)
    has = [id(p) for group in opt.param_groups for p in group["params"]]
    assert sorted(has) == sorted({id(p) for p in model.parameters()})
    shared = handle.mixture.experts[0]
    decay = {id(p): group["weight_decay"] for group in opt.param_groups for p in group["params"]}
    assert (decay[id(shared.fc1.weight)], decay[id(shared.fc1.bias)]) == (0.1, 0.0)
    train(model, handle, opt, range(2))
    handle.remove()
    opt.zero_grad()
    model(patches()).sum().backward()
    opt.step()
    assert {id(p) for group in opt.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters()
    }


def test_numbers_for_a_log() -> None:
    model, handle, opt = made()
    train(model, handle, opt, range(1))
    found = handle.metrics()
    assert found["widenet/loss"] == pytest.approx(0.04, abs=0.01)  # four blocks, about even
    assert 0 <= found["widenet/dropped"] < 0.5
    assert found["widenet/trainable"] == sum(p.numel() for p in handle.parameters())


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    model, handle, opt = made()
    train(model, handle, opt, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    train(model, handle, opt, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin, its, other = made()
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    train(twin, its, other, range(3, 6))
    assert all(torch.equal(t, twin.state_dict()[name]) for name, t in model.state_dict().items())


def test_activation_checkpointing_routes_the_same() -> None:
    grads, losses = [], []
    for checkpointed in (False, True):
        model = vit(depth=2)
        model.checkpointed = checkpointed
        handle = attached(model)
        torch.manual_seed(3)
        loss = model(patches()).square().sum()
        losses.append(handle.loss())
        (loss + losses[-1]).backward()
        grads.append([p.grad for p in model.parameters()])
    assert torch.equal(*losses)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.long
def test_compiled_it_is_the_same() -> None:
    model = vit(depth=2)
    handle = attached(model)
    call = torch.compile(model, backend="eager")
    made = []
    for f in (model, call, call):
        torch.manual_seed(5)
        model.zero_grad()
        (f(patches()).square().sum() + handle.loss()).backward()
        made.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(made[0], made[1])
    torch.testing.assert_close(made[0], made[2])


def test_a_copy_of_the_model_shares_within_itself() -> None:
    model = vit()
    attached(model, balance=0.0)
    twin = copy.deepcopy(model)
    assert twin.blocks[0].mlp is twin.blocks[3].mlp is not model.blocks[0].mlp
    assert torch.equal(twin.eval()(patches()), model.eval()(patches()))


def ranks_have_the_gradients_of_all(rank: int) -> None:
    model, alone = vit(), vit()
    handle, own = (attached(net, **still(balance=0.0)) for net in (model, alone))
    call = DistributedDataParallel(model)
    x = patches(4)
    call(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    alone(x).square().mean().backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert len(handle.parameters()) == len(own.parameters())


def a_model_that_is_sharded_as_a_whole_is_the_same(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    plain, own, base = made()
    model = vit()
    handle = attached(model)
    fully_shard(model)
    opt = optx.wrap(torch.optim.AdamW(model.parameters(), lr=0.05))
    train(plain, own, base, range(2))
    train(model, handle, opt, range(2))
    want = plain.state_dict()
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t.full_tensor(), want[name], atol=1e-5, rtol=1e-4)  # type: ignore[attr-defined]


CASES = [ranks_have_the_gradients_of_all, a_model_that_is_sharded_as_a_whole_is_the_same]

if dist.is_gloo_available():
    test_on_two_processes = on_processes(2, *CASES)


# ---- other people's models -------------------------------------------------------------------------------


def test_transformers_vit_and_what_layers_have_of_their_own() -> None:
    family = BY_LABEL["ViT"]
    model = family.make()
    handle = optx.attach(model, optx.WideNet(balance=0.0))
    assert [one.path for one in handle.served] == ["vit.layers.0", "vit.layers.1"]
    family.run(model).sum().backward()
    assert all(p.grad is not None for p in handle.mixture.router.parameters())


def test_a_cache_of_keys_has_a_place_for_each_layer() -> None:
    model = BY_LABEL["Llama"].make()
    with torch.no_grad():
        optx.attach(model, optx.WideNet())
        ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
        grown = model.generate(ids[:, :4], max_new_tokens=3, do_sample=False, use_cache=True)
        alone = model.generate(ids[:, :4], max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(grown, alone)


# ---- errors ----------------------------------------------------------------------------------------------


def _two(change: Any) -> nn.Module:
    model = vit(depth=2)
    change(model.blocks)
    return model


def _tied(blocks: Any) -> None:
    blocks[1].attn.proj.weight = blocks[0].attn.proj.weight


def _same(blocks: Any) -> None:
    blocks[1] = blocks[0]


def _head(blocks: Any) -> None:
    blocks.extra = nn.Linear(6, 18)
    blocks.extra.weight = blocks[1].attn.qkv.weight


def _wider(blocks: Any) -> None:
    blocks[1] = Block(6, 12, 2)


def _served(blocks: Any) -> None:
    optx.attach(blocks, optx.LoRA(rank=2), r"1.attn.qkv")


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: vit(depth=1), {}, "found one block, 'blocks.0'"),
        (lambda: _two(_same), {}, "found one block"),
        (lambda: _two(_tied), {}, r"can't share 'blocks.1.attn.proj.weight', which is tied"),
        (lambda: _two(_head), {}, "tied to something else"),
        (lambda: _two(_wider), {}, r"'fc1.weight' has shape \(10, 6\) and \(12, 6\)"),
        (lambda: _two(_served), {}, r"blocks.1.attn has something attached"),
        (lambda: vit().to("meta"), {}, r"'blocks.0.attn.qkv.weight' is on the meta device"),
        (vit, {"ffn": "mpl"}, r"no module 'mpl' to share. Near: 'mlp'"),
        (vit, {"share": ("atn",)}, r"no module 'atn'"),
        (lambda: BY_LABEL["BERT"].make(), {}, r"does not know which module of .* is its FFN"),
    ],
)
def test_what_can_not_be_shared(make: Any, options: dict[str, Any], words: str) -> None:
    model = make()
    before = list(model.state_dict())
    with pytest.raises(optx.TargetError, match=words):
        attached(model, **options)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"capacity": 0}, "capacity is 0, so no expert would take a token"),
        ({"eval_capacity": 0.0}, "eval_capacity is 0"),
        ({"capacity": -1}, "capacity is -1"),
        ({"top_k": 5}, "top_k is 5, and there are 4 experts"),
        ({"top_k": 0}, "at least 1"),
        ({"balance": -0.1}, "balance is -0.1"),
        ({"share": ("attn",), "keep": ("x",)}, "keep="),
        ({"init": "mad"}, "'first', 'mean', 'fresh'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(optx.OptxError, match=words):
        optx.WideNet(**options)


class Two(FFN):
    def forward(self, x: Tensor, more: Any = None) -> Any:  # type: ignore[override]
        return super().forward(x), more


def test_an_ffn_of_two_outputs_is_refused_at_its_call() -> None:
    model = vit(depth=2)
    for block in model.blocks:
        block.mlp = Two()
    handle = attached(model)
    with pytest.raises(optx.OptxError, match=r"FFN of 'blocks.0' returns a tuple"):
        model(patches())
    with pytest.raises(optx.OptxError, match="more than its tokens"):
        handle.mixture(torch.randn(1, 2, 6), torch.ones(1))


def test_what_is_kept_or_named_stays_its_own() -> None:
    model = vit()
    attached(model, keep=("attn.proj",))
    assert model.blocks[0].attn.qkv is model.blocks[1].attn.qkv
    assert model.blocks[0].attn.proj is not model.blocks[1].attn.proj
    named = vit()
    attached(named, share=())
    assert named.blocks[0].attn is not named.blocks[1].attn
    assert named.blocks[0].mlp is named.blocks[1].mlp
