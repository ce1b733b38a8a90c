"""Inside and alongside adapters (arXiv 2208.09847): the spec's properties, the handle, and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from aside_models import (
    LAYERS,
    VARIANTS,
    Layer,
    Net,
    assert_close,
    attached,
    batch,
    checkpointed,
    each_model,
    each_stream,
    each_variant,
    gpt2,
    gradients,
    logits,
    parts,
    t5,
    vit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from injections import assert_same, bert, llama, move, no_dropout, run, snapshot, tokens
from torch import Tensor, nn
from torch.nn import functional as F

import optx
from optx import IAA, Aside, LoRA, MergeError, OptxError, SequentialAdapter, ShapeError, TargetError

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the equations ----------------------------------------------------------------------------------------


def by_hand(net: Net, x: Tensor, variant: str, f: Callable[[Tensor], Tensor]) -> Tensor:
    """The three variants as the spec writes them, with row vectors."""
    added = [dict(part.named_parameters()) for part in parts(net)]
    bare = [type(layer).forward for layer in net.layers]

    def S(t: dict[str, Tensor], x: Tensor) -> Tensor:
        return f(x @ t["W_down"].t() + t["b_down"]) @ t["W_up"].t() + t["b_up"]

    z: Any = torch.zeros_like(x) if variant == "highway" else torch.zeros(*x.shape[:-1], 3, dtype=x.dtype)
    for layer, forward, t in zip(net.layers, bare, added, strict=True):
        if variant == "highway":
            z = z + S(t, x + z)
        elif variant == "bottleneck":
            z = z + f(x @ t["D"].t() + (z @ t["C"].t() if "C" in t else 0))
        y = forward(layer, x)
        x = y + S(t, x) if variant == "layerwise" else y
    if variant == "bottleneck":
        return x + z @ added[-1]["U"].t()
    return x + z if variant == "highway" else x


FORMS = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "linear": lambda x: x}


@settings(max_examples=40)
@given(
    variant=st.sampled_from(VARIANTS),
    form=st.sampled_from(sorted(FORMS)),
    depth=st.integers(1, 5),
    d=st.integers(1, 9),
    shape=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 99),
)
def test_it_is_what_the_equations_say(
    variant: str, form: str, depth: int, d: int, shape: list[int], seed: int
) -> None:
    net = Net(depth, d, seed=seed).double()
    handle = optx.attach(net, Aside(rank=3, variant=variant, form=form), LAYERS)  # type: ignore[arg-type]
    move(handle, seed)
    x = batch(*shape, d, seed=seed, dtype=torch.float64)
    torch.testing.assert_close(net(x), by_hand(net, x, variant, FORMS[form]), rtol=0, atol=1e-12)
    found = gradients(net, lambda: net(x))
    wanted = gradients(net, lambda: by_hand(net, x, variant, FORMS[form]))
    assert_close(found, wanted, 1e-9 * max(1.0, *(float(g.abs().max()) for g in wanted.values())))


@each_model
@each_variant
def test_nothing_changes_at_the_start_bit_for_bit(model: Any, variant: str) -> None:
    net = model()
    wanted = logits(net)
    with optx.attach(net, Aside(rank=3, variant=variant)) as handle:
        assert torch.equal(logits(net), wanted)
        net.train()
        no_dropout(net)
        assert torch.equal(logits(net), wanted)
        move(handle)
        assert not torch.allclose(logits(net), wanted, atol=1e-3)


def test_the_layers_see_nothing_of_a_highway() -> None:
    """Only the last output depends on it; a way around each layer feeds the next one."""
    for variant in VARIANTS:
        model = llama()
        wanted = model(tokens(), output_hidden_states=True).hidden_states
        handle = optx.attach(model, Aside(rank=3, variant=variant))
        move(handle)
        found = model(tokens(), output_hidden_states=True).hidden_states
        same = [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)]
        assert same == ([True, False, False] if variant == "layerwise" else [True, True, False])


def test_recorded_hidden_states_are_what_the_next_layer_gets() -> None:
    """transformers records in hooks of its own, which come after ours."""
    model = llama()
    move(optx.attach(model, Aside(rank=3, variant="layerwise")))
    seen: list[Tensor] = []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    recorded = model(tokens(), output_hidden_states=True).hidden_states
    assert torch.equal(recorded[1], seen[0])


def test_at_the_start_every_depth_gets_the_gradient_of_the_output() -> None:
    """Without a factor of frozen layers: these shrink it by 1000 a layer."""

    class Damped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 1e-3 * super().forward(x) + 1.0

    net = Net(6, 8, lambda d: Damped(d, d)).double()
    handle = optx.attach(net, Aside(rank=3), LAYERS)
    inside = optx.attach(net, LoRA(rank=2), LAYERS)
    inputs: list[Tensor] = []
    for layer in net.layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    output = net(batch(dtype=torch.float64))
    output.retain_grad()
    output.pow(3).sum().backward()
    g = output.grad
    assert g is not None
    for part, x in zip(parts(net), inputs, strict=True):
        hidden = torch.relu(x @ part.W_down.t() + part.b_down)
        torch.testing.assert_close(part.W_up.grad, g.t() @ hidden, rtol=1e-12, atol=0)
        torch.testing.assert_close(part.b_up.grad, g.sum(0), rtol=1e-12, atol=0)
        assert not part.W_down.grad.any()
    beside, within = (list(optx.analysis.grad_norms(h).values()) for h in (handle, inside))
    assert max(beside) < 20 * min(beside)
    assert within[0] < 1e-12 * within[-1]


@each_stream
def test_layers_that_pass_nothing_on_do_not_starve_it(variant: str) -> None:
    """F_l = 0: inside, only the last layer learns; alongside, all do."""
    net = Net(4, 8, lambda d: nn.Linear(d, d))
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    inside = optx.attach(net, optx.BitFit(), LAYERS)
    aside = optx.attach(net, Aside(rank=3, variant=variant, form="gelu"), LAYERS)
    with torch.no_grad():
        for p in inside.parameters():
            p.copy_(torch.randn_like(p))  # or there was nothing to read between the layers
        if variant == "bottleneck":
            parts(net)[-1].U.copy_(torch.randn(8, 3))  # at zero, only U itself has a gradient
    gradients(net, lambda: net(batch()))
    within = [float(p.grad.abs().sum()) for p in inside.parameters()]  # type: ignore[union-attr]
    if variant == "highway":  # in the other, the stream is moved from its start, and reads the layers' input
        assert within[:3] == [0, 0, 0]
    assert within[3] > 0
    assert len(optx.analysis.grad_norms(aside)) == 4
    assert min(optx.analysis.grad_norms(aside).values()) > 1e-3


@settings(max_examples=25)
@given(depth=st.integers(1, 8), d=st.integers(1, 6), eps=st.floats(-0.9, 0.9), seed=st.integers(0, 99))
def test_a_linear_highway_grows_geometrically(depth: int, d: int, eps: float, seed: int) -> None:
    """S_l(x) = eps x and x_l = 0: z_L = (1 + eps)^(L-1) z_1."""
    net = Net(depth, d, lambda d: nn.Linear(d, d)).double()
    optx.attach(net, Aside(rank=d, form="linear"), LAYERS)
    v = batch(d, seed=seed, dtype=torch.float64)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        for part in parts(net)[1:]:
            part.W_down.copy_(torch.eye(d))
            part.W_up.copy_(eps * torch.eye(d, dtype=torch.float64))
        parts(net)[0].b_up.copy_(v)
    found = net(torch.zeros(2, d, dtype=torch.float64))
    torch.testing.assert_close(found, ((1 + eps) ** (depth - 1) * v).expand(2, d), rtol=1e-12, atol=1e-14)


@settings(max_examples=15)
@given(depth=st.integers(1, 6), d=st.integers(1, 12), rank=st.integers(1, 14))
def test_the_number_of_parameters(depth: int, d: int, rank: int) -> None:
    wanted = {
        "highway": depth * (2 * d * rank + rank + d),
        "layerwise": depth * (2 * d * rank + rank + d),
        "bottleneck": depth * d * rank + (depth - 1) * rank**2 + d * rank,
    }
    for variant, number in wanted.items():
        _, handle = attached(variant, depth, d, rank=rank)
        assert handle.report().trainable == number == sum(p.numel() for p in handle.parameters())


def test_the_papers_size() -> None:
    """BERT-base, rank 8: 0.14 % of its parameters."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig(), add_pooling_layer=False)
    handle = optx.attach(model, Aside(rank=8))
    assert len(handle) == 12
    assert handle.report().trainable == 156_768
    assert "0.144 %" in str(handle.report())


@each_model
@each_variant
def test_every_parameter_has_a_gradient_in_every_forward(model: Any, variant: str) -> None:
    """DDP needs no search for unused ones."""
    net = model()
    handle = optx.attach(net, Aside(rank=3, variant=variant, form="gelu"))
    logits(net).square().sum().backward()
    assert all(p.grad is not None for p in handle.parameters())
    for p in handle.parameters():
        p.grad = None
    move(handle)
    logits(net).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in handle.parameters())


# ---- what a layer may be ----------------------------------------------------------------------------------


class Pair(NamedTuple):
    hidden: Tensor
    other: str


@pytest.mark.parametrize("kind", [tuple, list, Pair], ids=lambda kind: kind.__name__)
@each_variant
def test_of_several_outputs_the_first_changes(variant: str, kind: Any) -> None:
    class Wrapped(Layer):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return kind(y, "kept") if kind is Pair else kind((y, "kept"))

    def first(layer: nn.Module, x: Tensor) -> Tensor:
        found = layer(x)
        assert type(found) is kind
        assert found[1] == "kept"
        return found[0]

    plain, handle = attached(variant)
    net = Net(kind=Wrapped)
    net.call = first
    other = optx.attach(net, Aside(rank=3, variant=variant), LAYERS)
    other.load_state_dict(handle.state_dict())
    assert torch.equal(net(batch()), plain(batch()))


def test_stacks_have_a_stream_each() -> None:
    """An encoder and a decoder; numbers further up in the name don't join or part what they should not."""
    model = t5()
    handle = optx.attach(model, Aside(rank=3))
    notes = [row.note.rpartition(", ")[2] for row in handle.report().rows]
    assert [row.module for row in handle.report().rows][:2] == ["encoder.block.0", "encoder.block.1"]
    assert notes == ["1 of 2", "2 of 2"] * 2
    towers = nn.Module()
    towers.towers = nn.ModuleList([Net(3), Net(2)])
    handle = optx.attach(towers, Aside(rank=3), r"towers\.\d+\.layers\.\d+\.one")
    assert [row.note[-6:] for row in handle.report().rows] == [
        "1 of 3",
        "2 of 3",
        "3 of 3",
        "1 of 2",
        "2 of 2",
    ]
    named = nn.Sequential()
    named.add_module("first", nn.Linear(4, 4))
    named.add_module("second", nn.Linear(4, 4))
    handle = optx.attach(named, Aside(rank=3), "first|second")
    assert [row.note[-6:] for row in handle.report().rows] == ["1 of 2", "2 of 2"]


def test_a_layer_that_returns_its_input_has_two_places_in_the_stream() -> None:
    class Idle(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return x

    net = Net()
    net.layers[1] = Idle(8)
    move(optx.attach(net, Aside(rank=3), LAYERS))
    x = batch().requires_grad_()
    torch.testing.assert_close(net(x), by_hand(net, x, "highway", torch.relu))
    wanted = gradients(net, lambda: net(x))
    net.call = checkpointed
    assert_close(gradients(net, lambda: net(x)), wanted, 0)


def test_hidden_states_may_come_by_keyword() -> None:
    net, _ = attached()
    wanted = net(batch())
    net.call = lambda layer, x: layer(x=x)
    assert torch.equal(net(batch()), wanted)


@each_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(variant: str, dtype: torch.dtype) -> None:
    net, handle = attached(variant)
    x = batch()
    wanted = net(x)
    with torch.autocast("cpu", dtype=dtype):
        mixed = net(x)
    assert mixed.dtype == torch.float32  # as the sum in the layers
    torch.testing.assert_close(mixed, wanted, rtol=0.05, atol=0.1 if dtype == torch.bfloat16 else 0.02)
    low = Net().to(dtype)
    other = optx.attach(low, Aside(rank=3, variant=variant), LAYERS)
    other.load_state_dict(handle.state_dict())
    assert all(p.dtype == torch.float32 for p in other.parameters())
    found = low(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.2)
    found.sum().backward()
    assert all(p.grad is not None for p in other.parameters())


def test_dropout_acts_while_training_only() -> None:
    for variant in VARIANTS:
        net, _ = attached(variant, dropout=0.5)
        assert not torch.equal(net(batch()), net(batch()))
        net.eval()
        assert torch.equal(net(batch()), net(batch()))


# ---- the handle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [llama, bert, gpt2, vit], ids=lambda make: make.__name__)
def test_iaa_is_both(model: Any) -> None:
    net, other = model(), model()
    wanted = logits(net)
    handle = optx.attach(net, IAA(rank=2, aside=3, variant="bottleneck", form="gelu"), modules_to_save=())
    assert torch.equal(logits(net), wanted)
    move(handle)
    rows = {row.note for row in handle.report().rows}
    assert rows == {
        "bottleneck 2, gelu, sequential, scale 1",
        "bottleneck, rank 3, gelu, 1 of 2",
        "bottleneck, rank 3, gelu, 2 of 2",
    }
    inside = optx.attach(other, SequentialAdapter(rank=2, form="gelu"), modules_to_save=())
    aside = optx.attach(other, Aside(rank=3, variant="bottleneck", form="gelu"), modules_to_save=())
    state = handle.state_dict()
    for one in (inside, aside):
        one.load_state_dict({key: state.pop(key) for key in one.state_dict()})
    assert not state
    assert torch.equal(logits(other), logits(net))
    logits(net).square().sum().backward()
    norms = optx.analysis.grad_norms(handle)
    names = [name for name, _ in net.named_modules()]
    assert sorted(norms, key=names.index) == list(norms)
    assert set(norms) == {one.path for one in handle.served}


def test_iaa_takes_targets_by_member() -> None:
    net = Net()
    targets = {"inside": r"layers\.[01]\.two", "aside": r"layers\.[23]"}
    handle = optx.attach(net, IAA(rank=2, aside=2, dropout=0.1), targets)
    assert [one.path for one in handle.served] == ["layers.0.two", "layers.1.two", "layers.2", "layers.3"]
    assert [one.injection.dropout for one in handle.served] == [0.1] * 4  # type: ignore[attr-defined]
    with pytest.raises(TargetError, match="'inside', 'aside'"):
        optx.attach(Net(), IAA(), LAYERS)


@each_variant
def test_it_rests_and_cannot_be_merged(variant: str) -> None:
    net, handle = attached(variant)
    wanted = net(batch())
    with handle.disable():
        assert torch.equal(net(batch()), Net()(batch()))
    assert torch.equal(net(batch()), wanted)
    with pytest.raises(MergeError, match=r"Aside at 'layers.0' is not a change of the module's weights"):
        handle.merge()
    assert torch.equal(net(batch()), wanted)


@each_variant
def test_state_goes_round(variant: str, tmp_path: Any) -> None:
    net, handle = attached(variant)
    state = handle.state_dict()
    assert all(key.startswith(tuple(f"layers.{i}.aside.{variant}." for i in range(4))) for key in state)
    other, fresh = attached(variant, moved=False)
    fresh.load_state_dict(state)
    assert torch.equal(other(batch()), net(batch()))
    handle.save(tmp_path / "saved")
    third = Net()
    loaded = optx.attach(third, tmp_path / "saved")
    assert loaded.injection == handle.injection
    assert torch.equal(third(batch()), net(batch()))
    for wrong in VARIANTS:
        if wrong != variant:
            with pytest.raises(optx.FileError, match=f"'layers.0.aside.{wrong}.* is missing"):
                attached(wrong)[1].load_state_dict(state)


@each_variant
def test_a_resumed_run_is_bit_identical(variant: str) -> None:
    def start() -> tuple[nn.Module, optx.Handle, torch.optim.Optimizer]:
        model = bert()
        torch.manual_seed(4)
        handle = optx.attach(model, IAA(rank=2, aside=3, variant=variant))  # type: ignore[arg-type]
        return model, handle, torch.optim.AdamW(handle.parameters(), lr=0.01)

    def steps(model: nn.Module, opt: torch.optim.Optimizer) -> None:
        for _ in range(3):
            opt.zero_grad()
            run(model).square().sum().backward()
            opt.step()

    whole, handle, opt = start()
    steps(whole, opt)
    steps(whole, opt)
    first, half, opt = start()
    steps(first, opt)
    second, resumed, again = start()
    resumed.load_state_dict({key: t.clone() for key, t in half.state_dict().items()})
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    steps(second, again)
    assert all(torch.equal(resumed.state_dict()[key], t) for key, t in handle.state_dict().items())
    assert torch.equal(run(second), run(whole))


# ---- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Aside(rank=0), "Aside: rank is 0; it must be at least 1"),
        (lambda: Aside(dropout=1.5), "Aside: dropout is 1.5"),
        (lambda: Aside(width=0), "Aside: width is 0"),
        (lambda: Aside(variant="L"), "Aside: variant is 'L'; it must be one of 'highway', 'layerwise', 'bot"),
        (lambda: Aside(form="softmax"), "Aside: form is 'softmax'; it must be one of"),
        (lambda: IAA(rank=0), "rank is 0"),
        (lambda: IAA(aside=0), "IAA: aside is 0"),
        (lambda: IAA(variant="wide"), "variant is 'wide'"),
        (lambda: IAA(form="softmax"), "softmax"),
    ],
)
def test_options_out_of_range(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(OptxError, match=words):
        make()


def test_modules_that_it_cannot_serve() -> None:
    net = nn.Sequential(nn.ReLU(), nn.Linear(4, 6), nn.Conv2d(3, 4, 3), Layer(8), Layer(4), nn.LayerNorm(4))
    before = snapshot(net)
    for targets, words in (
        ("0", r"'0' is a ReLU that begins with neither .* Pass optx.Aside\(width=...\)"),
        ("1", "'1' turns a width of 4 into 6"),
        ("2", "'2' is a Conv2d that begins"),
        ("3|4", "'3' has hidden states of width 8 and '4' of 4, which Aside can't join"),
    ):
        with pytest.raises(TargetError, match=words):
            optx.attach(net, Aside(rank=2), targets)
        assert_same(net, before)
    optx.attach(net, Aside(rank=2, variant="layerwise"), "3|4").remove()
    optx.attach(net, Aside(rank=2, width=5), "0").remove()
    optx.attach(net, Aside(rank=2), "5").remove()


@each_variant
def test_shapes_that_do_not_fit(variant: str) -> None:
    net, _ = attached(variant, width=5)
    with pytest.raises(ShapeError, match=r"'layers.0' got .* \(5, 8\).* width of 5.*Aside\(width=8\)"):
        net(batch())

    class Halved(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[::2]

    net = Net(1, kind=Halved)
    optx.attach(net, Aside(rank=2, variant=variant), LAYERS)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"turns hidden states of shape \(4, 8\) into \(2, 8\)"):
        net(batch(4, 8))
