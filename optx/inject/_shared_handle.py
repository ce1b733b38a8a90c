"""The handle of `optx.StableRPS`: one array for all modules, its gradient scaler, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import FileError, OptxError, check_choice, warn
from optx._names import RESERVED
from optx.inject import _shared_places
from optx.inject._handle import Handle
from optx.inject._served import Served
from optx.inject._shared_keep import Kept
from optx.inject._shared_part import SharedWeight, from_numbers
from optx.inject._shared_scaler import MODES, GradScale, gamma
from optx.inject._trained_whole import Saved
from optx.kernels.shared import mapping


class SharedHandle(Handle):
    """What `optx.attach` returns for `optx.StableRPS`.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> handle = optx.attach(model, optx.StableRPS(compression=0.25), targets="0|1")
        >>> handle.psi.shape
        torch.Size([32])
        >>> handle.loads().unique().tolist()
        [4]
    """

    injection: Any  # `optx.StableRPS`, which this module does not know

    def __init__(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved] = ()
    ) -> None:
        super().__init__(model, injection, served, saved)
        self._kept = Kept(self.served, injection.keep)
        module: Any = self.served[0].module
        hook = module.register_load_state_dict_pre_hook(_tell_of_bare)
        self.served[0].hooks.append(hook)

    def _parts(self) -> list[SharedWeight]:
        return [one.part for one in self.served if isinstance(one.part, SharedWeight)]

    @property
    def psi(self) -> nn.Parameter:
        """The shared array, (m,)."""
        return self._parts()[0].holder.psi

    @property
    def revision(self) -> int:
        """Grows when places or scales are loaded."""
        return sum(part.revision for part in self._parts())

    # ---- the mapping --------------------------------------------------------------------------------

    def loads(self) -> Tensor:
        """How many weights read each slot, (m,) int64."""
        return self._totals()["count"].long()

    def gamma(self, mode: str = "v1") -> Tensor:
        """What `grad_scale` divides each slot's gradient by (plus 1e-6), (m,) float64."""
        check_choice("gamma", "mode", mode, MODES)
        return gamma(mode, self._totals())

    def _totals(self) -> Mapping[str, Tensor]:
        return _shared_places.totals((part.at for part in self._parts()), self.psi.device)

    def slots(self, path: str) -> Tensor:
        """Which slot each weight of a served module reads, in its shape, int64: 8 bytes a weight."""
        part = self._part_at(path)
        return mapping.slots(part.at).view(part.shape)

    def signs(self, path: str) -> Tensor:
        """-1 or 1 for each weight of a served module, in its shape, int64."""
        part = self._part_at(path)
        return mapping.signs(part.at).view(part.shape)

    def weight(self, path: str) -> Tensor:
        """The weight of a served module as it is now, in the array's dtype; autograd follows it."""
        part = self._part_at(path)
        return part.weight(self.psi.dtype)

    def _part_at(self, path: str) -> SharedWeight:
        for one in self.served:
            if one.path == path and isinstance(one.part, SharedWeight):
                return one.part
        raise OptxError(
            f"StableRPS: {path!r} is not served. Served: {[one.path for one in self.served][:8]}."
        )

    def grad_scale(self, mode: str | None = None) -> GradScale:
        """The gradient scaler as a transform for `optx.wrap`: d psi / (Gamma + 1e-6) before the step.

        Gamma_j is, in ``"v1"``, (sum of the scales of slot j's weights)^2 / (their number + 1e-3): if the
        weights of a slot agree, each moves by its own gradient times lr, whatever ``init_std`` is. The other
        modes are the authors' (``"v2"`` sum of scales, ``"v3"`` their mean, ``"v4"`` root of the sum of their
        squares, ``"v5"`` that sum). It comes before `Clip`; weight decay, which the base adds after it, is
        not divided. `optx.wrap(optimizer, handle)` adds it by itself.

        Args:
            mode: None: the injection's ``scaler``.

        Raises:
            OptxError: there is no such mode, or the injection has ``scaler="none"`` and none is given.
        """
        chosen = self.injection.scaler if mode is None else mode
        if chosen == "none":
            raise OptxError(
                'grad_scale: mode is "none", which scales nothing. Leave it out, or give one of '
                f"{', '.join(map(repr, MODES))}."
            )
        check_choice("grad_scale", "mode", chosen, MODES)
        self._check_alive("grad_scale")
        return GradScale(self, chosen)

    # ---- life ---------------------------------------------------------------------------------------

    def _take_off(self, *, restore: bool) -> None:
        self._kept.back(self.served)
        super()._take_off(restore=restore)

    def merge(self, *, untie: bool = False) -> None:
        """Write the weights into their modules; see `Handle.merge`.

        With ``keep="file"`` or ``"none"`` the modules have their weights again meanwhile, as long as it is
        merged.
        """
        self._kept.back(self.served)
        try:
            super().merge(untie=untie)
        except BaseException:
            self._away()
            raise

    def unmerge(self) -> None:
        """See `Handle.unmerge`."""
        super().unmerge()
        self._away()

    def disable(self) -> Any:
        """See `Handle.disable`.

        Raises:
            OptxError: the modules' own weights are not there (``keep`` is ``"file"`` or ``"none"``).
        """
        if self._kept.keep != "memory" and not self.merged:
            raise OptxError(
                f"disable: the modules have no weights of their own meanwhile (keep={self._kept.keep!r}). "
                'Attach with keep="memory", or remove() it.'
            )
        return super().disable()

    def _away(self) -> None:
        if self._kept.keep != "memory" and not self.merged:
            self._kept.away(self.served)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` gave, with the places and scales in it; see `Handle.load_state_dict`.

        Raises:
            FileError: also where it is of other modules or another number of slots; nothing is changed.
        """
        own = self._tensors()
        for key, tensor in own.items():
            given = state_dict.get(key)
            if key.endswith(".place") and given is not None and given.shape == tensor.shape:
                here, there = from_numbers(tensor), from_numbers(given)
                if (here.numel, here.slots) != (there.numel, there.slots):
                    raise FileError(
                        f"state_dict: {key!r} is of {there.numel:,} weights on {there.slots:,} slots; "
                        f"the module has {here.numel:,} on {here.slots:,}. Attach with the same options."
                    )
        super().load_state_dict(state_dict)
        for part in self._parts():
            part.reread()


def _tell_of_bare(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """A bare model's checkpoint has weights that nothing here would compute with."""
    own = f"{prefix}{RESERVED}."
    if f"{prefix}weight" in state_dict and not any(key.startswith(own) for key in state_dict):
        warn(
            f"StableRPS: load_state_dict: the checkpoint has '{prefix}weight' and no shared array, and the "
            "module reads its weight from that: what is loaded takes no part. Load it into the bare model, "
            'and attach with optx.StableRPS(..., init="fit").'
        )
