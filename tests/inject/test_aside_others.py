"""A stream beside other things: copies, FSDP2, caches, other injections, other people's hooks."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from adapter_models import cache_name
from aside_models import (
    LAYERS,
    Net,
    assert_close,
    attached,
    batch,
    call,
    checkpointed,
    each_stream,
    each_variant,
    gradients,
    parts,
    t5,
)
from injections import assert_same, bert, llama, move, run, snapshot, tokens
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import optx
from optx import IAA, Aside, LoRA, OptxError, SequentialAdapter

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- other tools ------------------------------------------------------------------------------------------


@each_variant
def test_a_copy_has_a_stream_of_its_own(variant: str) -> None:
    net, _ = attached(variant)
    wanted = net(batch())  # its graph lives, and so do its links
    net.call = call
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(batch()), wanted)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert torch.equal(net(batch()), wanted)
        if variant != "layerwise":
            assert parts(other)[0].stream is parts(other)[3].stream is not parts(net)[0].stream
            assert [module for module, _ in parts(other)[0].stream.layers] == list(other.layers)


def test_deep_models_are_copied() -> None:
    """A stream that linked layer to layer would copy them inside one another, past the recursion limit."""
    net, _ = attached(depth=200, d=2)
    assert torch.equal(copy.deepcopy(net)(batch(1, 2)), net(batch(1, 2)))
    assert torch.equal(pickle.loads(pickle.dumps(net))(batch(1, 2)), net(batch(1, 2)))


@each_variant
def test_functional_call_and_vmap(variant: str) -> None:
    nets = [attached(variant)[0] for _ in range(3)]
    for seed, net in enumerate(nets):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn_like(p) / 3)
    base, x = nets[0], batch()
    wanted = torch.stack([net(x) for net in nets])
    found = functional_call(base, dict(nets[1].named_parameters()), (x,))
    assert torch.equal(found, wanted[1])
    params, buffers = stack_module_state(nets)  # type: ignore[arg-type]
    many = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(many, wanted, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("group_of_one")
@each_stream
def test_fsdp2(variant: str) -> None:
    """Its hooks exchange the tensors that go into a layer, and take the weights away behind it."""
    from torch.distributed.fsdp import fully_shard

    plain, _ = attached(variant)
    wanted = gradients(plain, lambda: plain(batch()))
    net, _ = attached(variant)
    for layer in net.layers:
        fully_shard(layer)
    fully_shard(net)
    x = batch().requires_grad_()
    assert torch.equal(net(x), plain(x))
    found = gradients(net, lambda: net(x))
    assert_close({name: g.full_tensor() for name, g in found.items()}, wanted, 1e-6)  # type: ignore[attr-defined]


@each_variant
def test_generation_with_a_cache(variant: str) -> None:
    net = llama()
    handle = optx.attach(net, IAA(rank=3, aside=3, variant=variant))
    move(handle)
    prompt, name = tokens()[:, :3], cache_name(net)
    whole = net(tokens()).logits
    state = net(prompt, use_cache=True)
    steps = [state.logits]
    for position in range(3, 7):
        seen = {name: getattr(state, name)}
        state = net(tokens()[:, position : position + 1], use_cache=True, **seen)
        steps.append(state.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-5)
    texts = [
        net.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)
    other = t5()
    move(optx.attach(other, Aside(rank=3, variant=variant)))
    texts = [
        other.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)
    ]
    assert torch.equal(*texts)


# ---- together with others ---------------------------------------------------------------------------------

INSIDE: dict[str, tuple[optx.Injection, str]] = {
    "LoRA inside": (LoRA(rank=2), r"layers\.\d+\.\w+"),
    "adapter inside": (SequentialAdapter(rank=2), r"layers\.\d+\.two"),
    "adapter on the layers": (SequentialAdapter(rank=2), LAYERS),
    "parallel adapter on the layers": (optx.ParallelAdapter(rank=2), LAYERS),
}


@pytest.mark.parametrize("inside", list(INSIDE))
@each_variant
def test_the_order_of_attaching_makes_no_difference(variant: str, inside: str) -> None:
    def build(first_inside: bool) -> tuple[Net, list[optx.Handle]]:
        net = Net()
        plan = [INSIDE[inside], (Aside(rank=3, variant=variant), LAYERS)]  # type: ignore[arg-type]
        handles = [optx.attach(net, *one) for one in (plan if first_inside else reversed(plan))]
        handles = handles if first_inside else handles[::-1]
        for seed, handle in enumerate(handles):
            torch.manual_seed(seed)
            with torch.no_grad():
                for p in handle.parameters():
                    p.copy_(0.3 * torch.randn_like(p))
        return net, handles

    one, _ = build(True)
    two, _ = build(False)
    x = batch().requires_grad_()
    assert torch.equal(one(x), two(x))
    assert_close(gradients(one, lambda: one(x)), gradients(two, lambda: two(x)), 1e-6)
    one.call = two.call = checkpointed
    assert_close(gradients(one, lambda: one(x)), gradients(two, lambda: two(x)), 1e-6)


def test_linear_layers_with_lora_on_themselves() -> None:
    """On the same modules, by hand: the last is W x + s B A x + z. Merging one changes nothing."""
    x, outputs = batch(), []
    for flip in (False, True):
        net, bare = (Net(kind=lambda d: nn.Linear(d, d)) for _ in range(2))
        handles: dict[bool, optx.Handle] = {}
        for lora in (flip, not flip):
            torch.manual_seed(2)
            handles[lora] = optx.attach(net, LoRA(rank=2, alpha=2) if lora else Aside(rank=3), LAYERS)
            move(handles[lora])
        outputs.append(net(x))
        with torch.no_grad():
            for layer, served in zip(bare.layers, net.layers, strict=True):
                layer.weight += served.optx.lora.B @ served.optx.lora.A  # type: ignore[union-attr]
        optx.attach(bare, Aside(rank=3), LAYERS).load_state_dict(handles[False].state_dict())
        torch.testing.assert_close(outputs[-1], bare(x), rtol=0, atol=1e-5)
        handles[True].merge()
        torch.testing.assert_close(net(x), outputs[-1], rtol=0, atol=1e-5)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("inside", [LoRA(rank=2, dora=True), optx.IA3(feedforward=())], ids=["DoRA", "IA3"])
@each_variant
def test_linear_layers_with_what_scales_them(variant: str, inside: optx.Injection) -> None:
    """Whatever is attached to a layer itself acts around the join, in either order; so it may not be merged
    below it, unless it commutes."""
    outputs = []
    for flip in (False, True):
        net, handles = Net(kind=lambda d: nn.Linear(d, d)), dict[bool, optx.Handle]()
        for scaling in (flip, not flip):
            torch.manual_seed(2)
            injection = inside if scaling else Aside(rank=3, variant=variant)  # type: ignore[arg-type]
            handles[scaling] = optx.attach(net, injection, LAYERS)
            move(handles[scaling])
        outputs.append(net(batch()))
        if isinstance(inside, LoRA):
            handles[True].merge()
            torch.testing.assert_close(net(batch()), outputs[-1], rtol=0, atol=1e-4)
        else:
            with pytest.raises(optx.MergeError, match=r"'aside' acts on 'layers\.0' too"):
                handles[True].merge()
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@each_variant
def test_each_comes_off_and_the_others_work_on(variant: str, order: tuple[int, ...]) -> None:
    methods = [SequentialAdapter(rank=3), Aside(rank=3, variant=variant), LoRA(rank=2)]  # type: ignore[arg-type]
    model = bert()
    before, bare = snapshot(model), run(model)
    handles = [optx.attach(model, method) for method in methods]
    for seed, handle in enumerate(handles):
        move(handle, seed)
    for number, i in enumerate(order):
        handles[i].remove()
        other = bert()
        for left in sorted(order[number + 1 :]):
            optx.attach(other, methods[left]).load_state_dict(handles[left].state_dict())
        assert torch.equal(run(model), run(other))
    assert_same(model, before)
    assert torch.equal(run(model), bare)


@each_stream
def test_two_streams_beside_the_same_layers(variant: str) -> None:
    net, first = attached(variant)
    bare, one = Net()(batch()), net(batch())
    second = optx.attach(net, Aside(rank=2, variant="highway"), LAYERS, name="second")
    move(second, 7)
    both = net(batch())
    with first.disable():
        other = net(batch())
    torch.testing.assert_close(both - bare, (one - bare) + (other - bare), rtol=0, atol=1e-5)
    hooks = [list(layer._forward_hooks) + list(layer._forward_pre_hooks) for layer in net.layers]
    assert torch.equal(net(batch()), both)
    assert hooks == [list(layer._forward_hooks) + list(layer._forward_pre_hooks) for layer in net.layers]
    first.remove()
    assert torch.equal(net(batch()), other)


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
@each_variant
def test_hooks_of_others_that_exchange_the_tensor(variant: str, early: bool) -> None:
    """They came before ours or after; what they do, the next layer reads."""
    net, x = Net(), batch().requires_grad_()
    injection = Aside(rank=3, variant=variant)  # type: ignore[arg-type]
    handle = None if early else optx.attach(net, injection, LAYERS)
    for layer in net.layers:
        layer.register_forward_hook(lambda module, args, output: 0.5 * output)
        layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    handle = handle or optx.attach(net, injection, LAYERS)
    move(handle)
    if variant == "highway":
        y, z = x, torch.zeros_like(x)
        for number, (layer, part) in enumerate(zip(net.layers, parts(net), strict=True)):
            z = z + part.S(y + 1 + z)
            y = 0.5 * (type(layer).forward(layer, y + 1) + (z if number == 3 else 0))
        torch.testing.assert_close(net(x), y, rtol=0, atol=1e-5)
    wanted = gradients(net, lambda: net(x))
    net.call = checkpointed
    assert_close(gradients(net, lambda: net(x)), wanted, 1e-6)


@each_stream
def test_a_backward_hook_on_a_layer_is_an_error(variant: str) -> None:
    """torch puts a function of its own around what goes in and out, after all hooks."""
    net, _ = attached(variant)
    net.layers[1].register_full_backward_hook(lambda *_: None)
    x = batch().requires_grad_()
    with pytest.raises(OptxError, match="a backward hook"):
        net(x)
