"""Adapters of strangers: options of other kinds, sizes that are not the tensors', expressions without end."""

from __future__ import annotations

import json
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import optx
from optx import Delta, FileError, OptxError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"layers": nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 4)]), "head": nn.Linear(4, 2)}
    )


def saved(folder: Path, injection: optx.Injection | None = None) -> Path:
    optx.attach(net(), injection or optx.LoRA(rank=2), r"layers\.\d").save(folder)
    return folder


def edited(folder: Path, **changes: Any) -> Path:
    """A PEFT folder with other options, as a stranger would write it: without what optx wrote beside it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    return folder


def described(file: Path, change: Any) -> None:
    """Another description in optx's own file."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["optx"])
    header["__metadata__"]["optx"] = json.dumps(change(about))
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def refuses(folder: Path, message: str) -> None:
    start, most = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OptxError, match=message):
        optx.attach(net(), folder)
    assert time.process_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 200_000  # kilobytes


GIANTS: dict[str, dict[str, Any]] = {
    "rank": {"r": 10**9},
    "another rank": {"r": 3},
    "a pattern's rank": {"rank_pattern": {"layers.1": 10**9}},
    "both": {"r": 2**31 - 1, "rank_pattern": {"layers.0": 2}},
}


@pytest.mark.parametrize("case", GIANTS)
def test_ranks_are_the_tensors(case: str, tmp_path: Path) -> None:
    folder = edited(saved(tmp_path / "a"), **GIANTS[case])
    refuses(folder, r"lora_A.weight' has shape \(2, \d\), and the options say rank \d+ for it")
    with pytest.raises(FileError, match=r"has factors of shapes .* and its configuration says rank"):
        Delta.lora(folder)


@pytest.mark.parametrize(
    ("injection", "option"),
    [
        (optx.SequentialAdapter(rank=3), "rank"),
        (optx.FLoRA(rank=2), "rank"),
        (optx.LoRA(rank=2, lora_bias=True), "rank"),
        (optx.SVFit(rank=2), "rank"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, optx.Injection) else value,
)
def test_sizes_in_our_own_files_are_the_tensors(injection: Any, option: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3)) if isinstance(injection, optx.FLoRA) else net()
    targets = "0" if isinstance(injection, optx.FLoRA) else r"layers\.\d"
    optx.attach(model, injection, targets).save(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))

    def change(about: Any) -> Any:
        about["injection"]["options"][option] = 10**9
        if "config" in about:
            about["config"]["r"] = 10**9
        return about

    described(file, change)
    if (config := tmp_path / "adapter_config.json").exists():
        config.write_text(json.dumps({**json.loads(config.read_text()), "r": 10**9}))
    with pytest.raises(
        FileError, match=r"=1000000000, and no tensor of that size|say rank 1000000000 for it"
    ):
        optx.attach(
            nn.Sequential(nn.Conv2d(4, 4, 3)) if isinstance(injection, optx.FLoRA) else net(), tmp_path
        )


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "a word for a rank": ({"r": "8"}, "r='8'; it must be a whole number above 0"),
    "no rank": ({"r": None}, "r=None; it must be a whole number"),
    "true for a rank": ({"r": True}, "r=True; it must be a whole number"),
    "a negative rank": ({"r": -1}, "r=-1; it must be"),
    "a list for alpha": ({"lora_alpha": [1]}, r"lora_alpha=\[1\]; it must be a number"),
    "nan for alpha": ({"lora_alpha": float("nan")}, "lora_alpha=nan; it must be a number"),
    "a number for a flag": ({"use_rslora": 1}, "use_rslora=1; it must be true or false"),
    "a list for a table": ({"rank_pattern": [1]}, "rank_pattern=.*; it must be a table of whole numbers"),
    "words in a table": ({"alpha_pattern": {"a": "b"}}, "alpha_pattern=.*; it must be a table of numbers"),
    "a number for targets": ({"target_modules": 3}, "target_modules=3; it must be a pattern or a list"),
    "numbers for targets": ({"target_modules": [3]}, r"target_modules=\[3\]; it must be a pattern or a list"),
    "a word for a list": ({"modules_to_save": "head"}, "modules_to_save='head'; it must be a list of names"),
    "a table for layers": (
        {"layers_to_transform": {}},
        "layers_to_transform={}; it must be a number or a list",
    ),
    "a number for bias": ({"bias": 3}, "bias=3; it must be a word"),
    "a list for the kind": ({"peft_type": []}, r"peft_type=\[\]; it must be a word"),
    "a prefix without sizes": (
        {"peft_type": "PREFIX_TUNING"},
        "num_virtual_tokens=None; it must be a whole number",
    ),
    "a loop of stacks": (
        {"layers_pattern": "(a+)+"},
        "layers_pattern: the pattern .* can't be matched in bounded",
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_options_of_other_kinds(case: str, tmp_path: Path) -> None:
    changes, message = KINDS[case]
    refuses(edited(saved(tmp_path / "a"), **changes), f"adapter_config.json' has {message}|{message}")


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", [r"([a-z0-9.]+)+!", r"(.*)*(.*)*!", r"(\w|\d|\.)*!"])
def test_expressions_without_end(option: str, pattern: str, tmp_path: Path) -> None:
    """They are matched all the same: here they match nothing."""
    folder = edited(saved(tmp_path / "a"), **{option: pattern})
    start = time.process_time()
    if option == "target_modules":
        refuses(folder, "does not mean")
    else:
        optx.attach(net(), folder)
    assert time.process_time() - start < 1
    refuses(edited(folder, **{option: r"(.*)*\1"}), "can't be matched in bounded time")
    refuses(edited(folder, **{option: "["}), "is not a regular expression")


def test_expressions_in_tables(tmp_path: Path) -> None:
    folder = edited(saved(tmp_path / "a"), rank_pattern={r"([a-z0-9.]+)+!": 7})
    start = time.process_time()
    with pytest.warns(UserWarning, match="which matches none of the served modules"):
        optx.attach(net(), folder)
    assert time.process_time() - start < 1


DESCRIBED: dict[str, Any] = {
    "a list": lambda about: [],
    "no injection": lambda about: {**about, "injection": None},
    "a table that is none": lambda about: {**about, "injection": {"a": 1}},
    "an unknown one": lambda about: {**about, "injection": {"injection": "Nothing", "options": {}}},
    "a list for its name": lambda about: {**about, "injection": {"injection": [], "options": {}}},
    "a list of options": lambda about: {**about, "injection": {**about["injection"], "options": []}},
    "a word for a rank": lambda about: _with(about, rank="3"),
    "a fraction for a rank": lambda about: _with(about, rank=3.5),
    "a list for a rank": lambda about: _with(about, rank=[3]),
    "an unknown option": lambda about: _with(about, colour=1),
    "a word for what is served": lambda about: {**about, "served": {"": "layers.0"}},
    "numbers for what is served": lambda about: {**about, "served": {"": [0]}},
    "nothing served": lambda about: {**about, "served": {}},
    "a few hundred lists in lists": lambda about: _with(about, form=_nested(400)),
    "a hundred tables in tables": lambda about: {**about, "more": _nested(100, lambda inner: {"in": inner})},
    "a number for what is kept": lambda about: {**about, "modules_to_save": 3},
}  # fmt: skip


def _nested(depth: int, around: Any = lambda inner: [inner]) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = around(made)
    return made


def _with(about: Any, **options: Any) -> Any:
    injection = about["injection"]
    return {**about, "injection": {**injection, "options": {**injection["options"], **options}}}


@pytest.mark.parametrize("case", DESCRIBED)
def test_descriptions_that_make_no_sense(case: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", optx.SequentialAdapter(rank=3))
    described(folder / "optx_adapter.safetensors", DESCRIBED[case])
    refuses(folder, r"^load: ")


def test_what_is_right_is_read(tmp_path: Path) -> None:
    for number, injection in enumerate(
        (optx.LoRA(rank=2, rank_pattern={"layers.1": 3}), optx.IA3(), optx.BitFit())
    ):
        folder = saved(tmp_path / f"{number}", injection)
        with optx.attach(net(), folder) as handle:
            assert handle.served
    assert len(Delta.lora(tmp_path / "0")) == 2
