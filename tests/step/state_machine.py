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
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from hypothesis.stateful import precondition, run_state_machine_as_test
from state_draws import F32, LOG, SHAPES, VARIETY, edit, edit_at, normal
from state_edits import TensorEdits
from state_twin import readable
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import optx
from optx.kernels.step.emit_cpu import _compiled as compiled  # pyright: ignore[reportPrivateUsage]


class Edits(TensorEdits):
    """Everything that may be done to the optimizer between two steps."""

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the machine, and write what it did as JSON."""
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
    VARIETY.choose(full=options.variety == "full")
    if options.log:
        LOG.open(options.log)
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
    main()
