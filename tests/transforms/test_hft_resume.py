"""HFT's checkpoints and copies: resumed in a new process, from plain and from other ones."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import flat
from hft_models import assert_equal, fresh, weights
from hft_runs import BASES, train, with_state
from torch import Tensor, nn

import optx
from optx.transforms.hft import HFT

SCRIPT = """
import sys, torch
sys.path[:0] = {folders!r}
import optx
from hft_models import fresh
from hft_runs import BASES, train
from optx.transforms.hft import HFT
torch.set_num_threads(1)
base, fused, checkpoint, result = sys.argv[1:]
model = fresh()
opt = optx.wrap(BASES[base](model.parameters()), HFT(model, rounds_every=4, seed=99),
                fused="auto" if fused == "auto" else False)
saved = torch.load(checkpoint, weights_only=True)
model.load_state_dict(saved["model"])
opt.load_state_dict(saved["opt"])
assert (opt.hft.round, opt.hft.seed, opt.hft.selected().trainable) == (1, 5, tuple(saved["trainable"]))
train(model, opt, 5)
torch.save({{"model": model.state_dict(), "opt": opt.state_dict(), "round": opt.hft.round}}, result)
"""


@pytest.mark.parametrize(
    ("base", "fused"), [("AdamW", "auto"), pytest.param("SGD", "False", marks=pytest.mark.long)]
)
def test_resume_in_a_new_process_is_bit_identical(base: str, fused: str, tmp_path: Path) -> None:
    """Property 6: saved in the middle of round 1, resumed, across the border to round 2."""

    def start() -> tuple[nn.Module, Any]:
        model = fresh()
        hft = HFT(model, rounds_every=4, seed=5)
        path: Any = "auto" if fused == "auto" else False
        return model, optx.wrap(BASES[base](model.parameters()), hft, fused=path)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, opt = start()
        train(model, opt, 10)
        half, half_opt = start()
        train(half, half_opt, 5)
    finally:
        torch.set_num_threads(threads)
    saved = {
        "model": half.state_dict(),
        "opt": half_opt.state_dict(),
        "trainable": list(half_opt.hft.selected().trainable),
    }
    torch.save(saved, tmp_path / "checkpoint.pt")
    script = SCRIPT.format(folders=[str(folder) for folder in Path(__file__).parents[:2]])
    files = [str(tmp_path / "checkpoint.pt"), str(tmp_path / "result.pt")]
    subprocess.run([sys.executable, "-c", script, base, fused, *files], check=True, timeout=1200)
    result = torch.load(files[1], weights_only=True)
    assert result["round"] == opt.hft.round == 2
    assert_equal(result["model"], dict(model.state_dict()))
    ours, theirs = flat(opt.state_dict()), flat(result["opt"])
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name], name


def test_a_plain_checkpoint_loads_without_the_frozen_half() -> None:
    model, plain = fresh(), fresh()
    base = BASES["AdamW"](plain.parameters())
    train(plain, base, 2)
    opt = optx.wrap(BASES["AdamW"](model.parameters()), HFT(model, seed=4))
    opt.hft.next_round()
    opt.load_state_dict(base.state_dict())
    assert (opt.hft.round, opt.hft.seed) == (1, 4)
    assert with_state(opt) == len(opt.hft.selected().trainable)


def test_a_checkpoint_of_another_selection_warns() -> None:
    model, other = fresh(), fresh()
    opt = optx.wrap(BASES["AdamW"](model.parameters()), HFT(model))
    wider = optx.wrap(BASES["AdamW"](other.parameters()), HFT(other, ratio=0.9))
    wider.load_state_dict(copy.deepcopy(wider.state_dict()))
    with pytest.warns(UserWarning, match="the checkpoint trained another half in round 0"):
        opt.load_state_dict(wider.state_dict())


def test_distributed_checkpoint() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def start() -> tuple[nn.Module, Any]:
        model = fresh()
        return model, optx.wrap(BASES["AdamW"](model.parameters()), HFT(model, rounds_every=4))

    model, opt = start()
    train(model, opt, 5)
    saved = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, opt)))
    other, resumed = start()
    other.load_state_dict(saved[0])
    resumed.hft.start_round(1)  # DCP restores state of trainable parameters only
    set_optimizer_state_dict(other, resumed, saved[1])
    assert (resumed.hft.round, resumed.param_groups[0]["optx.hft.steps"]) == (1, 1)
    train(model, opt, 5)
    train(other, resumed, 5)
    assert opt.hft.round == resumed.hft.round == 2
    assert_equal(weights(model), weights(other))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_a_copy_goes_its_own_way(how: Callable[[Any], Any]) -> None:
    model = fresh()
    opt = optx.wrap(BASES["AdamW"](model.parameters()), HFT(model, rounds_every=2))
    train(model, opt, 3)
    other, copied = how((model, opt))
    assert copied.hft is not opt.hft
    assert copied.hft.model is other
    before = weights(model)
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    other.zero_grad()
    train(other, copied, 3)
    assert_equal(weights(model), before)
    assert (opt.hft.round, copied.hft.round) == (1, 3)
    train(model, opt, 3)
    assert_equal(weights(model), weights(other))
    frozen = copied.hft.selected().frozen
    start = weights(other)
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    copied.step()
    assert all(torch.equal(start[name], other.get_parameter(name)) for name in frozen)
