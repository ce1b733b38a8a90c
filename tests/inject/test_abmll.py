"""ABMLL on a model's life: what it serves, merges, files, resume, and optimizers that follow it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from abmll_models import data, equal, grads, meta, mlp, move, nll
from adapter_models import gpt2, in_peft, llama, outputs
from torch import nn

import optx


def test_default_targets_c_and_the_start():
    model = llama()
    before = outputs(model)
    ab = optx.attach(model, optx.ABMLL(rank=2))
    assert {one.path.split(".")[-1] for one in ab.served} == {"q_proj", "v_proj"}
    assert torch.equal(outputs(model), before)
    for one in ab.served:
        part: Any = one.part
        torch.testing.assert_close(part.c, 0.01 * one.module.weight.detach().std())  # type: ignore[operator]
        assert not part.B_mean.any()
        assert not part.B_std.any()
        assert part.A_mean.std() > 0
    assert ab.metrics()["abmll/change_norm"] == 0.0
    assert "rank 2, c " in str(ab.report())


@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_merged_mean_computes_the_same_and_peft_reads_it(build: Any, tmp_path: Path):
    """Property 8, on Linear and on Conv1D."""
    model = build()
    bare = {name: t.clone() for name, t in model.state_dict().items()}
    before = outputs(model)
    ab = optx.attach(model, optx.ABMLL(rank=2))
    move(ab)
    tuned = outputs(model)
    assert (tuned - before).abs().max() > 5e-3
    optx.export_lora(ab, tmp_path)
    torch.testing.assert_close(outputs(in_peft(build(), tmp_path)), tuned, rtol=1e-5, atol=1e-5)
    ab.merge()
    torch.testing.assert_close(outputs(model), tuned, rtol=1e-5, atol=1e-5)
    ab.unmerge()
    ab.merge()
    ab.remove()
    assert torch.equal(outputs(model), before)
    assert all(torch.equal(t, bare[name]) for name, t in model.state_dict().items())


def test_a_task_s_mean_is_merged_where_that_is_asked_for():
    model, ab = mlp()
    (x, _), bare = data(0)[1], model[0].weight.detach().clone()
    theta = ab.predict(lambda: model(x), 0)
    with pytest.raises(optx.MergeError, match="which='phi' is for use within a task"):
        ab.merge(which="phi")
    with pytest.raises(optx.OptxError, match="merge: which is 'mean'"):
        ab.merge(which="mean")  # type: ignore[arg-type]
    with ab.task(inner_lr=1.0) as t:
        t.adapt(lambda: nll(model, data(0)[0]))
        phi = ab.predict(lambda: model(x), 0)
        ab.merge(which="phi")
    torch.testing.assert_close(model(x).softmax(-1).detach(), phi)
    assert not torch.allclose(phi, theta)
    with pytest.raises(optx.MergeError, match="task: the means are merged"), ab.task():
        pass
    with pytest.raises(optx.MergeError, match="no weights can be drawn"):
        ab.predict(lambda: model(x))
    ab.unmerge()
    assert torch.equal(model[0].weight, bare)
    ab.merge()
    torch.testing.assert_close(model(x).softmax(-1).detach(), theta)


def test_what_it_can_t_serve_is_refused_by_name():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    for target, kind in (("0", "Embedding"), ("2", "Conv1d")):
        with pytest.raises(
            optx.TargetError, match=f"ABMLL serves Linear or Conv1D modules; '{target}' .*{kind}"
        ):
            optx.attach(model, optx.ABMLL(rank=2), target)
    with pytest.raises(optx.TargetError, match=r"rank=8 is larger than the weight of '1', \(4, 4\)"):
        optx.attach(model, optx.ABMLL(), "1")
    nn.init.zeros_(model[1].weight)
    with pytest.raises(optx.TargetError, match=r"deviation of 1.weight, 0; it must be finite and above 0"):
        optx.attach(model, optx.ABMLL(rank=2), "1")
    with torch.no_grad():
        model[1].weight[0] += 1e-5
    with pytest.raises(optx.TargetError, match="above 1e-06"):
        optx.attach(model, optx.ABMLL(rank=2, sigma_param="abs"), "1")
    optx.attach(model, optx.ABMLL(rank=2, c=1e-3, sigma_param="abs"), "1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": -1e-7}, "beta is -1e-07"),
        ({"beta": float("inf")}, "beta is inf; it must be a finite number, 0 or more"),
        ({"beta": None}, "beta is None"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"c": 0.0}, "c is 0.0; it must be a finite number above 0"),
        ({"c": -1.0}, "c is -1.0"),
        ({"c": 1e-6, "sigma_param": "abs"}, "c is 1e-06 with sigma_param='abs'"),
        ({"a0": 0}, "a0 is 0;"),
        ({"b0": 0.0}, "b0 is 0.0;"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"seed": -1}, "seed is -1"),
        ({"sigma_param": "exp"}, "sigma_param is 'exp'; it must be one of 'softplus', 'abs'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(optx.OptxError, match=f"ABMLL: {words}"):
        optx.ABMLL(**options)


def steps(model: Any, ab: optx.ABMLLHandle, opt: torch.optim.Optimizer, which: range) -> dict[str, Any]:
    for step in which:
        meta(model, ab, (2 * step, 2 * step + 1))
        opt.step()
        opt.zero_grad()
    return {name: t.clone() for name, t in ab.state_dict().items()}


@pytest.mark.parametrize("saved", [("model", "handle", "optimizer"), ("model", "optimizer")])
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, saved: tuple[str, ...]):
    model, ab = mlp(torch.float32)
    opt = torch.optim.Adam(ab.parameters(), lr=0.01)
    steps(model, ab, opt, range(2))
    run: dict[str, Any] = {"model": model, "handle": ab, "optimizer": opt}
    torch.save({name: run[name].state_dict() for name in saved}, tmp_path / "run.pt")
    wanted = steps(model, ab, opt, range(2, 4))
    torch.manual_seed(9)
    model, ab = mlp(torch.float32, moved=False)
    opt = torch.optim.Adam(ab.parameters(), lr=0.01)
    run = {"model": model, "handle": ab, "optimizer": opt}
    for name, state in torch.load(tmp_path / "run.pt", weights_only=True).items():
        run[name].load_state_dict(state)
    assert ab.tasks_begun == 4
    assert equal(wanted, steps(model, ab, opt, range(2, 4)))


def test_made_without_memory_it_counts_from_0_and_from_what_is_loaded():
    _, ab = mlp(torch.float32)
    ab.tasks_begun = 5
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    empty = optx.attach(model, optx.ABMLL(rank=2, c=0.05), nn.Linear)
    assert empty.tasks_begun == 0
    torch.use_deterministic_algorithms(True)  # so that memory without values has the largest number
    try:
        model.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert empty.tasks_begun == 0
    empty.load_state_dict(ab.state_dict())
    assert empty.tasks_begun == 5


def test_files_hold_theta_c_and_the_options(tmp_path: Path):
    model, ab = mlp(beta=1e-3, c=None, sigma_param="abs")
    x = data(0)[0][0]
    ab.save(tmp_path)
    fresh = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    again: Any = optx.attach(fresh, tmp_path)
    assert isinstance(again, optx.ABMLLHandle)
    assert again.injection == ab.injection
    for name in ("0", "2"):
        fresh.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
    assert torch.equal(again.predict(lambda: fresh(x)), ab.predict(lambda: model(x)))
    own, other = mlp(beta=0.5, c=0.1, sigma_param="abs", moved=False)
    other.load(tmp_path)  # options of training alone may be others
    assert float(own[0].optx.abmll.c) == float(model[0].optx.abmll.c) != 0.1
    _, soft = mlp()
    with pytest.raises(optx.FileError, match="sigma_param='abs'"):
        soft.load(tmp_path)
    with pytest.raises(optx.FileError, match=r'it is of .*"abs".* and this handle of .*"softplus"'):
        soft.load_state_dict(ab.state_dict())
    state = soft.state_dict()
    del state["optx.abmll.tasks"]
    with pytest.raises(optx.FileError, match=r"'optx.abmll.tasks' is missing"):
        soft.load_state_dict(state)


def test_an_optimizer_of_before_follows_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    base = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
    )
    ab = optx.attach(model, optx.ABMLL(rank=2, c=0.05), nn.Linear)
    opt = optx.wrap(base, ab)
    places = {id(p): i for i, group in enumerate(opt.param_groups) for p in group["params"]}
    assert [places[id(p)] for _, p in ab.named_parameters()] == [0] * 4 + [1] * 4
    before = {name: p.detach().clone() for name, p in ab.named_parameters()}
    own = model[0].weight.detach().clone()
    meta(model, ab, range(2))
    opt.step()
    assert all(not torch.equal(p, before[n]) for n, p in ab.named_parameters() if ".B_" in n)
    assert not torch.equal(model[0].weight, own)  # the query's loss is the model's, too
    ab.remove()
    assert sum(len(group["params"]) for group in opt.param_groups) == 4


def test_a_copy_made_within_a_task_is_outside_of_it():
    model, ab = mlp()
    x = data(0)[0][0]
    theta = model(x)
    with ab.task(inner_lr=1.0) as t:
        t.adapt(lambda: nll(model, data(0)[0]))
        twin = copy.deepcopy(model)
    assert torch.equal(twin(x), theta)


def test_disabled_sharded_or_empty_it_has_no_tasks():
    _, ab = mlp()
    with ab.disable(), pytest.raises(optx.OptxError, match="attached to '0' is disabled"), ab.task():
        pass
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 7))
    ab = optx.attach(model, optx.ABMLL(rank=2, c=0.1), nn.Linear)
    with pytest.raises(optx.OptxError, match="is on the meta device, without values"), ab.task():
        pass
    with pytest.raises(optx.TargetError, match="meta"):
        optx.attach(model, optx.ABMLL(rank=2), nn.Linear, name="second")
    ab.remove()
    with pytest.raises(optx.OptxError, match="task: this handle has been removed"), ab.task():
        pass


def test_scaled_losses_and_half_precision_train_it():
    """bfloat16 weights have float32 factors; a scaled loss scales every term."""
    model, ab = mlp(torch.bfloat16, beta=1e-3)
    assert {p.dtype for p in ab.parameters()} == {torch.float32}
    meta(model, ab)
    assert all(t.isfinite().all() and t.any() for t in grads(ab).values())
    model, ab = mlp(beta=1e-3)
    meta(model, ab)
    plain = grads(ab)
    ab.tasks_begun = 0
    meta(model, ab, scale=8.0)
    assert all(torch.allclose(8 * plain[name], t) for name, t in grads(ab).items())


def test_compiled_it_computes_the_same():
    model, ab = mlp(torch.float32)
    meta(model, ab, range(2))
    wanted = grads(ab)
    ab.tasks_begun = 0
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    meta(compiled, ab, range(2), query=compiled)
    for name, t in grads(ab).items():
        torch.testing.assert_close(t, wanted[name])
