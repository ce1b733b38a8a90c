"""Self-tuning networks: weights that respond to hyperparameters, which are tuned while the model is trained.

Source: STN, arXiv 1903.03088, and Delta-STN, arXiv 2010.13514. The responding layer is in
``_best_response.py``; batches, schedule and steps are in ``_self_tuning.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from optx._errors import OptxError, TargetError, check_choice, check_range, check_whole
from optx.inject._best_response import BestResponse
from optx.inject._hparams import HParams
from optx.inject._injection import Injection, Site, Targets
from optx.inject._part import Part
from optx.inject._self_tuning import SelfTuning
from optx.inject._served import Served
from optx.inject._targets import check_each_matches, family_of, matcher
from optx.inject._trained_whole import Saved
from optx.inject._tuned_dropout import DROPOUTS, AtRate
from optx.inject._weights import is_conv, is_linear

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class STN(Injection):
    """Tune dropout, augmentation and other regularisation in one run, by weights that respond to them.

    Each module computes c (W x + b) + s_w * (W_h x) + s_b * b_h, with W and b its own, and s linear in the
    hyperparameters of each example. Weights learn under perturbed hyperparameters; these learn on validation
    batches, by the gradient through the gates s: what they do to the training loss needs no derivative.

    Args:
        hparams: what is tuned: `optx.HParams`, each by `optx.hp`.
        delta: Delta-STN: gates are linear in the perturbation alone, and V starts at 0. At the values in
            force the model is c (W x + b), exactly.
        dropout: a hyperparameter that all nn.Dropout (1d, 2d, 3d) modules of the model have as their rate, or
            a dict of hyperparameters with targets, as `optx.attach` takes them.
        shared: all examples of a batch share one perturbation, for models whose examples are not along the
            first axis of everything, or that have a loss of the whole batch.
        batch_axis: where the examples are in inputs of Linear, Conv1D and nn.Dropout modules that have three
            axes and more: 0, or 1 for (time, batch, features), torch's ``batch_first=False``, for which
            batches are given by their number of examples. None: the first; but a model that has a module with
            ``batch_first=False`` is refused, and so is an input whose first two axes are both as long as the
            batch, unless that module has had another that told them apart. Convolutions have it first.
        scale: whether there is a c; else it is 1. Delta-STN's authors have none.
        lr: Adam's rate for the hyperparameters.
        sigma_lr: the same for the scales of their perturbations. 0: the scales stay.
        tau: weight of the entropy that keeps the scales from shrinking to 0.
        warmup: training batches before the first validation batch is due.
        train_steps: training batches in a turn of the schedule.
        valid_steps: validation batches after them.
        seed: of the perturbations, which have a stream of their own: torch's is as without them.

    Serves nn.Linear, transformers' Conv1D and nn.Conv1d/2d/3d. By default all of the model, and in a family
    that optx knows those of its blocks (the convolutions of a ResNet's). The handle has
    ``train_batch``, ``valid_batch``, ``step_hparams``, ``due``, ``history``, ``dropout``, ``weight_decay``
    and ``linearised``. The optimizer of weights is yours: it takes ``model.parameters()`` after attach;
    hyperparameters are in none of its groups, and ``handle.state_dict()`` has all of their state.
    ``merge()`` bakes W = c W + diag(s_w) W_h at the values in force; ``remove()`` leaves W and b as they are
    trained, without c and the response, which only with ``delta=True`` and ``scale=False`` is the same model.
    ``handle.parameters()`` are the responses alone: an optimizer of these leaves W as it is. A batch outside
    of ``train_batch`` is trained at the values in force, and no response is learnt from it.

    ``handle.history`` is the schedule, to draw: a dict of lists of one length, ``"batches"`` (training
    batches so far), each hyperparameter by its name, and the scales as ``"sigma <name>"``. To resume load the
    model's and the optimizer's states and the handle's: the model's has no values of hyperparameters.

    Paper values:
        ``train_steps=2, valid_steps=1, lr=3e-3, sigma_lr=3e-3, tau=1e-3``: the convolutional networks (the
            defaults), with a warm-up of 5 epochs.
        ``lr=0.01, sigma_lr=0.0, warmup=331``: language modelling by an LSTM, with scales of 1.
        ``delta=True, train_steps=5, valid_steps=1``: Delta-STN.

    Limits: Each served weight is there twice, and a step takes about twice as long. Embeddings, recurrent
        cells and attention's own dropout are not served. It tunes regularisation, not learning rates. Gates
        learn slowly from V near 0: with too short a warm-up, or weights that have memorised the training
        set, hyperparameters follow a response that is not there: Adam's step has one size whatever the
        gradient, so they drift. V and W_h learn by their product, from 0 with ``delta=True``: in ridge
        regression of 20 weights to one output, from a penalty of e^-4, that product stayed below 1 % of the
        best response with one seed of three (the penalty went to e^-5 and not to e^-1.2; a longer warm-up or
        run, momentum and another rate did not help). With V 1 and W_h 0 before training
        (``handle.named_parameters()``) all three arrive; on digits that start is no better, and diverges
        where V has a deviation of 1. With activation checkpointing backward has
        to be within the batch that the model was computed in; else it raises.

    Keywords: self-tuning networks, Delta-STN, hyperparameter optimisation, HPO, bilevel, hypernetwork, best
        response, dropout schedule, tuning.

    Evidence: ``optx run selftune``; ``test_stn.py``, ``test_stn_tuning.py``, ``test_stn_response.py``,
        ``test_stn_torch.py``, ``test_stn_arguments.py``.

    Raises:
        OptxError: an option out of range, or ``dropout`` names no hyperparameter or one that is no rate.
        TargetError: at attach, a dropout target that matches none, or a module with ``batch_first=False``
            where neither ``batch_axis`` nor ``shared`` is given.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2))
        >>> hparams = optx.HParams(drop=optx.hp(0.05, (0, 0.9)))
        >>> stn = optx.attach(model, optx.STN(hparams, delta=True, dropout="drop", warmup=0))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for step in range(4):
        ...     with stn.train_batch(16):
        ...         model(torch.randn(16, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     if stn.due:
        ...         with stn.valid_batch(16):
        ...             model(torch.randn(16, 8)).square().mean().backward()
        ...         stn.step_hparams()
        >>> len(stn.history["drop"])
        3

    Source: arXiv 1903.03088 and 2010.13514.
    """

    name: ClassVar[str] = "stn"
    role: ClassVar[str] = "weighted"
    serves: ClassVar[str] = "Linear, Conv1D or Conv1d/2d/3d modules"

    hparams: HParams
    delta: bool = False
    dropout: str | Mapping[str, Targets] | None = None
    shared: bool = False
    scale: bool = False
    lr: float = 3e-3
    sigma_lr: float = 3e-3
    tau: float = 1e-3
    warmup: int = 100
    train_steps: int = 2
    valid_steps: int = 1
    seed: int = 0
    batch_axis: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.hparams, HParams):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(
                f"STN: hparams is {self.hparams!r}; it must be optx.HParams(drop=optx.hp(0.05, (0, 0.9)))."
            )
        for option, least in (("lr", 1e-12), ("sigma_lr", 0), ("tau", 0)):
            value = getattr(self, option)
            check_range("STN", option, value, least)
            if isinstance(value, bool) or math.isinf(value):
                raise OptxError(f"STN: {option} is {value!r}; it must be a finite number.")
            object.__setattr__(self, option, float(value))  # NumPy's would not be saved
        for option, least in (("warmup", 0), ("train_steps", 1), ("valid_steps", 1), ("seed", -(2**63))):
            object.__setattr__(self, option, check_whole("STN", option, getattr(self, option), least))
        for option in ("delta", "shared", "scale"):
            check_choice("STN", option, getattr(self, option), (True, False))
        check_choice("STN", "batch_axis", self.batch_axis, (None, 0, 1))
        for name in self._rates():
            spec = self.hparams.specs[list(self.hparams)[self.hparams.place(name)]]
            within = spec.low is not None and spec.high is not None and spec.low >= 0 and spec.high < 1
            if not within or spec.discrete:
                raise OptxError(
                    f"STN: dropout has {name!r}, whose range is ({spec.low}, {spec.high}); a rate must be "
                    "continuous with a range from 0 at least to below 1, as (0, 0.9)."
                )

    def _rates(self) -> dict[str, Targets]:
        """Targets by the hyperparameter that is the rate of what they match."""
        given: Any = self.dropout
        if given is None:
            return {}
        if isinstance(given, str):
            return {given: lambda path, module: type(module) in DROPOUTS}
        if isinstance(given, Mapping):
            return dict(given)  # pyright: ignore[reportUnknownArgumentType]
        raise OptxError(f"STN: dropout is {given!r}; it must be a hyperparameter's name, or a dict by names.")

    def role_in(self, model: nn.Module) -> str:
        """All that has a weight; in a known family without its embeddings' likes and its head."""
        family = family_of(model)
        if family is None:
            return self.role
        return "convolutions" if family.convolutions else "linears"

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's response."""
        if not (is_linear(module) or is_conv(module)):
            raise TargetError(f"attach: STN serves {self.serves}; {path!r} is a {type(module).__name__}.")
        return BestResponse(module, path, self.hparams, centred=self.delta, scaled=self.scale)

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per site; all respond to the same hyperparameters."""
        self.hparams.check_free()
        return super().parts(sites)

    def companions(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Injection, list[Site]]]:
        """The dropout modules whose rate is tuned."""
        modules = [(path, module) for path, module in model.named_modules() if path]
        late = [path for path, module in modules if getattr(module, "batch_first", None) is False]
        if late and self.batch_axis is None and not self.shared:
            raise TargetError(
                f"STN: {late[0]!r} has batch_first=False, so examples may be along the second axis. Say "
                "where they are in (a, b, features) by optx.STN(..., batch_axis=1) or 0, or pass shared=True."
            )
        found: list[tuple[Injection, list[Site]]] = []
        owners: dict[str, str] = {}
        for name, targets in self._rates().items():
            check_each_matches(targets, modules, "STN: dropout")
            matches = matcher(targets)
            sites = [Site(path, module) for path, module in modules if matches(path, module)]
            if not sites:
                raise TargetError(
                    f"STN: dropout has {name!r}, for which no module is found. The model's dropout modules: "
                    f"{[path for path, module in modules if type(module) in DROPOUTS]}."
                )
            for site in sites:
                if site.path in owners:
                    raise TargetError(
                        f"STN: dropout gives {site.path!r} two rates, {owners[site.path]!r} and {name!r}."
                    )
                owners[site.path] = name
            found.append((AtRate(self.hparams, name), sites))
        return found

    def metrics(self, handle: Any) -> dict[str, float | Tensor]:
        """Each hyperparameter's value now, and the scale of what perturbs it."""
        sigma, raw, found = (
            self.hparams.sigma().detach(),
            self.hparams.raw.detach(),
            dict[str, float | Tensor](),
        )
        for i, (name, spec) in enumerate(self.hparams.specs.items()):
            found[f"value/{name}"] = spec.constrained(raw[i])
            found[f"sigma/{name}"] = sigma[i]
        return found

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> SelfTuning:
        """What `optx.attach` returns."""
        return SelfTuning(model, injection, served, saved)

    def options(self) -> dict[str, Any]:
        """As plain data; of the hyperparameters also the values that are in force."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**plain, "hparams": self.hparams.description()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """What `options` described."""
        given = options.get("hparams")
        if not isinstance(given, Mapping):
            raise OptxError("STN: the options have no hparams.")
        return super().from_options({**options, "hparams": HParams.from_description(given)})
