"""`Handle.metrics`: numbers of what was attached, against computations of their own in float64."""

from __future__ import annotations

import math
import re

import pytest
import torch

import optx
from tests.injections import ROWS, cnn, images, run
from tests.step.test_metrics import close, documented

PLAIN = {"trainable", "merged", "norm"}


def norm_of(tensors):
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def in_weights(model, handle):
    """The norm of what a merge adds to weights and biases, in float64."""
    for one in handle.served:
        one.module.to(torch.float64)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".optx." not in n}
    handle.merge(untie=True)
    after = {n: p.detach() for n, p in model.named_parameters() if n in before}
    return norm_of(after[n] - before[n] for n in after)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_every_injection_tells_its_numbers_and_the_norm_of_its_change(row):
    model, handle = row.attached(model=row.shortest())
    found = handle.metrics()
    adapter = row.injection().name
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    own = {name.removeprefix(f"{adapter}/"): value for name, value in found.items()}
    trained = {id(p): p for p in handle.parameters() if p.requires_grad}.values()
    wanted = {"trainable": float(sum(p.numel() for p in trained)), "merged": 0.0, "norm": norm_of(trained)}
    close(own, wanted)
    if "change_norm" in own:
        # A bias that LoRA trains beside its factors is no weight.
        biased = [p for n, p in handle.named_parameters() if n.endswith(".bias") and ".optx." in n]
        wanted = math.sqrt(max(in_weights(model, handle) ** 2 - norm_of(biased) ** 2, 0.0))
        assert own["change_norm"] == pytest.approx(wanted, rel=1e-5)
        assert handle.metrics()[f"{adapter}/merged"] == 1.0
    elif row.merges:
        assert type(row.injection()) in (
            optx.IA3,
            optx.LoRA,
            optx.STN,
            optx.Perp,
            optx.StableRPS,
            optx.PSDFactor,
            optx.VQLogits,
            optx.LDLT,
        )  # from weights


def test_stn_tells_its_hyperparameters():
    row = next(row for row in ROWS if row.label == "STN, conv")
    _, handle = row.attached()
    hparams = handle.injection.hparams
    wanted = {f"stn/value/{name}": value for name, value in hparams.values().items()}
    wanted |= {f"stn/sigma/{name}": hparams[name].sigma for name in hparams}
    close(handle.metrics(), wanted)


def test_ftwt_tells_its_loss_and_which_share_of_filters_the_last_call_kept():
    model = cnn()
    handle = optx.attach(model, optx.FTWT(r=0.9, shape=(1, 3, 8, 8)))
    assert set(handle.metrics()) == {f"ftwt/{what}" for what in PLAIN}
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn_like(p))
    model.train()
    run(model)
    loss = handle.loss().detach()
    masks = torch.cat([mask.double().flatten() for mask in handle.masks().values()])
    wanted = {"kept": float(masks.mean()), "loss": float(loss), "agreement": handle.agreement()}
    assert 0.0 < wanted["kept"] < 1.0
    close(handle.metrics(), {f"ftwt/{name}": value for name, value in wanted.items()})
    model.eval()
    model(images()[:1])
    assert handle.metrics()["ftwt/loss"] == pytest.approx(float(loss))


def test_trainable_numbers_are_those_that_an_optimizer_can_move():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    handle = optx.attach(model, optx.LoRA(rank=2), "0", name="news", modules_to_save=["1"])
    assert handle.metrics()["news/trainable"] == 2 * (4 + 4) + 4 * 3 + 3
    handle.parameters()[0].requires_grad_(False)
    assert handle.metrics()["news/trainable"] == 2 * 4 + 4 * 3 + 3
    handle.remove()
    with pytest.raises(optx.OptxError, match="removed"):
        handle.metrics()


def test_the_table_of_names_is_whole():
    named = {name.removeprefix("<adapter>/") for name in documented(optx.Handle.metrics)}
    found = {*PLAIN, "change_norm", "kept", "loss", "agreement", "beta", "spread", "dropped"}
    _, handle = next(row for row in ROWS if row.label == "STN, conv").attached()
    found |= {re.sub(r"(value|sigma)/\w+", r"\1/<name>", n).split("/", 1)[1] for n in handle.metrics()}
    assert named == found
