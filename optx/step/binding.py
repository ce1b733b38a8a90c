"""Binds the arguments and results of a transform's rules, and refuses what has no meaning in a moment.

`Moments` has the table that this follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from optx._errors import TransformError, near
from optx._rules import Rule
from optx.kernels.step.program import W0, Axis, Call, G, Kind, Ref, W
from optx.step.counting import ADVANCES, advance
from optx.step.declared import Slot
from optx.step.elementwise import why_not_elementwise
from optx.step.step_moments import Moments
from optx.step.transform import Transform

REGISTERS = {"w": W, "g": G, "w0": W0}
GRAD_SQ = Ref("col", "grad_sq")
NUMEL = Ref("col", "numel")
SIZES = (NUMEL, *(Ref("col", name) for name in ("ndim", "rows", "columns")))  # known before a step
# Names that mean the same for every transform: none may call its own things so.
_TAKEN = (*REGISTERS, "grad_sq", "numel", "fresh")
ALONG: dict[str, Axis] = {"rows": "row", "columns": "column"}
SUMS: dict[str, Kind] = {"sums": "col", "row_sums": "row", "column_sums": "column", "after_sums": "col"}
BEFORE = (
    "sums",
    "row_sums",
    "column_sums",
    "scalars",
    "rows",
    "columns",
    "finish",
)  # and compute numbers per tensor
PER_TENSOR = ("scalars", "rows", "columns", "finish", "after_scalars", "after_finish")
_ALONG_ONLY = ("row", "column", "rows", "columns")


class Binder:
    """Binds the rules of one transform, in the order of the moments.

    Args:
        transform: whose rules they are.
        moments: the rules, in one param group.
        common: what every rule may read, by name.
    """

    def __init__(self, transform: Transform, moments: Moments, common: Mapping[str, Ref]) -> None:
        self.transform, self.moments, self.common = transform, moments, common
        self.made: dict[str, Ref] = {}  # what earlier rules computed
        self.kept: list[str] = []  # cells that scalars wrote
        self._check_names()
        self._check_rules()

    def call(self, moment: str) -> Call | None:
        """The call of one moment; its results can be read from then on."""
        rule = self.rules[moment]
        if rule is None:
            return None
        args = tuple(self._read(moment, rule, name) for name in rule.reads)
        writes = tuple(self._write(moment, rule, name) for name in rule.writes)
        # One number for the whole group may be asked what it is.
        varying = [n for n, ref in zip(rule.reads, args, strict=True) if ref.kind not in ("hyper", "total")]
        if why := why_not_elementwise(rule, varying):
            raise self._error(f"rule {rule.name!r} ({moment}) {why}.")
        for name, ref in zip(rule.writes, writes, strict=True):
            if ref.kind in ("col", "row", "column") and ref != GRAD_SQ:
                self.made[name] = ref
        return Call(rule, args, writes)

    def totals(self, when: str = "") -> list[Ref]:
        """What is added over the whole optimizer; can be read as ``total_<name>`` from then on.

        Args:
            when: ``after_`` for what is added once the base has made the new weights.
        """
        refs: list[Ref] = []
        for name in getattr(self.moments, f"{when}totals"):
            ref = NUMEL if name == "numel" else self.made.get(name)
            if ref is None or ref.kind == "total":
                raise self._error(
                    f"{when}totals has {name!r}, which neither {when}sums nor {when}scalars compute. "
                    f"{near(name, ['numel', *self.made])}"
                )
            refs.append(ref)
            self.made[f"total_{name}"] = Ref("total", ref.name)
        return refs

    def counts(self) -> list[Call]:
        """What advances the transform's counters; rules read them so from then on."""
        calls: list[Call] = []
        for name in (name for name, slot in self.transform.slots.items() if slot.counts):
            new = self.made[name] = Ref("col", self._own(name))
            self.kept.append(new.name)
            calls.append(Call(advance, (Ref("cell", new.name), Ref("hyper", ADVANCES)), (new,)))
        return calls

    def reads(self, moment: str, name: str) -> bool:
        """Whether a moment's rule reads a name."""
        rule = self.rules[moment]
        return rule is not None and name in rule.reads

    # ---- names ---------------------------------------------------------------------------------------

    def _own(self, name: str) -> str:
        return f"{self.transform.name}.{name}"

    def _slots(self, kind: Kind) -> list[str]:
        return [name for name, slot in self.transform.slots.items() if slot.kind == kind]

    def _read(self, moment: str, rule: Rule, name: str) -> Ref:
        element = moment not in PER_TENSOR
        found = self._find(moment, name)
        if found is None:
            raise self._unknown(moment, rule, name)
        if not element and found.kind in ("reg", "slot"):
            over = f"per {ALONG[moment]}" if moment in ALONG else "once per tensor"
            raise self._error(
                f"rule {rule.name!r} ({moment}) reads {name!r}, which has a value per element, and {moment} "
                f"runs {over}; take a sum of it in {ALONG.get(moment, '')}{'_' * (moment in ALONG)}sums."
            )
        if found.kind in _ALONG_ONLY and found.kind != moment and not self._along(moment, found):
            raise self._error(
                f"rule {rule.name!r} ({moment}) reads {name!r}, which has a value per "
                f"{found.kind.removesuffix('s')}; "
                + (
                    f"{moment} has none."
                    if not element
                    else f"only what the rule of {found.kind!r} writes is there (help(optx.per_row) has one)."
                )
            )
        return found

    def _along(self, moment: str, found: Ref) -> bool:
        """Whether a rule of a moment can read a number per row or column of this step."""
        if found.kind in ALONG:  # as it was before the step
            return False
        return ALONG[moment] == found.kind if moment in ALONG else moment not in PER_TENSOR

    def _find(self, moment: str, name: str) -> Ref | None:
        if name == "g" and moment == "meter":
            return None  # where the base steps by itself, it may have overwritten it
        if name in REGISTERS:
            # Before any rule writes a weight, it is what it was when the step began.
            return W if name == "w0" and moment in ("sums", "gradient") else REGISTERS[name]
        if name in self.made:
            return self.made[name]
        if name in self.transform.slots:
            return Ref(self.transform.slots[name].kind, self._own(name))
        if name == "grad_sq":
            if moment == "sums":
                return None
            # Later transforms may replace the one that all share.
            return GRAD_SQ if moment == "scalars" else Ref("col", self._own("grad_sq"))
        if name in self.transform.options:
            return Ref("hyper", self._own(name))
        return self.common.get(name)

    def _unknown(self, moment: str, rule: Rule, name: str) -> TransformError:
        start = f"rule {rule.name!r} reads {name!r}"
        if moment == "meter" and name == "g":
            return self._error(f"{start} in meter, which sees what the step left; sum it in sums.")
        if name == "grad_sq":
            return self._error(f"{start} in sums, which are taken in the same pass; read it in scalars.")
        computed = [m for m, own in self.rules.items() if own and name in own.writes]
        if computed or name.removeprefix("total_") in (*self.moments.totals, *self.moments.after_totals):
            last = computed[0] if computed else "the totals"
            return self._error(f"{start} in {moment}, and {last} computes it only later.")
        transform = self.transform
        names = [*REGISTERS, *transform.slots, *transform.options, *self.made, *self.common]
        return self._error(
            f"{start}, which is no slot {sorted(transform.slots)}, option {sorted(transform.options)} or "
            f"earlier result of the transform, nor a name of this base ({', '.join(sorted(self.common))}). "
            f"{near(name, names)}"
        )

    def _write(self, moment: str, rule: Rule, name: str) -> Ref:
        slot = self.transform.slots.get(name)
        own = Ref("slot", self._own(name))
        match moment:
            case _ if moment in (*SUMS, *PER_TENSOR, "meter"):
                if name == "grad_sq" and moment == "scalars":
                    return GRAD_SQ
                if moment.startswith("after_") and (before := self._computed_before(name)):
                    raise self._error(
                        f"rule {rule.name!r} ({moment}) writes {name!r}, which {before} has computed and the "
                        "rules before the base's update read; give it another name."
                    )
                if slot is not None and slot.counts:
                    raise self._error(
                        f"rule {rule.name!r} ({moment}) writes {name!r}, a counter; rules can only read it."
                    )
                free = name not in (*_TAKEN, *self.transform.options) and slot is None
                if moment in ALONG:
                    if free or (slot is not None and slot.axis == ALONG[moment]):
                        return Ref(ALONG[moment], self._own(name))
                elif free or (slot is not None and slot.scalar and moment in PER_TENSOR):
                    if slot is not None:
                        self.kept.append(self._own(name))
                    return Ref(SUMS.get(moment, "col"), self._own(name))
                allowed = "new names"
                if moment in ALONG:
                    allowed += f" and slots per {ALONG[moment]}"
                elif moment in PER_TENSOR:
                    allowed += f" and cells {self._slots('cell')}"
            case "observe":
                if slot is not None and slot.scalar and not slot.counts:
                    return Ref("cell", self._own(name))
                allowed = f"cells (per_tensor slots) {self._slots('cell')}"
            case _:
                register = "g" if moment == "gradient" else "w"
                if name == register:
                    return REGISTERS[name]
                if slot is not None and slot.packed:
                    raise self._error(
                        f"rule {rule.name!r} ({moment}) writes {name!r}, a packed slot, which rules can only "
                        "read."
                    )
                if slot is not None and slot.kind == "slot":
                    return own
                allowed = f"{register!r} and slots per element {self._slots('slot')}"
        if slot is None and name not in (*_TAKEN, *self.transform.options):
            near_slots = near(name, self.transform.slots)
            raise self._error(
                f"rule {rule.name!r} ({moment}) writes {name!r}, which is no slot of the transform; {moment} "
                f"may write {allowed} of it. {near_slots}"
            )
        raise self._error(
            f"rule {rule.name!r} ({moment}) writes {name!r}; {moment} may write {allowed} of the transform."
        )

    def _computed_before(self, name: str) -> str:
        """The moment before the base's update that computes a name."""
        return next((m for m in BEFORE if (r := self.rules[m]) is not None and name in r.writes), "")

    # ---- checks --------------------------------------------------------------------------------------

    def _error(self, message: str) -> TransformError:
        return TransformError(f"{self.transform!r}: {message}")

    def _check_names(self) -> None:
        for name, slot in self.transform.slots.items():
            value: Any = slot
            if not isinstance(value, Slot):
                raise self._error(
                    f"slots[{name!r}] is {value!r}; it must be optx.like_weight() or optx.per_tensor()."
                )
            if name in self.transform.options:
                raise self._error(f"{name!r} is a slot and an option; a rule could not tell which it reads.")
        for kind, names in (("slot", self.transform.slots), ("option", self.transform.options)):
            for name in names:
                if not name.isidentifier() or name in _TAKEN:
                    raise self._error(
                        f"a {kind} is named {name!r}; it must be an identifier other than "
                        f"{', '.join(_TAKEN)}, which mean something else in a rule."
                    )

    def _check_rules(self) -> None:
        m: Any = self.moments
        if not isinstance(m, Moments):
            raise self._error(f"moments() returns {m!r}; it must return optx.Moments(...).")
        every: dict[str, Any] = {"totals": m.totals, "after_totals": m.after_totals}
        for which, totals in every.items():
            if isinstance(totals, str) or not all(isinstance(name, str) for name in totals):
                raise self._error(f"{which} is {totals!r}; it must be a tuple of names, as ('second',).")
        self.rules = _rules_of(m)
        given: dict[str, Any] = self.rules
        for moment, value in given.items():
            if value is None:
                continue
            if not isinstance(value, Rule):
                name = getattr(value, "__name__", repr(value))
                raise self._error(
                    f"{moment} is {name!r}, a {type(value).__name__} and no rule; decorate one function "
                    "with @optx.rule(writes=...)."
                )
            self._check_results(moment, value)
        scalars = m.scalars
        if scalars is not None and "grad_sq" in scalars.writes and m.gradient is None:
            raise self._error(
                f"rule {scalars.name!r} writes 'grad_sq', the sum of squares after the transform's "
                "gradient rule, and there is none."
            )

    def _check_results(self, moment: str, rule: Rule) -> None:
        if wrong := rule.wrong_results(rule.results):
            raise self._error(f"rule {rule.name!r} ({moment}) {wrong}.")


def _rules_of(m: Moments) -> dict[str, Rule | None]:
    """By moment, in the order in which they come."""
    return {
        "sums": m.sums,
        "row_sums": m.row_sums,
        "column_sums": m.column_sums,
        "scalars": m.scalars,
        "rows": m.rows,
        "columns": m.columns,
        "finish": m.finish,
        "gradient": m.gradient,
        "weight": m.weight,
        "after_sums": m.after_sums,
        "after_scalars": m.after_scalars,
        "after_finish": m.after_finish,
        "after": m.after,
        "observe": m.observe,
        "meter": m.meter,
    }


def common_names(names: Iterable[str], hypers: Iterable[str], counted: bool) -> dict[str, Ref]:
    """What every transform's rules may read: the base's state, numbers of its group, of the tensor."""
    refs = {name: Ref("hyper", name) for name in hypers}
    refs |= {name: Ref("slot", name) for name in names}
    refs |= {ref.name: ref for ref in SIZES}
    if counted:
        refs["step"] = Ref("col", "step")
    return refs
