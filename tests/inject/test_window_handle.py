"""What `optx.WindowPrune`'s handle tells and takes: the loss, decisions, costs, pictures, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from window_models import blocks, image, own, real

import optx


def attached(model: nn.Module, **options: Any) -> optx.WindowHandle:
    torch.manual_seed(2)
    return optx.attach(model, optx.WindowPrune(blocks=blocks, **options))


def pixels(batch: int = 2, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


# ---- the loss ---------------------------------------------------------------------------------------------


def collected(handle: optx.WindowHandle) -> dict[str, Tensor]:
    """The windows' logits of the last forward, as they are before `loss` takes them."""
    return {path: values[0].detach() for path, values in handle.collected.values.items()}


@given(seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.25, 0.5]))
def test_the_loss_is_the_cross_entropy_with_the_windows_that_are_marked(seed: int, share: float) -> None:
    """Index 0 is keep; a shifted block's windows are those of the rolled mask: 8 x 8 tokens, four windows."""
    model, handle = _TWO
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 1, 8, 8, generator=generator) < 0.1
    model.train()(image(2, 8, 8))
    logits = collected(handle)
    got = handle.loss(mask, share)
    want: list[Tensor] = []
    for path, shift in (("0", 0), ("1", 2)):
        rolled = mask[:, 0].float().roll((-shift, -shift), (1, 2))
        for b in range(2):
            for i in range(2):
                for j in range(2):
                    marked = rolled[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean() > share
                    z = logits[path][4 * b + 2 * i + j]
                    want.append(-z.log_softmax(0)[0 if marked else 1])
    torch.testing.assert_close(got.detach(), torch.stack(want).mean())


_MODEL = own(2)
_TWO = (_MODEL, attached(_MODEL))


def test_the_mask_is_of_pixels_whatever_the_stage() -> None:
    """One marked pixel is in one window of each plain block: of 16 x 16 tokens and of 8 x 8."""
    model = real("Swin").train()
    handle = optx.attach(model, optx.WindowPrune())
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, 17, 31] = 1  # token (8, 15) and (4, 7): window (2, 3) of 4 x 4, and (1, 1) of 2 x 2
    model(pixels())
    logits = collected(handle)
    got = handle.loss(mask)
    paths = list(logits)
    assert len(paths) == 4
    losses: list[Tensor] = []
    for path, side, place in ((paths[0], 4, (2, 3)), (paths[2], 2, (1, 1))):
        target = torch.ones(2, side, side, dtype=torch.long)
        target[:, place[0], place[1]] = 0
        losses.append(F.cross_entropy(logits[path], target.flatten()))
    # In shifted blocks token (8, 15) is at (6, 13) after a roll by 2, and (4, 7) at (2, 5).
    for path, side, place in ((paths[1], 4, (1, 3)), (paths[3], 2, (0, 1))):
        target = torch.ones(2, side, side, dtype=torch.long)
        target[:, place[0], place[1]] = 0
        losses.append(F.cross_entropy(logits[path], target.flatten()))
    torch.testing.assert_close(got.detach(), torch.stack(losses).mean())


def test_what_a_model_pads_its_input_by_is_not_marked() -> None:
    """30 x 26 pixels are 15 x 13 tokens in padded windows, and 8 x 7 in the next stage."""
    model = real("Swin").train()
    handle = optx.attach(model, optx.WindowPrune())
    mask = torch.zeros(1, 1, 30, 26)
    mask[..., 29, 25] = 1
    model(pixels(1)[..., :30, :26])
    logits = collected(handle)
    got = handle.loss(mask)
    # Tokens (14, 12) and (7, 6), of which the shifted blocks' rolls make (12, 10) and (5, 4).
    losses: list[Tensor] = []
    for (_, z), place in zip(logits.items(), (15, 14, 3, 3), strict=True):
        target = torch.ones(len(z), dtype=torch.long)
        target[place] = 0
        losses.append(F.cross_entropy(z, target))
    torch.testing.assert_close(got.detach(), torch.stack(losses).mean())


def test_the_loss_is_taken_once_and_ends_with_freeze() -> None:
    model, mask = own(2).train(), torch.ones(3, 12, 8)
    handle = attached(model)
    model(image())
    assert handle.loss(mask).requires_grad
    with pytest.raises(optx.OptxError, match="nothing has been collected"):
        handle.loss(mask)
    handle.freeze()
    model(image())
    assert float(handle.loss(mask)) == 0
    assert all(not p.requires_grad for p in handle.parameters())


def test_a_forgotten_loss_is_told_once() -> None:
    model = own(2).train()
    attached(model)
    model(image())
    with pytest.warns(UserWarning, match="WindowPrune: the last forward in training mode collected a loss"):
        model(image())


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.ones(2, 12, 8), "the mask is of 2 images"),
        (torch.ones(3, 2, 12, 8), "must be"),
        (torch.ones(3, 1, 5, 8), "coarser than the model's tokens, whose height is 12"),
        (torch.full((3, 12, 8), 255.0), "from 255 to 255"),
        (torch.full((3, 12, 8), float("nan")), "from nan to nan"),
    ],
)
def test_a_mask_that_is_none(mask: Tensor, says: str) -> None:
    model = own(2).train()
    handle = attached(model)
    model(image())
    with pytest.raises(optx.OptxError, match=says):
        handle.loss(mask)


def test_a_mask_on_another_grid_than_the_input_is_refused() -> None:
    """Its pixels would be taken for others; at twice the size, and of the tokens, they are the same."""
    model = real("Swin").train()
    handle = optx.attach(model, optx.WindowPrune())
    for size in ((33, 33), (40, 40), (32, 64)):
        model(pixels())
        with pytest.raises(optx.OptxError, match=r"the model's input was \(2, 3, 32, 32\): neither"):
            handle.loss(torch.ones(2, *size))
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., :12] = 1
    losses: list[Tensor] = []
    for factor in (2, 1, 0.5):
        torch.manual_seed(0)
        model(pixel_values=pixels())
        losses.append(handle.loss(F.interpolate(mask, scale_factor=factor)))
    assert len({float(one.detach()) for one in losses}) == 1


# ---- decisions --------------------------------------------------------------------------------------------


def test_decisions_are_those_of_the_last_forward() -> None:
    model = own(2).eval()
    handle = attached(model)
    with pytest.raises(optx.OptxError, match="nothing has been decided yet"):
        _ = handle.decisions
    want = {"0": torch.rand(3, 1, 3, 2) < 0.5, "1": torch.rand(1, 1, 3, 2) < 0.5}
    with handle.force(want):
        model(image())
        assert torch.equal(handle.decisions["0"], want["0"])
        assert torch.equal(handle.decisions["1"], want["1"].expand(3, 1, 3, 2))
        kept = int(want["0"].sum()) + 3 * int(want["1"].sum())
        assert handle.active_ratio() == pytest.approx(kept / 36)
        assert handle.maps()["1"].shape == (3, 1, 12, 8)
        assert float(handle.maps()["1"].float().mean()) == pytest.approx(float(want["1"].float().mean()))


def test_force_ends() -> None:
    model = own(2).eval()
    handle = attached(model)
    model(image())
    alone = handle.decisions
    with handle.force(keep_all=True):
        with handle.force({"0": torch.zeros(1, 1, 3, 2)}):
            model(image())
            assert not handle.decisions["0"].any()
        model(image())
        assert handle.active_ratio() == 1
    model(image())
    assert all(torch.equal(one, handle.decisions[path]) for path, one in alone.items())
    handle.force(keep_all=True)
    handle.force()
    model(image())
    assert all(torch.equal(one, handle.decisions[path]) for path, one in alone.items())


def test_what_can_not_be_forced() -> None:
    model = own(2).eval()
    handle = attached(model)
    with pytest.raises(optx.OptxError, match="no served block is called '7'"):
        handle.force({"7": torch.ones(1, 1, 3, 2)})
    with pytest.raises(optx.OptxError, match="exclude each other"):
        handle.force({}, keep_all=True)
    handle.force({"0": torch.ones(1, 1, 2, 3)})
    with pytest.raises(optx.OptxError, match=r"shape \(1, 1, 2, 3\), and its windows are \(3, 1, 3, 2\)"):
        model(image())


def test_a_follower_without_its_first_says_so() -> None:
    model = own(4).eval()
    handle = attached(model)
    model(image())
    with pytest.raises(optx.OptxError, match="'2' follows the first block of its stage"):
        model[2](image(2))
    handle._begin(model, (), {})
    with pytest.raises(optx.OptxError, match="'2' follows the first block of its stage"):
        model[2](image())


def test_logits_that_are_not_finite_drop_nothing_in_silence() -> None:
    model = own(2).eval()
    attached(model)
    with pytest.raises(optx.OptxError, match="the predictor of '0' gave logits that are not finite"):
        model(image() * float("inf"))


def test_a_checkpoint_that_loses_gradients_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = own(2)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=True)

    model = Model().train()
    attached(model)
    with pytest.raises(optx.OptxError, match="use_reentrant=False"):
        model(image().requires_grad_())


# ---- costs and pictures -----------------------------------------------------------------------------------


def test_multiply_adds_are_those_of_the_formula() -> None:
    """Property 7: C = 8, windows of 16 tokens, MLP of 4 C; predictors on all tokens."""
    model = real("Swin").eval()
    handle = optx.attach(model, optx.WindowPrune())
    model(pixels())
    c, t = 8, 16
    window = 4 * t * c * c + 2 * t * t * c + 8 * t * c * c
    token = 2 * c * c + c * (c // 2) + (c // 2) * (c // 4) + (c // 4) * 2
    block = handle.served[0].part
    assert (block.form.window_macs, block.form.call_macs, block.token_macs) == (window, 0, token)
    shares: list[float] = []
    for kept in (0, 4, 8, 16):
        policy = (torch.arange(16) < kept).reshape(1, 1, 4, 4)
        with handle.force({path: policy[..., :side, :side] for path, side in _sides(handle)}):
            model(pixels())
            cost = handle.cost()
        total = sum(
            int(one.sum()) * part.form.window_macs
            for one, (_, part) in zip(handle.decisions.values(), handle._parts(), strict=True)
        )
        assert cost.active == total
        shares.append(cost.active / cost.dense)
        assert cost.predictor == 2 * (2 * 256 * token + 2 * 64 * handle.served[2].part.token_macs)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert f"{cost.share:.1%}" in str(cost)


def _sides(handle: optx.WindowHandle) -> list[tuple[str, int]]:
    return [(path, one.shape[-1]) for path, one in handle.decisions.items()]


def test_attention_of_shared_position_bias_is_counted_once_a_call() -> None:
    handle = optx.attach(real("Swinv2"), optx.WindowPrune())
    part = handle.served[0].part
    assert part.form.call_macs == 49 * (2 * 512 + 512 * 2)  # the MLP over 7 x 7 offsets


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    from matplotlib.image import imread

    model = own(4).eval()
    handle = attached(model)
    model(image())
    handle.plot(tmp_path / "a.png")
    handle.plot(tmp_path / "b.png", torch.rand(3, 3, 24, 16), example=2)
    assert imread(tmp_path / "a.png").std() > 0.01
    assert not torch.equal(*(torch.tensor(imread(tmp_path / f"{name}.png")) for name in "ab"))
    with pytest.raises(optx.OptxError, match="example is 3"):
        handle.plot(tmp_path / "c.png", example=3)
    assert not (tmp_path / "c.png").exists()


@pytest.mark.long
def test_it_compiles_in_training() -> None:
    """Without a graph break; the same draw, loss and decisions."""
    model = own(3).train()
    handle = attached(model)
    torch.manual_seed(5)
    want = model(image())
    loss, decided = handle.loss(torch.ones(3, 12, 8)), handle.decisions
    torch._dynamo.reset()
    torch.manual_seed(5)
    got = torch.compile(model, backend="eager", fullgraph=True)(image())
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(handle.loss(torch.ones(3, 12, 8)), loss)
    assert all(torch.equal(one, handle.decisions[path]) for path, one in decided.items())
    got.sum().backward()
    assert all(p.grad is not None for p in handle.parameters())


def test_there_is_nothing_to_merge() -> None:
    handle = attached(own(2))
    with pytest.raises(optx.MergeError):
        handle.merge()
