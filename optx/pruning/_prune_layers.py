"""Which layers of a model are pruned, and how each is a matrix of outputs and inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from optx._errors import OptxError, TargetError, warn
from optx._masked_model import without_numbers
from optx._module_paths import paths_of
from optx._names import RESERVED, is_dtensor
from optx.inject._anatomy import stacks_of
from optx.inject._injection import Targets
from optx.inject._quantised import kind_of
from optx.inject._targets import ALL_LINEAR, all_linear, check_each_matches, matcher
from optx.inject._uncalled import reader_of
from optx.inject._weights import is_conv, is_linear, is_transposed
from optx.pruning._calibration_sums import InputSums
from optx.pruning._method import PruneMethod, check_finite

_HEADS = {"lm_head", "head", "heads", "classifier", "score", "qa_outputs", "embed_out"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}  # a few numbers that decide about many


@dataclass(frozen=True, eq=False)
class Layer:
    """A module whose weight is pruned.

    Attributes:
        path: in the bare model.
        module: nn.Linear, transformers' Conv1D, or a convolution.
    """

    path: str
    module: nn.Module

    @property
    def name(self) -> str:
        """Of the weight."""
        return f"{self.path}.weight".removeprefix(".")

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        own: Any = self.module
        return own.weight

    @property
    def groups(self) -> int:
        """Of a grouped convolution; else 1."""
        return int(getattr(self.module, "groups", 1)) if is_conv(self.module) else 1

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as (outputs, inputs); of a convolution, all that its kernel sees."""
        return tensor.t() if is_transposed(self.module) else tensor.flatten(1)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """The way back."""
        turned = matrix.t() if is_transposed(self.module) else matrix
        return turned.reshape(self.weight.shape)

    @property
    def width(self) -> int:
        """Inputs of one output."""
        return self.matrix(self.weight).shape[1]

    def sums(self, method: PruneMethod) -> InputSums:
        """Empty sums of its inputs, of the kind that a method needs."""
        kind: type[InputSums] = method.sums  # pyright: ignore[reportAttributeAccessIssue]
        return kind(self.name, self.groups, self.width)

    def rows(self, x: Tensor, counted: Tensor | None) -> Tensor:
        """What it is given as (tokens, groups, width)."""
        if is_conv(self.module):
            return _unfolded(self.module, x)
        flat = x.reshape(-1, x.shape[-1])
        return (flat if counted is None else flat[counted])[:, None]


def _unfolded(module: Any, x: Tensor) -> Tensor:
    """Each place that the kernel is put to: (batch * places, groups, inputs of one output)."""
    axes = len(module.kernel_size)
    x = x if x.ndim == axes + 2 else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    lone = axes == 1
    x = x[:, :, None] if lone else x
    sizes = [(1, *one) if lone else one for one in (module.kernel_size, module.dilation, module.stride)]
    places = F.unfold(x, sizes[0], dilation=sizes[1], stride=sizes[2])
    return places.unflatten(1, (module.groups, -1)).permute(0, 3, 1, 2).flatten(0, 1)


# ---- which -------------------------------------------------------------------------------------------------


def layers_of(
    model: nn.Module, method: PruneMethod, targets: Targets | None, exclude: Targets | None
) -> list[Layer]:
    """The layers to prune, in the model's order, each checked; arguments are those of `optx.prune`.

    Raises:
        TargetError: nothing is left, or one can't be pruned; names it.
        OptxError: a weight is quantised or not in memory, or has inf or nan.
        ShapeError: the pattern doesn't divide a layer's inputs.
    """
    modules = dict(paths_of(model).modules)
    _check_bare(model, modules)
    every = {path: one for path, one in modules.items() if is_linear(one) or is_conv(one)}
    chosen = _by_default(model, modules, every) if targets is None else _named(model, modules, every, targets)
    if targets is None and not method.needs_inputs:
        _tell_of_attention(modules, chosen)
    if exclude:
        chosen = without(chosen, exclude)
    if method.needs_inputs:
        chosen = _called(model, modules, chosen, named=targets is not None)
    layers = [Layer(path, module) for path, module in chosen.items()]
    for layer in layers:
        _check(layer, method)
    _check_tied(layers, modules)
    return layers


def _check_bare(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Raise if adapters are attached: what a layer computes would not be its weight's doing alone."""
    own = next((path for path, _ in model.named_modules() if RESERVED in path.split(".")), None)
    peft = next((p for p, m in modules.items() if type(m).__module__.startswith("peft.tuners.")), None)
    found = peft if own is None else own
    if found is not None:
        raise OptxError(
            f"prune: this model has an adapter attached ({found!r}), and its weights alone are not what it "
            "computes with; merge it or take it off first."
        )


def _by_default(
    model: nn.Module, modules: Mapping[str, nn.Module], every: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """What is in the blocks of a known family; in other models all but the head."""
    stacks = stacks_of(modules)
    if not stacks:
        heads = heads_of(model, modules)
        left = {path: module for path, module in every.items() if path not in heads}
        _tell_of_stacks(modules)
        return _or_none(left, model, "but its head")
    blocks = tuple(f"{path}." for stack in stacks for path in stack.blocks)
    for path, module in modules.items():
        own = [(n, p) for n, p in module.named_parameters(recurse=False) if p.ndim > 2]
        if own and path.startswith(blocks) and not is_conv(module):
            name, p = own[0]
            raise TargetError(
                f"prune: {path!r} computes with {name!r}, a parameter of shape {tuple(p.shape)} and no "
                "module (experts in one tensor), which is not pruned; pass targets= to say that the rest "
                "is meant, as targets=torch.nn.Linear with exclude= of the head."
            )
    inside = {path: m for path, m in every.items() if path.startswith(blocks)}
    found = {path: m for path, m in inside.items() if path.rpartition(".")[2] not in _ROUTERS}
    return _or_none(found, model, "in its blocks")


def _tell_of_stacks(modules: Mapping[str, nn.Module]) -> None:
    """Matrices that numbered modules compute with by themselves, as experts do that are one tensor."""
    found = [
        (f"{path}.{name}", tuple(p.shape))
        for path, module in modules.items()
        if any(part.isdigit() for part in path.split(".")) and not hasattr(module, "kernel_size")
        for name, p in module.named_parameters(recurse=False)
        if p.ndim > 2 and min(p.shape) > 1
    ]
    if found:
        (name, shape), *rest = found
        warn(
            f"optx.prune: {name!r}, of shape {shape} ({1 + len(rest)} such in all), is the parameter of no "
            "linear layer or convolution; left dense."
        )


def _tell_of_attention(modules: Mapping[str, nn.Module], chosen: Mapping[str, nn.Module]) -> None:
    """torch's own attention has three of its four matrices in one parameter, of no linear layer."""
    owners = (path.rpartition(".")[0] for path in chosen if path)
    dense = [path for path in owners if isinstance(modules[path], nn.MultiheadAttention)]
    if dense:
        warn(
            f"optx.prune: queries, keys and values of {dense[0]!r} ({len(dense)} in all) are a parameter "
            "of a MultiheadAttention and no layer; left dense. A state dict's are pruned: "
            "optx.prune(model.state_dict(), ...)."
        )


def _or_none(found: dict[str, nn.Module], model: nn.Module, where: str) -> dict[str, nn.Module]:
    if not found:
        raise TargetError(
            f"prune: this {type(model).__name__} has no linear layer or convolution {where}; pass targets=, "
            "a regex over module names."
        )
    return found


def heads_of(model: Any, modules: Mapping[str, nn.Module]) -> set[str]:
    """A model's output embeddings, and what has a head's name."""
    said = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    named = {path for path in modules if not _HEADS.isdisjoint(path.split("."))}
    return named | {path for path, module in modules.items() if module is said}


def _named(
    model: nn.Module, modules: Mapping[str, nn.Module], every: Mapping[str, nn.Module], targets: Targets
) -> dict[str, nn.Module]:
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        here, matches = paths_of(model).here, all_linear(model)
        return {path: module for path, module in every.items() if matches(here[path], module)}
    check_each_matches(targets, list(modules.items()), "prune: targets")
    matches = matcher(targets)
    found = {path: module for path, module in every.items() if matches(path, module)}
    if not found:
        kinds = sorted({type(m).__name__ for p, m in modules.items() if p and matches(p, m)})
        what = f"matches {', '.join(kinds)} only" if kinds else "matches no module"
        some = ", ".join(map(repr, list(every)[:3]))
        raise TargetError(
            f"prune: targets={targets!r} {what}; pruned are linear layers and convolutions, here {some} "
            f"({len(every)} in all)."
        )
    return found


def without(chosen: Mapping[str, nn.Module], exclude: Targets) -> dict[str, nn.Module]:
    """What is left of modules by name.

    Raises:
        TargetError: that is nothing, or all: what ``exclude`` was meant for would be pruned in silence.
    """
    check_each_matches(exclude, list(chosen.items()), "prune: exclude")
    matches = matcher(exclude)
    left = {path: module for path, module in chosen.items() if not matches(path, module)}
    if not left or len(left) == len(chosen):
        what = "leaves nothing to prune of" if not left else "leaves nothing out of"
        some = ", ".join(map(repr, list(chosen)[:3]))
        raise TargetError(f"prune: exclude={exclude!r} {what} {some} ({len(chosen)} in all).")
    return left


def _called(
    model: nn.Module, modules: Mapping[str, nn.Module], chosen: Mapping[str, nn.Module], *, named: bool
) -> dict[str, nn.Module]:
    """Without layers whose weight is used and that are not called: what they are given can't be seen."""
    here = paths_of(model).here
    readers: dict[str, str] = {}
    for path in chosen:
        parent = modules[path.rpartition(".")[0]] if path else None
        reader = (
            "MultiheadAttention"
            if isinstance(parent, nn.MultiheadAttention)
            else reader_of(model, here[path])
        )
        if reader is not None:
            readers[path] = reader
    if not readers:
        return dict(chosen)
    path, reader = next(iter(readers.items()))
    why = f"{path!r} ({len(readers)} such in all) is in a {reader}, which uses its weight without calling it"
    if named or len(readers) == len(chosen):
        raise TargetError(
            f"prune: {why}, so that what it is given can't be seen; exclude it, or use Magnitude."
        )
    warn(f"optx.prune: {why}; left dense.")
    return {path: module for path, module in chosen.items() if path not in readers}


# ---- whether it can be pruned ------------------------------------------------------------------------------


def _check(layer: Layer, method: PruneMethod) -> None:
    module: Any = layer.module
    if parametrize.is_parametrized(module, "weight"):
        raise TargetError(
            f"prune: {layer.name!r} is made by a parametrization at every call; remove it first "
            "(torch.nn.utils.parametrize.remove_parametrizations)."
        )
    kind = kind_of(module)
    weight: Any = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and not kind and module._parameters.get("weight") is not weight:
        raise TargetError(
            f"prune: {layer.name!r} is no parameter but made of others at every call, as by weight_norm, "
            "spectral_norm or prune of torch.nn.utils; undo that first (remove_weight_norm, "
            "remove_spectral_norm, prune.remove)."
        )
    why = f"is {kind}; prune before it is quantised." if kind else without_numbers(weight)
    if not why and is_dtensor(weight):
        why = "is sharded; prune before the model is (Masks.apply_ serves a sharded model)."
    if why:
        raise OptxError(f"prune: {layer.name!r} {why}")
    if method.needs_inputs and isinstance(module, nn.Conv3d):
        raise TargetError(
            f"prune: {layer.path!r} is a Conv3d, whose inputs {type(method).__name__} can't take apart; "
            "exclude it, or use Magnitude."
        )
    method.check_shape(layer.name, layer.width)
    check_finite(layer.name, weight)


def _check_tied(layers: Sequence[Layer], modules: Mapping[str, nn.Module]) -> None:
    """Raise if a weight is another module's too: pruning it for one would prune the other."""
    chosen = {layer.path for layer in layers}
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        weight = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    for layer in layers:
        others = [path for path in owners.get(id(layer.weight), []) if path != layer.path]
        if others:
            also = " as well" if others[0] in chosen else ""
            raise TargetError(
                f"prune: the weight of {layer.path!r} is that of {others[0]!r} too (tied), and what is "
                f"pruned for one is pruned for the other{also}; leave it out with exclude=, or untie them."
            )


def numbers_of(layer: Layer) -> Tensor:
    """The weight as a matrix in float32, or wider where it is."""
    weight = layer.weight.detach()
    return layer.matrix(weight).to(torch.promote_types(weight.dtype, torch.float32))
