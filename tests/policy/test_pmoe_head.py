"""PMOEHead on policies: where it begins, what it gives, what comes back, how it is saved, what it refuses."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from injections import assert_same, snapshot
from pmoe_policies import Policy, Q, policy, states
from processes import on_processes
from torch import nn

import optx
from optx.policy import ActionMixture, least_q


def test_where_it_begins() -> None:
    model, handle = policy(k=3, init=1e-3)
    part = model.out.optx.pmoe_head
    for name, p in handle.named_parameters():
        limit = 8**-0.5 if "mixing" in name else 1e-3
        assert p.detach().abs().max().item() <= limit
        assert p.detach().abs().max().item() > limit / 10
    assert part.mean_weight.shape == part.log_std_weight.shape == (6, 8)
    assert part.mixing_weight.shape == (3, 8)
    mixture = model(states())
    assert isinstance(mixture, ActionMixture)
    assert float(mixture.means.detach().abs().max()) < 0.05
    assert (mixture.k, mixture.squash, mixture.low) == (3, True, None)
    assert handle.report().rows[0].note == "3 primitives of 2 actions"


@settings(max_examples=25)
@given(
    k=st.integers(1, 5),
    actions=st.integers(1, 3),
    mean=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    kind=st.sampled_from(["plain", "unit", "number", "row"]),
    batch=st.lists(st.integers(1, 3), max_size=2),
)
def test_the_mixture_is_what_the_heads_give(
    k: int, actions: int, mean: bool, dtype: torch.dtype, kind: str, batch: list[int]
) -> None:
    options: dict[str, Any] = {"number": {"low": -2.0}, "row": {"low": [-3.0] * actions, "high": 4.0}}.get(
        kind, {}
    )
    model = Policy(outputs=actions * (1 if mean else 2)).to(dtype)
    head = optx.PMOEHead(
        k,
        outputs="mean" if mean else "mean_log_std",
        squash=kind != "plain",
        init=0.5,
        log_std_max=0.1,
        **options,
    )
    optx.attach(model, head, targets="out")
    x = torch.randn(*batch, 3, dtype=dtype)
    mixture = model(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert mixture.means.shape == mixture.log_stds.shape == (*batch, k, actions)
    assert mixture.logits.shape == (*batch, k)
    assert mixture.means.dtype == mixture.log_stds.dtype == mixture.logits.dtype == wide
    part, h = model.out.optx.pmoe_head, model.trunk(x).to(wide)
    for name, found in (("mean", mixture.means), ("log_std", mixture.log_stds), ("mixing", mixture.logits)):
        weight, bias = (getattr(part, f"{name}_{one}").to(wide) for one in ("weight", "bias"))
        wanted = (h @ weight.T + bias).clamp(*((-20, 0.1) if name == "log_std" else (None, 1e9)))
        torch.testing.assert_close(found.flatten(len(batch)), wanted, rtol=1e-5, atol=1e-6)
    a = mixture.sample()
    assert a.shape == (*batch, actions)
    if kind != "plain":
        low, high = {"unit": (-1, 1), "number": (-2, 1), "row": (-3, 4)}[kind]
        assert low - 1e-5 <= float(a.min()) <= float(a.max()) <= high + 1e-5
    assert bool(mixture.log_prob(a).isfinite().all())


def test_remove_gives_the_linear_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = Policy()
    before, output = snapshot(model), model(states())
    handle = optx.attach(model, optx.PMOEHead(), targets="out")
    assert not model.out.weight.requires_grad
    optimizer = torch.optim.SGD(handle.parameters(), lr=1.0)
    losses = optx.sac_pmoe_losses(model(states()), least_q(states(), Q()), alpha=0.1)
    (losses.policy + losses.freq).backward()
    optimizer.step()
    for p in model.parameters():
        p.grad = None
    with handle.disable():
        assert torch.equal(model(states()), output)
    handle.remove()
    assert_same(model, before)
    assert torch.equal(model(states()), output)


def test_an_optimizer_follows() -> None:
    model = Policy()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    own = [id(p) for g in optimizer.param_groups for p in g["params"]]
    handle = optx.attach(model, optx.PMOEHead(), targets="out")
    optimizer = optx.wrap(optimizer, handle)
    there = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert {id(p) for p in handle.parameters()} <= there
    assert id(model.out.weight) not in there
    handle.remove()
    assert sorted(id(p) for g in optimizer.param_groups for p in g["params"]) == sorted(own)


# ---- one primitive again --------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", ["mean_log_std", "mean"])
def test_one_primitive_as_a_plain_linear(outputs: Any) -> None:
    model, handle = policy(outputs=2 if outputs == "mean" else 4, head_outputs=outputs)
    mixture, h = model(states()), model.trunk(states())
    for i in range(4):
        plain = handle.materialize(i)
        assert type(plain) is nn.Linear
        wanted = torch.cat([mixture.means[:, i], mixture.log_stds[:, i]], -1)
        torch.testing.assert_close(plain(h), wanted if outputs != "mean" else mixture.means[:, i])
    keys = {name for name in model.state_dict() if ".optx." not in name}
    wanted = handle.materialize(2)(h)
    assert handle.merge_and_unload(primitive=2) is model
    assert set(model.state_dict()) == keys
    assert model.out.weight.requires_grad
    assert torch.equal(model(states()), wanted)


def test_which_primitive_must_be_said() -> None:
    _, handle = policy()
    with pytest.raises(optx.OptxError, match=r"materialize: there are 4 primitives; say which one"):
        handle.materialize()
    for wrong in (4, -1, 1.5):
        with pytest.raises(optx.OptxError, match=f"primitive is {wrong}; it must be 0 to 3"):
            handle.materialize(wrong)  # type: ignore[arg-type]
    with pytest.raises(optx.OptxError, match="merge_and_unload: there are 4 primitives"):
        handle.merge_and_unload()
    with pytest.raises(optx.MergeError, match="PMOEHead can't be merged: its primitives are several"):
        handle.merge()
    one, single = policy(k=1)
    torch.testing.assert_close(single.materialize()(one.trunk(states()))[:, :2], one(states()).means[:, 0])
    torch.manual_seed(0)
    bare = Policy(bias=False)
    handle = optx.attach(bare, optx.PMOEHead(), targets="out")
    with pytest.raises(optx.MergeError, match="'out' has no bias, and a primitive has"):
        handle.merge_and_unload(primitive=0)
    assert not handle.removed


# ---- saved, copied, compiled, in several processes ------------------------------------------------------


def train(model: Any, optimizer: Any, numbers: range) -> None:
    torch.manual_seed(7)
    critics = Q(), Q()
    for number in numbers:
        torch.manual_seed(number)
        s = torch.randn(16, 3)
        losses = optx.sac_pmoe_losses(model(s), least_q(s, *critics), alpha=0.1)
        optimizer.zero_grad()
        (losses.policy + losses.freq).backward()
        optimizer.step()


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, _ = policy(low=-2.0, high=2.0)
    half, handle = policy(low=-2.0, high=2.0)
    train(whole, torch.optim.Adam(whole.parameters(), lr=1e-2), range(8))
    optimizer = torch.optim.Adam(half.parameters(), lr=1e-2)
    train(half, optimizer, range(4))
    kept = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, kept)
    handle.save(tmp_path / "head")
    kept.seek(0)
    loaded = torch.load(kept, weights_only=True)
    again, _ = policy(seed=3, low=-2.0, high=2.0)
    again.load_state_dict(loaded["model"])
    optimizer = torch.optim.Adam(again.parameters(), lr=1e-2)
    optimizer.load_state_dict(loaded["optimizer"])
    train(again, optimizer, range(4, 8))
    assert all(torch.equal(one, whole.state_dict()[name]) for name, one in again.state_dict().items())
    fresh = Policy()
    fresh.trunk.load_state_dict(half.trunk.state_dict())
    read = optx.attach(fresh, tmp_path / "head")
    assert isinstance(read, optx.PMOEHandle)
    assert repr(read.injection) == repr(handle.injection)
    torch.manual_seed(0)
    wanted = half(states()).sample()
    torch.manual_seed(0)
    assert torch.equal(fresh(states()).sample(), wanted)
    fresh.load_state_dict(Policy().state_dict(), strict=True)  # a checkpoint of the bare policy


def test_under_autocast_it_is_float32() -> None:
    model, _ = policy()
    s = states()
    q_fn = least_q(s, Q())
    with torch.autocast("cpu", torch.bfloat16):
        mixture = model(s)
        losses = optx.sac_pmoe_losses(mixture, q_fn, alpha=0.1)
    assert mixture.means.dtype == mixture.w.dtype == torch.float32
    assert mixture.log_prob(mixture.sample()).dtype == torch.float32
    assert losses.freq.dtype == torch.float32


def test_a_double_model_stays_double() -> None:
    model, _ = policy(dtype=torch.float64, low=-2.0)
    s = states(dtype=torch.float64)
    losses = optx.sac_pmoe_losses(model(s), least_q(s, Q().double()), alpha=0.1)
    assert losses.policy.dtype == losses.freq.dtype == torch.float64


@pytest.mark.long
def test_compiled(tmp_path: Path) -> None:
    model, _ = policy(low=-2.0)
    s = states()
    critic = Q()

    def losses(s: torch.Tensor, noise: torch.Tensor) -> Any:
        mixture = model(s)
        q = critic(s.unsqueeze(-2).expand(-1, 4, -1), mixture.centres + noise)
        return mixture.log_prob(mixture.centres[:, 0]).mean(), optx.FrequencyLoss()(mixture.w, q.squeeze(-1))

    plain = losses(s, torch.zeros(16, 4, 2))
    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True)
    torch.testing.assert_close(compiled(s, torch.zeros(16, 4, 2)), plain)
    whole = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(whole(s).means, model(s).means)


def trained(model: Any, spread: nn.Module, rows: slice) -> list[float]:
    """Two steps on some rows of a batch, without noise; what the head's tensors sum to."""
    torch.manual_seed(1)
    critic = Q()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        s = states(16)[rows] + step
        mixture = spread(s)
        q = least_q(s, critic)(mixture.centres)
        loss = optx.FrequencyLoss()(mixture.w, q) - q.max(-1).values.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach().double().sum().item() for p in model.parameters()]


def replicas_are_one_policy(rank: int) -> None:
    """Under DDP, half of a batch on each process, beside one process that has all of it.

    No gradient reaches the log-deviations here, which DDP has to look for.
    """
    model, _ = policy()
    whole, _ = policy()
    spread = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    found = trained(model, spread, slice(8 * rank, 8 * rank + 8))
    assert found == pytest.approx(trained(whole, whole, slice(None)), abs=1e-5)


test_processes = on_processes(2, replicas_are_one_policy)


# ---- what is refused ------------------------------------------------------------------------------------


def test_options_out_of_range() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"k": 0}, "k is 0; it must be at least 1"),
        ({"k": 2.5}, r"k is 2\.5; it must be a whole number"),
        ({"outputs": "std"}, "outputs is 'std'; it must be one of 'mean_log_std', 'mean'"),
        ({"low": 1.0}, r"low\[0\] is 1 and high\[0\] is 1; low must be below high"),
        ({"low": [-1.0, 2.0], "high": 2.0}, r"low\[1\] is 2 and high\[1\] is 2"),
        ({"low": [-1.0, -1.0], "high": [1.0] * 3}, "low has 2 numbers and high 3"),
        ({"low": -torch.inf}, "low is -inf; it must be a finite number, or a row of them"),
        ({"high": "wide"}, "high is 'wide'; it must be a finite number"),
        ({"squash": False, "low": -1.0}, "with squash=False there are none"),
        ({"log_std_min": 3.0}, r"log_std_min is 3\.0; it must be between -50\.0 and 2\.0"),
        ({"init": -1.0}, r"init is -1\.0; it must be between 0\.0 and 1000\.0"),
    ]
    for options, says in wrong:
        with pytest.raises(optx.OptxError, match=says):
            optx.PMOEHead(**options)
    space = optx.PMOEHead(low=np.array([-2.0, -1.0], np.float32), high=np.array([2.0, 3.0], np.float32))
    assert repr(space) == "PMOEHead(low=(-2.0, -1.0), high=(2.0, 3.0))"


def test_what_it_does_not_serve() -> None:
    head = optx.PMOEHead()
    with pytest.raises(optx.TargetError, match="PMOEHead can't know which Linear gives the policy's means"):
        optx.attach(Policy(), head)
    with pytest.raises(optx.TargetError, match="PMOEHead serves one Linear, and targets match 3 modules"):
        optx.attach(Policy(), head, targets=nn.Linear)
    with pytest.raises(optx.TargetError, match=r"'trunk\.1' is a ReLU"):
        optx.attach(Policy(), head, targets="trunk.1")
    with pytest.raises(optx.TargetError, match=r"'out' has 3 outputs, which can't be n means and n log-dev"):
        optx.attach(Policy(outputs=3), head, targets="out")
    with pytest.raises(optx.TargetError, match=r"PMOEHead has low of 3 numbers, and 'out' gives 2 actions"):
        optx.attach(Policy(), optx.PMOEHead(low=(-1.0, -1.0, -1.0)), targets="out")
    model = Policy()
    before = snapshot(model)
    lora = optx.attach(model, optx.LoRA(rank=1), targets="out")
    with pytest.raises(optx.TargetError, match="'lora' is attached to 'out' already"):
        optx.attach(model, head, targets="out")
    lora.remove()
    with optx.attach(model, head, targets="out"):
        for other in (optx.LoRA(rank=1), optx.BitFit(), optx.SequentialAdapter(rank=1), optx.IA3()):
            with pytest.raises(optx.TargetError, match="can't serve 'out': 'pmoe_head' is there and"):
                optx.attach(model, other, targets="out")
        with optx.attach(model, optx.LoRA(rank=1), "all-linear", exclude="out"):
            assert isinstance(model(states()), ActionMixture)
        with pytest.raises(AttributeError, match="an ActionMixture has no 'chunk'"):
            model(states()).chunk(2, -1)
    assert_same(model, before)


def test_bounds_are_as_exact_in_half_precision() -> None:
    """1.1 in bfloat16 is 1.1015625, which an environment of -0.1 to 1.1 refuses."""
    for dtype in (torch.bfloat16, torch.float16):
        model, handle = policy(low=-0.1, high=1.1, init=30.0)
        model.to(dtype)
        a = model(states(200, dtype)).sample()
        assert float(a.min()) == np.float32(-0.1)
        assert float(a.max()) == np.float32(1.1)
        assert model.out.optx.pmoe_head.mean_weight.dtype == dtype
        handle.remove()
    assert policy(low=-0.1, high=1.1)[0].double().out.optx.pmoe_head.low.dtype == torch.float64
