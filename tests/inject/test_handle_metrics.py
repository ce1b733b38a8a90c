"""`Handle.metrics`: numbers of what was attached, against computations of their own."""

import pytest
import torch

import optx


def test_trainable_numbers_are_those_that_an_optimizer_can_move():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    handle = optx.attach(model, optx.LoRA(rank=2), "0", name="news", modules_to_save=["1"])
    assert handle.metrics()["news/trainable"] == 2 * (4 + 4) + 4 * 3 + 3
    handle.parameters()[0].requires_grad_(False)
    assert handle.metrics()["news/trainable"] == 2 * 4 + 4 * 3 + 3
    handle.remove()
    with pytest.raises(optx.OptxError, match="removed"):
        handle.metrics()
