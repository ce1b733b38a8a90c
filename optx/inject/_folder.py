"""Handles as folders: PEFT's two files where PEFT knows the method, else ``optx_adapter.safetensors``.

Tensors are keyed by module path and suffix, without what torch.compile and DDP put into paths. The metadata
of the safetensors file, under ``optx``, says what to attach where; JSON, no pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from optx import _everything
from optx._errors import FileError, OptxError, near, warn
from optx._module_paths import paths_of
from optx._names import placed_like, whole
from optx._safetensors import brief, parsed
from optx.inject import _peft_read, _peft_write
from optx.inject._adapter_card import CARD, card_of, is_ours
from optx.inject._file_bounds import check_config, check_sizes, decoded, words_of
from optx.inject._folder_output import written_folder
from optx.inject._injection import Composite, Injection, values_of
from optx.inject._low_rank_start import is_of_weight, split
from optx.inject._served import OnModel, Served
from optx.inject._stored import Stored, check_tensors
from optx.inject.lora import LoRA

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
OWN = "optx_adapter.safetensors"
PICKLE = "adapter_model.bin"

# Entries of PEFT's configuration that may be edited later: none changes what is computed.
_FREE = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version")

# Options that act at the start or in training alone: a run may go on with others.
_FOR_TRAINING = (
    *("dropout", "init", "std"),
    *("hparams", "shared", "lr", "sigma_lr", "tau", "warmup", "train_steps", "valid_steps", "seed"),  # STN's
    *("keep", "scaler", "init_std", "scale", "match_std", "param_scale"),  # StableRPS's
    *("beta", "gamma", "a0", "b0", "c"),  # ABMLL's, whose c is also among the tensors
)


# ---- saving -----------------------------------------------------------------------------------------


def save(handle: OnModel, path: str | PathLike[str]) -> None:
    """Write a handle's folder. What the options can't say is found out before anything is written."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise OptxError(f"save: {os.fspath(path)!r} is a file; pass the name of a folder.")
    if folder.is_symlink() and not folder.exists():
        raise OptxError(f"save: {os.fspath(path)!r} is a link to nothing. Make the folder that it names.")
    description = _describe(handle)
    config = _peft_write.config_of(handle)
    live = handle.state_dict()
    tensors = {key: live[name] for key, name in _keys(handle).items()}
    empty = [key for key, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise OptxError(
            f"save: {empty[0]!r} is on the meta device and has no values yet. Give the model and the adapter "
            "their values first."
        )
    if isinstance(config, str):
        if config:
            warn(f"save: PEFT can't read this adapter, as {config}. It is written as {OWN}.")
        config = None
    else:
        tensors = _peft_write.tensors_of(handle, tensors)
    card = card_of(handle, config, description["version"])
    with written_folder(folder, (CARD, OWN, TENSORS, CONFIG), _may_be_replaced) as aside:
        (aside / CARD).write_text(card, encoding="utf-8")
        if config is None:
            _write(aside / OWN, tensors, description)
        else:
            _write(aside / TENSORS, tensors, {**description, "config": config})
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (aside / CONFIG).write_text(text, encoding="utf-8")


def _may_be_replaced(file: Path) -> bool:
    """A file of ours by its name, and a card by what it says."""
    return file.name != CARD or is_ours(file)


def _write(file: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Copies: safetensors takes neither views of one storage nor sharded tensors.
    copies = {key: whole(tensor).detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(copies, file, metadata={"format": "pt", "optx": json.dumps(description)})
    except SafetensorError as error:  # a full disk, for one
        raise OSError(
            f"save: {file.name!r} can't be written to {str(file.parent.parent)!r} ({error})."
        ) from None
    file.chmod(mode)  # safetensors leaves its files to their owner alone


def _describe(handle: OnModel) -> dict[str, Any]:
    """What to attach where."""
    plain = paths_of(handle.model).plain
    try:
        injection = _encode(handle.injection)
        again = _encode(_decode(json.loads(json.dumps(injection))))
    except (TypeError, ValueError) as error:
        raise OptxError(
            f"save: the options of {handle.injection} can't be written as JSON ({error})."
        ) from error
    if again != injection:
        raise OptxError(f"save: the options of {handle.injection} would not be the same when read again.")
    return {
        "version": _version(),
        "injection": injection,
        "served": {
            name: [path for one in group for path in one.paths_as(plain)]
            for name, group in _by_member(handle).items()
        },
        "modules_to_save": [plain[kept.path] for kept in handle.saved],
    }


def _by_member(handle: OnModel) -> dict[str, list[Served]]:
    """What is served by member; what an injection brings along by itself (companions) is left out."""
    injection = handle.injection
    members = injection.members() if isinstance(injection, Composite) else {"": injection}
    groups: dict[int, list[Served]] = {}
    for one in handle.served:
        groups.setdefault(id(one.injection), []).append(one)
    waiting = list(groups.values())
    found: dict[str, list[Served]] = {}
    for name, member in members.items():
        group = next(group for group in waiting if group[0].injection == member)
        waiting.remove(group)
        found[name] = group
    return found


def _keys(handle: OnModel) -> dict[str, str]:
    """The keys of a handle's state dict, by those of a file: bare paths, and the method's own name."""
    plain = paths_of(handle.model).plain
    keys: dict[str, str] = {}
    for one in handle.served:
        suffixes = one.part.suffixes()
        for name in one.part.tensors():
            suffix = suffixes.get(name)
            keys[f"{plain[one.path]}.{suffix or f'{one.injection.name}.{name}'}"] = (
                f"{one.path}.{suffix or f'{one.name}.{name}'}"
            )
    for kept in handle.saved:
        for name in kept.module.state_dict():
            keys[f"{plain[kept.path]}.{name}"] = f"{kept.path}.{name}"
    return keys


# ---- loading ----------------------------------------------------------------------------------------


def load(handle: OnModel, path: str | PathLike[str]) -> None:
    """Load a folder's tensors into a handle of the same injection."""
    if handle.removed:
        raise OptxError("load: this handle has been removed from its model. Attach again.")
    stored = read(path, handle.model)
    where = os.fspath(path)
    own, theirs = (_effective(one, handle) for one in (handle.injection, stored.injection))
    if own["class"] != theirs["class"]:
        raise FileError(f"load: {where!r} holds {theirs['class']}, and this handle is of {own['class']}.")
    for option, value in theirs.items():
        if option not in _FOR_TRAINING and own[option] != value:
            raise FileError(
                f"load: {where!r} was saved with {option}={value!r}, and this handle has {own[option]!r}. "
                "optx.attach(model, path) takes the options from the file."
            )
    if isinstance(handle.injection, LoRA):
        starts = [is_of_weight(one["init"]) for one in (own, theirs)]
        if starts[0] != starts[1]:
            raise FileError(
                f"load: {where!r} was saved with init={theirs['init']!r}, and this handle has "
                f"{own['init']!r}: one keeps its factors' start, the other has none. optx.attach(model, "
                "path) takes the options from the file."
            )
    fill(handle, stored, where)


def fill(handle: OnModel, stored: Stored, where: str) -> None:
    """Copy the tensors into the handle, if every key and shape is right."""
    live, keys = handle.state_dict(), _keys(handle)
    own = {key: live[name] for key, name in keys.items()}
    check_tensors(stored.tensors, own, where=f"load: {where!r}", prefix=stored.prefix)
    # A handle may have more state than its parts; a file is of parts.
    handle.load_state_dict({**live, **{keys[k]: placed_like(stored.tensors[k], t) for k, t in own.items()}})


def _effective(injection: Injection, handle: OnModel) -> dict[str, Any]:
    """Options in a form that is equal if what they do to the handle's modules is."""
    return {"class": type(injection).__name__, **_encode(_peft_write.spelled_out(injection, handle))}


# ---- reading ----------------------------------------------------------------------------------------


def read(path: str | PathLike[str], model: nn.Module) -> Stored:
    """What a folder holds; the model is not touched."""
    folder = Path(path)
    if not folder.is_dir():
        what = "a file; pass the folder it is in" if folder.exists() else "no folder"
        raise FileError(
            f"load: {os.fspath(path)!r} is {what}. An adapter of the Hub must be downloaded first."
        )
    own, config, tensors = folder / OWN, folder / CONFIG, folder / TENSORS
    if own.exists() and config.exists():
        raise FileError(
            f"load: {os.fspath(path)!r} has both {OWN} and {CONFIG}. Delete the one that is not wanted."
        )
    if own.exists():
        return check_sizes(_read_own(own, model), f"load: {str(own)!r}")
    if not tensors.exists() and (folder / PICKLE).exists():
        raise FileError(
            f"load: {str(folder / PICKLE)!r} is a pickle, which can run any code when it is read. Load it in "
            "PEFT, if you trust it, and save it again: save_pretrained writes safetensors."
        )
    for file in (config, tensors):
        if not file.exists():
            there = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
            raise FileError(f"load: {os.fspath(path)!r} has no {file.name}. It has {there}.")
    return check_sizes(_read_peft(config, tensors, model), f"load: {str(tensors)!r}")


def _read_own(file: Path, model: nn.Module) -> Stored:
    where = f"load: {str(file)!r}"
    tensors, description = _open(file)
    if description is None:
        raise FileError(f"{where} is not an adapter file: its metadata has no 'optx'.")
    return _described(description, tensors, model, where)


def _read_peft(config_file: Path, file: Path, model: nn.Module) -> Stored:
    try:
        config = parsed(config_file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except (ValueError, OSError) as error:
        raise FileError(
            f"load: {str(config_file)!r} is damaged ({brief(str(error), quote=False)})."
        ) from error
    check_config(config, f"load: {str(config_file)!r}")
    tensors, description = _open(file)
    where = f"load: {str(file)!r}"
    stored = _peft_read.read(config, tensors, model, where)
    if description is None:
        return stored
    written = description.get("config", {})
    if not isinstance(written, dict):
        raise FileError(f"{where} is damaged: its description's configuration is no table.")
    for option in {*written, *config} - set(_FREE):
        if written.get(option) != config.get(option):
            here, there = brief(config.get(option)), brief(written.get(option))
            raise FileError(
                f"{where} was written with {brief(option, quote=False)}={there}, and {CONFIG} beside it has "
                f"{here}: a save was cut off, or one of them was changed. Save again."
            )
    made = _described(description, stored.tensors, model, where)
    made.prefix = stored.prefix
    if isinstance(made.injection, LoRA) and is_of_weight(made.injection.init):
        ranks = {path: made.injection.rank_at(path) for path in made.served[""]}
        made.tensors = split(made.tensors, ranks)
    return made


def _open(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """A safetensors file's tensors, and what optx wrote about them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
        description = parsed(metadata["optx"]) if "optx" in metadata else None
    except (SafetensorError, ValueError, OSError) as error:
        raise FileError(
            f"load: {str(file)!r} is damaged or cut off ({brief(str(error), quote=False)})."
        ) from error
    if description is not None and not isinstance(description, dict):
        raise FileError(f"load: {str(file)!r} is damaged: its description is no table.")
    return tensors, description


def _described(
    description: Mapping[str, Any], tensors: dict[str, Tensor], model: nn.Module, where: str
) -> Stored:
    """What optx wrote about a file."""
    paths = paths_of(model)
    try:
        injection = decoded(lambda: _decode(description["injection"]), where)
        members = injection.members() if isinstance(injection, Composite) else ("",)
        served = {name: words_of(description["served"][name], where, "'served'") for name in members}
        kept = words_of(description["modules_to_save"], where, "'modules_to_save'")
        stored = Stored(injection, served, kept, tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{where} is damaged: its description lacks {error}.") from error
    for path in (*(one for served in stored.served.values() for one in served), *stored.whole):
        if paths.find(path) is None:
            raise FileError(
                f"{where} was saved for another model: it serves {path!r}, and this one has no such module. "
                f"{near(path, filter(None, paths.modules))}"
            )
    return stored


# ---- options as JSON --------------------------------------------------------------------------------


def _encode(value: Any) -> Any:
    """An option as JSON can hold it; an injection inside another by its class name."""
    if isinstance(value, Injection):
        options = value.options()
        options.update({name: own for name, own in values_of(value).items() if _holds_injection(own)})
        return {"injection": type(value).__name__, "options": {k: _encode(v) for k, v in options.items()}}
    if isinstance(value, Mapping):
        return {k: _encode(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"injection", "options"}:  # pyright: ignore[reportUnknownArgumentType]
        _everything.load()
        known = {kind.__name__: kind for kind in _kinds(Injection)}
        if not isinstance(value["injection"], str) or value["injection"] not in known:
            raise FileError(
                f"load: the file is of an injection {value['injection']!r}, which is not known here. Import "
                f"the module that defines it. {near(value['injection'], known)}"
            )
        return known[value["injection"]].from_options({k: _decode(v) for k, v in value["options"].items()})
    if isinstance(value, dict):
        return {k: _decode(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return tuple(map(_decode, value)) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType]


def _holds_injection(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_injection, value.values()))  # pyright: ignore[reportUnknownArgumentType]
    return isinstance(value, Injection) or (
        isinstance(value, list | tuple) and any(map(_holds_injection, value))
    )  # pyright: ignore[reportUnknownArgumentType]


def _kinds(of: type[Injection]) -> list[type[Injection]]:
    """Every injection that is defined, a later definition of one name after an earlier."""
    return [kind for child in of.__subclasses__() for kind in (child, *_kinds(child))]


def _version() -> str:
    try:
        return version("optx-torch")
    except PackageNotFoundError:
        return "unknown"
