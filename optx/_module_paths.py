"""Module paths without what torch.compile, DDP and FSDP put into them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from optx._names import RESERVED

# What these classes call the module they wrap.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}

# Those that no one else would call a module by; "module" may be the user's own.
_INSIDE = re.compile(r"(?:^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


def bare_path(path: str) -> str:
    """A path as patterns over module names mean it, where the model is not at hand."""
    return _INSIDE.sub("", path).removeprefix(".")


@dataclass(frozen=True)
class Paths:
    """A model's modules by the path that they have in the bare model, and back.

    Attributes:
        here: the path in this model, by the path in the bare one.
        plain: the other way round.
        modules: by the path in the bare model, in the model's order.
    """

    here: Mapping[str, str]
    plain: Mapping[str, str]
    modules: Mapping[str, nn.Module]

    def find(self, path: str) -> str | None:
        """The path here of a module of the bare model, or of a parameter of one; None if it has neither."""
        if path in self.here:
            return self.here[path]
        owner, _, name = path.rpartition(".")
        known = owner in self.modules and name in self.modules[owner]._parameters  # pyright: ignore[reportPrivateUsage]
        return f"{self.here[owner]}.{name}" if known else None


def paths_of(model: nn.Module) -> Paths:
    """Every module but those that optx added."""
    plain = {"": ""}
    found: dict[str, nn.Module] = {"": model}
    all_modules = dict(model.named_modules())
    for path, module in all_modules.items():
        parent, _, leaf = path.rpartition(".")
        if not path or RESERVED in path.split("."):
            continue
        wraps = leaf == _WRAPPERS.get(type(all_modules[parent]).__name__)
        plain[path] = plain[parent] if wraps else f"{plain[parent]}.{leaf}".removeprefix(".")
        found[plain[path]] = module  # of a wrapper and what it wraps, the inner one
    return Paths({short: path for path, short in plain.items()}, plain, found)
