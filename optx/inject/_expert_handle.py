"""The handle of `optx.EWA`, and the transform that averages its experts after each step.

Source: EWA, arXiv 2308.06093.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import MergeError, OptxError, warn
from optx._names import is_dtensor
from optx.inject._averaged_experts import AveragedExperts
from optx.inject._handle import Handle
from optx.inject._served import Served
from optx.inject._trained_whole import Saved, act
from optx.inject._watch import check_there
from optx.step.rehearsal import is_rehearsal
from optx.step.transform import Host, Transform

_APART = 0.2  # of the mean's norm: experts of independent draws are 1 and more from it, averaged ones 0.003


class ExpertHandle(Handle):
    """What `optx.attach` returns for `optx.EWA`.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> handle = optx.attach(model, optx.EWA(experts=2, beta=0.3, schedule="constant"), targets="0")
        >>> opt = torch.optim.SGD(handle.parameters(), lr=0.1)
        >>> model(torch.randn(8, 4)).sum().backward()
        >>> opt.step()
        >>> handle.step()  # or optx.wrap(opt, handle), once, which does it after each step
        >>> handle.steps, handle.beta
        (1, 0.3)
        >>> list(handle.merge_and_unload().state_dict())
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """

    injection: Any  # `optx.EWA`, which this module does not know

    def __init__(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved] = ()
    ) -> None:
        super().__init__(model, injection, served, saved)
        self._told = False
        for part in self._parts():
            part.refresh()
        for p in self.leaving():
            p.grad = None

    def _parts(self) -> list[AveragedExperts]:
        return [one.part for one in self.served if isinstance(one.part, AveragedExperts)]

    # ---- averaging --------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """How many steps have been taken, as checkpoints have it."""
        return self._parts()[0].count

    @property
    def beta(self) -> float:
        """The share rate of the last averaging."""
        return self.injection.beta_at(self.steps)

    def step(self) -> None:
        """Average the experts, after a step of the optimizer that was not skipped.

        ``optx.wrap(optimizer, handle)`` does it, and knows of skipped steps.

        Raises:
            OptxError: removed or merged, or an engine has cut the experts into pieces.
        """
        self._check_alive("step")
        if self.merged:
            raise OptxError("step: the experts are merged. Call unmerge() before training goes on.")
        pull = self.injection.pull_at(self.steps + 1)
        for part in self._parts():
            part.check_whole()
        for part in self._parts():
            part.average(pull)

    def spread(self) -> dict[str, float]:
        """How far experts are from their mean, by module: the mean distance as a share of the mean's norm."""
        self._check_alive("spread")
        return {part.path: float(part.spread()) for part in self._parts()}

    def numbers(self) -> dict[str, float | Tensor]:
        """For `Handle.metrics`: the rate, and the spread of all modules together; not of what is sharded."""
        parts = self._parts()
        found: dict[str, float | Tensor] = {"beta": self.beta}
        if not any(is_dtensor(p) for p in parts[0].parameters()):
            found["spread"] = torch.stack([part.spread() for part in parts]).mean()
        return found

    # ---- one module again -------------------------------------------------------------------------------

    def merge(self, *, untie: bool = False) -> None:
        """Let the mean of the experts compute, in training too; `unmerge` lets the experts go on.

        Nothing is added to the weights: the module's own hold the mean, in the precision that they have. A
        warning, once, where experts were never averaged or are still far apart: their mean is then none of
        the models that were trained. Not where ``beta`` is 0, nor of what is sharded.

        Args:
            untie: of no use here: what is tied was refused at attach.

        Raises:
            OptxError: it has been removed, or a module is gone.
        """
        self._check_alive("merge")
        check_there(self.model, self.served, "merge")
        for part in self._parts():
            part.check_whole()
        self._tell_of_distance()
        for part in self._parts():
            part.refresh()
            part.merged = True

    def _tell_of_distance(self) -> None:
        """Warn, once, of experts whose mean is not what was trained."""
        parts = self._parts()
        if self._told or not self.injection.beta or any(is_dtensor(p) for p in parts[0].parameters()):
            return
        spread, path = max((part.spread().item(), part.path) for part in parts)
        if not (spread > _APART or (spread > 0 and not self.steps)):
            return
        self._told = True
        warn(
            f"EWA: the experts of {path!r} are {spread:.2g} of their mean's norm away from it, "
            + (
                f"averaged {self.steps} times, so that the mean, which is merged, is none of the models that "
                "were trained. Train on; or average by a larger beta, or one that is there from the start "
                "(schedule='constant')."
                if self.steps
                else "and were never averaged. Use optx.wrap(optimizer, handle), or call handle.step() after "
                "each optimizer.step()."
            )
        )

    def unmerge(self) -> None:
        """Let the experts compute again, as they were.

        Raises:
            MergeError: the merged weights were changed since; nothing is changed.
        """
        for one in self.served:
            if isinstance(one.part, AveragedExperts) and one.part.merged and not one.part.is_fresh():
                raise MergeError(
                    f"unmerge: {one.path!r} was changed after the merge (a step, a load, or a move to "
                    "another device or dtype), and the experts know nothing of it. Keep the merged weights "
                    "with handle.merge_and_unload()."
                )
        for part in self._parts():
            part.merged = False

    def merge_and_unload(self, *, untie: bool = False) -> nn.Module:
        """Leave the mean of the experts in each module, for good: the model's own class, keys and flags.

        Raises:
            OptxError: as `merge`.
        """
        if not self.merged:
            self.merge()
        self._check_alive("merge_and_unload")
        for kept in self.saved:
            act(kept.module, kept.values)
        self._take_off(restore=False)
        return self.model

    def remove(self) -> None:
        """Take everything off: the model is what it was before attach, or what was loaded into it since.

        To keep what was trained, call `merge_and_unload`.
        """
        if self._removed:
            return
        for part in self._parts():
            part.values_back()
        self._take_off(restore=True)

    def disable(self) -> Any:
        """Let the mean of the experts compute, in training too; see `Handle.disable`."""
        for part in self._parts():
            part.refresh()
        return super().disable()


class ExpertAveraging(Transform):
    """Average the experts of a handle after each step that was taken; `optx.EWA` brings it.

    Args:
        handle: of ``optx.attach(model, optx.EWA(...))``.
    """

    def __init__(self, handle: ExpertHandle) -> None:
        # As it is called on its modules, so that two handles may have one optimizer.
        object.__setattr__(self, "name", handle.served[0].name)
        self.handle = handle

    def after_step(self, optimizer: Host) -> None:
        """Draw the experts together."""
        if not self.handle.removed and not is_rehearsal(optimizer):
            self.handle.step()
