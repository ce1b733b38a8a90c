"""Numbers that are not float32's: floats of 8 bits, mixed widths, masks of infinities, overflow, codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from delta_cases import equal, normal
from safetensors.torch import load_file, save_file
from torch import Tensor

import optx
from optx import Delta, OptxError

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
EIGHT = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
FLOATS = [F64, F32, F16, BF16, *EIGHT]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def place(folder: Path, **models: dict[str, Tensor]) -> list[Path]:
    for name, tensors in models.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return [folder / f"{name}.safetensors" for name in models]


@pytest.mark.parametrize("tuned_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_every_float_with_every_other(
    base_dtype: torch.dtype, tuned_dtype: torch.dtype, tmp_path: Path
) -> None:
    """There and back, pruned, merged, in memory and on the disk: in the base's dtype, rounded once."""
    base, tuned = {"w": normal(9, 7).to(base_dtype)}, {"w": normal(9, 7, seed=1).to(tuned_dtype)}
    files = place(tmp_path, base=base, tuned=tuned)
    delta = Delta.between(*files)
    wide = F64 if F64 in (base_dtype, tuned_dtype) else F32
    change = tuned["w"].to(wide) - base["w"].to(wide)
    assert torch.equal(delta["w"], change)
    delta.apply(files[0], tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")["w"]
    assert made.dtype == base_dtype
    assert torch.equal(bits(made), bits(tuned["w"].to(wide).to(base_dtype)))
    half = Delta.between(base, tuned).apply(base, scale=0.5)
    assert isinstance(half, dict)
    wanted = (base["w"].to(wide) + 0.5 * change).to(base_dtype)
    assert torch.equal(bits(half["w"]), bits(wanted))
    pruned = Delta.between(base, tuned).dare(0.5)
    kept = pruned["w"] != 0
    sparse: Any = pruned.apply(base)
    assert torch.equal(
        bits(sparse["w"])[~_spread(kept, base_dtype)], bits(base["w"])[~_spread(kept, base_dtype)]
    )
    merged = optx.merge(files[0], [files[1]], optx.TaskArithmetic(), tmp_path / "merged.safetensors")
    difference = load_file(merged)["w"].to(F64) - tuned["w"].to(F64)
    assert float(difference.abs().max()) <= (0.0 if tuned_dtype == base_dtype in EIGHT else 0.26)


def _spread(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of numbers as one of their bytes."""
    return mask.repeat_interleave(dtype.itemsize, dim=-1)


@pytest.mark.parametrize("dtype", EIGHT, ids=str)
def test_saved_deltas_of_eight_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = {"w": normal(40, 30).to(dtype)}, {"w": normal(40, 30, seed=1).to(dtype)}
    path = Delta.between(base, tuned).dare(0.5).save(tmp_path / "d.safetensors")
    made: Any = Delta.load(path).apply(base)
    wanted: Any = Delta.between(base, tuned).dare(0.5).apply(base)
    assert torch.equal(bits(made["w"]), bits(wanted["w"]))
    small = optx.compress(Delta.between(base, tuned))
    assert small.numel == 1200
    small.add_to(base)


def test_a_mask_of_infinities_stays(tmp_path: Path) -> None:
    """not_finite.py: equal infinities are no change, on every path."""
    mask = torch.full((4, 4), float("-inf")).triu(1)
    odd = torch.tensor([float("nan"), float("inf"), 1.0])
    for dtype in (F32, BF16, F16, F64):
        base = {"mask": mask.to(dtype), "odd": odd.to(dtype), "w": torch.zeros(8, dtype=dtype)}
        tuned = {"mask": mask.to(dtype), "odd": odd.to(dtype), "w": torch.ones(8, dtype=dtype)}
        files = place(tmp_path, base=base, tuned=tuned)
        delta = Delta.between(base, tuned)
        assert not delta["mask"].any()
        made: list[Any] = [
            d.apply(base)
            for d in (
                delta,
                delta.dare(0.5),
                delta.magnitude(0.5),
                delta * 0.5,
                delta + delta,
                delta.dare(0.5) * 2,
            )
        ]
        made += [optx.merge(base, [tuned, tuned], m) for m in (optx.TaskArithmetic(), optx.DARELinear(p=0.5))]
        out = Delta.between(*files).dare(0.5).apply(files[0], tmp_path / f"{dtype}.safetensors")
        made.append(load_file(str(out)))
        loaded = Delta.load(delta.save(tmp_path / f"{dtype}.delta.safetensors"))
        made.append(loaded.apply(base))
        for state in made:
            for name in ("mask", "odd"):
                assert torch.equal(state[name].nan_to_num(7.0), base[name].nan_to_num(7.0)), (dtype, name)
                assert torch.equal(state[name].isnan(), base[name].isnan())


def test_infinities_that_come_or_go() -> None:
    """One pass gives the tuned numbers; where a sum would be NaN it is refused."""
    base, tuned = {"w": torch.tensor([float("-inf"), 1.0])}, {"w": torch.tensor([0.0, float("-inf")])}
    made: Any = Delta.between(base, tuned).apply(base)
    assert torch.equal(made["w"], tuned["w"])
    with pytest.raises(OptxError, match=r"Delta.apply: 1 number of 'w' or more .* or no number at all"):
        (Delta.between(base, tuned) * 1.0).apply(base)
    with pytest.raises(OptxError, match=r"the change of 'w' in models\[0\] is not finite"):
        optx.merge(base, [tuned], optx.TaskArithmetic())


@pytest.mark.parametrize("dtype", [F16, torch.float8_e4m3fn, torch.float8_e5m2, BF16], ids=str)
def test_what_is_too_large_for_the_output_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """not_finite.py: named, counted, and nothing left behind."""
    largest = torch.finfo(dtype).max
    base, tuned = ({"w": torch.full((1000,), x * largest, dtype=F64).to(dtype)} for x in (0.01, 0.5))
    files = place(tmp_path, base=base, tuned=tuned)
    before = set(tmp_path.iterdir())
    calls: dict[str, Any] = {
        "apply": lambda: Delta.between(base, tuned).dare(0.99).apply(base),
        "scaled": lambda: Delta.between(base, tuned).apply(base, scale=9.0),
        "file": lambda: Delta.between(*files).dare(0.99).apply(files[0], tmp_path / "o.safetensors"),
        "folder": lambda: Delta.between(*files).dare(0.99).apply(files[0], tmp_path / "o"),
        "merge": lambda: optx.merge(base, [tuned], optx.DARELinear(p=0.99)),
        "merge to a file": lambda: optx.merge(
            files[0], [files[1]] * 3, optx.TaskArithmetic(), tmp_path / "o"
        ),
    }
    for name, call in calls.items():
        with pytest.raises(OptxError, match=r"\d+ numbers? of 'w' or more would be beyond the largest"):
            call()
        assert set(tmp_path.iterdir()) == before, name
    if dtype != BF16:  # whose largest numbers are those of the sums themselves
        wide: Any = optx.merge(base, [tuned], optx.DARELinear(p=0.99), dtype=F64)
        assert bool(wide["w"].isfinite().all())


def test_a_narrower_dtype_of_a_merge(tmp_path: Path) -> None:
    base = {"w": torch.full((5,), 1e5)}
    with pytest.raises(
        OptxError, match=r"merge: 5 numbers of 'w' or more would be beyond the largest float16"
    ):
        optx.merge(base, [{"w": base["w"] + 1}], optx.TaskArithmetic(), dtype=F16)
    with pytest.raises(OptxError, match=r"beyond the largest bfloat16"):
        optx.merge(
            {"w": torch.full((5,), 3.4e38)}, [{"w": torch.full((5,), 3.4028e38)}], optx.TIES(), dtype=BF16
        )


# ---- what has no numbers to subtract ---------------------------------------------------------------------


def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


SCALES, I8, I32 = torch.ones(4), torch.int8, torch.int32
CODES: dict[str, dict[str, Tensor]] = {
    "GPTQ": {"l.qweight": zeros(2, 4, dtype=I32), "l.qzeros": zeros(1, 4, dtype=I32), "l.scales": SCALES},
    "bitsandbytes 4-bit": {"l.weight": zeros(8, 1), "l.weight.absmax": SCALES},
    "bitsandbytes 8-bit": {"l.weight": zeros(8, 1, dtype=I8), "l.SCB": SCALES},
    "nested state": {"l.weight.quant_state.bitsandbytes__nf4": zeros(9)},
    "block-wise float8": {"l.weight": normal(4, 4).to(EIGHT[0]), "l.weight_scale_inv": SCALES},
    "float8 with a scale": {"l.weight": normal(4, 4).to(EIGHT[0]), "l.weight_scale": SCALES},
    "compressed-tensors": {"l.weight_packed": zeros(4, 1, dtype=I32), "l.weight_scale": SCALES},
    "HQQ": {"l.W_q": zeros(4, 1)},
    "MXFP4": {"e.w_blocks": zeros(4, 16), "e.w_scales": zeros(4)},
    "scales of powers": {"l.scale": SCALES.to(torch.float8_e8m0fnu)},
    "quanto": {"l.weight._data": zeros(4, 4, dtype=I8), "l.weight._scale": SCALES},
    "quanto, 4 bits": {"l.weight._data._data": zeros(4, 4, dtype=I8), "l.weight._scale": SCALES},
    "scales by other names": {"l.weight": normal(4, 4).to(EIGHT[0]), "l.scale": SCALES},
    "scales of inputs": {"l.weight": normal(4, 4).to(EIGHT[0]), "l.input_scale": SCALES},
    "float8 experts": {"e.gate_up_proj": normal(2, 4, 4).to(EIGHT[0]), "e.gate_up_proj_scale_inv": SCALES},
    "scaled int experts": {"e.gate_up": zeros(2, 4, 4, dtype=I8), "e.gate_up_scale": SCALES},
    "int experts": {"e.down_proj": zeros(2, 4, 4, dtype=I8)},
    "AQLM": {"l.codes": zeros(4, 2, 1, dtype=I8), "l.codebooks": torch.ones(1, 4, 1, 2)},
    "VPTQ": {"l.centroids": torch.ones(1, 8), "l.indices": zeros(4, dtype=torch.int16)},
    "SpQR": {"l.dense_weights": zeros(4, dtype=I32), "l.col_vals": zeros(4, dtype=I32)},
    "Marlin": {"l.B": zeros(2, 4, dtype=I32), "l.s": SCALES},
    "int weights": {"l.weight": zeros(4, 4, dtype=I8)},
}


@pytest.mark.parametrize("case", CODES)
def test_quantised_checkpoints_are_refused(case: str, tmp_path: Path) -> None:
    """Codes taken whole from one model beside scales of another are noise, in silence."""
    rest = {"norm.weight": torch.ones(4)}
    files = place(tmp_path, plain=rest, codes={**rest, **CODES[case]})
    for call in (
        lambda: Delta.between(files[1], files[1]),
        lambda: Delta.between({**rest, **CODES[case]}, {**rest, **CODES[case]}),
        lambda: optx.merge(files[1], [files[1]], optx.TaskArithmetic(), tmp_path / "out"),
        lambda: optx.compress(files[1]),
        lambda: optx.merge_yaml(linear(*files), tmp_path / "out"),
    ):
        with pytest.raises(OptxError, match=r"belongs to .* quantised weights: codes and scales.*Dequantise"):
            call()
    assert not (tmp_path / "out").exists()
    assert list(Delta.between(files[1], files[1], include="norm.*")) == ["norm.weight"]


def linear(*files: Path, method: str = "linear", **top: Any) -> dict[str, Any]:
    models = [{"model": str(file)} for file in files]
    weights = {"parameters": {"weight": 1}} if method == "linear" else {}
    return {"merge_method": method, "models": models, **weights, **top}


@pytest.mark.parametrize("case", CODES)
def test_codes_are_copied_as_they_are_or_not_at_all(case: str, tmp_path: Path) -> None:
    """A passthrough merge of quantised models moves layers; in another dtype its codes would be numbers."""
    [file] = place(tmp_path, codes=CODES[case])
    same = load_file(optx.merge_yaml(linear(file, method="passthrough"), tmp_path / "same.safetensors"))
    assert all(torch.equal(bits(same[name]), bits(tensor)) for name, tensor in CODES[case].items())
    changed = linear(file, method="passthrough", dtype="bfloat16")
    scaled = linear(file, method="passthrough", parameters={"scale": 2})
    for config in (changed, scaled):
        with pytest.raises(OptxError, match=r"belongs to .* quantised weights"):
            optx.merge_yaml(config, tmp_path / "out.safetensors")


def test_floats_of_eight_bits_without_scales_and_scales_without_codes_are_served() -> None:
    state = {
        "l.weight": normal(4, 4).to(EIGHT[0]),
        "l.weight_gain": torch.ones(4),
        "x.weight_scale": torch.ones(1),
    }
    assert len(Delta.between(state, state)) == 3


def test_complex_numbers_are_refused_unless_left_out() -> None:
    state = {"freqs": torch.ones(3, dtype=torch.complex64), "w": torch.ones(3)}
    with pytest.raises(
        OptxError, match=r"'freqs' is torch.complex64 in tuned; there is no difference of complex"
    ):
        Delta.between(state, state)
    made: Any = Delta.between(state, {**state, "w": torch.zeros(3)}, exclude="freqs").apply(state)
    assert torch.equal(made["freqs"], state["freqs"])


def test_complex_numbers_are_carried_over_in_files(tmp_path: Path) -> None:
    state = {"freqs": torch.ones(3, dtype=torch.complex64), "w": torch.ones(3)}
    (base,) = place(tmp_path, base=state)
    out = Delta.between(base, {"w": torch.zeros(3)}, include="w").apply(base, tmp_path / "o.safetensors")
    assert equal(load_file(str(out)), {**state, "w": torch.zeros(3)})


def wrapped(kind: str) -> Tensor:
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        linear = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False))
        quantize_(linear, Int8WeightOnlyConfig(version=2))
        return linear[0].weight
    if kind == "bitsandbytes":
        bnb: Any = pytest.importorskip("bitsandbytes")
        return bnb.nn.Params4bit(torch.zeros(4, 4), requires_grad=False)
    if kind == "sparse":
        return torch.eye(3).to_sparse()
    return torch.zeros(3, device="meta")


WRAPPED = {
    "torchao": "a quantised or wrapped weight that has no plain numbers",
    "bitsandbytes": "a quantised or wrapped weight",
    "sparse": r"is a sparse_coo tensor; it must be a plain one",
    "meta": "is on the meta device, without numbers",
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_weights_are_refused(kind: str) -> None:
    if kind in ("torchao", "bitsandbytes"):
        pytest.importorskip(kind)
    state = {"w": wrapped(kind)}
    for call in (
        lambda: Delta.between(state, state),
        lambda: Delta.between({"w": torch.zeros(3)}, state),
        lambda: optx.merge(state, [state], optx.TaskArithmetic()),
        lambda: optx.compress(state),
    ):
        with pytest.raises(OptxError, match=WRAPPED[kind]):
            call()


@pytest.mark.usefixtures("group_of_one")
def test_sharded_modules_are_refused() -> None:
    """FSDP2, in a process group of one: its tensors are of the wrapper's kind all the same."""
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    plain = {n: t.clone() for n, t in model.state_dict().items()}
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    with pytest.raises(
        OptxError, match=r"'0.weight' is a DTensor, of which each process holds a part .FSDP2"
    ):
        Delta.between(plain, model)
    with pytest.raises(OptxError, match="get_model_state_dict"):
        Delta.between(plain, plain).apply(model)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert not Delta.between(plain, whole)["0.weight"].any()  # the way out that the message names
