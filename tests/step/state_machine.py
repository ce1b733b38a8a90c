"""A hypothesis state machine that edits what a wrapped optimizer is pointed at, and steps.

Run by `test_state_machine.py` in a process of its own, since a kernel that is pointed at the wrong memory
ends it; for a long run::

    python tests/step/state_machine.py --examples 1000 --steps 30 --seed 7 --variety full

Every rule is written to ``--log`` before it acts: the last lines of a crashed run tell what it died of.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import io
import json
import os
import pickle
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from state_twin import (
    ANCHOR,
    Outcome,
    Snapshot,
    agree,
    coarsest,
    numbers,
    readable,
    refusal,
    shares_memory,
    twin_step,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import optx
from optx.kernels.step.emit_cpu import _compiled as compiled  # pyright: ignore[reportPrivateUsage]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = [(3, 4), (5,), (), (0,), (2, 3, 2, 2), (33, 3)]

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw amsgrad": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "adam": (torch.optim.Adam, {"lr": 0.02, "betas": (0.8, 0.95)}),
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
}


def _perp(_: Any) -> list[optx.Transform]:
    return [optx.PerpGrad()]


def _adamr(anchors: Any) -> list[optx.Transform]:
    return [optx.AdamR(anchor=anchors)]


def _both(anchors: Any) -> list[optx.Transform]:
    return [optx.PerpGrad(), optx.AdamR(anchor=anchors)]


CHAINS: dict[str, Callable[[Any], list[optx.Transform]]] = {
    "none": lambda _: [],
    "perp": _perp,
    "adamr": _adamr,
    "both": _both,
}


class Variety:
    """What is drawn from. Every new kernel takes seconds to compile, so that the tests' run has few."""

    def __init__(self, full: bool) -> None:
        self.bases = list(BASES) if full else ["adamw", "sgd"]
        self.chains = list(CHAINS) if full else ["none", "both"]
        self.dtypes = [F32, F32, F32, BF16, F64, F16] if full else [F32]
        self.casts = [F32, BF16, F64, F16] if full else [F32, BF16]
        self.moments = [F32, BF16, F64, F16, torch.int64] if full else [F32, torch.int64]
        self.gradients = [F32, BF16, F64, F16] if full else [F32]
        self.options = OPTIONS if full else [o for o in OPTIONS if o[0] not in _STRUCTURAL]


_STRUCTURAL = ("maximize", "amsgrad", "nesterov", "momentum", "weight_decay", "dampening")
OPTIONS: list[tuple[str, Any]] = [
    ("lr", 0.03),
    ("lr", np.float64(0.02)),
    ("lr", np.array(0.01)),
    ("lr", torch.tensor(0.02)),
    ("lr", torch.tensor(0.02, dtype=F64)),
    ("lr", 0),
    ("lr", "0.1"),
    ("lr", None),
    ("lr", torch.ones(2)),
    ("weight_decay", 0.0),
    ("weight_decay", 0.05),
    ("weight_decay", np.float32(0.05)),
    ("maximize", True),
    ("maximize", False),
    ("amsgrad", True),
    ("amsgrad", False),
    ("nesterov", True),
    ("nesterov", False),
    ("momentum", 0),
    ("momentum", 0.8),
    ("dampening", 0.1),
    ("betas", (0.7, 0.9)),
    ("betas", (np.float64(0.9), 0.99)),
    ("eps", 1e-6),
    ("perp_grad", False),
    ("perp_grad", True),
    ("adamr", False),
    ("adamr", True),
    ("adamr_weight", 0.1),
    ("adamr_weight", -1.0),
    ("perp_grad_rescale", 0.5),
]

GRADIENTS = [
    "plain",
    "plain",
    "plain",
    "none",
    "transposed",
    "gaps",
    "expanded",
    "neg",
    "zero",
    "dtype",
    "nan",
]
DATA = [
    "same", "dtype", "shape", "gaps", "transposed", "reshaped", "freed", "shrunk", "odd address",
    "expanded", "two",
]  # fmt: skip
ENTRIES = [
    "same", "dtype", "shape", "gaps", "transposed", "expanded", "alias", "meta", "fake", "freed", "number",
    "none", "missing", "numpy", "two",
]  # fmt: skip


class Log:
    """Writes each rule before it acts, past every buffer, and counts."""

    def __init__(self, path: str | None) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if path else None
        self.counts: Counter[str] = Counter()
        self.examples = 0

    def write(self, line: str) -> None:
        if self._file is not None:
            os.write(self._file, f"{line}\n".encode())

    def count(self, *what: str) -> None:
        self.counts.update(what)


LOG = Log(None)
VARIETY = Variety(False)


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype = F32) -> Tensor:
    """The same numbers for the same seed."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=g, dtype=F64).to(dtype)


def laid_out(t: Tensor, kind: str) -> Tensor:
    """The same elements, lying otherwise."""
    if kind == "transposed" and t.ndim == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if kind == "transposed" and t.ndim > 1:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "gaps" and t.ndim:
        return torch.stack([t, t], -1).flatten(-2)[..., ::2]
    if kind == "expanded" and t.ndim and t.shape[0]:
        return t[:1].expand(t.shape)
    if kind == "odd address" and t.numel():
        whole = torch.empty(t.numel() + 1, dtype=t.dtype)
        whole[1:] = t.flatten()
        return whole[1:].view(t.shape)
    return t


def freed(t: Tensor, size: int) -> Tensor:
    """A tensor whose storage has that many bytes now."""
    if t.untyped_storage().resizable():
        t.untyped_storage().resize_(size)
    return t


# A step after an edit: seed and kinds of its gradients, their other dtype, and whether a closure makes them.
STEP = st.tuples(
    st.integers(0, 999),
    st.lists(st.sampled_from(GRADIENTS), min_size=1, max_size=4),
    st.integers(0, 3),
    st.booleans(),
)


def edit(**strategies: Any) -> Any:
    """A rule that edits, and mostly steps then: of so many rules hypothesis would seldom choose the step."""

    def decorate(function: Callable[..., None]) -> Any:
        def act(self: Any, then: Any, **arguments: Any) -> None:
            function(self, **arguments)
            if then is not None:
                self.take_step(*then)

        act.__name__, act.__doc__ = function.__name__, function.__doc__
        return rule(then=st.one_of(st.none(), STEP, STEP), **strategies)(act)

    return decorate


def edit_at(**more: Any) -> Any:
    """With the numbers that most take: contents, and which parameter."""
    return edit(seed=st.integers(0, 999), at=st.integers(0, 7), **more)


class Edits(RuleBasedStateMachine):
    """The optimizer, and what may be done to it between two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.opt: Any = None
        self.saved: list[Any] = []
        self.scale = 1.0
        self.hook: Any = None

    # ---- helpers -----------------------------------------------------------------------------------

    def _say(self, name: str, **arguments: Any) -> None:
        LOG.write(f"{name} {arguments}")
        LOG.count("rules", f"rule: {name}")

    @property
    def params(self) -> list[Any]:
        return [p for group in self.opt.param_groups for p in group["params"]]

    def _at(self, at: int) -> Any:
        return self.params[at % len(self.params)]

    def _refused(self, act: Callable[[], Any], what: str, may: tuple[type[Exception], ...] = ()) -> bool:
        """Do something that optx may refuse, changing nothing then; whether it did."""
        before = Snapshot(self.opt)
        try:
            act()
        except (optx.OptxError, *may) as error:
            reason = str(error)
        else:
            return False
        changes = before.changes()
        assert not changes, f"{what} was refused ({reason}), and changed {changes}"
        LOG.count(f"refused: {what}")
        LOG.write(f"  {what} refused: {reason}")
        return True

    # ---- start -------------------------------------------------------------------------------------

    @initialize(data=st.data())
    def start(self, data: Any) -> None:
        v = VARIETY
        base, chain = data.draw(st.sampled_from(v.bases)), data.draw(st.sampled_from(v.chains))
        if base == "sgd":
            chain = {"adamr": "perp", "both": "perp"}.get(chain, chain)
        fused = data.draw(st.sampled_from(["auto", "auto", False])) if chain == "none" else "auto"
        dtype = data.draw(st.sampled_from(v.dtypes))
        shapes = data.draw(st.lists(st.sampled_from(SHAPES), min_size=2, max_size=4))
        split = data.draw(st.booleans())
        LOG.examples += 1
        self._say("start", base=base, chain=chain, fused=fused, dtype=dtype, shapes=shapes, split=split)
        params = [nn.Parameter(normal(s, i, dtype)) for i, s in enumerate(shapes)]
        groups = [{"params": params[:1]}, {"params": params[1:]}] if split else [{"params": params}]
        self.make, self.numbers = BASES[base]
        self.chain, self.fused = CHAINS[chain], fused
        self.opt = self._wrap(self.make(groups, **self.numbers))

    def _wrap(self, base: Any) -> Any:
        return optx.wrap(base, *self.chain(None), fused=self.fused, rounding="nearest")

    # ---- steps -------------------------------------------------------------------------------------

    def _gradient(self, p: Any, kind: str, seed: int, dtype: torch.dtype) -> Tensor | None:
        if isinstance(p, TwoTensor) or isinstance(p.data, TwoTensor):
            return None if kind == "none" else TwoTensor(normal(p.shape, seed), normal(p.shape, seed + 1))
        if kind == "none":
            return None
        if kind == "zero":
            return torch._efficientzerotensor(tuple(p.shape), dtype=p.dtype)  # pyright: ignore
        g = normal(p.shape, seed, dtype if kind == "dtype" else p.dtype)
        if kind == "nan" and g.numel():
            g.view(-1)[0] = float("nan")
        return torch._neg_view(g) if kind == "neg" else laid_out(g, kind)  # pyright: ignore

    def _give(self, kinds: Sequence[str], seed: int, dtype: torch.dtype) -> list[Tensor | None]:
        grads: list[Tensor | None] = []
        for i, p in enumerate(self.params):
            kind = kinds[i % len(kinds)]
            if kind == "nan" and not self.opt.skip_nonfinite:
                kind = "plain"
            p.grad = None
            g = self._gradient(p, kind, seed + i, dtype)
            if g is not None and g.dtype != p.dtype:
                p.grad_dtype = g.dtype
            elif g is not None and p.is_leaf:
                p.grad_dtype = p.dtype
            p.grad = g
            grads.append(g)
        return grads

    @rule(then=STEP, again=st.integers(0, 1))
    def step(self, then: Any, again: int) -> None:
        for _ in range(1 + again):
            self.take_step(*then)

    def take_step(self, seed: int, kinds: list[str], number: int, closure: bool) -> None:
        """Give gradients, step the optimizer and its twins, and compare."""
        dtype = VARIETY.gradients[number % len(VARIETY.gradients)]
        self._say("step", seed=seed, kinds=kinds, closure=closure, dtype=dtype)
        try:
            self.opt.follow_parameters()  # as the step does: the twin is made of what it finds then
        except optx.OptxError as error:
            LOG.count("refused: replaced parameters")
            LOG.write(f"  {error}")
            self._heal()
            return
        grads = self._give(kinds, seed, dtype)
        params = self.params
        sound = all(
            readable(t)
            for p in params
            for t in (p, *self.opt.state.get(p, {}).values())
            if isinstance(t, Tensor) and p.grad is not None and not _no_memory_by_kind(t)
        )
        twins: list[Outcome] = []
        scale = 1.0 if closure else self.scale  # a hook runs before the closure, which makes gradients anew
        if sound:
            twins = [twin_step(self.opt, self.make, self.chain, scale, wide) for wide in (False, True)]
        before = Snapshot(self.opt)
        start = [numbers(p) if readable(p) else p.detach() for p in params]
        aliased = any(shares_memory(v, p) for p in params for v in self.opt.state.get(p, {}).values())
        told = [p.grad is not None and not bool(torch.isfinite(numbers(p.grad)).all()) for p in params]

        def evaluate() -> float:
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            return 1.0

        try:
            self.opt.step(evaluate) if closure else self.opt.step()
        except Exception as error:
            self._explain(error, self._changed(before), twins, sound)
            self._heal()
            return
        LOG.count("steps taken")
        LOG.write("  stepped")
        if self.opt.skip_nonfinite and any(told):
            assert self.opt.skipped_last, "a gradient is nan, and the step was not skipped"
            changed = self._changed(before)
            assert not changed, f"a skipped step changed {changed}"
            LOG.count("steps skipped")
            return
        assert not self.opt.skipped_last, "a step with finite gradients was skipped"
        assert sound, "stepped on tensors without memory"
        self._compare(twins, start, aliased)
        self._heal(only_weights=True)

    def _changed(self, before: Snapshot) -> list[str]:
        """What changed, besides gradients that the hook scaled: those are a person's own doing.

        A sum that was wrong since a person changed what it is the sum of may be right now.
        """
        changes = [c for c in before.changes() if not (self.hook and c.startswith("gradient"))]
        return [c for c in changes if not (c.endswith("v_sum") and self._is_sum(c.split()[1]))]

    def _is_sum(self, place: str) -> bool:
        group, number = map(int, place.split("."))
        state = self.opt.state[self.opt.param_groups[group]["params"][number]]
        if "optx.adamr.v_sum" not in state or not isinstance(state.get("exp_avg_sq"), Tensor):
            return True  # it will be made anew
        total = float(numbers(state["exp_avg_sq"]).sum())
        return abs(float(state["optx.adamr.v_sum"]) - total) <= 1e-5 * abs(total)

    def _explain(self, error: Exception, changes: list[str], twins: list[Outcome], sound: bool) -> None:
        """An error is optx's sentence about something that torch does not serve either, or an allowance."""
        LOG.write(f"  {type(error).__name__}: {error}")
        assert not changes, f"the step raised ({error}) and changed {changes}"
        if isinstance(error, optx.OptxError):
            text = str(error)
            assert "param" in text, f"the sentence names no parameter: {text}"
        if not sound:
            assert isinstance(error, optx.OptxError), f"not a sentence of optx's: {error!r}"
            LOG.count("refused, torch crashes: no memory")
            return
        native, _ = twins
        allowed = refusal(error)
        if native.error is not None and (allowed is not None or type(native.error) is type(error)):
            LOG.count(f"refused as by torch: {allowed.name if allowed else type(error).__name__}")
            return
        assert allowed is not None, f"torch steps, optx raised {type(error).__name__}: {error}"
        LOG.count(f"refused, torch steps: {allowed.name}")

    def _compare(self, twins: list[Outcome], start: list[Tensor], aliased: bool) -> None:
        native, wide = twins
        if native.error is not None:
            LOG.count(f"served, torch raises: {type(native.error).__name__}: {_brief(native.error)}")
            LOG.write(f"  torch: {native.error!r}")
        if native.error is not None and wide.error is not None:
            raise AssertionError(
                f"torch raises in every dtype ({wide.error!r}), optx stepped"
            ) from wide.error
        ways: list[str] = []
        states = (self.opt.state.get(p, {}) for p in self.params)
        everything = [v for state in states for k, v in state.items() if k != "step"]
        everything += [t for p in self.params for t in (p, p.grad)]
        for i, p in enumerate(self.params):
            state = self.opt.state.get(p, {})
            tensors = [p, p.grad, *(v for k, v in state.items() if k != "step")]
            dtype = coarsest(tensors)
            if dtype == F64 and self.opt.totals and coarsest(everything) != F64:
                dtype = F32  # AdamR's r is taken over all, and moments of others are computed in float32
            if dtype == F64 and any(
                isinstance(v, np.float32) for g in self.opt.param_groups for v in g.values()
            ):
                dtype = F32  # in torch's loop NumPy computes what is made of it in float32
            if aliased and shares_memory(p, p):
                ways.append("aliased")
                continue
            if p.grad is None and not readable(p):
                continue
            pairs = [("weight", p, [t.weights[i] if t.error is None else None for t in twins], start[i])]
            for key, value in state.items():
                if (
                    not key.startswith("optx.")
                    and isinstance(value, Tensor)
                    and (p.grad is not None or readable(value))
                ):
                    wanted = [t.states[i].get(key) if t.error is None else None for t in twins]
                    pairs.append((key, value, wanted, value))
            for what, got, wanted, before in pairs:
                fits = [w is not None and agree(got, w, before, dtype) for w in wanted]
                assert any(fits), (
                    f"{what} of parameter {i} {tuple(p.shape)} {p.dtype} agrees with neither twin:\n"
                    f"optx {_show(got)}\ntorch {_show(wanted[0])}\nin float64 {_show(wanted[1])}"
                )
                ways.append("torch" if fits[0] else "torch in float64 only")
        for way in set(ways):
            LOG.count(f"agreed: {way}")

    def _heal(self, only_weights: bool = False) -> None:
        """What a person does after the sentence: give the weight memory, and the state its shape."""
        for i, p in enumerate(self.params):
            if isinstance(p.data, TwoTensor):
                if not only_weights:
                    self.opt.state.pop(p, None)
                    self._put(p, nn.Parameter(p.data.a))
                continue
            bad = (
                not readable(p) or not torch.isfinite(numbers(p)).all() or float(numbers(p).abs().sum()) > 1e5
            )
            if bad:
                p.grad = None
                p.data = normal(p.shape, i, p.dtype)
            if bad or not only_weights:
                p.grad = None
                self.opt.state.pop(p, None)
                anchor = self._anchor(p)
                if anchor is not None and (
                    not isinstance(anchor, Tensor) or anchor.shape != p.shape or not readable(anchor)
                ):
                    self.opt.state[p][ANCHOR] = p.detach().clone()
        if not only_weights:
            for group in self.opt.param_groups:
                group.update({k: v for k, v in self.numbers.items() if k in group})

    def _put(self, old: Any, new: Any) -> None:
        """A parameter object in the place of another."""
        for group in self.opt.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]

    def _anchor(self, p: Any) -> Any:
        return self.opt.slot_store.of(p).get(ANCHOR)

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

    # ---- parameters and groups ----------------------------------------------------------------------

    @edit_at(kind=st.sampled_from(["same", "dtype", "shape", "two", "transposed"]), moved=st.booleans())
    def replaced(self, seed: int, at: int, kind: str, moved: bool) -> None:
        """Another object in a parameter's place; its state goes along by hand, or as optx does it."""
        self._say("replaced", seed=seed, at=at, kind=kind, moved=moved)
        was = [list(map(id, known)) for _, known in self.opt._known]
        if was != [list(map(id, group["params"])) for group in self.opt.param_groups]:
            # After two edits at once nobody knows which parameter is whose successor.
            self._refused(self.opt.follow_parameters, "replaced parameters")
        old = self._at(at)
        data = old.data.a if isinstance(old.data, TwoTensor) else old.data
        new = nn.Parameter(self._new_data(data, kind, seed, VARIETY.casts[seed % len(VARIETY.casts)]))
        self._put(old, new)
        had = dict(self.opt.state.get(old, {}))
        # One that came since the last step, with state that was moved by hand, is nobody's successor to optx.
        moved = moved or all(old is not p for _, known in self.opt._known for p in known)
        if moved and old in self.opt.state:
            self.opt.state[new] = self.opt.state.pop(old)
        if not moved and not self._refused(self.opt.state_dict, "state_dict"):
            now = self.opt.state.get(new, {})
            assert {k: id(v) for k, v in now.items()} == {k: id(v) for k, v in had.items()}, (
                "state was not moved"
            )

    @edit_at(with_state=st.booleans())
    def grown(self, seed: int, at: int, with_state: bool) -> None:
        self._say("grown", seed=seed, at=at, with_state=with_state)
        p = self._at(at)
        if not p.ndim or isinstance(p.data, TwoTensor) or not readable(p):
            return
        p.grad = None
        p.data = torch.cat([p.data, normal((2, *p.shape[1:]), seed, p.dtype)])
        for key, value in list(self.opt.state.get(p, {}).items()) if with_state else ():
            if isinstance(value, Tensor) and value.ndim == p.ndim and readable(value) and key != "step":
                more = normal((2, *p.shape[1:]), seed, F32).abs().to(value.dtype)
                if value.shape[1:] == more.shape[1:] and not isinstance(value, TwoTensor):
                    self.opt.state[p][key] = torch.cat([value, more])

    @precondition(lambda self: len(self.params) < 6)
    @edit(seed=st.integers(0, 999), data=st.data(), off=st.booleans())
    def group_added(self, seed: int, data: Any, off: bool) -> None:
        dtype = data.draw(st.sampled_from(VARIETY.dtypes))
        self._say("group_added", seed=seed, dtype=dtype, off=off)
        group = {"params": [nn.Parameter(normal(SHAPES[seed % len(SHAPES)], seed, dtype))]}
        keys = {f"{t.name}": False for t in self.opt.transforms} if off else {}
        self._refused(lambda: self.opt.add_param_group({**group, **keys}), "add_param_group")

    @edit(how=st.sampled_from(["reverse", "merge", "split", "remove", "move", "reverse params"]))
    def groups_edited(self, how: str) -> None:
        self._say("groups_edited", how=how)
        groups = self.opt.param_groups
        if how == "reverse":
            groups.reverse()
        elif how == "reverse params":
            groups[0]["params"].reverse()
        elif how == "merge" and len(groups) > 1:
            last = groups.pop()
            groups[0]["params"] = [*groups[0]["params"], *last["params"]]
        elif how == "split" and len(groups[0]["params"]) > 1:
            p = groups[0]["params"].pop()
            groups.append({**groups[0], "params": [p]})
        elif how == "remove" and len(groups) > 1:
            for p in groups.pop()["params"]:
                self.opt.state.pop(p, None)
        elif how == "move" and len(groups) > 1 and len(groups[-1]["params"]) > 1:
            groups[0]["params"].append(groups[-1]["params"].pop(0))

    @edit(at=st.integers(0, 3), data=st.data())
    def option(self, at: int, data: Any) -> None:
        key, value = data.draw(st.sampled_from(VARIETY.options))
        self._say("option", at=at, key=key, value=value)
        group = self.opt.param_groups[at % len(self.opt.param_groups)]
        if key in group:
            group[key] = copy.deepcopy(value)

    @edit(on=st.booleans())
    def skip_nonfinite(self, on: bool) -> None:
        self._say("skip_nonfinite", on=on)
        self._refused(lambda: optx.wrap(self.opt, skip_nonfinite=on), "wrap again")

    @edit()
    def hooked(self) -> None:
        """A hook on the base that scales the gradients, taken off the next time."""
        self._say("hooked")
        if self.hook is not None:
            self.hook.remove()
            self.hook, self.scale = None, 1.0
            return

        def double(base: Any, *_: Any) -> None:
            for group in base.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        # A ZeroTensor of one number comes out of torch's own product as float64.
                        p.grad = (p.grad * 2.0).to(p.grad.dtype)

        self.hook, self.scale = self.opt.base.register_step_pre_hook(double), 2.0

    @edit()
    def plan(self) -> None:
        self._say("plan")
        self._refused(lambda: str(self.opt.plan()), "plan")

    @edit(step_plain=st.booleans())
    def rewrapped(self, step_plain: bool) -> None:
        """Taken off, stepped as it is, and wrapped again."""
        self._say("rewrapped", step_plain=step_plain)
        base = self.opt.remove()
        try:
            self.opt = self._wrap(base)
        except optx.OptxError as error:
            LOG.write(f"  wrap refused: {error}")
            LOG.count("refused: wrap")
            for group in base.param_groups:
                group.update({k: v for k, v in self.numbers.items() if k in group})
            for i, p in enumerate(q for group in base.param_groups for q in group["params"]):
                if not isinstance(p.data, TwoTensor):
                    p.grad, p.data = None, normal(p.shape, i, p.dtype)
            base.state.clear()
            self.opt = self._wrap(base)

    # ---- checkpoints --------------------------------------------------------------------------------

    def _whole(self) -> bool:
        slots = self.opt.slot_store
        tensors = [
            t for p in self.params for t in (p, *self.opt.state.get(p, {}).values(), *slots.of(p).values())
        ]
        return all(readable(t) and not isinstance(t, TwoTensor) for t in tensors if isinstance(t, Tensor))

    @edit()
    def save(self) -> None:
        self._say("save")
        if self._whole():
            self.saved.append(copy.deepcopy(self._saved()))

    @precondition(lambda self: self.saved)
    @edit(which=st.integers(0, 9), how=st.sampled_from(["own", "own", "reversed", "plain", "file", "shape"]))
    def load(self, which: int, how: str) -> None:
        self._say("load", which=which, how=how)
        checkpoint = copy.deepcopy(self.saved[which % len(self.saved)])
        if how == "reversed":
            checkpoint["param_groups"][0]["params"].reverse()
        elif how == "plain":
            checkpoint.pop("optx_pending", None)
            for entry in checkpoint["state"].values():
                for key in [k for k in entry if k.startswith("optx.")]:
                    del entry[key]
        elif how == "shape":
            for entry in checkpoint["state"].values():
                entry.update({k: v[..., None] for k, v in entry.items() if isinstance(v, Tensor) and v.ndim})
        plain = _loaded_by_torch(self, checkpoint)
        if how == "file":
            act = lambda: self._through_file(checkpoint)  # noqa: E731
        else:
            act = lambda: self.opt.load_state_dict(checkpoint)  # noqa: E731
        torch_refuses = isinstance(plain, Exception)
        if not self._refused(act, f"load {how}", (ValueError, KeyError, IndexError) if torch_refuses else ()):
            assert not torch_refuses, f"torch refuses this checkpoint ({plain}), optx loaded it"
            for p, entry in zip(self.params, plain, strict=True):
                for key, wanted in entry.items():
                    got = self.opt.state[p][key]
                    if isinstance(wanted, Tensor):
                        got = got.to(wanted.dtype)
                        assert torch.equal(got, wanted), f"loaded {key}: {got}, torch {wanted}"

    def _through_file(self, checkpoint: Any) -> None:
        """Loaded, saved to a file, loaded from it."""
        self.opt.load_state_dict(checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "optimizer.safetensors")
            try:
                optx.save_optimizer(self.opt, path)
            except optx.OptxError as error:
                if "which safetensors cannot hold" not in str(error):
                    raise
                LOG.count("refused: save_optimizer")
                return
            optx.load_optimizer(self.opt, path)

    def _saved(self) -> dict[str, Any]:
        """The state dict; torch's own has no place for the state of what is in no group any more."""
        members = {p for group in self.opt.param_groups for p in group["params"]}
        for p in [p for p in self.opt.state if p not in members]:
            del self.opt.state[p]
        return self.opt.state_dict()

    @edit(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def copied(self, how: str) -> None:
        self._say("copied", how=how)
        if not self._whole() or self.hook is not None:
            return
        for p in self.params:
            p.grad = None
        whole = all("step" in s for s in self.opt.state.values() if s)
        if how != "torch.save" and not whole and "betas" in self.opt.param_groups[0]:
            return  # torch's Adam asks every parameter's state for its step when it is copied or unpickled
        if how == "deepcopy":
            self.opt = copy.deepcopy(self.opt)
        elif how == "pickle":
            self.opt = pickle.loads(pickle.dumps(self.opt))
        else:
            buffer = io.BytesIO()
            torch.save({"weights": [p.data for p in self.params], "optimizer": self._saved()}, buffer)
            buffer.seek(0)
            if _safe_globals(self.opt):
                saved = torch.load(buffer, weights_only=True)["optimizer"]
                self._refused(lambda: self.opt.load_state_dict(saved), "load of what was saved")


def _safe_globals(opt: Any) -> bool:
    """Whether a torch file of it can be loaded with ``weights_only``: no NumPy numbers in it."""
    values = [v for g in opt.param_groups for k, v in g.items() if k != "params"]
    values += [v for s in opt.state.values() for v in s.values()]
    flat = [x for v in values for x in (v if isinstance(v, tuple) else (v,))]
    return not any(isinstance(v, np.generic | np.ndarray) for v in flat)


def _loaded_by_torch(machine: Edits, checkpoint: Any) -> Any:
    """What the base alone makes of a checkpoint: every parameter's state, or its error."""
    clones = [
        {"params": [nn.Parameter(torch.zeros(p.shape, dtype=p.dtype)) for p in group["params"]]}
        for group in machine.opt.param_groups
    ]
    plain = machine.make(clones, **machine.numbers)
    state = {
        n: {k: v for k, v in entry.items() if not k.startswith("optx.")}
        for n, entry in checkpoint["state"].items()
    }
    try:
        plain.load_state_dict(copy.deepcopy({"state": state, "param_groups": checkpoint["param_groups"]}))
    except (ValueError, KeyError, IndexError) as error:
        return error
    return [plain.state.get(p, {}) for group in plain.param_groups for p in group["params"]]


def _no_memory_by_kind(t: Tensor) -> bool:
    """Tensors that never have memory: torch raises for them, and does not crash."""
    return t.is_meta or hasattr(t, "fake_mode")


def _brief(error: Exception) -> str:
    return " ".join(str(error).split()[:9])


def _show(t: Any) -> str:
    if not isinstance(t, Tensor):
        return repr(t)
    values = numbers(t).flatten()[:6].tolist() if readable(t) else "without memory"
    return f"{tuple(t.shape)} {t.dtype} {values}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the machine, and write what it did as JSON."""
    global LOG, VARIETY
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--steps", type=int, default=15, help="rules per example")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variety", choices=["few", "full"], default="few", help="of dtypes and kernels")
    parser.add_argument("--shrink", action="store_true", help="look for a shorter sequence after a failure")
    parser.add_argument("--log", help="a file for every rule, before it acts")
    parser.add_argument("--counts", help="a file for the counts, as JSON")
    options = parser.parse_args(arguments)
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    LOG, VARIETY = Log(options.log), Variety(options.variety == "full")
    chosen = settings(
        max_examples=options.examples,
        stateful_step_count=options.steps,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.generate, *([Phase.shrink] if options.shrink else [])],
        suppress_health_check=list(HealthCheck),
    )
    with_seed(options.seed)(Edits)
    try:
        run_state_machine_as_test(Edits, settings=chosen)
    finally:
        counts = {
            "examples": LOG.examples,
            "kernels": compiled.cache_info().currsize,
            **dict(sorted(LOG.counts.items())),
        }
        text = json.dumps(counts, indent=1)
        print(text)
        if options.counts:
            Path(options.counts).write_text(text)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
