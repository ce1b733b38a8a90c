"""The handle of `optx.LDLT`: it connects the chain when it is made, and tells the certificate."""

# Letters are those of the paper.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from optx._errors import OptxError, TargetError
from optx.inject._handle import Handle
from optx.inject._injection import Site
from optx.inject._low_rank_start import from_file
from optx.inject._part import original
from optx.inject._served import Served
from optx.inject._trained_whole import Saved
from optx.inject._weights import is_conv
from optx.lipschitz import _ldlt_fit, _ldlt_lmi, _ldlt_slopes
from optx.lipschitz._ldlt_linalg import least_eigenvalue
from optx.lipschitz._ldlt_lmi import Certificate
from optx.lipschitz._ldlt_order import Order, order_of
from optx.lipschitz._ldlt_part import Chain, LDLTWeight, decoded


class LDLTHandle(Handle):
    """What `optx.attach` returns for `optx.LDLT`.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> handle = optx.attach(model, optx.LDLT(L=2.0), targets="0|2")
        >>> found = handle.certificate()
        >>> found.L, found.holds
        (2.0, True)
    """

    injection: Any  # `optx.LDLT`, which this module does not know

    def __init__(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved] = ()
    ) -> None:
        super().__init__(model, injection, served, saved)
        order = self._order(model)
        by_path = {one.path: one for one in self.served}
        self._ordered = [by_path[site.path] for site in order.sites]
        self.chain = _connected(self._ordered, order, injection)

    def _order(self, model: nn.Module) -> Order:
        """How the served layers are connected now."""
        given = self.injection.activation
        declared = None if given is None else _ldlt_slopes.named(given)
        return order_of(
            model, [Site(one.path, one.module) for one in self.served], self.injection.residual, declared
        )

    # ---- the certificate ----------------------------------------------------------------------------

    @property
    def L(self) -> float:
        """The Lipschitz constant in l2 from the first layer's input to the last's output."""
        return self.chain.L

    def weight(self, path: str) -> Tensor:
        """The weight of a served layer as it is now; autograd follows it."""
        for one, weight in zip(self._ordered, self.chain.weights(), strict=True):
            if one.path == path:
                return weight
        raise OptxError(f"LDLT: {path!r} is not served. Served: {[one.path for one in self._ordered][:8]}.")

    def certificate(self, shape: Sequence[int] | None = None) -> Certificate:
        """L and the least eigenvalue of LipSDP's matrix of the weights that the layers compute with now.

        It is computed in float64 from these weights alone, merged ones too, and not from V and a: it tells
        what rounding has left. Memory and time are those of a square matrix of all widths together.

        Args:
            shape: of the chain's input without the batch, (channels, height, width), where its layers are
                convolutions: they are unrolled for an image of that size.

        Raises:
            OptxError: it is removed or disabled; the model was changed since, so that it computes something
                else (another activation, a weight parametrized, a forward hook); or ``shape`` is missing or
                of other channels.
        """
        self._check_alive("certificate")
        if not all(one.part.enabled for one in self._ordered):
            raise OptxError(
                "certificate: the handle is disabled, and the layers compute with their own weights."
            )
        self._check_as_attached()
        chain, modules = self.chain, [one.module for one in self._ordered]
        weights = [one.double() for one in self._now()]
        multipliers = chain.multipliers()
        if any(is_conv(module) for module in modules):
            matrices = _ldlt_lmi.matrices(modules, weights, self._checked(shape, modules[0]))
            if multipliers is not None:
                multipliers = [
                    one.repeat_interleave(len(matrix) // len(one))
                    for one, matrix in zip(multipliers, matrices, strict=False)
                ]
            weights = matrices
        A, B = None, weights[-1]
        C = weights[:-1]
        if chain.form == "residual":
            A, B, C = weights[-1], weights[-2], weights[:-2]
        elif chain.form == "identity":
            A = torch.eye(len(B), dtype=B.dtype, device=B.device)
        found = least_eigenvalue(_ldlt_lmi.matrix(C, chain.links, chain.L, A, B, multipliers))
        gain = math.prod(link.gain for link in chain.links)
        ends = self._ordered[0].path, self._ordered[len(C)].path
        return Certificate(chain.L, found, chain.L * gain, *ends)

    def _check_as_attached(self) -> None:
        """Raise where the model computes another thing than the chain that it was."""
        for one in self._ordered:
            if is_parametrized(one.module, "weight"):
                raise OptxError(
                    f"certificate: {one.path}.weight has been parametrized after attach, and the certificate "
                    "would be of another weight. Remove that parametrization."
                )
            if (hook := _foreign_hook(one.module)) is not None:
                raise OptxError(
                    f"certificate: {one.path!r} has a forward hook ({hook}), which may change what it "
                    "computes. Remove it."
                )
        try:
            order = self._order(self.model)
        except TargetError as error:
            said = str(error).removeprefix("attach: ")
            raise OptxError(f"certificate: the model has been changed after attach. {said}") from error
        paths = [one.path for one in order.sites] == [one.path for one in self._ordered]
        if not paths or order.links != self.chain.links or order.form != self.chain.form:
            raise OptxError(
                "certificate: what lies between the layers is not what it was at attach, where the weights "
                "were made for it. Put it back, or attach LDLT anew."
            )

    def _now(self) -> list[Tensor]:
        merged = [one.part.merged for one in self._ordered]
        if all(merged):
            return [_own(one.module).detach() for one in self._ordered]
        with torch.no_grad():
            made = self.chain.weights()
        return [
            weight.to(torch.promote_types(_own(one.module).dtype, weight.dtype))
            for one, weight in zip(self._ordered, made, strict=True)
        ]

    def _checked(self, shape: Sequence[int] | None, first: Any) -> tuple[int, ...]:
        if shape is None or len(shape) != first.weight.ndim - 1 or shape[0] != first.in_channels:
            dims = ", ".join(["height", "width"] if first.weight.ndim == 4 else ["..."])
            raise OptxError(
                f"certificate: shape is {shape!r}; the chain has convolutions, so it must be the size of one "
                f"input, ({first.in_channels}, {dims}), for which they are unrolled."
            )
        return tuple(shape)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """As `Handle.load_state_dict`; the chain's L must be the one that it was attached with."""
        first = self._ordered[0]
        bound = state_dict.get(f"{first.path}.{first.name}.bound")
        if self.chain.fixed and bound is not None and (other := decoded(bound)) != self.chain.L:
            raise OptxError(
                f"LDLT: the state is of a chain of L={other:g}, and this one was attached with "
                f"L={self.chain.L:g}: its V mean other weights here. Attach with that L, and load again."
            )
        super().load_state_dict(state_dict)


def _foreign_hook(module: nn.Module) -> str | None:
    """The name of a forward hook that is not optx's."""
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        for hook in vars(module)[kind].values():
            owner: Any = getattr(hook, "__self__", hook)
            if not type(owner).__module__.startswith("optx."):
                return getattr(hook, "__qualname__", type(owner).__name__)
    return None


def _own(module: Any) -> Tensor:
    return module.weight


def _connected(served: Sequence[Served], order: Order, injection: Any) -> Chain:
    """The chain of the parts that are attached, with what they begin from."""
    parts: list[LDLTWeight] = []
    for one in served:
        assert isinstance(one.part, LDLTWeight)
        parts.append(one.part)
    auto = injection.L == "auto"
    chain = Chain(parts, order.links, order.form, fixed=not auto)
    for part in parts:
        part.chain = chain
    _check_form(served, order, None if auto else injection.L)
    n = len(parts) - (2 if order.form == "residual" else 1)
    for part in parts[n:]:
        part.gauge = None
    if order.form == "residual":
        parts[-1].a = None  # A and B are one contraction
    chain.L = 1.0 if auto else injection.L
    if order.form == "identity" and not auto and injection.L == 1.0:
        parts[-1].V = parts[-1].a = None  # of B nothing is free
    if injection.keeps and not from_file():
        _keep(chain, served, auto, injection.L)
    return chain


def _check_form(served: Sequence[Served], order: Order, L: float | None) -> None:
    """Raise for what a skip can't have.

    Raises:
        TargetError: says why.
    """
    if order.form == "sequential":
        return
    paths = [one.path for one in served]
    if any(is_conv(one.module) for one in served):
        raise TargetError(
            f"attach: LDLT(residual=True) serves Linear layers; in {paths} there is a convolution."
        )
    if len(served) < (3 if order.form == "residual" else 2):
        raise TargetError(
            f"attach: LDLT(residual=True) needs a branch of two layers at least; {paths} are fewer."
        )
    first: Any = served[0].module
    out: Any = served[-2 if order.form == "residual" else -1].module
    if order.form == "residual":
        skip: Any = served[-1].module
        if (skip.in_features, skip.out_features) != (first.in_features, out.out_features):
            raise TargetError(
                f"attach: LDLT: the skip {paths[-1]!r} is {skip.in_features} to {skip.out_features}, and "
                f"the branch {first.in_features} to {out.out_features}."
            )
        return
    if len(served) > 2 or order.links[0].low != 0.0:
        raise TargetError(
            "attach: LDLT(residual=True) with nothing on the skip serves two layers with an activation of "
            f"slopes from 0 between them; {paths} have {len(served)} layers and slopes from "
            f"{order.links[0].low:g}. Serve such blocks one by one, or put a Linear on the skip."
        )
    if L is not None and L < 1.0:
        raise TargetError(
            f"attach: LDLT: L is {L:g}, and the skip alone has 1: with nothing on it L must be at least 1."
        )


def _keep(chain: Chain, served: Sequence[Served], auto: bool, L: Any) -> None:
    """Begin from the weights that there are.

    Raises:
        TargetError: no chain of this L has them; names the smallest L that works.
    """
    weights = [original(one.module, "weight").detach().double() for one in served]
    if bad := next(
        (one.path for one, w in zip(served, weights, strict=True) if not w.isfinite().all()), None
    ):
        raise TargetError(f"attach: LDLT can't keep the weight of {bad!r}, which has inf or nan.")
    found = None if auto else _ldlt_fit.fit(weights, chain.links, chain.form, L)
    if found is None:
        least = _ldlt_fit.smallest(weights, chain.links, chain.form)
        if not auto or math.isinf(least):
            raise TargetError(
                f"attach: LDLT: the weights of {served[0].path!r} to {served[-1].path!r} are those of no "
                f"chain of "
                + (f"L={L:g}; the smallest L that works is {least:.6g}. " if least < math.inf else "any L. ")
                + "Use a larger L, L='auto', or init='raw', with which the layers don't compute what they "
                + "did."
            )
        chain.L = max(least * (1.0 + _ldlt_fit.MARGIN), 1e-12)
        found = _ldlt_fit.fit(weights, chain.links, chain.form, chain.L)
        assert found is not None
    with torch.no_grad():
        for part, V in zip(chain.parts, found.V, strict=False):
            assert part.V is not None
            part.V.copy_(V)
        for part, a in zip(chain.parts, found.a, strict=False):
            if part.a is not None:
                part.a.copy_(a)
        for part, gauge in zip(chain.parts, found.gauges, strict=False):
            assert part.gauge is not None
            part.gauge.fill_(gauge)
