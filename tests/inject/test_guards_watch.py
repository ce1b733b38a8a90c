"""What keeps a look at a model's first call, and torch's encoder, from saying or doing too much."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import optx
from optx.inject._uncalled import Watch, reader_of, watch


def looks(model: nn.Module) -> int:
    """How many hooks wait for the first call."""
    hooks = (
        h for one in model.modules() for h in (*one._forward_pre_hooks.values(), *one._forward_hooks.values())
    )
    return sum(isinstance(getattr(hook, "__self__", None), Watch) for hook in hooks)


class Pair(nn.Module):
    """Two linear modules, of which one may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        weight = self.parts()[1].weight
        x = self.one(x)
        return F.linear(x, weight) if both else x

    def parts(self) -> list[nn.Linear]:
        return [self.one, self.two]


def test_a_tied_weight_is_used_by_whoever_calls_another_module() -> None:
    """The use of the tensor may be the other module's, which nothing is attached to."""

    class Tied(Pair):
        def forward(self, x: Tensor, both: bool = False) -> Tensor:
            return self.one(self.two(x)) if both else self.two(x)

    model = Tied()
    model.two.weight = model.one.weight
    optx.attach(model, optx.LoRA(rank=2), targets="one")
    model(torch.randn(2, 6))
    assert looks(model) > 0  # nothing that is served was called yet
    model(torch.randn(2, 6), both=True)
    assert looks(model) == 0


def test_a_call_that_fails_is_not_judged() -> None:
    """What did not act by then may have been about to."""

    class Fails(Pair):
        def forward(self, x: Tensor, both: bool = False) -> Tensor:
            used = F.linear(x, self.parts()[1].weight)
            if not both:
                raise KeyError("the caller's own")
            return self.two(used)

    model = Fails()
    optx.attach(model, optx.LoRA(rank=2), targets="two")
    with pytest.raises(KeyError, match="the caller's own"):
        model(torch.randn(2, 6))


def test_a_call_in_another_thread_does_not_end_the_look() -> None:
    """Nor is it waited for: what the look counts is of the thread that began it."""

    class Threads(Pair):
        def forward(self, x: Tensor, both: bool = False) -> Tensor:
            if both:
                other = threading.Thread(target=lambda: self(x))
                other.start()
                other.join()
            return F.linear(x, self.parts()[1].weight)

    model = Threads()
    optx.attach(model, optx.LoRA(rank=2), targets="two")
    with pytest.raises(optx.TargetError, match="did not act"):
        model(torch.randn(2, 6), both=True)


def test_nothing_looks_where_that_would_change_what_runs() -> None:
    """Fast paths of attention are left where there are hooks, and what is compiled would be traced with "
    "them."""
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    optx.attach(attention, optx.LoRA(rank=2), targets="linear1")
    assert looks(attention) == 0
    compiled = nn.Sequential(nn.Linear(6, 6))
    compiled.compile(backend="eager")
    optx.attach(compiled, optx.LoRA(rank=2), targets="0")
    assert looks(compiled) == 0
    inner: Any = torch.compile(nn.Linear(6, 6), backend="eager")
    outer = nn.Sequential(inner)
    optx.attach(outer, optx.LoRA(rank=2), targets=r"0\._orig_mod")
    assert looks(outer) == 0
    assert watch(nn.Sequential(nn.Linear(2, 2))) is None


ABOUT = (
    "dtype device shape ndim size() numel() dim() is_cuda is_meta requires_grad element_size() itemsize "
    "data_ptr() grad stride() type() quant_state is_sparse is_contiguous()"
)
USES = ("self.fc.weight.t()", "self.fc.weight * 2", "F.linear(x, self.fc.weight)", "x @ self.fc.weight.data")
NO_USES = (
    *(f"print(self.fc.weight.{one})" for one in ABOUT.split(" ")),
    "self.fc.weight is None",
    "self.fc.weight != None",
    *(f"{name}(self.fc.weight)" for name in ("type", "len", "id")),
    "isinstance(self.fc.weight, nn.Parameter)",
    "hasattr(self.fc.weight, 'quant_state')",
    "getattr(self.fc.weight, 'quant_state', None)",
)


@pytest.mark.parametrize(("lines", "used"), [(USES, True), (NO_USES, False)])
def test_what_a_forward_asks_of_a_weight_is_no_use_of_it(lines: Any, used: bool, monkeypatch: Any) -> None:
    from optx.inject import _uncalled

    sources: dict[Any, str] = {}
    monkeypatch.setattr(_uncalled.inspect, "getsource", lambda method: sources[method])
    for line in (*lines, *(() if used else ("self.fc.weight = nn.Parameter(x)",))):
        text, space = f"def forward(self, x):\n    {line}\n    return x\n", dict[str, Any]()
        exec(text, {"nn": nn, "F": F}, space)
        sources[space["forward"]] = text
        model = type("Model", (nn.Module,), {"forward": space["forward"]})()
        model.fc = nn.Linear(2, 2)
        assert (reader_of(model, "fc") is not None) == used, line


def test_the_gradient_of_a_weight_is_no_use_of_it() -> None:
    class Looks(Pair):
        def forward(self, x: Tensor, both: bool = False) -> Tensor:
            two = self.parts()[1]
            grad = two.weight.grad
            return self.two(x) + (0 if grad is None else grad.sum())

    model = Looks()
    model.two.weight.grad = torch.zeros(6, 6)
    optx.attach(model, optx.LoRA(rank=2), targets="two")
    model(torch.randn(2, 6))
    assert looks(model) == 0


# ---- torch's encoder, where it does not nest by itself -------------------------------------------------


def encoder(**options: Any) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, **options).eval()


def padded(left: bool = False) -> tuple[Tensor, Tensor]:
    pad = torch.zeros(3, 5, dtype=torch.bool)
    pad[1, 2 : 3 if left else 5] = True  # a hole, which a nested tensor can't have, or an end
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)), pad


def same_as_before(model: Any, call: Any) -> bool:
    """Whether an adapter that changes nothing changes nothing; whether padding is zero besides."""
    before = call(model)
    handle = optx.attach(model, optx.LoRA(rank=2), targets=r".*linear1")
    torch.testing.assert_close(call(model), before, rtol=1e-5, atol=1e-5)
    handle.remove()
    return bool((before[1, 2] == 0).all())


@torch.no_grad()
def test_padding_is_zero_where_the_encoder_would_nest() -> None:
    x, pad = padded()
    assert same_as_before(encoder(), lambda model: model(x, src_key_padding_mask=pad))
    frozen = encoder().requires_grad_(False)
    with torch.enable_grad():  # what is attached has gradients, which is not the layer's own
        assert same_as_before(frozen, lambda model: model(x, src_key_padding_mask=pad))
    hole = padded(left=True)
    assert not same_as_before(encoder(), lambda model: model(hole[0], src_key_padding_mask=hole[1]))


@torch.no_grad()
def test_padding_is_computed_where_it_would_not() -> None:
    x, pad = padded()
    plain = lambda model: model(x, src_key_padding_mask=pad)  # noqa: E731
    with torch.enable_grad():
        assert not same_as_before(encoder(), plain)
    assert not same_as_before(encoder(), lambda model: model(x, torch.zeros(5, 5), src_key_padding_mask=pad))
    assert not same_as_before(encoder().train(), plain)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert not same_as_before(encoder(), plain)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    one = lambda model: model(x[1], src_key_padding_mask=pad[1])[None].expand(3, 5, 16)  # noqa: E731
    assert not same_as_before(encoder(), one)


@torch.no_grad()
def test_a_mask_that_nobody_checks_is_taken_as_it_is() -> None:
    """With mask_check=False the encoder nests by whatever mask it is given."""
    x, pad = padded()
    assert same_as_before(encoder(mask_check=False), lambda model: model(x, src_key_padding_mask=pad))


@torch.no_grad()
def test_padding_is_computed_within_autocast() -> None:
    x, pad = padded()
    torch.set_autocast_enabled("cuda", True)  # the one that the encoder asks for
    try:
        assert not same_as_before(encoder(), lambda model: model(x, src_key_padding_mask=pad))
    finally:
        torch.set_autocast_enabled("cuda", False)
