"""`from_config`: optimizer, transforms, injections and loss out of a plain dict, as YAML and Hydra have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from optx._config_names import find
from optx._config_values import Reader, accepted, check_known, plain
from optx._errors import OptxError, shown
from optx.inject._attach import attach, attach_saved
from optx.inject._freeze import trainable_only
from optx.inject._handle import Handle
from optx.inject._injection import Injection
from optx.step.transform import Transform
from optx.step.wrap import wrap

_Attached = tuple[Handle, Callable[[], None]]  # and what takes it back
MakeOptimizer = Callable[..., Optimizer]
"""What makes an optimizer of parameters, as ``functools.partial(torch.optim.AdamW, lr=1e-4)``."""

SECTIONS = ("optimizer", "transforms", "wrap", "attach", "trainable_only", "loss")
# The keys of an entry that are attach's own arguments, and what it calls them.
_OF_ATTACH = {one: one for one in ("targets", "layers", "exclude", "modules_to_save")} | {
    "adapter_name": "name"
}
_OF_WRAP = ("fused", "skip_nonfinite", "rounding", "metrics", "state", "master")


@dataclass(frozen=True)
class Configured:
    """What `from_config` made; it unpacks as ``optimizer, handles, loss``.

    Attributes:
        optimizer: wrapped if the config has ``transforms`` or ``wrap``, or something attached that it must
            follow; None if there is none.
        handles: of `optx.attach`, in the config's order.
        loss: the loss object, or None.
    """

    optimizer: Any
    handles: tuple[Handle, ...]
    loss: Any

    def __iter__(self) -> Iterator[Any]:
        """So that it unpacks."""
        return iter((self.optimizer, self.handles, self.loss))


def from_config(
    config: Mapping[str, Any],
    optimizer: Optimizer | MakeOptimizer | None = None,
    model: nn.Module | None = None,
) -> Configured:
    """Make what a plain dict describes: from YAML, JSON, Hydra or a LightningCLI.

    All is looked at before anything is changed, and if a later part fails, what was attached comes off again.
    Each entry is a method's name, or a table of ``name`` and arguments. ``name`` is the class's as it is in
    optx, or a dotted path to one of yours, which is imported: read configs of those whom you trust.

    Args:
        config: with any of these keys (a mapping of any kind, OmegaConf's too):

            ``optimizer``: a class of torch.optim, or a dotted path, with its arguments. It gets the model's
            parameters that are to be trained, after ``attach`` has added its own.

            ``transforms``: a list, as for `optx.wrap`.

            ``wrap``: the settings of `optx.wrap`: ``fused``, ``rounding``, ``skip_nonfinite``, ``metrics``,
                ``state``, ``master``.

            ``attach``: a list of injections. Beside their arguments they take those of `optx.attach`:
            ``targets``, ``layers``, ``exclude``, ``modules_to_save``, and its ``name`` as ``adapter_name``;
            a module type is written ``torch.nn.Linear``. ``{path: out/}`` attaches a saved adapter.

            ``trainable_only``: true freezes all but what was attached.

            ``loss``: one of optx's loss classes, or a dotted path.

            Masks, shapes and anchors are paths of files; hyperparameters (`optx.hp`) are tables. A method
            that needs the model gets ``model``; where it is optional, ``model: true`` passes it.
        optimizer: in place of the config's: one that is made already, or a function of parameters that makes
            it, as ``functools.partial(torch.optim.AdamW, lr=1e-4)`` or Hydra's ``_partial_: true``.
        model: that is trained.

    Returns:
        ``optimizer``, ``handles`` and ``loss``, which it unpacks to.

    Raises:
        OptxError: a key or a name that nothing reads, a value of the wrong kind, something that is missing,
            or what the methods themselves raise; model and optimizer are as they were.

    Keywords: YAML, Hydra, OmegaConf, LightningCLI, axolotl, JSON, config file, dict, instantiate.

    Example:
        >>> import torch, optx
        >>> config = {
        ...     "optimizer": {"name": "AdamW", "lr": 1e-3},
        ...     "transforms": ["PerpGrad", {"name": "AdamR", "weight": 0.05}],
        ...     "attach": [{"name": "LoRA", "rank": 2, "targets": "torch.nn.Linear"}],
        ...     "trainable_only": True,
        ... }
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> optimizer, handles, loss = optx.from_config(config, model=model)
        >>> optimizer.transforms
        (PerpGrad(rescale=True), AdamR(weight=0.05))
        >>> optx.to_config(handles[0].injection)
        {'name': 'LoRA', 'rank': 2}
    """
    table = _checked(plain(config))
    maker = _Maker(model)
    maker.check_together(table, optimizer)
    make = maker.optimizer(table["optimizer"]) if table.get("optimizer") else optimizer
    transforms = [maker.made(one, f"transforms[{i}]", Transform) for i, one in _list(table, "transforms")]
    attached = [maker.attached(one, f"attach[{i}]") for i, one in _list(table, "attach")]
    settings = maker.settings(table.get("wrap") or {})
    loss = maker.call(table["loss"], "loss", nn.Module) if table.get("loss") else None
    with ExitStack() as undo:
        handles: list[Handle] = []
        for one in attached:
            handle, take_back = one(cast(nn.Module, model))
            handles.append(handle)
            undo.callback(take_back)
        if table.get("trainable_only"):
            undo.callback(trainable_only(cast(nn.Module, model), *handles).restore)
        made = make if make is None or isinstance(make, Optimizer) else _of_parameters(make, model)
        if made is not None:
            _check_trains(made, handles)
        made_loss = loss and loss()
        followed = [one for one in handles if one.leaving() or one.transforms()]
        if made is not None and (followed or transforms or "wrap" in table):
            made = wrap(made, *followed, *transforms, **settings)
        undo.pop_all()
    return Configured(made, tuple(handles), made_loss)


def _checked(config: Any) -> dict[str, Any]:
    """The sections; raises for what is none."""
    if not isinstance(config, dict):
        raise OptxError(f"from_config: config is a {type(config).__name__}; it must be a table (a dict).")
    table = cast("dict[str, Any]", config)
    if "injections" in table:
        raise OptxError("from_config: there is no 'injections'; their list is called 'attach'.")
    if "optx" in table and not set(SECTIONS) & set(table):
        raise OptxError(
            "from_config: there is no 'optx'. If it is a section of a larger file, pass config['optx']."
        )
    check_known("from_config", table, SECTIONS)
    if not isinstance(table.get("trainable_only", False), bool):
        raise OptxError(
            f"from_config: trainable_only is {shown(table['trainable_only'])}; it must be true or false."
        )
    return table


def _list(table: Mapping[str, Any], section: str) -> list[tuple[int, Any]]:
    """The entries of a section, with their places."""
    given = table.get(section)
    if not isinstance(given, list | None):
        raise OptxError(f"from_config: {section} is {shown(given)}; it must be a list of names or tables.")
    return list(enumerate(cast("list[Any]", given or [])))


class _Maker:
    """Makes what the entries of one config describe, of the model that it was given with."""

    def __init__(self, model: nn.Module | None) -> None:
        if not (model is None or isinstance(model, nn.Module)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(f"from_config: model is a {type(model).__name__}; it must be the model.")
        self.model = model
        self._reader = Reader(model, self.made)

    def check_together(self, table: Mapping[str, Any], optimizer: object) -> None:
        """Raise if a section asks for what is not there."""
        named = table.get("optimizer")
        if named and optimizer is not None:
            raise OptxError("from_config: optimizer is given twice, in the config and as an argument.")
        if optimizer is not None and not isinstance(optimizer, Optimizer) and not callable(optimizer):
            raise OptxError(
                f"from_config: optimizer is {shown(optimizer)}; it must be an optimizer, or a function of "
                "parameters that makes one, as functools.partial(torch.optim.AdamW, lr=1e-4)."
            )
        if (table.get("transforms") or table.get("wrap")) and not named and optimizer is None:
            raise OptxError(
                "from_config: transforms and wrap are of an optimizer, and there is none. Name one in the "
                "config (optimizer: {name: AdamW, lr: 1e-4}), or pass optimizer=."
            )
        made_here = named or not isinstance(optimizer, Optimizer | None)
        for section, needed in (("attach", table.get("attach")), ("optimizer", made_here)):
            if needed and self.model is None:
                raise OptxError(f"from_config: {section} needs the model; pass model=.")
        if table.get("trainable_only") and not table.get("attach"):
            raise OptxError(
                "from_config: trainable_only freezes all but what attach adds, and attach is empty."
            )

    # ---- entries ----------------------------------------------------------------------------------------

    def made(self, entry: Any, where: str, kind: type) -> Any:
        """The object of an entry."""
        return self.call(entry, where, kind)()

    def call(self, entry: Any, where: str, kind: type) -> Callable[[], Any]:
        """The class of an entry with its arguments, looked at."""
        name, given = _entry(entry, where)
        cls, who = find(name, where, kind), f"from_config: {where} ({name})"
        kinds = accepted(cls)
        wild = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls).parameters.values())
        if not wild:
            check_known(who, given, kinds)
        read = {key: self._reader.read(who, key, value, kinds.get(key, ())) for key, value in given.items()}
        for key, p in inspect.signature(cls).parameters.items():
            if p.default is p.empty and key not in read and key in kinds and key != "params":
                if key != "model":
                    raise OptxError(f"{who}: {key} is missing.")
                read[key] = self._reader.read(who, key, True, kinds[key])
        return partial(cls, **read)

    def attached(self, entry: Any, where: str) -> Callable[[nn.Module], _Attached]:
        """What attaches an entry to a model."""
        table = {"name": entry} if isinstance(entry, str) else entry
        if isinstance(table, dict) and "path" in table:
            saved = cast("dict[str, Any]", table)
            check_known(f"from_config: {where}", saved, ("path", "adapter_name"))
            return partial(attach_saved, path=str(saved["path"]), name=saved.get("adapter_name"))
        own = {key: value for key, value in _table(table, where).items() if key not in _OF_ATTACH}
        kinds = accepted(attach)
        who = f"from_config: {where} ({own.get('name')})"
        how = {
            _OF_ATTACH[key]: self._reader.read(who, key, value, kinds[_OF_ATTACH[key]])
            for key, value in _table(table, where).items()
            if key in _OF_ATTACH
        }
        injection = self.made(own, where, Injection)

        def attached(model: nn.Module) -> _Attached:
            handle = attach(model, injection, **how)
            return handle, handle.remove

        return attached

    def settings(self, given: Any) -> dict[str, Any]:
        """Of `optx.wrap`."""
        table, kinds = _table(given, "wrap"), accepted(wrap)
        check_known("from_config: wrap", table, _OF_WRAP)
        return {k: self._reader.read("from_config: wrap", k, v, kinds[k]) for k, v in table.items()}

    def optimizer(self, entry: Any) -> MakeOptimizer:
        """What makes the config's optimizer of parameters."""
        return self.call(entry, "optimizer", Optimizer)


def _table(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise OptxError(f"from_config: {where} is {shown(given)}; it must be a table.")
    return cast("dict[str, Any]", given)


def _entry(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    """An entry's name and its arguments."""
    table = _table({"name": entry} if isinstance(entry, str) else entry, where)
    name = table.get("name")
    if not isinstance(name, str):
        raise OptxError(f"from_config: {where} is {shown(entry)}; it must be a name, or a table with a name.")
    return name, {key: value for key, value in table.items() if key != "name"}


# ---- the optimizer --------------------------------------------------------------------------------------


def _of_parameters(make: MakeOptimizer, model: Any) -> Optimizer:
    """The optimizer of what is to be trained; torch's own are told the names, by which states are saved."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise OptxError(f"from_config: this {type(model).__name__} has no parameter that is to be trained.")
    inner: Any = make
    while isinstance(inner, partial):
        inner = cast("partial[Any]", inner).func
    takes_names = getattr(inner, "__module__", "").startswith("torch.optim")
    made: Any = make(named if takes_names else [p for _, p in named])
    if not isinstance(made, Optimizer):
        raise OptxError(f"from_config: optimizer made a {type(made).__name__}; it must make an optimizer.")
    return made


def _check_trains(optimizer: Optimizer, handles: Iterable[Handle]) -> None:
    """Raise if an optimizer that was there before has not got what was attached."""
    has = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for handle in handles:
        if any(p.requires_grad and id(p) not in has for p in handle.parameters()):
            raise OptxError(
                f"from_config: the optimizer was made before {handle.injection} was attached, and would not "
                "train it. Name the optimizer in the config, or pass a function that makes it, as "
                "functools.partial(torch.optim.AdamW, lr=1e-4)."
            )
