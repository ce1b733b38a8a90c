"""Whose forward a stream is of: checkpoints, threads, compiled code."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from aside_models import (
    Caller,
    assert_close,
    attached,
    batch,
    call,
    checkpointed,
    each_stream,
    each_variant,
    gradients,
    links,
    parts,
    reentrant,
)
from injections import bert, checkpoint_layers, llama, move, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import optx
from optx import IAA, OptxError

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- whose forward the stream is of -----------------------------------------------------------------------


@each_variant
def test_forwards_do_not_see_each_other(variant: str) -> None:
    """Two before one backward; layers of two forwards in turns; one inside another; one that was aborted."""
    net, _ = attached(variant)
    a, b = batch(seed=1), batch(seed=2)
    wanted = gradients(net, lambda: torch.stack([net(a), net(b)]))
    alone = net(a), net(b)
    assert all(torch.equal(net(x), y) for x, y in zip((a, b), alone, strict=True))

    def in_turns() -> Tensor:
        x, y = a, b
        for layer in net.layers:
            x, y = layer(x), layer(y)
        return torch.stack([x, y])

    assert all(torch.equal(x, y) for x, y in zip(in_turns(), alone, strict=True))
    assert_close(gradients(net, in_turns), wanted, 1e-5)

    def with_another_inside(layer: nn.Module, x: Tensor) -> Tensor:
        if layer is net.layers[2] and x is not b:
            net.call = call
            assert torch.equal(net(b), alone[1])
            net.call = with_another_inside
        return layer(x)

    net.call = with_another_inside
    assert torch.equal(net(a), alone[0])

    def abort(layer: nn.Module, x: Tensor) -> Tensor:
        if layer is net.layers[3]:
            raise KeyboardInterrupt
        return layer(x)

    net.call = abort
    with pytest.raises(KeyboardInterrupt):
        net(b)
    net.call = call
    assert torch.equal(net(a), alone[0])


@each_stream
def test_threads_do_not_see_each_other(variant: str) -> None:
    net, _ = attached(variant)
    inputs = [batch(seed=seed) for seed in range(4)]
    wanted, found = [net(x) for x in inputs], [True] * 4

    def work(i: int) -> None:
        for _ in range(50):
            found[i] = found[i] and torch.equal(net(inputs[i]), wanted[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found)


@each_stream
def test_nothing_is_kept_longer_than_the_graph(variant: str) -> None:
    net, _ = attached(variant)
    output = net(batch())
    assert links(net) == 3
    del output
    gc.collect()
    assert links(net) == 0
    output = net(batch())
    output.sum().backward()
    assert links(net) == 0
    with torch.no_grad():
        net(batch())
    assert links(net) == 0


@each_variant
def test_checkpointing_of_torch(variant: str) -> None:
    """Hooks run inside it, and again when a layer is computed again."""
    net, _ = attached(variant, dropout=0.3)
    x, y = (batch(seed=seed).requires_grad_() for seed in range(2))

    def loss() -> Tensor:
        torch.manual_seed(0)
        return torch.stack([net(x), net(y)])

    wanted = gradients(net, loss)
    net.call = checkpointed
    assert_close(gradients(net, loss), wanted, 1e-6)


@pytest.mark.parametrize("model", [llama, bert], ids=["llama", "bert"])
@each_variant
def test_checkpointing_of_transformers(model: Any, variant: str) -> None:
    net = model().train()
    handle = optx.attach(net, IAA(rank=3, aside=3, variant=variant))
    move(handle)

    def loss() -> Tensor:
        torch.manual_seed(0)  # of dropout
        return net(tokens()).logits

    wanted = gradients(net, loss)
    checkpoint_layers(net)
    assert any(getattr(module, "gradient_checkpointing", False) for module in net.modules())
    assert_close(gradients(net, loss), wanted, 1e-6)


@each_stream
def test_reentrant_checkpointing_is_an_error_that_says_so(variant: str) -> None:
    net, _ = attached(variant)
    x = batch().requires_grad_()
    net.call = reentrant
    with pytest.raises(OptxError, match=r"'layers.3' .* 'layers.2' .*use_reentrant=False.*layerwise"):
        net(x).sum().backward()
    net.call = lambda layer, x: reentrant(layer, x) if layer is net.layers[0] else layer(x)
    with pytest.raises(OptxError, match=r"'layers.0' ran without recording .*'layers.1'.*use_reentrant"):
        net(x)
    wanted = gradients(net, lambda: (setattr(net, "call", call), net(x))[1])
    assert_close(gradients(net, lambda: checkpoint(net, x, use_reentrant=True)), wanted, 0)  # all of them


def test_reentrant_checkpointing_needs_no_stream_where_there_is_none() -> None:
    net, _ = attached("layerwise")
    x = batch().requires_grad_()
    wanted = gradients(net, lambda: net(x))
    net.call = reentrant
    assert_close(gradients(net, lambda: net(x)), wanted, 0)


@each_stream
def test_lower_layers_may_run_without_gradients(variant: str) -> None:
    """As one who trains the upper half does."""
    net, _ = attached(variant)

    def half(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(layer in list(net.layers)[2:]):
            return layer(x)

    wanted = net(batch())
    net.call = half
    found = net(batch())
    assert torch.equal(found, wanted)
    assert set(gradients(net, lambda: net(batch()))) == {
        name for name, _ in net.named_parameters() if name.startswith(("layers.2", "layers.3"))
    }


@pytest.mark.parametrize(
    "between",
    [lambda layer, x: layer(x * 1), lambda layer, x: layer(x.view_as(x)), lambda layer, x: layer(x.clone())],
    ids=["scaled", "view", "clone"],
)
@each_stream
def test_another_tensor_between_layers_is_an_error(variant: str, between: Caller) -> None:
    net, _ = attached(variant)
    net.call = between
    with pytest.raises(OptxError, match=r"'layers.1' was called with another tensor .* 'layers.0' returned"):
        net(batch())


def test_a_skipped_layer_and_a_bare_forward_are_errors() -> None:
    net, _ = attached()
    net.call = lambda layer, x: x if layer is net.layers[1] else layer(x)
    with pytest.raises(OptxError, match=r"'layers.2' .* 'layers.1' returned.* a layer was skipped"):
        net(batch())
    with pytest.raises(OptxError, match=r"'layers.0' was run by its forward\(\)"):
        net.layers[0].forward(batch())


# ---- compiled ---------------------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    torch._dynamo.reset()
    yield lambda module, **options: torch.compile(module, backend="aot_eager", **options)
    torch._dynamo.reset()


@each_variant
def test_compiled_is_eager(variant: str, compiled: Callable[..., Any]) -> None:
    net, _ = attached(variant)
    x = batch()
    wanted, grads = net(x), gradients(net, lambda: net(x))
    fast = compiled(net, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(fast(x), wanted, rtol=0, atol=1e-6)
        assert_close(gradients(net, lambda: fast(x)), grads, 1e-5)
    assert torch.equal(net(x), wanted)  # eager again
    if variant != "layerwise":
        assert parts(net)[0].stream._traced is None


@pytest.mark.long(keep=3)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, without us too
@pytest.mark.parametrize("which", [{0}, {3}, {1, 2}, {0, 2}, {0, 1, 2, 3}], ids=str)
def test_some_layers_compiled_and_some_not(which: set[int], compiled: Callable[..., Any]) -> None:
    net, _ = attached()
    x = batch()
    wanted, grads = net(x), gradients(net, lambda: net(x))
    for number in which:
        net.layers[number].compile(backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(net(x), wanted, rtol=0, atol=1e-6)
    assert_close(gradients(net, lambda: net(x)), grads, 1e-5)


@pytest.mark.long
def test_compiled_with_checkpointing_of_transformers(compiled: Callable[..., Any]) -> None:
    net = llama().train()
    net.config.use_cache = False
    move(optx.attach(net, IAA(rank=3, aside=3)))
    wanted = gradients(net, lambda: net(tokens()).logits)
    checkpoint_layers(net)
    # transformers 4 checkpoints a layer with its hooks, and torch traces no attribute out of a checkpoint.
    layer = type(net.model.layers[0])
    fast = compiled(net, fullgraph=layer.__call__ is nn.Module.__call__)
    assert_close(gradients(net, lambda: fast(tokens()).logits), wanted, 1e-4)
