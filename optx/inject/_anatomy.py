"""What a model is made of: its stacks of blocks, the parts of each, and whether anything was overlooked.

A default serves all of what it claims or nothing: every block of every stack has each part, every attention
module is one of those that were found, and what is no module (experts in one tensor) is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from optx._errors import TargetError, warn
from optx.inject._families import FAMILIES, PROJECTIONS, ROLES, WORDS, Family
from optx.inject._weights import is_conv, is_linear

Modules = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Stack:
    """Blocks that follow one another, all of one family.

    Attributes:
        path: of the list that they are in.
        blocks: each block's modules by their path in it, by the block's path.
    """

    family: Family
    path: str
    blocks: Mapping[str, Modules]


def stacks_of(modules: Modules) -> list[Stack]:
    """The stacks of known families in a model, in its order; a model of two towers has two."""
    found: dict[str, Stack] = {}
    for key, blocks in _numbered(modules).items():
        inner = {path for block in blocks.values() for path in block}
        path = next(iter(blocks))
        known = [family for family in FAMILIES if re.fullmatch(family.block, path)]
        scores = [family.score(inner) for family in known]
        if any(scores):
            family = known[scores.index(max(scores))]
            found[key] = Stack(family, path.rpartition(".")[0], blocks)
    paths = [f"{path}." for stack in found.values() for path in stack.blocks]
    return [stack for key, stack in found.items() if not key.startswith(tuple(paths))]


def _numbered(modules: Modules) -> dict[str, dict[str, dict[str, nn.Module]]]:
    """Modules whose names end with a number, by what they have in common, with what is in each."""
    patterns = [re.compile(pattern) for pattern in {family.block for family in FAMILIES}]
    blocks: dict[str, dict[str, nn.Module]] = {}
    groups: dict[str, dict[str, dict[str, nn.Module]]] = {}
    for path, module in modules.items():
        if path and path[-1].isdigit() and any(pattern.fullmatch(path) for pattern in patterns):
            blocks[path] = {"": module}
            groups.setdefault(path.rstrip("0123456789"), {})[path] = blocks[path]
    for path, module in modules.items():
        names = path.split(".")
        for depth in range(1, len(names)):
            block = blocks.get(".".join(names[:depth]))
            if block is not None:
                block[".".join(names[depth:])] = module
    return groups


def family_of(modules: Modules) -> Family | None:
    """The family of the largest stack, the first among equals."""
    stacks = stacks_of(modules)
    return max(stacks, key=lambda stack: len(stack.blocks)).family if stacks else None


# ---- the modules of a role -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What is looked for.

    Attributes:
        method: the injection's name, for messages.
        serves: the modules that it can serve, in words.
        kind: the model's class.
    """

    method: str
    serves: str
    kind: str
    role: str

    @property
    def way_out(self) -> str:
        """What to do instead."""
        of_linears = self.role in ("query_value", "linears")
        every = '"all-linear" (each but the output head), or ' if of_linears else ""
        return f"Pass targets=, {every}a regex over module names of {self.serves}."


def of_role(modules: Modules, wanted: Wanted) -> set[str]:
    """The paths of all modules of a role.

    Raises:
        TargetError: the model has no known structure, a block lacks a part, or something is left over.
    """
    stacks = stacks_of(modules)
    _check_families(stacks, wanted, modules)
    paths: set[str] = set()
    for stack in stacks:
        for part in ROLES[wanted.role]:
            paths |= _in_stack(stack, part, wanted)
    _check_rest(stacks, wanted, modules)
    return paths


def _check_families(stacks: Sequence[Stack], wanted: Wanted, modules: Modules) -> None:
    lacking = next((stack for stack in stacks if not stack.family.has(wanted.role)), None)
    if stacks and lacking is None:
        return
    if lacking is not None and (why := lacking.family.lack(wanted.role)):
        raise TargetError(
            f"attach: {wanted.method} has no default targets in {lacking.path!r} of this {wanted.kind}, a "
            f"{lacking.family.name} model: {why}. {wanted.way_out}"
        )
    known = ", ".join(family.name for family in FAMILIES if family.has(wanted.role))
    if lacking is not None:
        what = (
            f"is a {lacking.family.name} model" if len(stacks) == 1 else f"has a {lacking.family.name} in it"
        )
    else:
        found = _listed(attentions_of(modules))
        what = f"is none of them{f' (it has attention in {found}, in no known place)' if found else ''}"
    raise TargetError(
        f"attach: {wanted.method} has default targets for {known}, and {wanted.kind} {what}. {wanted.way_out}"
    )


def _in_stack(stack: Stack, part: str, wanted: Wanted) -> set[str]:
    """The paths of a part in all blocks of a stack, each of which has it."""
    if part in PROJECTIONS:
        owners = {
            f"{block}.{path}": _below(inner, path)
            for block, inner in stack.blocks.items()
            for path in inner
            if re.fullmatch(stack.family.attention, path)
        }
    else:
        owners = {block: dict(inner) for block, inner in stack.blocks.items()}
    found = {owner: _matching(stack.family, part, owner, inner, wanted) for owner, inner in owners.items()}
    without = [owner for owner, paths in found.items() if not paths]
    if part in PROJECTIONS:  # and blocks that have no attention that is known
        without += [block for block in stack.blocks if not any(o.startswith(f"{block}.") for o in owners)]
    if without and part not in ("linears", "convolutions"):
        _refuse_part(stack, part, len(found), without, wanted)
    return {f"{owner}.{path}" if path else owner for owner, paths in found.items() for path in paths}


def _matching(family: Family, part: str, owner: str, inner: Modules, wanted: Wanted) -> list[str]:
    """The paths of a part within one block or attention module."""
    if part == "block":
        return [""]
    if part in ("linears", "ffn_inner"):
        _check_no_tensor_of_experts(owner, inner, wanted)
    if part == "linears":
        return _linears(owner, inner, wanted)
    if part == "convolutions":
        return [path for path, module in inner.items() if is_conv(module)]
    matches = [path for path in inner if re.fullmatch(family.part(part), path)]
    if part == "ffn_out" and not matches and family.ffn:  # a mixture of experts has one output, its own
        matches = [path for path in inner if re.fullmatch(family.ffn, path) and has_experts(inner[path])]
    if part == "attention_out":
        cores = [path for path in inner if re.fullmatch(family.attention, path)]
        return matches if len(matches) == len(cores) else []
    return matches


def _refuse_part(stack: Stack, part: str, owners: int, without: Sequence[str], wanted: Wanted) -> None:
    blocks = max(len(stack.blocks), owners)
    first = without[0]
    inner = stack.blocks.get(first) or next(
        _below(block, first[len(path) + 1 :])
        for path, block in stack.blocks.items()
        if first.startswith(f"{path}.")
    )
    has = ", ".join(dict.fromkeys(path.split(".")[0] for path in inner if path)) or "no modules"
    all_of_it = ", ".join(WORDS[one] for one in ROLES[wanted.role])
    raise TargetError(
        f"attach: {wanted.method} by default serves {all_of_it}; it found {WORDS[part]} in "
        f"{blocks - len(without)} of {blocks} places in {stack.path!r} of this {wanted.kind} (read as "
        f"{stack.family.name}), not in {_listed(without)}, which has {has}. {wanted.way_out}"
    )


def _linears(owner: str, inner: Modules, wanted: Wanted) -> list[str]:
    """All linear modules of a block that are called."""
    inside = tuple(f"{path}." for path, one in inner.items() if isinstance(one, nn.MultiheadAttention))
    linear = [path for path, module in inner.items() if path and is_linear(module)]
    left = [path for path in linear if path.startswith(inside)]
    if left:
        warn(
            f"optx.attach: {wanted.method} leaves out {owner}.{left[0]}, inside an nn.MultiheadAttention, "
            "which uses its weights without calling a module."
        )
    return [path for path in linear if path not in left]


# ---- what would be overlooked --------------------------------------------------------------------------


def _check_rest(stacks: Sequence[Stack], wanted: Wanted, modules: Modules) -> None:
    """Raise if there is attention that is none of what was found."""
    if ROLES[wanted.role] == ("convolutions",):
        return
    known = {
        f"{block}.{path}"
        for stack in stacks
        for block, inner in stack.blocks.items()
        for path in inner
        if re.fullmatch(stack.family.attention or stack.family.mixer, path)
    }
    for path, module in attentions_of(modules).items():
        covered = any(_within(path, one) or _within(one, path) for one in known)
        if covered or (wanted.role == "block" and not re.search(r"(^|\.)\d+(\.|$)", path)):
            continue
        raise TargetError(
            f"attach: {wanted.method} found all it serves by default in {_stacks(stacks)}, but this "
            f"{wanted.kind} has attention in {path!r} too, a {type(module).__name__} in no place that optx "
            f"knows. {wanted.way_out}"
        )


def _stacks(stacks: Sequence[Stack]) -> str:
    return ", ".join(f"{stack.path!r} ({len(stack.blocks)} blocks, {stack.family.name})" for stack in stacks)


def _check_no_tensor_of_experts(owner: str, inner: Modules, wanted: Wanted) -> None:
    """Raise if a block computes with experts that are no modules."""
    for path, module in inner.items():
        if is_conv(module):
            continue
        for name, p in module.named_parameters(recurse=False):
            if p.ndim > 2:
                raise TargetError(
                    f"attach: {wanted.method} serves modules, and {owner}.{path} of this {wanted.kind} "
                    f"computes with {name!r}, a parameter of shape {tuple(p.shape)} and no module, so a part "
                    f"of what it serves by default would be left out. {wanted.way_out}"
                )


_NAMES = (
    {"q_proj", "k_proj", "v_proj"},
    {"query", "key", "value"},
    {"q_lin", "k_lin", "v_lin"},
    {"q", "k", "v"},
    {"query_proj", "key_proj", "value_proj"},
    {"to_q", "to_k", "to_v"},
    {"wq", "wk", "wv"},
)
_FUSED = {"qkv", "qkv_proj", "query_key_value", "Wqkv", "c_attn", "to_qkv", "W_pack", "kv_proj", "to_kv"}


def attentions_of(modules: Modules) -> dict[str, nn.Module]:
    """The innermost modules that look like attention, by class name or by what they consist of."""
    alike = {path: module for path, module in modules.items() if _is_attention(module)}
    outer = {path[:i] for path in alike for i, letter in enumerate(path) if letter == "."}
    return {path: module for path, module in alike.items() if path not in outer}


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    own = {name for name, child in module.named_children() if is_linear(child)}
    if own & _FUSED or any(len(own & names) > 1 for names in _NAMES):
        return True
    named = re.search(r"attention|attn", type(module).__name__, re.IGNORECASE)
    computes = any(is_linear(one) for one in module.modules()) or any(
        p.ndim > 2 for p in module.parameters(recurse=False)
    )
    return named is not None and computes and not is_linear(module)


def has_experts(module: nn.Module) -> bool:
    """Whether a module is a mixture of experts."""
    return any(name.rpartition(".")[2] == "experts" for name, _ in module.named_modules())


def _below(modules: Modules, path: str) -> dict[str, nn.Module]:
    return {name[len(path) + 1 :]: one for name, one in modules.items() if name.startswith(f"{path}.")}


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _listed(paths: Iterable[str]) -> str:
    every = list(paths)
    return ", ".join(map(repr, every[:3])) + (f" and {len(every) - 3} more" if len(every) > 3 else "")
