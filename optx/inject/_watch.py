"""Whether what was attached is still where the model computes: modules get replaced, resized and deleted.

A part lives in its module, so a module that goes takes its part along, and one that comes in its place has
none. Neither torch nor the model says so. The model's own call looks, and what writes files or weights does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from optx._errors import OptxError
from optx._module_paths import bare_path, paths_of
from optx.inject._part import RESERVED, Attached, Part
from optx.inject._passed_by import FirstCall, doubtful
from optx.inject._served import Served
from optx.inject._trained_whole import Saved

_Tree: TypeAlias = "dict[str, _Tree | _Leaf]"


class _Leaf:
    """A part by the name that it has on its module, and the shape that the module's weight had."""

    def __init__(self, path: str, name: str, part: Part, shape: torch.Size | None) -> None:
        self.path, self.name, self.shape = path, name, shape
        self.part = weakref.ref(part)  # the model holds this: no circles through it

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "part": self.part()}  # a copy of the model watches the copied part

    def __setstate__(self, state: dict[str, Any]) -> None:
        part = state["part"]
        self.__dict__.update(state, part=weakref.ref(part) if part is not None else lambda: None)

    def is_on(self, module: nn.Module) -> bool:
        """Whether the part is on this module, and the weight has its shape."""
        container = module._modules.get(RESERVED)  # pyright: ignore[reportPrivateUsage]
        if container is None or self.name not in container._modules:  # pyright: ignore[reportPrivateUsage]
            return False
        weight = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
        return weight is None or weight.shape == self.shape or not self.resized(module)

    def resized(self, module: nn.Module) -> bool:
        """Whether the weight has grown or shrunk; one that is sharded or empty for now has not."""
        now = _shape(module)
        return (
            now != self.shape and now is not None and self.shape is not None and len(now) == len(self.shape)
        )


class Watch:
    """A hook before the model's call that raises if a served module was replaced or resized since attach.

    What was deleted with its layer is no fault: the rest computes as it should. The usual look is one walk
    along the served paths, without a call; only if it fails is anything searched.
    """

    def __init__(self, model: nn.Module, served: Sequence[Served]) -> None:
        leaves = [(_Leaf(one.path, one.name, one.part, _shape(one.module)), one.module) for one in served]
        self._tree = _tree([leaf for leaf, module in leaves if leaf.is_on(module)])
        self._hook = model.register_forward_pre_hook(self._before_call)

    def remove(self) -> None:
        """Take the hook off."""
        self._hook.remove()

    def _before_call(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        exchanged = self.look(model)
        if exchanged:
            FirstCall(exchanged).begin(model)

    def look(self, model: nn.Module) -> list[tuple[nn.Module, dict[str, Attached]]]:
        """Raise if something is not in its place any more.

        Returns:
            Modules inside whose forward was exchanged, with what is served right inside of them.
        """
        if "_is_replica" in model.__dict__:
            raise OptxError(
                "optx: this model is a copy that DataParallel made, and what is attached acts on the first. "
                "Use DistributedDataParallel, or one device."
            )
        exchanged: list[tuple[nn.Module, dict[str, Attached]]] = []
        if not _all_on(model, self._tree, exchanged):
            self._search(model)
        return exchanged

    def _search(self, model: nn.Module) -> None:
        """Raise if something is wrong; else watch what is still in its place."""
        present = {id(module) for module in model.modules()}
        paths, kept = paths_of(model), list[_Leaf]()
        for leaf in _leaves(self._tree):
            module, part = paths.modules.get(bare_path(leaf.path)), leaf.part()
            if module is None:  # deleted, with its layer
                continue
            if leaf.is_on(module):
                leaf.path = paths.here[bare_path(leaf.path)]
                kept.append(leaf)
            elif part is None or id(part) not in present:
                raise OptxError(
                    f"optx: {leaf.path!r} was replaced since {leaf.name!r} was attached to it, so that acts "
                    f"nowhere: there is a {type(module).__name__} without it now. Put the module back, or "
                    "call handle.remove() and attach again."
                )
            elif leaf.resized(module):
                raise OptxError(
                    f"optx: {leaf.path}.weight has shape {tuple(_shape(module) or ())}, and had "
                    f"{tuple(leaf.shape or ())} when {leaf.name!r} was attached to it. Call handle.remove() "
                    "and attach again: resize a model before anything is attached to it."
                )
        self._tree = _tree(kept)


def _tree(leaves: Sequence[_Leaf]) -> _Tree:
    root: _Tree = {}
    for leaf in leaves:
        node: Any = root
        for name in leaf.path.split("."):
            node = node.setdefault(name, {})
        node[f".{leaf.name}"] = leaf  # no module's name has a dot
    return root


def _leaves(tree: _Tree) -> Iterator[_Leaf]:
    for below in tree.values():
        if isinstance(below, _Leaf):
            yield below
        else:
            yield from _leaves(below)


def _all_on(module: nn.Module, tree: _Tree, exchanged: list[tuple[nn.Module, dict[str, Attached]]]) -> bool:
    """Whether every part is where it was put; notes modules whose forward is not their class's."""
    for name, below in tree.items():
        if isinstance(below, _Leaf):
            if not below.is_on(module):
                return False
            continue
        child = module._modules.get(name)  # pyright: ignore[reportPrivateUsage]
        if child is None or not _all_on(child, below, exchanged):
            return False
        if "forward" in child.__dict__ and (served := doubtful(child, below)):
            exchanged.append((child, served))
    return True


def _shape(module: nn.Module) -> torch.Size | None:
    """A weight's shape; None where it is packed, sharded away or made by something else."""
    weight = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
    return weight.shape if weight is not None and weight.is_floating_point() and weight.numel() else None


# ---- for what writes weights or files -----------------------------------------------------------------


def gone(model: nn.Module, served: Sequence[Served | Saved]) -> list[Served | Saved]:
    """What is not in the model any more; the others have the path that they have now."""
    paths = {id(module): path for path, module in model.named_modules()}
    plain, missing = paths_of(model).plain, list[Served | Saved]()
    for one in served:
        now = paths.get(id(one.module))
        if now is None:
            missing.append(one)
        elif bare_path(plain.get(now, now)) != bare_path(plain.get(one.path, one.path)):
            one.path = now  # a layer before it was dropped
    return missing


def check_there(model: nn.Module, served: Sequence[Served | Saved], doing: str) -> None:
    """Raise if something that was attached is not in the model any more.

    Raises:
        OptxError: names the first, and what to do.
    """
    if missing := gone(model, served):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise OptxError(
            f"{doing}: {missing[0].path!r}{more} is not in the model any more: it was deleted or replaced "
            "since attach. Put it back, or call handle.remove() and attach again."
        )
