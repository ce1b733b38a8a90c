"""AdaWPT on transformers' Swin, Swin V2 and Swin2SR: norms before and after, shifts, padding, arguments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from window_models import Attention, Block, blocks, move, real

import optx

KINDS = ["Swin", "Swinv2", "Swin2SR"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def pixels(batch: int = 3, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def attached(model: nn.Module, **options: Any) -> optx.WindowHandle:
    torch.manual_seed(2)
    return optx.attach(model, optx.WindowPrune(**options))


def some(handle: optx.WindowHandle, share: float = 0.5) -> dict[str, Tensor]:
    """A policy of every block of the last forward."""
    generator = torch.Generator().manual_seed(4)
    return {
        path: torch.rand(one.shape, generator=generator) < share for path, one in handle.decisions.items()
    }


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *((kind, (32, 32)) for kind in KINDS),
        *((kind, (30, 26)) for kind in KINDS[:2]),  # Swin2SR itself takes only whole windows
    ],
    ids=str,
)
def test_a_real_model(kind: str, size: tuple[int, int]) -> None:
    """Properties 1 to 3, with the model's own padding, and to the bit after remove."""
    model, x = real(kind), pixels(3, *size)
    with torch.no_grad():
        want = model(x).last_hidden_state
        handle = attached(model)
        with handle.force(keep_all=True):
            torch.testing.assert_close(model(x).last_hidden_state, want, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(model.train()(x).last_hidden_state, want, atol=1e-6, rtol=1e-5)
        with handle.force(some(handle)):
            masked = model(x).last_hidden_state
            gathered = model.eval()(x).last_hidden_state
        torch.testing.assert_close(gathered, masked, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(gathered, want, atol=1e-3)
        assert 0.3 < handle.active_ratio() < 0.7
        handle.remove()
        assert torch.equal(model(x).last_hidden_state, want)


@each_kind
def test_what_a_block_drops_is_what_came_in(kind: str) -> None:
    """Also under norms that come after: a norm makes its bias of a 0."""
    model = real(kind)
    handle = attached(model)
    model(pixels())
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> Any:
        return lambda module, args, output: seen.update({path: (args[0], output[0])})

    hooks = [one.module.register_forward_hook(keep(one.path)) for one in handle.served]
    with handle.force(some(handle)):
        for training in (True, False):
            model.train(training)(pixels())
            for path, kept in handle.maps().items():
                before, after = (one.unflatten(1, kept.shape[-2:]) for one in seen[path])
                assert torch.equal(before[~kept[:, 0]], after[~kept[:, 0]])
                assert (before != after).any(-1)[kept[:, 0]].float().mean() > 0.99
    for hook in hooks:
        hook.remove()


def test_a_saved_folder_is_attached(tmp_path: Path) -> None:
    model = real("Swinv2")
    handle = attached(model, share_policy="block", tau=0.5)
    move(handle)
    want = model(pixels()).last_hidden_state
    handle.save(tmp_path / "a")
    handle.remove()
    again = optx.attach(model, str(tmp_path / "a"))
    assert torch.equal(model(pixels()).last_hidden_state, want)
    assert again.injection == optx.WindowPrune(share_policy="block", tau=0.5)
    own = nn.Sequential(Block())
    optx.attach(own, optx.WindowPrune(blocks=blocks)).save(tmp_path / "b")
    with pytest.raises(optx.TargetError, match=r"a saved folder holds no such function"):
        optx.attach(nn.Sequential(Block()), str(tmp_path / "b"))


def test_post_norm_is_seen_by_what_a_block_computes() -> None:
    forms = {kind: [part.form.post_norm for _, part in attached(real(kind))._parts()] for kind in KINDS}
    assert forms == {"Swin": [False] * 4, "Swinv2": [True] * 4, "Swin2SR": [True] * 4}


def test_branches_of_zero_hide_no_order() -> None:
    """Of a block that starts as the identity every order gives the same."""
    model = real("Swinv2")
    for name, p in model.named_parameters():
        if "output.dense" in name or "layernorm_" in name:
            nn.init.zeros_(p)
    assert all(part.form.post_norm for _, part in attached(model)._parts())


def test_a_last_stage_of_one_window_is_plain_however_often_it_ran() -> None:
    """transformers' Swin forgets its shift at the first image that is as small as a window."""
    fresh, used = real("Swin", 16), real("Swin", 16)
    used(pixels(1, 16, 16))
    predicting = [
        [path for path, part in attached(model)._parts() if part.predictor is not None]
        for model in (fresh, used)
    ]
    assert predicting[0] == predicting[1]
    assert len(predicting[0]) == 3
    handle = (
        attached(fresh, share_policy="block") if False else optx.attach(real("Swin", 16), optx.WindowPrune())
    )
    handle.model(pixels(2, 16, 16))
    found = handle.decisions
    assert torch.equal(found["encoder.layers.1.blocks.0"], found["encoder.layers.1.blocks.1"])


@each_kind
def test_attention_weights_are_there_and_0_where_nothing_was_computed(kind: str) -> None:
    model = real(kind, attn_implementation="eager") if kind == "Swin" else real(kind)
    handle = attached(model)
    with torch.no_grad():
        model(pixels())
        with handle.force(keep_all=True):
            dense = model(pixels(), output_attentions=True).attentions
        policy = some(handle)
        with handle.force(policy):
            gathered = model(pixels(), output_attentions=True).attentions
    assert len(dense) == len(gathered) == 2
    last = list(policy.values())[1].flatten()
    assert [one.shape for one in gathered] == [one.shape for one in dense]
    assert torch.equal(gathered[0].flatten(1).sum(1) > 0, last)


def test_masked_training_has_the_dense_models_drop_path() -> None:
    model = real("Swin")
    for block in (module for module in model.modules() if hasattr(module, "drop_path")):
        block.drop_path = Half()
    want = model.train()(pixels()).last_hidden_state
    handle = attached(model)
    with handle.force(keep_all=True):
        torch.testing.assert_close(model(pixels()).last_hidden_state, want, atol=1e-5, rtol=1e-5)


class Half(nn.Module):
    """Another factor for each of three images."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([2.0, 0.0, 1.0])[:, None, None] if self.training else x


# ---- what can't be served ---------------------------------------------------------------------------------


class Convolved(nn.Module):
    """An MLP over the whole image, as of vision transformers for detection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Centred(nn.Module):
    """An MLP that takes a mean over all windows."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((0, 1))


class Imaged(nn.Module):
    """An MLP that wants to know the image's size."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("mlp", "says"),
    [
        (Convolved(8), "mixes tokens"),
        (Centred(), "MLP mixes windows"),
        (Imaged(), "can't be computed on windows"),
    ],
)
def test_an_mlp_beyond_its_window_is_refused(mlp: nn.Module, says: str) -> None:
    model = real("Swin")
    block = model.encoder.layers[0].blocks[1]
    block.mlp = mlp
    before = list(model.state_dict())
    with pytest.raises(optx.TargetError, match=rf"encoder\.layers\.0\.blocks\.1.*{says}"):
        attached(model)
    assert list(model.state_dict()) == before
    optx.attach(model, optx.WindowPrune(), exclude="encoder.layers.0.blocks.1")


def test_an_mlp_of_ones_own_over_the_image_is_refused() -> None:
    with pytest.raises(optx.TargetError, match="'0', a Block: its MLP mixes tokens, and computed window by"):
        optx.attach(nn.Sequential(Block(whole=True)), optx.WindowPrune(blocks=blocks))


def test_a_block_that_does_more_is_refused() -> None:
    model = real("Swin")
    block = model.encoder.layers[0].blocks[0]
    kind = type(block)

    class Scaled(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, weights = super().forward(*args, **kwargs)
            return 2 * output, weights

    block.__class__ = Scaled
    with pytest.raises(optx.TargetError, match="a Scaled: norms, attention and MLP put together"):
        attached(model)


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8)), {}, "finds no module built as Swin's blocks are"),
        (
            lambda: nn.Sequential(nn.Linear(8, 8)),
            {"blocks": blocks},
            "finds no module that blocks= calls one",
        ),
        (lambda: real("Swin"), {"window": 8}, r"its window is \(4, 4\), and window=8 was given"),
        (lambda: nn.Sequential(Block()), {"blocks": lambda module: 3}, "blocks gave int"),
        (lambda: real("Swin").to("meta"), {}, "meta device"),
    ],
)
def test_what_can_not_be_served(model: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(optx.TargetError, match=says):
        attached(model(), **options)


class Failing(Block):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not today")


def test_a_block_that_can_not_be_tried_or_has_no_width() -> None:
    with pytest.raises(optx.TargetError, match=r"its forward takes none of .* \(RuntimeError: not today\)"):
        attached(nn.Sequential(Failing()), blocks=blocks)

    def without(module: nn.Module) -> optx.WindowBlock | None:
        found = blocks(module)
        return found and dataclasses.replace(found, norm1=lambda x: module.one(x))

    with pytest.raises(optx.TargetError, match="can't see the width of '0' by its norm1"):
        attached(nn.Sequential(Block()), blocks=without)


def test_tokens_in_a_row_need_a_size() -> None:
    model = nn.Sequential(Block())
    attached(model, blocks=blocks)
    with pytest.raises(optx.OptxError, match=r"called with \(2, 16, 8\) and no height and width in tokens"):
        model(torch.randn(2, 16, 8))


def test_a_target_that_is_no_block_says_what_it_lacks() -> None:
    with pytest.raises(optx.TargetError, match="it has no two norms"):
        optx.attach(real("Swin"), optx.WindowPrune(), targets=r"encoder\.layers\.0")


@pytest.mark.parametrize(
    "options",
    [{"tau": 0.0}, {"tau": float("inf")}, {"share_policy": "model"}, {"window": 0}, {"blocks": "swin"}],
)
def test_options(options: dict[str, Any]) -> None:
    with pytest.raises(optx.OptxError, match=f"WindowPrune: {next(iter(options))} is"):
        optx.WindowPrune(**options)


def test_four_callables_will_do() -> None:
    """With window= and the module's shift_size; the image's size comes as an argument."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.m, self.t = (
                nn.LayerNorm(8),
                nn.LayerNorm(8),
                nn.Linear(8, 8),
                Attention(8, 2),
            )

        def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
            h, w = size
            u = F.pad(self.a(x).unflatten(1, size), (0, 0, 0, w % 2, 0, h % 2))
            cut = u.unfold(1, 2, 2).unfold(2, 2, 2).permute(0, 1, 2, 4, 5, 3)
            y = self.t(cut.reshape(-1, 4, 8), None).reshape(cut.shape).permute(0, 1, 3, 2, 4, 5)
            x = x + y.reshape(u.shape)[:, :h, :w].flatten(1, 2)
            return x + self.m(self.b(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Plain(), Plain()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, (6, 5))
            return x

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 30, 8)
    want = model(x)
    made = lambda module: (module.a, module.t, module.b, module.m) if isinstance(module, Plain) else None  # noqa: E731
    handle = attached(model, blocks=made, window=2)
    with handle.force(keep_all=True):
        torch.testing.assert_close(model(x), want, atol=1e-6, rtol=1e-6)
    move(handle)
    model(x)
    assert [tuple(one.shape) for one in handle.decisions.values()] == [(2, 1, 3, 3)] * 2
