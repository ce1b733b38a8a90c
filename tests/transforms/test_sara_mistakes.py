"""What SaRA refuses, before anything is changed, and what it says."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from sara_runs import adamw, copies, net, train, wrapped
from torch import nn

import optx
from optx import OptxError, TransformError


@optx.rule(writes="w")
def leave(w: Any) -> Any:
    """Everything moves."""
    return w * 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "threshold is None and fraction is None; give exactly one of them"),
        ({"threshold": 1e-3, "fraction": 0.1}, "threshold is 0.001 and fraction is 0.1; give exactly one"),
        ({"threshold": -1.0}, "threshold is -1.0; it must be at least 0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"fraction": 0.0}, "fraction is 0; it must be above 0"),
        ({"fraction": 1.5}, "fraction is 1.5; it must be between 0.0 and 1.0"),
        ({"fraction": 0.1, "reselect_at": 0}, "reselect_at is 0; it must be at least 1 step, or -1"),
        ({"fraction": 0.1, "reselect_at": 2.5}, "reselect_at is 2.5; it must be a whole number"),
        ({"fraction": 0.1, "rank_weight": -1.0}, "rank_weight is -1.0; it must be at least 0"),
        ({"fraction": 0.1, "rank_every": 0}, "rank_every is 0; it must be at least 1"),
        ({"fraction": 0.1, "compact": 1}, "compact is 1; it must be True or False"),
        ({"fraction": 0.1, "reset_state_on_reselect": None}, "reset_state_on_reselect is None; it must be"),
    ],
)
def test_arguments(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptxError, match=said):
        optx.SaRA(**options)


def test_company_that_would_move_the_rest_or_not_find_its_weights() -> None:
    class Later(optx.Transform):
        name = "later"
        rules: ClassVar[dict[str, Any]] = {"after": leave}

    model = net()
    start, later = copies(model), [optx.SaRA(fraction=0.2), Later()]
    opt = optx.wrap(adamw(model), *later, fused=False)
    train(model, opt, range(2))
    for name, p in model.named_parameters():  # it has the last word, wherever it stands
        assert torch.equal(p[~opt.sara._mask(p)], start[name][~opt.sara._mask(p)])
    with pytest.raises(TransformError, match="where PerpGrad would not find its weights"):
        optx.wrap(adamw(model), optx.SaRA(0.1, compact=True), optx.PerpGrad())
    opt = wrapped(net(), compact=True)
    with pytest.raises(TransformError, match="where PerpGrad would not find its weights"):
        optx.wrap(opt, optx.PerpGrad())
    assert [t.name for t in opt.transforms] == ["sara"]
    with pytest.raises(TransformError, match="serves SGD, Adam and AdamW; the base is RAdam"):
        optx.wrap(torch.optim.RAdam(net().parameters()), optx.SaRA(0.1, compact=True))


def test_weights_that_cannot_be_selected_from() -> None:
    meta = nn.Linear(3, 3, device="meta")
    with pytest.raises(TransformError, match="'weight' is on the meta device and has no values"):
        optx.wrap(torch.optim.AdamW(meta.named_parameters()), optx.SaRA(0.1))
    left_out = [{"params": list(net().parameters()), "sara": False}]
    with pytest.raises(TransformError, match="no trainable weight to select from"):
        optx.wrap(torch.optim.AdamW(left_out), optx.SaRA(0.1))
    with pytest.raises(TransformError, match="matrices of 65 rows and columns or more, and no trainable"):
        wrapped(net(), rank_weight=0.1)
    with pytest.raises(TransformError, match=r"density\(\) needs the optimizer"):
        optx.SaRA(0.1).density()


@pytest.mark.parametrize("compact", [False, True])
def test_a_trained_checkpoint_without_a_selection_is_refused_and_nothing_changes(compact: bool) -> None:
    model = net()
    plain = adamw(model)
    train(model, plain, range(3))
    tuned = net(seed=4)
    opt = wrapped(tuned, compact=compact)
    train(tuned, opt, range(1))
    before, state = copies(tuned), {p: dict(s) for p, s in opt.state.items()}
    said = "has state of '0.weight' and no selection, so it was trained otherwise, and a selection made now"
    with pytest.raises(TransformError, match=said):
        opt.load_state_dict(plain.state_dict())
    assert all(torch.equal(p, before[n]) for n, p in tuned.named_parameters())
    assert all(state[p][key] is t for p, s in opt.state.items() for key, t in s.items())


def test_forms_and_sizes_of_checkpoints() -> None:
    model = net()
    dense, compact = wrapped(model), wrapped(net(), compact=True)
    for opt, other in ((dense, compact), (compact, dense)):
        own = net()
        run = wrapped(own, compact=opt.sara.compact)
        train(own, run, range(1))
        with pytest.raises(TransformError, match=f"saved with compact={opt.sara.compact}, whose state has"):
            other.load_state_dict(run.state_dict())
    own = net()
    run = wrapped(own, compact=True)
    train(own, run, range(1))
    state = run.state_dict()
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][1:]
    with pytest.raises(
        optx.ShapeError, match=r"selects \d+ entries of '0.weight', and its 'exp_avg' has shape"
    ):
        compact.load_state_dict(state)


def test_another_threshold_than_the_checkpoints_is_told() -> None:
    model, again = net(), net()
    opt = wrapped(model, threshold=0.05)
    train(model, opt, range(2))
    resumed = wrapped(again, threshold=0.07)
    with pytest.warns(
        UserWarning, match=r"were selected below 0.05, and threshold is 0.07; the checkpoint's"
    ):
        resumed.load_state_dict(opt.state_dict())
    assert resumed.sara.threshold == 0.05
    with pytest.raises(TransformError, match="'threshold' was read when the optimizer was wrapped"):
        resumed.sara.threshold = 0.1
