"""The handle of `optx.Perp`: merges under the mask, or says that a merge would fill it in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from optx._errors import FileError, MergeError, OptxError
from optx._masks import Masks
from optx._module_paths import bare_path
from optx.inject._handle import Handle
from optx.inject._part import Part
from optx.inject._perp_parts import Masked, MaskedConvLoRA, MaskedLinearLoRA


class PerpHandle(Handle):
    """What `optx.attach` returns for `optx.Perp`.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> masks = optx.Masks.from_bool({"0.weight": torch.eye(8).bool()})
        >>> masks.apply_(model)
        >>> handle = optx.attach(model, optx.Perp(adapter="mask", rank=2), masks=masks)
        >>> handle.masks == masks
        True
    """

    _may_fill = False  # while a merge for good goes through merge()

    @property
    def masks(self) -> Masks:
        """The masks of the weights that have an adapter, by the weights' names in the model.

        Raises:
            OptxError: none has.
        """
        found = self._masked()
        if not found:
            raise OptxError(f"masks: {self.injection} has no adapter, so it holds no masks.")
        names = {path: bare_path(f"{path}.weight") for path in found}
        return Masks(
            {names[path]: part.mask for path, part in found.items()},
            {names[path]: part.weight_shape for path, part in found.items()},
        )

    def _masked(self) -> dict[str, Masked]:
        return {one.path: one.part for one in self.served if isinstance(one.part, Masked)}

    def merge(self, *, untie: bool = False, dense: bool = False) -> None:
        """Fold everything into the weights, which keep their zeros; see `Handle.merge`.

        Args:
            untie: a served weight that other modules share (a head that is the embedding) gets a copy of its
                own, which `unmerge` gives up again.
            dense: ``adapter="lora"`` may fill the zeros in.

        Raises:
            MergeError: ``adapter="lora"`` without ``dense=True``, a base weight that is not 0 any more where
                it was pruned, or as `Handle.merge`; nothing is changed.
        """
        self._check_sparse(dense)
        super().merge(untie=untie)

    def merge_and_unload(self, *, untie: bool = False, dense: bool = False) -> nn.Module:
        """Merge for good and take everything off; see `merge` and `Handle.merge_and_unload`."""
        self._may_fill = dense
        try:
            return super().merge_and_unload(untie=untie)
        finally:
            self._may_fill = False

    def _check_sparse(self, dense: bool) -> None:
        filling = [one for one in self.served if _fills(one.part)]
        if filling and not dense and not self._may_fill:
            raise MergeError(
                f"merge: plain LoRA at {filling[0].path!r} would fill in the zeros of the pruned weight. Use "
                "adapter='mask' or 'lora_prune', or pass dense=True if the weights may become dense."
            )

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` gave; masks have to be those of the weights here.

        Raises:
            FileError: as `Handle.load_state_dict`, or a mask is another; nothing is changed.
            MergeError: it is merged.
        """
        own = self.state_dict()
        for key, tensor in own.items():
            given = state_dict.get(key)
            if not key.endswith(".mask") or given is None or given.shape != tensor.shape:
                continue
            if not torch.equal(given.to(tensor.device), tensor):
                raise FileError(
                    f"state_dict: {key!r} is not the mask that the weight has here: it is of a model "
                    "that was pruned in another way."
                )
        super().load_state_dict(state_dict)


def _fills(part: Part) -> bool:
    return isinstance(part, MaskedLinearLoRA | MaskedConvLoRA) and not part.prunes
