"""Groups that differ in numbers only share their kernels, and step to the bit as each would alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from fused_cases import BASES, BF16, F32, F64, SHAPES, Case, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import optx
from optx.kernels import cpu
from optx.step.paths import GroupPath

CASES = [
    Case("adamw", "none"),
    Case("adamw", "perp adamr"),
    Case("sgd momentum dampening", "perp"),
    Case("adam l2", "adamr", weights=F64, grads=F64),
    Case("adamw", "perp", weights=BF16, grads=BF16, rounding="stochastic"),
    Case("adamw", "none", weights=BF16, grads=BF16, rounding="kahan"),
]


@contextmanager
def apart() -> Iterator[None]:
    """Within, every group's kernels run on their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupPath, "goes_with", lambda *_: False)
        yield


class Twins:
    """The same optimizer twice: its groups share kernels in one, and have their own in the other."""

    def __init__(
        self, case: Case, groups: Sequence[dict[str, Any]], mixed: bool = False, **asked: Any
    ) -> None:
        self.case, self.count = case, 0
        base, chain = BASES[case.base], [case.chain.startswith("perp"), "adamr" in case.chain]
        self.opts: list[Any] = []
        for together in (True, False):
            params = [torch.nn.Parameter(w) for w in draw(SHAPES, 0, case.weights)]
            if mixed:  # several dtypes, first met in another order in each group
                params = [torch.nn.Parameter(p.to((F32, F64, BF16)[i % 3])) for i, p in enumerate(params)]
            split = [{"params": params[i :: len(groups)], **group} for i, group in enumerate(groups)]
            transforms = [t() for t, wanted in zip((optx.PerpGrad, optx.AdamR), chain, strict=True) if wanted]
            inner = base.make(split, **{**base.numbers, "weight_decay": 0.1})
            with nullcontext() if together else apart():
                opt = optx.wrap(inner, *transforms, fused="cpu", rounding=case.rounding, **asked)
            self.opts.append(opt)

    def kernels(self) -> list[int]:
        """For each group, which of the sets of tables serves it."""
        served = [id(path.fused) for path in self.opts[0]._stepper.paths.groups()]
        return [served.index(one) for one in served]

    def params(self, opt: Any) -> list[Tensor]:
        return [p for group in opt.param_groups for p in group["params"]]

    def step(self, missing: Sequence[int] = (), scale: float = 1.0) -> None:
        self.count += 1
        for opt in self.opts:
            for i, p in enumerate(self.params(opt)):
                g = draw([tuple(p.shape)], 100 * self.count + i, p.dtype)[0] * scale
                p.grad = None if i in missing else g
        self.both(lambda opt: opt.step())
        self.check()

    def check(self) -> None:
        shared, own = self.opts
        with apart():
            assert len({id(path.fused) for path in own._stepper.paths.groups()}) == len(own.param_groups)
        for p, q in zip(self.params(shared), self.params(own), strict=True):
            assert torch.equal(p, q)
            assert shared.state[p].keys() == own.state[q].keys()
            for key, value in shared.state[p].items():
                assert torch.equal(value, own.state[q][key]), key
        assert shared.totals == own.totals

    def both(self, edit: Any) -> None:
        edit(self.opts[0])
        with apart():
            edit(self.opts[1])


@pytest.mark.long(keep=3)
@pytest.mark.filterwarnings("ignore:AdamR. param group")
@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_each_group_steps_as_if_it_were_alone(case: Case, data: st.DataObject) -> None:
    numbers = {
        "lr": st.floats(1e-4, 0.1),
        "weight_decay": st.floats(1e-4, 0.5),
        "optx.seed": st.integers(0, 9),
    }
    if "adam" in case.base:
        numbers |= {"eps": st.floats(1e-12, 1e-3)}
        numbers |= {"betas": st.tuples(st.floats(0, 0.99), st.floats(0.5, 0.999))}
    groups = data.draw(st.lists(st.fixed_dictionaries(numbers), min_size=2, max_size=4))
    twins = Twins(case, groups, skip_nonfinite=data.draw(st.booleans()))
    assert twins.kernels() == [0] * len(groups)
    twins.step()
    twins.step(missing=data.draw(st.sets(st.integers(0, 5), max_size=3)))
    twins.step()
    assert twins.kernels() == [0] * len(groups)


@pytest.mark.filterwarnings("ignore:AdamR. param group")
def test_totals_are_added_up_group_by_group() -> None:
    """Over several dtypes too: a float64 sum in another order would be off in its last bits."""
    twins = Twins(Case(), [{"lr": 0.01}, {"lr": 0.02}], mixed=True)
    for _ in range(6):
        twins.step()
    assert twins.kernels() == [0, 0]


def test_one_launch_serves_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def launches(*groups: dict[str, Any]) -> int:
        twins, counted = Twins(Case("adamw", "perp"), groups), list[int]()
        twins.step()
        run = cpu.run
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "run", lambda *args, **kw: (counted.append(1), run(*args, **kw)))
            twins.opts[0].step()
        return len(counted)

    assert launches({"lr": 0.1}, {"lr": 0.2}, {"lr": torch.tensor(0.3)}) == launches({}) > 0


def test_a_skipped_step_is_skipped_in_all() -> None:
    twins = Twins(Case("adamw", "perp"), [{"lr": 0.1}, {"lr": 0.2}], skip_nonfinite=True)
    twins.step(scale=float("nan"))  # also the first, whose state is taken back
    twins.step()
    twins.step(scale=float("inf"))
    twins.step()
    assert [opt.skipped_steps for opt in twins.opts] == [2, 2]


# ---- what parts them, and what joins them again ---------------------------------------------------------


def test_groups_part_and_join_with_what_they_compute() -> None:
    twins = Twins(Case("adamw", "perp"), [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}])
    twins.step()
    for key, value, kernels in (
        ("weight_decay", 0, [0, 1, 2]),  # the middle one has another program, and the order stays
        ("weight_decay", 0.3, [0, 0, 0]),
        ("perp_grad", False, [0, 1, 2]),
        ("perp_grad", True, [0, 0, 0]),
        ("amsgrad", True, [0, 1, 2]),
        ("lr", 0.7, [0, 1, 2]),
    ):
        twins.both(lambda opt, key=key, value=value: opt.param_groups[1].update({key: value}))
        twins.step()
        assert twins.kernels() == kernels, key


def test_groups_come_and_go() -> None:
    twins = Twins(Case("adamw", "perp"), [{"lr": 0.1}, {"lr": 0.2}])
    twins.step()
    twins.both(lambda opt: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, 4))], "lr": 0.3}))
    twins.step()
    assert twins.kernels() == [0, 0, 0]
    saved = copy.deepcopy(twins.opts[0].state_dict())
    twins.step()
    twins.both(lambda opt: opt.load_state_dict(copy.deepcopy(saved)))
    twins.step()
    assert twins.kernels() == [0, 0, 0]
    twins.both(lambda opt: opt.param_groups.reverse())
    twins.step()
    twins.both(lambda opt: opt.param_groups.pop(1))
    twins.step()
    assert twins.kernels() == [0, 0]


def test_an_error_on_the_way_leaves_no_group_to_two_kernels() -> None:
    """The first group's path is made anew, then the second raises; put right, it looks as before."""
    twins = Twins(Case("adamw", "perp"), [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}])
    twins.step()

    def fail(opt: Any) -> None:
        opt.param_groups[0]["weight_decay"] = 0
        opt.param_groups[1]["betas"] = (1.5, 0.9)
        with pytest.raises(optx.OptxError, match="betas"):
            opt.step()
        opt.param_groups[1]["betas"] = (0.9, 0.999)

    twins.both(fail)
    twins.step()
    assert twins.kernels() == [0, 1, 1]


def test_tensors_of_two_groups_in_one_memory_are_written_in_turn() -> None:
    """Two views of one weight: each group's kernels run after the other's, as torch's loops do."""
    twins = Twins(Case("adamw", "none"), [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}])
    twins.step()
    for opt in twins.opts:
        first, second = (group["params"][0] for group in opt.param_groups[:2])
        second.data = first.data[0, 0]
        assert second.data_ptr() == first.data_ptr()
    twins.both(lambda opt: opt.state.clear())
    twins.step()
    assert twins.kernels() == [0, 1, 2]
    assert {plan.path for plan in twins.opts[0].plan()} == {"fused cpu"}


@pytest.mark.filterwarnings("ignore:AdamR. param group")
def test_only_the_group_that_no_kernel_can_serve_leaves_them() -> None:
    twins = Twins(Case("adamw", "adamr"), [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}])
    twins.both(lambda opt: setattr(opt, "fused", "auto"))
    twins.step()
    assert twins.kernels() == [0, 0, 0]

    def negate(opt: Any) -> None:
        state = opt.state[opt.param_groups[1]["params"][0]]
        state["optx.adamr.anchor"] = torch._neg_view(state["optx.adamr.anchor"])

    twins.both(negate)
    twins.step()
    paths = twins.opts[0]._stepper.paths.groups(retry=False)
    assert [path.fused is None for path in paths] == [False, True, False]
    assert "lazy" in str(paths[1].reason)
