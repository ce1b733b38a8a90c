"""The methods of a merge's YAML: their parameters, what models they need, and what computes them.

Names, parameters and defaults are mergekit 0.1.5's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from optx._errors import OptxError, near
from optx.delta import _merge_kernels as kernels
from optx.delta import _merge_spheres as spheres
from optx.delta import _merge_task_vectors as vectors
from optx.delta import _merge_whole as whole
from optx.delta._merge_file import MergeFile, ModelRef, Slice
from optx.delta._merge_group import Group, Made
from optx.delta._merge_settings import Kind, Table, check_setting, count, number, shown, truth, value_at

_REQUIRED: Any = object()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        kind: what a value is.
        of: the whole merge, each model, or each but the base.
        default: None too if there is none.
        low: the smallest value that makes sense.
        high: the largest.
    """

    kind: Kind
    of: Literal["merge", "model", "other"] = "merge"
    default: Any = _REQUIRED
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        merge: computes one tensor.
        parameters: by name.
        base: whether it needs one, knows one, or takes it for a model like the others.
        models: how many there may be at least and at most, the base included.
        others: how many besides the base.
        idle: parameters that don't change the result, and why.
    """

    merge: Callable[[Group], Made]
    parameters: Mapping[str, Parameter]
    base: Literal["needed", "known", "none"] = "none"
    models: tuple[int, int | None] = (1, None)
    others: tuple[int, int | None] = (0, None)
    idle: Mapping[str, str] = field(default_factory=dict[str, str])


_WEIGHT = Parameter(number, "other")
_DENSITY = Parameter(number, "other", 1.0, 0.0, 1.0)


_MASK = {"int8_mask": "it does not change the result, and memory is bounded without it"}
_NO_PRUNING = "task_arithmetic prunes nothing; use ties, dare_linear or dare_ties"


def _vectors(
    merge: Callable[[Group], Made],
    normalize: bool,
    rescale: bool,
    idle: Mapping[str, str] = _MASK,
    **more: Parameter,
) -> Method:
    return Method(
        merge,
        {
            "weight": _WEIGHT,
            "density": _DENSITY,
            "lambda": Parameter(number, default=1.0),
            "normalize": Parameter(truth, default=normalize),
            "rescale": Parameter(truth, default=rescale),
            "int8_mask": Parameter(truth, default=False),
            **more,
        },
        "needed",
        idle=idle,
    )


_EPSILON = Parameter(number, "other", 0.15, 0.0, 0.5)
_GAMMA = Parameter(number, "other", 0.01, 0.0, 1.0)
METHODS: dict[str, Method] = {
    "linear": Method(
        kernels.linear, {"weight": Parameter(number, "model"), "normalize": Parameter(truth, default=True)}
    ),
    "slerp": Method(kernels.slerp, {"t": Parameter(number)}, "needed", (2, 2)),
    "passthrough": Method(kernels.passthrough, {"scale": Parameter(number, "model", None)}, models=(1, 1)),
    "task_arithmetic": _vectors(
        vectors.task_arithmetic, False, False, _MASK | {"density": _NO_PRUNING, "rescale": _NO_PRUNING}
    ),
    "ties": _vectors(vectors.ties, True, False),
    "dare_linear": _vectors(vectors.dare_linear, False, True),
    "dare_ties": _vectors(vectors.dare_ties, False, True),
    "model_stock": Method(
        whole.model_stock, {"filter_wise": Parameter(truth, default=False)}, "needed", (3, None)
    ),
    "nearswap": Method(kernels.nearswap, {"t": Parameter(number)}, "needed", (2, 2)),
    "nuslerp": Method(
        spheres.nuslerp,
        {
            "weight": _WEIGHT,
            "nuslerp_row_wise": Parameter(truth, default=False),
            "nuslerp_flatten": Parameter(truth, default=True),
        },
        "known",
        others=(2, 2),
    ),
    "breadcrumbs": _vectors(whole.breadcrumbs, False, False, gamma=_GAMMA),
    "breadcrumbs_ties": _vectors(whole.breadcrumbs_ties, False, False, gamma=_GAMMA),
    "della": _vectors(whole.della, True, True, epsilon=_EPSILON),
    "della_linear": _vectors(whole.della_linear, False, True, epsilon=_EPSILON),
    "sce": Method(
        whole.sce,
        {
            "select_topk": Parameter(number, default=1.0),
            "int8_mask": Parameter(truth, default=False),
        },
        "needed",
        idle=_MASK,
    ),
    "multislerp": Method(
        spheres.multislerp,
        {
            "weight": _WEIGHT,
            "normalize_weights": Parameter(truth, default=True),
            "eps": Parameter(number, default=1e-8),
        },
        "known",
        others=(1, None),
    ),
    "karcher": Method(
        spheres.karcher, {"max_iter": Parameter(count, default=10), "tol": Parameter(number, default=1e-5)}
    ),
    "arcee_fusion": Method(whole.arcee_fusion, {}, "needed", (2, 2)),
}
# Parameters of mergekit's, today or once, that a file may give to a method that hasn't got them.
_IDLE = frozenset(
    (
        "weight",
        "density",
        "lambda",
        "normalize",
        "rescale",
        "int8_mask",
        "t",
        "scale",
        "filter_wise",
        "gamma",
        "epsilon",
        "embed_slerp",
        "nuslerp_flatten",
        "nuslerp_row_wise",
        "select_topk",
        "normalize_weights",
        "eps",
        "max_iter",
        "tol",
        "consensus_method",
    )
)


@dataclass(frozen=True)
class Resolver:
    """A file's method, and what its parameters are for each tensor."""

    file: MergeFile
    method: Method = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", method_of(self.file.method))

    def values(
        self, slice_: Slice, name: str, names: Sequence[str], base: int | None, t: float
    ) -> tuple[Table, list[Table]]:
        """The parameters of the merge, and of each model, for one tensor.

        Args:
            slice_: where it is.
            name: in the result.
            names: in the models.
            base: the base's place among them.
            t: where its layer is, 0 to 1.
        """
        above = (slice_.parameters, self.file.parameters)
        shared = Table()
        each = [Table() for _ in names]
        for key, parameter in self.method.parameters.items():
            if parameter.of == "merge":
                shared[key] = self._value(key, parameter, above, name, t, "")
                continue
            for i, (part, own) in enumerate(zip(slice_.parts, names, strict=True)):
                if parameter.of == "other" and i == base:
                    continue
                tables = (part.parameters, *above)
                each[i][key] = self._value(key, parameter, tables, own, t, part.model.text)
        return shared, each

    def _value(
        self, key: str, parameter: Parameter, tables: Sequence[Table], name: str, t: float, model: str
    ) -> Any:
        found = value_at(key, tables, parameter.kind, name, t)
        if found is not None or parameter.default is not _REQUIRED:
            return parameter.default if found is None else found
        if not any(table.get(key) is not None for table in tables):
            if model:
                raise OptxError(f"config: {model!r} has no {key!r}; give it under its parameters.")
            raise OptxError(f"config: {self.file.method} needs {key!r}; give it under parameters.")
        raise OptxError(
            f"config: no filter of {key!r} lets {name!r} through; add an entry with a value and no filter."
        )


def method_of(name: str) -> Method:
    """A method by its name.

    Raises:
        OptxError: there is none.
    """
    if name not in METHODS:
        raise OptxError(f"config: optx does not do merge_method {name!r}. {near(name, METHODS)}")
    return METHODS[name]


def check_parameters(file: MergeFile) -> list[str]:
    """Look at every parameter of a file, used or not.

    Returns:
        What has no effect, in sentences.

    Raises:
        OptxError: one that nobody knows, that is in the wrong place, or has a wrong value.
    """
    method, notes = method_of(file.method), dict[str, None]()
    tables = [("", file.parameters)]
    for one in file.slices:
        tables.append(("", one.parameters))
        tables += ((part.model.text, part.parameters) for part in one.parts)
    for model, table in tables:
        for key, setting in table.items():
            parameter = method.parameters.get(key)
            if parameter is None:
                if key not in _IDLE:
                    raise OptxError(
                        f"config: {file.method} has no parameter {shown(key)}. "
                        f"{near(str(key)[:80], method.parameters)}"
                    )
                notes[f"{key} is ignored: {file.method} has no such parameter."] = None
                continue
            if key in method.idle:
                if setting not in (None, parameter.default):
                    notes[f"{key} is ignored: {method.idle[key]}."] = None
            elif model and parameter.of == "merge":
                raise OptxError(f"config: {key!r} holds for the whole merge; {model!r} can't have its own.")
            if setting is not None:
                check_setting(key, setting, _within(file.method, parameter))
    return list(notes)


def _within(owner: str, parameter: Parameter) -> Kind:
    def kind(key: str, value: Any) -> Any:
        found = parameter.kind(key, value)
        low, high = parameter.low, parameter.high
        if low is not None and high is not None and not low <= found <= high:
            raise OptxError(f"{owner}: {key} is {found!r}; it must be between {low} and {high}.")
        return found

    return kind


def check_models(file: MergeFile, slice_: Slice, base: ModelRef | None, where: str) -> None:
    """Raise unless a method has the models that it needs."""
    method, name = method_of(file.method), file.method
    texts = [part.model for part in slice_.parts]
    if method.base == "needed":
        if base is None:
            what = (
                "one of the two" if method.models == (2, 2) else "the model that the others were tuned from"
            )
            raise OptxError(f"config: {name} needs base_model, {what}.")
        if base not in texts:
            raise OptxError(f"config: {name} needs the base {base.text!r} among the sources of {where}.")
    known = int(method.base != "none" and base in texts)
    low, high = method.others
    where += f" has {len(texts)}" + (", the base among them" if base in texts else "")
    _check_count(name, len(texts), method.models, where)
    _check_count(name, len(texts), (low + known, None if high is None else high + known), where)


def _check_count(name: str, found: int, wanted: tuple[int, int | None], where: str) -> None:
    low, high = wanted
    if found < low or (high is not None and found > high):
        words = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        raise OptxError(f"config: {name} takes {words} {'model' if words == '1' else 'models'}; {where}.")
