"""LoRA's starts: the output unchanged, PiSSA's and OLoRA's factors, training as in PEFT, and their files.

The starts that PEFT takes off the base are case pissa.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import (
    assert_close,
    assert_refused,
    attached,
    by_peft,
    edit_config,
    gpt2,
    ids,
    in_peft,
    llama,
    move,
    outputs,
    peft_talk,
    plain,
    tensors_in,
)
from peft import LoraConfig
from torch import nn

import optx
from optx import LoRA
from optx.inject import _low_rank_start
from optx.inject._low_rank_start import factors_of
from optx.inject._peft_start import init_of, starts_of

INITS = ["kaiming", "gaussian", "pissa", "pissa_niter_4", "olora"]
LINEAR = ["q_proj", "down_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True, "lora_bias": True}], ids=str)
@pytest.mark.parametrize("init", INITS)
def test_the_output_is_the_same_to_the_bit(init: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    model, x = plain().to(dtype), ids()
    targets = ["emb", "conv1", "conv", "fc"] if "lora_bias" not in options else ["conv1", "conv", "fc"]
    before, ranks = outputs(model, x), {"conv": 4, "emb": 3}
    if dtype == torch.bfloat16 and options.get("dora"):
        targets = ["fc"]  # an embedding's DoRA scales rows that were rounded before
    if init == "kaiming" or "emb" not in targets:
        ranks.pop("emb")
    lora = LoRA(rank=3, alpha=5, init=init, rank_pattern=ranks if "conv" in targets else {}, **options)
    handle = optx.attach(model, lora, targets)
    after = outputs(model, x)
    assert torch.equal(after, before) or (options.get("dora") and (after - before).abs().max() < 1e-5)
    drawn = init in ("kaiming", "gaussian")
    assert all((part.part.A_start is None) == (drawn or one == "emb") for one, part in _parts(handle).items())
    move(handle)
    assert (outputs(model, x) - before).abs().max() > 1e-2
    handle.remove()
    assert torch.equal(outputs(model, x), before)


def _parts(handle: optx.Handle) -> dict[str, Any]:
    return {one.path: one for one in handle.served}


def test_factors_are_the_papers() -> None:
    """PiSSA, section 3: the largest singular values; OLoRA: the first rows and columns of QR."""
    torch.manual_seed(0)
    W = torch.randn(7, 5) * torch.tensor([4.0, 2.0, 0.5, 0.2, 0.1])
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    A, B = factors_of("pissa", W, 2, 0.5, "")
    assert_close(0.5 * B @ A, U[:, :2] @ torch.diag(S[:2]) @ Vh[:2])
    assert_close(A @ A.t(), torch.diag(S[:2] / 0.5))
    assert_close(B.t() @ B, torch.diag(S[:2] / 0.5))
    fast = factors_of("pissa_niter_30", W, 2, 0.5, "")
    assert_close(fast[1] @ fast[0], B @ A, 1e-4)
    Q, R = torch.linalg.qr(W)
    A, B = factors_of("olora", W, 2, 0.5, "")
    assert_close(B, Q[:, :2])
    assert_close(A, R[:2])


def test_gaussian_is_pefts() -> None:
    model = nn.Sequential(nn.Linear(400, 500))
    handle = optx.attach(model, LoRA(rank=10, init="gaussian"), "0")
    part = handle.served[0].part
    assert abs(part.A.std().item() - 0.1) < 0.005
    assert not part.B.any()


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_training_is_pefts(start: str, options: dict[str, Any]) -> None:
    """Five steps with a weight decay, from the same base: the same losses, factors and outputs."""
    with peft_talk():
        config = LoraConfig(r=2, lora_alpha=3, target_modules=LINEAR, init_lora_weights=start, **options)
        theirs = peft.get_peft_model(llama(), config)
    ours = llama()
    lora = LoRA(rank=2, alpha=3, init=start, rslora="use_rslora" in options, dora="use_dora" in options)
    handle = optx.attach(ours, lora, LINEAR)
    losses: list[list[float]] = []
    for model, params in (
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
        (ours, handle.parameters()),
    ):
        opt = torch.optim.AdamW(params, lr=5e-3, weight_decay=0.1)
        losses.append([])
        for _ in range(5):
            loss = model(input_ids=ids(), labels=ids()).loss
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.05
    assert_close(outputs(ours), outputs(theirs), 1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True, "rank_pattern": {"down_proj": 3}}])
def test_files_are_a_lora_of_twice_the_rank(init: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = llama()
    handle = attached(model, LoRA(rank=2, alpha=3, init=init, **options), targets=[*LINEAR, "embed_tokens"])
    wanted = outputs(model)
    handle.save(tmp_path)
    shapes = {key: tuple(t.shape) for key, t in tensors_in(tmp_path).items()}
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    assert shapes[f"{key}A.weight"] == (4, 16)
    assert shapes[f"{key}B.weight"] == (16, 4)
    assert not any(key.endswith(".start") for key in shapes)
    assert_close(outputs(in_peft(llama(), tmp_path)), wanted)
    fresh = llama()
    again = optx.attach(fresh, tmp_path)
    assert torch.equal(outputs(fresh), wanted)
    assert again.injection == handle.injection
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in handle.state_dict().items())
    other = llama()
    third = optx.attach(other, handle.injection, [*LINEAR, "embed_tokens"])
    third.load(tmp_path)  # also where iterations are drawn: the start is the file's
    assert torch.equal(outputs(other), wanted)
    third.merge()
    assert_close(outputs(other), wanted, 1e-4)
    third.unmerge()
    assert torch.equal(outputs(other), wanted)


def test_dropout_acts_on_the_update_and_not_on_what_was_taken_off() -> None:
    """As in PEFT, where that is missing from the base."""
    with peft_talk():
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa", lora_dropout=1.0)
        base = nn.Sequential(nn.Linear(6, 5))
        ours = copy.deepcopy(base)
        theirs = peft.get_peft_model(base, config).train()
    optx.attach(ours, LoRA(rank=2, alpha=8, init="pissa", dropout=1.0), "0").model.train()
    x = torch.randn(3, 6)
    assert_close(ours(x), theirs(x))
    assert (ours(x) - ours.eval()(x)).abs().max() > 0.01


def test_starts_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(
        optx.OptxError, match=r"init is 'pisa'; it must be one of 'kaiming', .* 'pissa_niter_16'"
    ):
        LoRA(init="pisa")
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(4, 4, 1, groups=2))
    for lora, target, why in (
        (LoRA(rank=4, init="pissa", rank_pattern={"0": 4}), "0", r"part of the weight of '0', \(3, 4\)"),
        (LoRA(rank=2, alpha=0, init="pissa"), "0", "at '0' divides by the scale; alpha=0 leaves none"),
        (LoRA(rank=2, init="olora"), "1", "groups=2, whose weight has no part for LoRA's init='olora'"),
    ):
        with pytest.raises(optx.TargetError, match=why):
            optx.attach(model, lora, target)
    assert len(list(model.modules())) == 3
    attached(llama(), LoRA(rank=2, init="pissa"), targets=LINEAR).save(tmp_path)
    handle = attached(llama(), LoRA(rank=2), targets=LINEAR)
    with pytest.raises(optx.FileError, match=r"saved with init='pissa', and this handle has 'kaiming'"):
        handle.load(tmp_path)


# ---- PEFT's own files -------------------------------------------------------------------------------

THEIRS: dict[str, tuple[Any, dict[str, Any]]] = {
    "pissa": (llama, {"target_modules": LINEAR}),
    "rslora": (llama, {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"down_proj": 3}}),
    "dora": (llama, {"target_modules": LINEAR, "use_dora": True}),
    "embedding": (llama, {"target_modules": [*LINEAR, "embed_tokens"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "bfloat16": (lambda: llama().to(torch.bfloat16), {"target_modules": LINEAR}),
}


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("case", THEIRS)
def test_what_peft_took_off_the_base_is_taken_off(case: str, start: str, tmp_path: Path) -> None:
    make, options = THEIRS[case]
    if (case, start) == ("conv1d", "olora"):
        options = {**options, "target_modules": ["attn.c_proj"]}  # square: others don't even run there
    with peft_talk():
        config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=start, **options)
    by_peft(make(), config, tmp_path)
    if (case, start) == ("conv1d", "olora"):
        assert_refused(tmp_path, r"an OLoRA of 'transformer.h.0.attn.c_proj', a Conv1D", gpt2())
        return
    model, theirs = make(), in_peft(make(), tmp_path)
    tolerance = 0.1 if case == "bfloat16" else 1e-5  # PEFT rounds what is left of the base
    base = outputs(model)
    handle = optx.attach(model, tmp_path)
    assert (outputs(model) - base).abs().max() > 0.05
    assert_close(outputs(model), outputs(theirs), tolerance)
    handle.save(tmp_path / "again")
    assert_close(outputs(in_peft(make(), tmp_path / "again")), outputs(theirs), tolerance)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica"])
def test_starts_that_leave_the_base_are_plain(start: Any, tmp_path: Path) -> None:
    theirs = by_peft(llama(), LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=start), tmp_path)
    model = llama()
    assert optx.attach(model, tmp_path).injection.init == "kaiming"  # type: ignore[attr-defined]
    assert_close(outputs(model), outputs(theirs))


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga", "loftq", "Pissa", "of 2027", 3])
def test_starts_that_cannot_be_made_again_are_refused(start: Any, tmp_path: Path) -> None:
    by_peft(llama(), LoraConfig(r=2, target_modules=LINEAR), tmp_path)
    edit_config(tmp_path, init_lora_weights=start)
    why = rf"trained with PEFT's init_lora_weights={start!r}, which|trained with .*{start!r}, whose"
    assert_refused(tmp_path, why)
    with pytest.raises(optx.FileError, match=why):
        optx.Delta.lora(tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_peft_converted_is_plain(start: str, tmp_path: Path) -> None:
    with peft_talk():
        theirs = peft.get_peft_model(llama(), LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=start))
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        move_theirs = [p for p in theirs.parameters() if p.requires_grad]
        with torch.no_grad():
            for number, p in enumerate(move_theirs):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
        theirs.peft_config["default"].init_lora_weights = start
        theirs.save_pretrained(
            tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    model = llama()
    optx.attach(model, tmp_path / "out")
    assert_close(outputs(model), outputs(theirs.eval()), 1e-4)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_delta_of_such_a_file_needs_the_base(start: str, conv1d: bool, tmp_path: Path) -> None:
    make, names = (gpt2, ["attn.c_proj"]) if conv1d else (llama, LINEAR)
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=names, init_lora_weights=start, fan_in_fan_out=conv1d
    )
    by_peft(make(), config, tmp_path)
    refused = r"init_lora_weights='\w+', which took a part off the base"
    for options in ({}, {"target": "factors", "base": make()}):
        with pytest.raises(optx.OptxError, match=refused):
            optx.Delta.lora(tmp_path, **options)
    if start == "olora" and conv1d:
        with pytest.raises(optx.OptxError, match=rf"{refused} that is not its factors'"):
            optx.Delta.lora(tmp_path, base=make())
        return
    merged: Any = optx.Delta.lora(tmp_path, base=make()).apply(make().state_dict())
    model = make()
    model.load_state_dict(merged)
    assert_close(outputs(model), outputs(in_peft(make(), tmp_path)), 1e-4)
    other = llama(hidden_size=32)
    with pytest.raises(optx.OptxError, match=r"which base lacks|changes '.*' by .* in base is"):
        optx.Delta.lora(tmp_path, base=other)[next(iter(optx.Delta.lora(tmp_path, base=make())))]


def test_a_delta_of_a_plain_file_needs_none(tmp_path: Path) -> None:
    attached(llama(), LoRA(rank=2, init="pissa"), targets=LINEAR).save(tmp_path)
    with pytest.raises(optx.OptxError, match=r"is a plain LoRA, whose change needs no base"):
        optx.Delta.lora(tmp_path, base=llama())
    merged: Any = optx.Delta.lora(tmp_path).apply(llama().state_dict())
    model = llama()
    optx.attach(model, tmp_path)
    other = llama()
    other.load_state_dict(merged)
    assert_close(outputs(other), outputs(model), 1e-4)


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora"])
def test_other_starts_are_not_for_experts(init: str) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_local_experts": 2}
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=16, num_attention_heads=1, num_key_value_heads=1, **sizes)
    )
    with pytest.raises(optx.TargetError, match=rf"init='{init}' is not for parameters such as .*down_proj'"):
        optx.attach(model, LoRA(rank=2, init=init), ["experts.down_proj"])


def test_a_file_says_its_start_and_none_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = optx.attach(nn.Sequential(nn.Linear(6, 6)), LoRA(rank=2, init="pissa"), "0")
    handle.save(tmp_path)

    def computes(*_: Any) -> Any:
        raise AssertionError("an SVD for nothing")

    monkeypatch.setattr(_low_rank_start, "factors_of", computes)
    optx.attach(nn.Sequential(nn.Linear(6, 6)), tmp_path)


def test_a_start_is_exact_within_autocast() -> None:
    W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    made: list[torch.Tensor] = []
    for autocast in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            made.append(factors_of("pissa_niter_4", W, 2, 1.0, "fc")[0])
    assert torch.equal(*made)


def test_what_a_file_says_of_a_start_that_this_model_has_not() -> None:
    A, B = torch.zeros(2, 4), torch.zeros(3, 2)
    tensors = {"fc.lora_A.weight": A, "fc.lora_B.weight": B}
    lora, fc = LoRA(rank=2, init="pissa"), nn.Linear(4, 3)
    assert set(starts_of(lora, tensors, {"fc": fc}, "here")) == {"fc.lora_A.start", "fc.lora_B.start"}
    with pytest.raises(optx.FileError, match=r"^here has .* for 'fc', which is no module"):
        starts_of(lora, tensors, {}, "here")
    with pytest.raises(optx.FileError, match=r"^here can't be read for this model: LoRA's init='pissa'"):
        starts_of(LoRA(rank=4, init="pissa"), tensors, {"fc": fc}, "here")
    # Factors of other shapes are left for what checks all of them.
    assert starts_of(lora, {**tensors, "fc.lora_A.weight": A[:1]}, {"fc": fc}, "here") == {}
    assert starts_of(lora, tensors, {"fc": nn.Linear(5, 3)}, "here") == {}
    assert init_of({"init_lora_weights": "OLoRA"}, "here") == "olora"
