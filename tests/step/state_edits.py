"""What the state machine does to tensors between two steps: to weights, and to the optimizer's state."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from state_draws import BF16, DATA, ENTRIES, F32, SHAPES, VARIETY, edit, edit_at, freed, laid_out, normal
from state_steps import Steps
from state_twin import readable, shares_memory
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor


class TensorEdits(Steps):
    """Edits of weights and of state, in place or by another tensor."""

    # ---- weights -----------------------------------------------------------------------------------

    def _new_data(self, old: Tensor, kind: str, seed: int, dtype: torch.dtype) -> Tensor:
        t = normal(old.shape, seed, old.dtype if old.dtype.is_floating_point else F32)
        if kind == "dtype":
            return t.to(dtype)
        if kind == "shape":
            return normal(SHAPES[seed % len(SHAPES)], seed, t.dtype)
        if kind == "reshaped":
            return t.flatten() if t.ndim > 1 else t[None]
        if kind == "freed":
            return freed(t, 0)
        if kind == "shrunk":
            return freed(t, t.element_size())
        if kind == "two":
            return TwoTensor(t, t.clone() + 1)
        return laid_out(t, kind)

    @edit_at(kind=st.sampled_from(DATA), data=st.data())
    def weight_data(self, seed: int, at: int, kind: str, data: Any) -> None:
        dtype = data.draw(st.sampled_from(VARIETY.casts))
        self._say("weight_data", seed=seed, at=at, kind=kind, dtype=dtype)
        p = self._at(at)
        if isinstance(p.data, TwoTensor) or kind == "two":
            return  # a wrapper subclass can't be swapped in under a plain parameter; see `replaced`
        p.grad = None
        p.data = self._new_data(p.data, kind, seed, dtype)

    @edit_at(how=st.sampled_from(["resize_", "t_", "freed", "set_"]))
    def weight_in_place(self, seed: int, at: int, how: str) -> None:
        self._say("weight_in_place", seed=seed, at=at, how=how)
        self._in_place(self._at(at), seed, how)

    def _in_place(self, t: Any, seed: int, how: str) -> None:
        if isinstance(t.data if isinstance(t, nn.Parameter) else t, TwoTensor) or not readable(t):
            return
        if isinstance(t, nn.Parameter):
            t.grad = None
        with torch.no_grad():
            if how == "resize_" and t.is_contiguous():
                # What `.data` does to a moment counts up no version: of that no sum taken before can know.
                whole = t.data if isinstance(t, nn.Parameter) else t
                if not whole.untyped_storage().resizable():  # it came out of a file
                    return
                whole.resize_(SHAPES[seed % len(SHAPES)]).copy_(
                    normal(SHAPES[seed % len(SHAPES)], seed).abs()
                )
            elif how == "t_" and t.ndim == 2:
                t.data = t.data.t()
            elif how == "freed":
                freed(t.data, 0)
            elif how == "set_":
                t.data.set_(normal(t.shape, seed, t.dtype))

    # ---- state -------------------------------------------------------------------------------------

    @edit_at(key=st.integers(0, 5), kind=st.sampled_from(ENTRIES), data=st.data())
    def state_entry(self, seed: int, at: int, key: int, kind: str, data: Any) -> None:
        dtype = data.draw(st.sampled_from(VARIETY.moments))
        p = self._at(at)
        name = self._key(p, key)
        self._say("state_entry", seed=seed, at=at, key=name, kind=kind, dtype=dtype)
        if name is None:
            return
        if kind == "missing":
            del self.opt.state[p][name]
        else:
            self.opt.state[p][name] = self._entry(p, self.opt.state[p][name], name, kind, seed, dtype)

    def _key(self, p: Any, key: int) -> str | None:
        names = sorted(self.opt.state.get(p, {}), key=str)
        return names[key % len(names)] if names else None

    def _entry(self, p: Any, old: Any, name: str, kind: str, seed: int, dtype: torch.dtype) -> Any:
        if kind == "none":
            return None
        if kind == "number":
            return 3.0
        if kind == "numpy":
            return np.float64(2.0)
        if isinstance(old, TwoTensor) or not isinstance(old, Tensor) or not readable(old):
            return old
        if name == "step":
            return old.to(dtype) if kind == "dtype" else old[None] if kind == "shape" else old.clone()
        if kind == "alias":
            return p.data
        t = normal(old.shape, seed, old.dtype if old.is_floating_point() else F32).abs()
        if kind == "dtype":
            return (t * 5).to(dtype)
        if kind == "shape":
            return normal(SHAPES[seed % len(SHAPES)], seed, t.dtype).abs()
        if kind == "meta":
            return t.to("meta")
        if kind == "fake":
            return FakeTensorMode().from_tensor(t)
        if kind == "freed":
            return freed(t, 0)
        if kind == "two":
            return TwoTensor(t, t.clone())
        return laid_out(t, kind)

    @edit_at(key=st.integers(0, 5), how=st.sampled_from(["resize_", "t_", "freed", "set_", "data"]))
    def state_in_place(self, seed: int, at: int, key: int, how: str) -> None:
        p = self._at(at)
        name = self._key(p, key)
        self._say("state_in_place", seed=seed, at=at, key=name, how=how)
        value = self.opt.state[p][name] if name is not None else None
        if not isinstance(value, Tensor) or name == "step" or not readable(value) or shares_memory(value, p):
            return
        if how == "data" and not isinstance(value, TwoTensor):
            value.data = normal(
                value.shape, seed, BF16 if seed % 2 and len(VARIETY.casts) > 2 else value.dtype
            ).abs()
        else:
            self._in_place(value, seed, how)

    @edit(at=st.integers(0, 7), everything=st.booleans())
    def state_cleared(self, at: int, everything: bool) -> None:
        self._say("state_cleared", at=at, everything=everything)
        if everything:
            self.opt.state.clear()
        elif self._at(at) in self.opt.state:
            del self.opt.state[self._at(at)]

    @edit(data=st.data(), moments=st.booleans())
    def cast(self, data: Any, moments: bool) -> None:
        dtype = data.draw(st.sampled_from(VARIETY.casts))
        self._say("cast", dtype=dtype, moments=moments)
        for p in self.params:
            if isinstance(p.data, TwoTensor) or not readable(p):
                continue
            if not moments:
                p.grad = None
                p.data = p.data.to(dtype)
                continue
            for key, value in list(self.opt.state.get(p, {}).items()):
                if isinstance(value, Tensor) and key.startswith(("exp_avg", "momentum")) and readable(value):
                    self.opt.state[p][key] = value.to(dtype)
