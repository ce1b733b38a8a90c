"""Finished blocks in a folder, so that a run that was killed goes on where it stopped, to the same result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import FileError, OptxError
from optx._files import written_aside
from optx._mask_bits import packed_shape
from optx._safetensors import Reader
from optx.pruning._blocks_plan import Unit
from optx.pruning._calibration import Batch, digest
from optx.pruning._method import PruneMethod
from optx.pruning._prune_layers import Layer

_MANIFEST = "prune.json"


class Ledger:
    """What was finished of one run: a file a block, and one that says of which run.

    A run is told by its method, its data, and every number of the dense model: of another one nothing is
    taken.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        model: nn.Module,
        method: PruneMethod,
        layers: Sequence[Layer],
        batches: Sequence[Batch],
    ) -> None:
        """Begin a run, or go on with one.

        Raises:
            OptxError: the folder has another run's blocks, or other files.
            FileError: it is damaged.
            OSError: nothing can be written there.
        """
        self.folder = Path(folder).expanduser()
        chosen = {id(layer.weight) for layer in layers}
        rest = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if id(t) not in chosen}
        run = {
            "method": repr(method),
            "layers": [layer.name for layer in layers],
            "data": digest([(batch.args, batch.kwargs) for batch in batches]),
            "rest of the model": digest(rest),
        }
        self.dense = self._begin(run, layers)

    def _begin(self, run: Mapping[str, Any], layers: Sequence[Layer]) -> dict[str, str]:
        now = {layer.name: digest(layer.weight) for layer in layers}
        path = self.folder / _MANIFEST
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                raise OptxError(
                    f"prune: resume={str(self.folder)!r} has files of something else; give a new folder."
                )
            with written_aside(path) as aside:
                aside.write_text(json.dumps({**run, "weights": now}), encoding="utf-8")
            return now
        try:
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            dense: dict[str, str] = kept.pop("weights")
            other = [key for key, value in run.items() if kept[key] != value]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FileError(f"prune: {str(path)!r} is damaged ({error}); delete the folder.") from None
        if other:
            raise OptxError(
                f"prune: resume={str(self.folder)!r} is of another run (it differs in {', '.join(other)}); "
                "give a new folder, or call prune as before."
            )
        self._check_weights(dense, now)
        return dense

    def _check_weights(self, dense: Mapping[str, str], now: Mapping[str, str]) -> None:
        """Weights must be the dense ones, or what this run has made of them."""
        changed = {name for name in now if now[name] != dense.get(name)}
        for file in self.folder.glob("*.safetensors") if changed else ():
            reader = Reader(file)
            changed -= {
                name
                for name in changed
                if _weight(name) in reader.entries and now[name] == digest(reader.read(_weight(name)))
            }
        if changed:
            raise OptxError(
                f"prune: resume={str(self.folder)!r} is of a model with another {sorted(changed)[0]!r}; "
                "load the dense model as before, or give a new folder."
            )

    def take(self, unit: Unit) -> dict[str, Tensor] | None:
        """The masks of a finished block, whose weights are set to what they were; None: it isn't finished.

        Raises:
            FileError: its file is damaged, or lacks something.
        """
        path = self._file(unit)
        if not path.exists():
            return None
        reader = Reader(path)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in unit.layers:
            shape, bits = layer.weight.shape, packed_shape(layer.weight.shape)
            try:
                weight, mask = reader.read(_weight(layer.name)), reader.read(_mask(layer.name))
            except KeyError:
                raise FileError(f"prune: {str(path)!r} lacks {layer.name!r}; delete it.") from None
            if weight.shape != shape or weight.dtype != layer.weight.dtype or tuple(mask.shape) != bits:
                raise FileError(f"prune: {str(path)!r} has another {layer.name!r}; delete it.")
            found[layer.name] = (weight, mask)
        with torch.no_grad():
            for layer in unit.layers:
                layer.weight.copy_(found[layer.name][0])
        return {name: mask for name, (_, mask) in found.items()}

    def put(self, unit: Unit, weights: Mapping[str, Tensor], bits: Mapping[str, Tensor]) -> None:
        """Keep a block that is finished: its new weights and their masks, by name."""
        from safetensors.torch import save_file

        tensors = {_mask(name): mask.contiguous() for name, mask in bits.items()}
        tensors |= {_weight(name): new.cpu().contiguous() for name, new in weights.items()}
        with written_aside(self._file(unit)) as aside:
            save_file(tensors, aside)

    def _file(self, unit: Unit) -> Path:
        return self.folder / f"{unit.path or 'model'}.safetensors"


def _weight(name: str) -> str:
    return f"weight:{name}"


def _mask(name: str) -> str:
    return f"mask:{name}"
