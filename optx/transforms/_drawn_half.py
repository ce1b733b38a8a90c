"""Which half of a model a round trains: the draw among what may be drawn from, and the flags that it sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from optx._errors import OptxError, TransformError, near, warn
from optx._names import parameter_names
from optx.step.transform import Group
from optx.transforms._flags import Flags
from optx.transforms._half_selection import Draw, Row
from optx.transforms._rounds import ModelLayers, Round, SavedRound, draw_round, named_parameters


class DrawnHalf:
    """A model, the draw of its present round, and what the person wants of each parameter beside that.

    Args:
        model: its parameters are read anew each time, since the objects may be replaced.
        draw: what to draw, and in which round.
        blocks: a regular expression that matches the blocks' names, or None.

    Attributes:
        flags: what the person wants, and what the round made of it.

    Raises:
        OptxError: the model is none, or has no blocks.
    """

    def __init__(self, model: Any, draw: Draw, blocks: Any) -> None:
        if not isinstance(model, nn.Module):
            raise OptxError(f"HFT: model is a {type(model).__name__}; it must be the model, as HFT(model).")
        if not (blocks is None or isinstance(blocks, str)):
            raise OptxError(f"HFT: blocks is {blocks!r}; it must be a regular expression, or None.")
        self.model, self.draw = model, draw
        self.flags = Flags()
        self.layers = ModelLayers(blocks)
        self._round = Round()
        self._served: list[bool] = []  # by group, as last seen
        self._left_out: set[str] = set()  # names in the others
        self._told = False
        self.layers.of(model)

    @property
    def checksum(self) -> int:
        """Of what this round drew."""
        return self._round.checksum

    # ---- looking -------------------------------------------------------------------------------------

    def see(self, groups: Sequence[Group], serves: Callable[[Group], bool]) -> None:
        """Look at which groups take part now; ``serves`` is not kept, since who has it has this object."""
        self._served = [serves(group) for group in groups]
        out = {p for group in groups if not serves(group) for p in group["params"]}
        named = named_parameters(self.model) if out else {}
        self._left_out = {name for name, p in named.items() if p in out}

    def sees(self, groups: Sequence[Group], serves: Callable[[Group], bool]) -> bool:
        """Whether the same groups take part as when it last looked."""
        return self._served == [serves(group) for group in groups]

    def follow(self) -> bool:
        """Take on the flags that the person has changed; whether there were any."""
        thawed = self.flags.follow()
        if thawed and not self._told:
            self._told = True
            warn(
                f"HFT: {thawed[0]!r} was thawed by hand ({len(thawed)} in all), but round {self.draw.round} "
                "holds it frozen, and so it stays. To train it, call opt.hft.thaw(name), or put it in a "
                "param group with hft=False."
            )
        return thawed is not None

    def watch(self) -> None:
        """Look after the parameters that the model has now."""
        self.flags.watch(named_parameters(self.model))

    def rows(self) -> list[Row]:
        """What becomes of every parameter."""
        return self._rows(self._round)

    def check_trains(self, base: torch.optim.Optimizer, anew: bool) -> None:
        """Refuse an optimizer of which nothing is trained, in this round or in a draw of it made anew."""
        named = named_parameters(self.model)
        optimized = {p for group in base.param_groups for p in group["params"]}
        chosen = self._drawn(self.flags.unwanted(), self._left_out) if anew else self._round
        if not any(row.trainable and named[row.name] in optimized for row in self._rows(chosen)):
            raise TransformError(
                f"HFT: with ratio={self.draw.ratio} the optimizer has nothing to train: none of its "
                "parameters was drawn or is outside of the blocks. Raise ratio, or give it the embeddings."
            )

    def _rows(self, chosen: Round) -> list[Row]:
        layers, named = self.layers.of(self.model), named_parameters(self.model)
        return chosen.rows(layers, named, self.flags.wish, self._left_out)

    # ---- drawing -------------------------------------------------------------------------------------

    def begin(self, number: int) -> None:
        """Draw round ``number`` among all but what the person froze or left out."""
        self.draw = replace(self.draw, round=number)
        self._round = self._drawn(self.flags.unwanted(), self._left_out)

    def take_in_new(self) -> None:
        """Draw of what came since the round began; what was drawn before stays."""
        new = self._drawn(self.flags.unwanted(), self._left_out | self._round.known)
        self._round = self._round.with_new(new)

    def return_to(self, saved: SavedRound) -> None:
        """Draw as the saved run did when its round began; frozen by hand since is not frozen then."""
        same = (saved.round, saved.seed, saved.selection) == (self.draw.round, self.draw.seed, self.checksum)
        self.draw = replace(self.draw, seed=saved.seed, round=saved.round)
        if same:
            return
        unwanted, nobody = self.flags.unwanted(), set[str]()
        ways = ((unwanted, self._left_out), (nobody, self._left_out), (unwanted, nobody), (nobody, nobody))
        rounds = [self._drawn(*way) for way in ways]
        self._round = next((one for one in rounds if one.checksum == saved.selection), rounds[0])

    def _drawn(self, unwanted: Set[str], undrawn: Set[str]) -> Round:
        layers, names = self.layers.of(self.model), named_parameters(self.model)
        return draw_round(self.draw, layers, names, unwanted, undrawn)

    # ---- flags ---------------------------------------------------------------------------------------

    def want(self, names: Iterable[str], trainable: bool, caller: str) -> None:
        """The person says it in words: frozen for good, or trained until a next round draws otherwise.

        Raises:
            OptxError: there is no parameter of that name; nothing is changed.
        """
        wanted, known = list(names), named_parameters(self.model)
        for name in wanted:
            if name not in known:
                raise OptxError(f"HFT: {caller}({name!r}) names no parameter. {near(name, known)}")
        self.flags.want(wanted, trainable)
        if trainable:
            self._round = self._round.with_thawed(wanted)

    def set_flags(self) -> None:
        """Make ``requires_grad`` what this round wants, and drop the gradients of what it freezes."""
        named = named_parameters(self.model)
        self.flags.watch(named)
        for row in self.rows():
            p = named[row.name]
            self.flags.set(row.name, p, row.trainable)
            if row.drawn and not row.trainable:
                p.grad = None

    def thaw_all(self) -> None:
        """For a while, all that only rounds freeze."""
        for name, p in named_parameters(self.model).items():
            if self.flags.wish[name]:
                self.flags.set(name, p, True)

    def give_back(self) -> None:
        """Every flag as the person last set it."""
        self.watch()
        self.flags.give_back()
        self._served = []


def check_model(model: nn.Module, base: torch.optim.Optimizer) -> None:
    """Refuse another model's parameters, and a DDP that would wait for frozen ones."""
    names = parameter_names(base)
    optimized = {p for group in base.param_groups for p in group["params"]}
    own = named_parameters(model).values()
    foreign = sorted((names[id(p)], tuple(p.shape)) for p in optimized.difference(own))
    if foreign:
        name, shape = foreign[0]
        raise TransformError(
            f"HFT: {name} of the optimizer, of shape {shape}, is not a parameter of the model "
            f"({len(foreign)} in all). Give HFT the model that the optimizer trains."
        )
    if isinstance(model, DistributedDataParallel) and not model.find_unused_parameters:
        raise TransformError(
            "HFT: the model is in DistributedDataParallel, which would wait for the gradients of the "
            "frozen half. Make it with find_unused_parameters=True."
        )
