"""`wrap`'s state and master: what is kept how, in which groups, across checkpoints, and what is refused."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx
from optx.step.formats import decode, encode, joined

FORMATS: list[dict[str, Any]] = [{}, {"state": "8bit"}, {"state": "bfloat16"}, {"state": "float32"}]
INPUTS = torch.randn(64, 24, generator=torch.Generator().manual_seed(7))
LABELS = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(8))


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 3)).to(dtype)


def made(model: nn.Module, **settings: Any) -> optx.Wrapped:
    return optx.wrap(torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), **settings)


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> float:
    loss = torch.zeros(())
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(INPUTS.to(dtype)).float(), LABELS)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return loss.item()


def same_state(a: optx.Wrapped, b: optx.Wrapped) -> bool:
    pairs = zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True)
    return all(torch.equal(a.state[p][k], b.state[q][k]) for p, q in pairs for k in a.state[p])


@pytest.fixture(scope="module")
def exact() -> list[float]:
    losses = []
    for steps in (30, 150):
        model = network()
        losses.append(train(model, made(model), steps))
    return losses


@pytest.mark.parametrize("settings", FORMATS[1:], ids=str)
def test_a_model_learns_as_fast_whatever_its_moments_are_kept_in(
    settings: dict[str, Any], exact: list[float]
) -> None:
    for steps, wanted in zip((30, 150), exact, strict=True):
        model = network()
        assert train(model, made(model, **settings), steps) == pytest.approx(wanted, rel=0.04)


@pytest.mark.parametrize("settings", [{"master": "split"}, {"master": "split16", "state": "8bit"}], ids=str)
def test_a_bfloat16_model_with_its_rest_learns_as_one_in_float32(settings: Any, exact: list[float]) -> None:
    model = network(torch.bfloat16)
    opt = made(model, **{"state": "float32", **settings})
    assert train(model, opt, 150) == pytest.approx(exact[1], rel=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_rest_is_what_a_float32_weight_has_more() -> None:
    """With lr so small that the bfloat16 weights alone would hardly move."""
    model, full = network(torch.bfloat16), network(torch.bfloat16).float()
    opts = made(model, master="split16", state="float32"), made(full)
    for opt in opts:
        opt.param_groups[0]["lr"] = 1e-5
    for _ in range(20):
        for p, q in zip(model.parameters(), full.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.float()
        for opt in opts:
            opt.step()
    for p, q in zip(model.parameters(), full.parameters(), strict=True):
        assert torch.equal(joined(p.data, opts[0].state[p]["optx.rest"]), q)


def test_codes_have_the_weights_shape_and_scales_its_rows() -> None:
    model = network()
    model.add_module("odd", nn.Linear(64, 3))
    opt = optx.wrap(torch.optim.AdamW(model.parameters(), lr=1e-2), state="8bit")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    shapes = {
        tuple(p.shape): (s["exp_avg"].dtype, s["exp_avg_sq"].dtype, tuple(s["optx.scale.exp_avg"].shape))
        for p, s in opt.state.items()
    }
    codes = torch.int8, torch.uint8
    assert shapes[32, 24] == (*codes, (24,))
    assert shapes[3, 64] == (*codes, (3, 2))
    assert shapes[3, 32] == (*codes, (3, 1))
    assert shapes[(3,)] == (*codes, (1,))


@pytest.mark.parametrize("settings", [*FORMATS, {"master": "split", "state": "8bit"}], ids=str)
def test_a_resumed_run_is_the_same_to_the_bit(settings: dict[str, Any], tmp_path: Any) -> None:
    dtype = torch.bfloat16 if "master" in settings else torch.float32
    model = network(dtype)
    opt = made(model, **settings)
    train(model, opt, 3)
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    optx.save_optimizer(opt, tmp_path / "file.safetensors")
    again = copy.deepcopy(model), copy.deepcopy(model)
    others = [made(m, **settings) for m in again]
    others[0].load_state_dict(torch.load(buffer, weights_only=True))
    optx.load_optimizer(others[1], tmp_path / "file.safetensors")
    twin, twin_opt = copy.deepcopy((model, opt))
    runs = [(model, opt), *zip(again, others, strict=True), (twin, twin_opt)]
    assert len({train(m, o, 3) for m, o in runs}) == 1
    assert all(same_state(opt, other) for _, other in runs[1:])


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.product(range(4), range(4))))
def test_another_format_is_told_and_converted_where_asked(saved: int, loaded: int) -> None:
    model = network()
    opt = made(model, **FORMATS[saved])
    train(model, opt, 2)
    state_dict = opt.state_dict()
    other_model = copy.deepcopy(model)
    other = made(other_model, **FORMATS[loaded])
    if saved != loaded and {saved, loaded} != {0, 3}:
        names = [repr(FORMATS[i].get("state", "None")).strip("'") for i in (saved, loaded)]
        with pytest.raises(optx.OptxError, match=rf"state='?{names[0]}.*state='?{names[1]}.*convert=True"):
            other.load_state_dict(state_dict)
        assert not other.state
        other.load_state_dict(state_dict, convert=True)
        trainers = made(copy.deepcopy(model), **FORMATS[loaded])
        trainers.load_state_dict(optx.convert_state(state_dict, trainers))
        assert same_state(other, trainers)
    else:
        other.load_state_dict(state_dict)
    assert other.param_groups[0].get("optx.state") == made(network(), **FORMATS[loaded]).param_groups[0].get(
        "optx.state"
    )
    kinds = {0: torch.float32, 1: torch.int8, 2: torch.bfloat16, 3: torch.float32}
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        t = other.state[q]["exp_avg"]
        assert t.dtype == kinds[loaded]
        before = floats(opt, p)
        if loaded == 1 and saved != 1:  # the nearest codes
            codes, scale = encode(before.float(), "signed")
            assert torch.equal(t, codes)
            assert torch.equal(other.state[q]["optx.scale.exp_avg"].view(-1), scale)
        elif loaded != 2 or saved == 2:
            assert torch.equal(floats(other, q), before.float() if loaded != 2 else before)
    train(other_model, other, 1)


def floats(opt: optx.Wrapped, p: Tensor) -> Tensor:
    t = opt.state[p]["exp_avg"]
    return decode(t, opt.state[p]["optx.scale.exp_avg"]) if t.dtype == torch.int8 else t


@pytest.mark.parametrize("settings", FORMATS[1:], ids=str)
def test_the_base_gets_back_moments_that_it_steps_itself(settings: dict[str, Any]) -> None:
    model = network()
    opt = made(model, **settings)
    train(model, opt, 2)
    wanted = {p: floats(opt, p).float() for p in model.parameters()}
    base = opt.remove()
    assert all(torch.equal(base.state[p]["exp_avg"], t) for p, t in wanted.items())
    assert all(not key.startswith("optx") for s in (*base.state.values(), *base.param_groups) for key in s)
    train(model, base, 1)


def test_a_base_that_has_stepped_is_taken_over() -> None:
    model = network()
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, base, 2)
    before = {p: base.state[p]["exp_avg"].clone() for p in model.parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt = optx.wrap(base, state="bfloat16")
    opt.step()
    for p, m in before.items():
        assert torch.allclose(opt.state[p]["exp_avg"].float(), 0.9 * m, rtol=0.02, atol=1e-9)


def test_groups_have_formats_of_their_own() -> None:
    model = network()
    first, second = model[0], model[2]
    groups = [
        {"params": list(first.parameters()), "optx.state": "8bit"},
        {"params": list(second.parameters()), "optx.state": "float32"},
    ]
    opt = optx.wrap(torch.optim.AdamW(groups, lr=1e-2), state="bfloat16")
    train(model, opt, 2)
    assert [group["optx.state"] for group in opt.param_groups] == [8, 32]
    assert opt.state[first.weight]["exp_avg"].dtype == torch.int8
    assert opt.state[second.weight]["exp_avg"].dtype == torch.float32
    assert "8bit" in str(opt.plan()[0])
    assert "8bit" not in str(opt.plan()[1])


def test_a_weight_in_another_memory_order_has_its_moments_in_float32() -> None:
    w = nn.Parameter(torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last))
    opt = optx.wrap(torch.optim.AdamW([w]), state="8bit")
    w.grad = torch.ones_like(w)
    opt.step()
    assert opt.state[w]["exp_avg"].dtype == torch.float32
    assert "288 numbers of 1 tensor in float32" in str(opt.plan())


def test_momentum_in_eight_bits_and_a_sum_that_reads_second_moments() -> None:
    w = nn.Parameter(torch.randn(64))
    opt = optx.wrap(torch.optim.SGD([w], lr=0.1, momentum=0.9), state="8bit")
    w.grad = torch.linspace(-1, 1, 64)
    opt.step()
    assert torch.allclose(floats_of(opt, w, "momentum_buffer"), w.grad, atol=0.02)
    model = network()
    pulled = optx.wrap(torch.optim.AdamW(model.parameters(), lr=1e-2), optx.AdamR(0.1), state="8bit")
    train(model, pulled, 3)
    for p in model.parameters():  # what is summed is what was stored
        kept = floats_of(pulled, p, "exp_avg_sq").double().sum()
        assert float(pulled.state[p]["optx.adamr.v_sum"]) == pytest.approx(float(kept), rel=1e-6)


def floats_of(opt: optx.Wrapped, p: Tensor, name: str) -> Tensor:
    return decode(opt.state[p][name], opt.state[p][f"optx.scale.{name}"])


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda p: torch.optim.AdamW([p]), {"state": "4bit"}, "state is '4bit'; it must be 'float32' or"),
        (lambda p: torch.optim.AdamW([p]), {"master": "fp32"}, "master is 'fp32'"),
        (lambda p: torch.optim.AdamW([{"params": [p], "optx.state": 4}]), {}, "optx.state=4; it must be"),
        (lambda p: torch.optim.AdamW([{"params": [p], "optx.stat": "8bit"}]), {}, "Is 'optx.state' meant"),
        (lambda p: torch.optim.AdamW([{"params": [p], "master": "split"}]), {}, "Is 'optx.master' meant"),
        (lambda p: torch.optim.SGD([p], lr=1.0), {"state": "8bit"}, "neither SGD nor a transform keeps"),
        (lambda p: torch.optim.LBFGS([p]), {"state": "8bit"}, "not fused: .* itself writes its state"),
        (lambda p: torch.optim.AdamW([p]), {"state": "8bit", "fused": False}, "not fused: fused=False"),
        (lambda p: torch.optim.AdamW([p]), {"master": "split"}, "keeps what a bfloat16 weight loses"),
        (
            lambda p: torch.optim.AdamW([p]),
            {"master": "split", "rounding": "kahan"},
            "rounding='kahan' and master='split'",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(make: Any, settings: dict[str, Any], message: str) -> None:
    p = nn.Parameter(torch.ones(4))
    with pytest.raises(optx.OptxError, match=message):
        optx.wrap(make(p), **settings)


def test_a_file_in_another_format_is_told_and_converted_where_asked(tmp_path: Any) -> None:
    model, path = network(), tmp_path / "file.safetensors"
    opt = made(model, state="8bit")
    train(model, opt, 1)
    optx.save_optimizer(opt, path)
    for other in (made(model), torch.optim.AdamW(model.parameters())):
        with pytest.raises(optx.OptxError, match="convert=True"):
            optx.load_optimizer(other, path)
        optx.load_optimizer(other, path, convert=True)
        moment = other.state[model[0].weight]["exp_avg"]
        assert torch.equal(moment, floats_of(opt, model[0].weight, "exp_avg"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_codes_are_never_taken_for_moments(tmp_path: Any) -> None:
    """torch's distributed checkpoint copies int8 into float32, and a plain optimizer's load does."""
    import torch.distributed.checkpoint as dcp

    model = network()
    opt = made(model, state="8bit")
    train(model, opt, 1)
    saved = opt.state_dict()
    dcp.save({"opt": saved}, checkpoint_id=tmp_path, no_dist=True)
    for wrap in (True, False):
        other = made(copy.deepcopy(model)) if wrap else torch.optim.AdamW(copy.deepcopy(model).parameters())
        for p in other.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        other.step()
        with pytest.raises(dcp.CheckpointException, match="Size mismatch between saved"):
            dcp.load({"opt": other.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(copy.deepcopy(saved))  # it shares counts
    with pytest.raises(RuntimeError):
        other.step()
    twin = network()
    again = made(twin, state="8bit")
    train(twin, again, 1)
    loaded = {"opt": again.state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    again.load_state_dict(loaded["opt"])
    for p, q in zip(opt.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(p[key], q[key]) for key in p)


def test_a_checkpoint_whose_scales_are_cut_is_refused() -> None:
    model = network()
    opt = made(model, state="8bit")
    train(model, opt, 1)
    state_dict = opt.state_dict()
    state_dict["state"][0]["optx.scale.exp_avg"] = torch.zeros(3, dtype=torch.bfloat16)
    with pytest.raises(optx.ShapeError, match=r"'exp_avg' of parameter .* 768 codes, which take 24 scales"):
        made(network(), state="8bit").load_state_dict(state_dict)
    del state_dict["state"][0]["optx.scale.exp_avg"]
    with pytest.raises(optx.OptxError, match=r"'optx.scale.exp_avg', their scales, is missing"):
        made(network(), state="8bit").load_state_dict(state_dict)


def test_other_libraries_states_are_decoded() -> None:
    model = network()
    opt = made(model, state="8bit")
    foreign = made(copy.deepcopy(model)).state_dict()
    codes = torch.arange(-127, 128).to(torch.int8).repeat(4)[:768].view(32, 24)
    table, largest = torch.linspace(-1, 1, 256), torch.tensor([1.0, 2.0, 4.0])
    places = torch.arange(768).remainder(256).to(torch.uint8).view(32, 24)
    flash = {"exp_avg::quantized": codes, "exp_avg::scales": torch.full((24,), 0.5, dtype=torch.float16)}
    bnb = {"state1": places, "qmap1": table, "absmax1": largest}
    dynamic = (table[places.long()].view(3, 256) * largest[:, None]).view(32, 24)
    for entry, wanted in (
        (flash, codes / 127.0 / (2 - codes.abs() / 127.0) * 0.5),
        ({**bnb, "step": 3}, dynamic),
        ({"__bnb_optimizer_quant_state__": bnb, "step": 3}, dynamic),
    ):
        state_dict = {**foreign, "state": {0: entry}}
        plain = optx.convert_state(state_dict)["state"][0]
        assert torch.allclose(plain["exp_avg"], wanted, rtol=1e-6)
        assert set(plain) <= {"exp_avg", "step"}
        with pytest.raises(optx.OptxError, match="another library kept this state in 8 bits"):
            opt.load_state_dict(state_dict)
        assert optx.convert_state(state_dict, opt)["state"][0]["exp_avg"].dtype == torch.int8


def test_a_checkpoint_in_the_same_format_is_not_encoded_again() -> None:
    model = network()
    opt = made(model, state="8bit")
    train(model, opt, 3)
    again = made(copy.deepcopy(model), state="8bit")
    again.load_state_dict(copy.deepcopy(opt.state_dict()), convert=True)
    for p, q in zip(opt.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(p[key], q[key]) for key in p)


def test_bitsandbytes_one_moment_goes_to_the_bases_own() -> None:
    model = network()
    codes = {"state1": torch.ones(32, 24, dtype=torch.uint8), "qmap1": torch.arange(256.0)}
    entry = {**codes, "absmax1": torch.full((3,), 2.0), "step": 3}
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state_dict = {**plain.state_dict(), "state": {0: entry}}
    opt = optx.wrap(plain)
    opt.load_state_dict(state_dict, convert=True)
    assert torch.equal(opt.state[next(model.parameters())]["momentum_buffer"], torch.full((32, 24), 2.0))
    entry |= {key.replace("1", "2"): value for key, value in entry.items()}
    with pytest.raises(optx.OptxError, match=r"kept exp_avg and exp_avg_sq .* SGD keeps momentum_buffer"):
        opt.load_state_dict(state_dict, convert=True)


def test_a_groups_format_may_be_set_later_and_is_checked() -> None:
    model = network()
    opt = made(model)
    train(model, opt, 1)
    group, first = opt.param_groups[0], opt.state[next(model.parameters())]
    for given, dtype in (("8bit", torch.int8), (None, torch.float32)):
        group["optx.state"] = given
        train(model, opt, 1)
        assert first["exp_avg"].dtype == dtype
    group["optx.state"] = "4bit"
    with pytest.raises(optx.OptxError, match=r"param group has optx\.state='4bit'; it must be 'float32' or"):
        opt.step()
    for key in ("optx.stat", "state"):
        wrong: Any = [{"params": list(network().parameters()), key: "8bit"}]
        with pytest.raises(optx.OptxError, match=f"group has {key}='8bit', .* Is 'optx.state' meant"):
            optx.wrap(torch.optim.AdamW(wrong))
    opt = optx.wrap(torch.optim.AdamW(network().double().parameters()), state="8bit")
    assert "numbers of 4 tensors in float64" in str(opt.plan())
