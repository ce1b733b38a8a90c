"""What kernels are given of each parameter: the tensors that belong to it, found or made, and looked at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError
from optx._names import is_dtensor, parameter_names
from optx.kernels.step.layout import SPLIT, scale_of
from optx.kernels.step.program import Axis, Program
from optx.kernels.step.tiles import matrix
from optx.step import bits
from optx.step.base_update import BaseRules
from optx.step.bases import init_base_state
from optx.step.checks import check_count, shapes_differ
from optx.step.declared import SLOT_DTYPES
from optx.step.formats import CODED, joined_rest
from optx.step.fusable import Unfusable, why_not_gradient, why_not_matrix, why_not_weight
from optx.step.kept import MASTER, ROUNDINGS, STATE, moments_of
from optx.step.memory import DTYPES, why_not_dense, why_not_plain
from optx.step.moments import scale_key, settle
from optx.step.sharded import here, spread_as, surprise, why_not_spread
from optx.step.slots import KAHAN, Slots
from optx.step.state import REST, is_ours
from optx.step.transform import Group

SLOT_DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in SLOT_DTYPES}


class GroupTensors:
    """The tensors that go with a param group's parameters.

    Args:
        group: the param group.
        program: names roles (one element per weight element) and cells (one number per weight).
        rules: the base's update.
        base: its state is read and, for new parameters, made as torch makes it.
        slots: the transforms' state.
        triton: whether Triton kernels are given them, else Numba's.

    Attributes:
        fresh: parameters whose base state was made since the last update, by id: the names made, and whether
            None was there (a person's doing).
        packed: the keys of packed slots.
        rounding: how bfloat16 weights keep what they lose, as kernels call it; None where they don't.
    """

    def __init__(
        self,
        group: Group,
        program: Program,
        rules: BaseRules,
        base: torch.optim.Optimizer,
        slots: Slots,
        triton: bool,
    ) -> None:
        self._group, self._program, self._rules, self._base = group, program, rules, base
        self._slots, self._triton = slots, triton
        self._base_keys = rules.state
        self.packed = frozenset(f"optx.{name}" for name in program.packed)
        self.fresh: dict[int, dict[str, bool]] = {}
        self.bits: int | None = group.get(STATE)
        self.rounding = ROUNDINGS.get(group.get(MASTER, 0))
        self._moments = moments_of(rules, slots.transforms, group)

    def check_weight(self, p: Tensor, grad: Tensor) -> None:
        """Raise unless kernels can take the weight and its gradient.

        Raises:
            Unfusable: they can't, and torch's operations can.
            OptxError: the gradient does not go with the weight, or has an unknown dtype.
        """
        reason = why_not_weight(p) or why_not_gradient(grad)
        if reason:
            raise Unfusable(reason)
        if self._program.shaped and (reason := why_not_matrix(p)):
            raise Unfusable(reason)
        if grad.dtype not in DTYPES:
            raise OptxError(f"optx: the gradient of {self._name(p)} is {grad.dtype}, which no kernel reads.")
        self._check_fits(p, "its gradient", grad)
        if is_dtensor(p):
            self._check_shard(p, "its shard", p, dense=True)
            self._check_shard(p, "its gradient's shard", grad)

    def _check_shard(self, p: Tensor, what: str, t: Tensor, dense: bool = False) -> None:
        """Raise for memory of a shard that no address leads to: other processes can't know of it."""
        local = here(t)
        lazy = local.is_neg() or local.is_conj() or local._is_zerotensor()  # pyright: ignore
        reason = None if lazy and not dense else why_not_plain(local)
        if reason is None and dense:
            reason = why_not_dense(local)
        if reason:
            raise surprise(f"{what} of {self._name(p)} {reason}")

    def _check_fits(self, p: Tensor, what: str, t: Tensor) -> None:
        """What goes with a weight element by element has its shape and is where it is."""
        if t.shape != p.shape:
            raise ShapeError(shapes_differ(parameter_names(self._base)[id(p)], p, what, t))
        if t.device != p.device:
            raise OptxError(
                f"optx: {self._name(p)} is on {p.device}, {what} is on {t.device}; move it there."
            )

    def role(self, p: Tensor, key: str) -> Tensor:
        """A state tensor with one element per weight element, laid out like the weight."""
        t = self.find(p, key)
        if key in self._moments and (self.bits or getattr(t, "dtype", None) in CODED):
            self._check_tensor(p, key, here(t) if is_dtensor(p) else t)
            t = settle(self._slots.store, p, key, self._moments[key], self.bits)
            if t.dtype in CODED:
                return t
        if is_dtensor(p) and isinstance(t, Tensor) and key not in self.packed:  # pyright: ignore
            t = self._spread_role(p, key, t)
        else:
            self._check_tensor(p, key, t)
        if key in self.packed:
            return self._packed_role(p, key, t)
        self._check_fits(p, _words(key), t)
        if t.dtype not in (DTYPES if key in self._base_keys else SLOT_DTYPE_NAMES):
            raise OptxError(f"optx: {_words(key)} of {self._name(p)} is {t.dtype}, which no kernel reads.")
        _lay_out_like(here(t), here(p))
        return t

    def _spread_role(self, p: Tensor, key: str, t: Tensor) -> Tensor:
        """One that lies over the mesh as its weight does."""
        name = parameter_names(self._base)[id(p)]
        spread = spread_as(t, p, name, _words(key))
        if spread is not t:
            if key in self._base_keys:
                self._base.state[p][key] = spread
            else:
                self._slots.store.put(p, key, spread)
        self._check_shard(p, f"{_words(key)}'s shard", spread)
        return spread

    def _packed_role(self, p: Tensor, key: str, t: Tensor) -> Tensor:
        if not bits.fits(t.shape, p):
            raise ShapeError(shapes_differ(parameter_names(self._base)[id(p)], p, _words(key), t))
        t = self._slots.packed(p, key)
        if t.shape == p.shape:
            _lay_out_like(here(t), here(p))
        return t

    def dtype(self, p: Tensor, name: str, t: Tensor) -> str:
        """What kernels call the dtype of a role."""
        key = self.key(name)
        if key in self._moments and t.dtype in CODED:
            return f"{self._moments[key]}8"
        return bits.form(t, p) if key in self.packed else SLOT_DTYPE_NAMES[t.dtype]

    def rest(self, p: Tensor) -> Tensor:
        """What a weight in two parts lost; of one that is in one part so far, nothing."""
        assert self.rounding is not None
        wanted = getattr(torch, SPLIT[self.rounding])
        make: Any = lambda: torch.zeros_like(p, dtype=wanted, requires_grad=False)  # noqa: E731
        t = self._slots.store.get(p, REST, make)
        if is_dtensor(p):
            t = self._spread_role(p, REST, t)
        self._check_fits(p, _words(REST), t)
        if t.dtype != wanted:  # of 16 bits where it has 8 now, or the other way round
            t.data = joined_rest(t, wanted)
        _lay_out_like(here(t), here(p))
        return t

    def cell(self, p: Tensor, name: str) -> Tensor:
        """A state tensor with one element per weight, in the dtype that kernels are made for."""
        key = self.key(name)
        t: Any = self.find(p, key)
        if type(t) in (int, float) and key in self._base_keys:  # some libraries keep a number at times
            t = self._base.state[p][key] = torch.tensor(float(t), device=p.device)
        self._check_tensor(p, key, t)
        if t.numel() != 1:
            raise ShapeError(
                f"optx: {_words(key)} of {self._name(p)} has shape {tuple(t.shape)}; it must be one number."
            )
        wanted = self._program.cell_dtype(name, SLOT_DTYPE_NAMES[p.dtype])
        if SLOT_DTYPE_NAMES.get(t.dtype) != wanted:
            t.data = t.to(getattr(torch, wanted))  # from a checkpoint of another version, say
        return t

    def vector(self, p: Tensor, name: str, axis: Axis) -> Tensor:
        """A state tensor with one element per row or column, in the dtype that kernels are made for."""
        key = self.key(name)
        t = self.find(p, key)
        self._check_tensor(p, key, t)
        length = matrix(p.shape)[axis == "column"]
        if t.numel() != length:
            raise ShapeError(
                f"optx: {_words(key)} of {self._name(p)} has shape {tuple(t.shape)}; it must have {length} "
                f"elements, one per {axis} of the weight, {tuple(p.shape)}."
            )
        wanted = self._program.cell_dtype(name, SLOT_DTYPE_NAMES[p.dtype])
        if SLOT_DTYPE_NAMES.get(t.dtype) != wanted or not t.is_contiguous():
            t.data = t.to(getattr(torch, wanted)).contiguous()
        return t

    def _check_tensor(self, p: Tensor, key: str, t: Any) -> None:
        if not isinstance(t, Tensor):
            raise OptxError(
                f"optx: {_words(key)} of {self._name(p)} is a {type(t).__name__}; it must be a tensor."
            )
        packed = key in self.packed and is_dtensor(p)
        if reason := why_not_spread(t) if packed and is_dtensor(t) else why_not_plain(t):
            raise Unfusable(f"{_words(key)} of a parameter {reason}")

    def _name(self, p: Tensor) -> str:
        return f"parameter {parameter_names(self._base)[id(p)]!r}"

    def make_missing(self, p: Tensor) -> None:
        """Make what is missing of the base's state."""
        if not self._base_keys:
            return
        state = self._base.state[p]
        made = {name: name in state for name in self._base_keys if state.get(name) is None}
        if made:
            self._check_names(p, state, made)
            self.fresh[id(p)] = made  # first, so that an interrupt leaves nothing behind
            init_base_state(state, p, self._rules, self._group)
        device = p.device if self._triton else torch.device("cpu")
        if self._rules.counts_states:
            count = check_count(state["step"], self._base, p)
            # The kernels count in float32, on the device; torch counts in float64 where that is the default.
            count = torch.as_tensor(count, dtype=torch.float32, device=device)
            state["step"] = count if self._rules.counts_tensors else int(count)
        for name in self._rules.cells:
            if isinstance(state[name], Tensor) and state[name].device != device:
                state[name] = state[name].to(device)

    def _check_names(self, p: Tensor, state: dict[str, Any], missing: Iterable[str]) -> None:
        """Raise where the base keeps what rules do not know, and not what they do."""
        lacking = [name for name in missing if name in self._rules.elements and name not in state]
        other = [
            name
            for name, value in state.items()
            if isinstance(value, Tensor) and value.ndim and name not in self._base_keys and not is_ours(name)
        ]
        if lacking and other:
            raise OptxError(
                f"optx: the state that {type(self._base).__name__} keeps of {self._name(p)} has "
                f"{other[0]!r}, and its rules {lacking[0]!r}, which is not there. They were written for "
                "another version."
            )

    def key(self, name: str) -> str:
        """Where ``state[p]`` has a role or cell."""
        if name in self._base_keys:
            return name
        if name.endswith(scale_of("")):
            return scale_key(self.key(name.removesuffix(scale_of(""))))
        if name == "rest":
            return REST
        return KAHAN if name == "kahan" else f"optx.{name}"

    def find(self, p: Tensor, key: str) -> Tensor:
        """A state tensor, made if it is not there."""
        return self._base.state[p][key] if key in self._base_keys else self._slots.get(p, key)

    def take_back(self, parameters: Iterable[Tensor]) -> None:
        """Take back the state that `make_missing` made."""
        state = self._base.state
        for p in parameters:
            for name, was_none in self.fresh.get(id(p), {}).items():
                if was_none:
                    state[p][name] = None
                else:
                    state[p].pop(name, None)
                self._slots.store.drop(p, [scale_key(name)])
            if p in state and not state[p]:
                del state[p]


def _words(key: str) -> str:
    return f"its state {key!r}"


def _lay_out_like(t: Tensor, p: Tensor) -> None:
    """A state tensor in another memory order (from a checkpoint, say) is laid out like its weight."""
    if not (t.is_contiguous() and p.is_contiguous()) and t.stride() != p.stride():
        t.data = torch.empty_like(p, dtype=t.dtype, requires_grad=False).copy_(t)
