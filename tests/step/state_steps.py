"""The state machine's step: taken beside its twins, compared, explained where it is refused, healed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from state_draws import BASES, CHAINS, F32, F64, LOG, SHAPES, STEP, VARIETY, laid_out, normal
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
from torch.testing._internal.two_tensor import TwoTensor

import optx


class Steps(RuleBasedStateMachine):
    """The optimizer, and its steps beside those of its twins."""

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
