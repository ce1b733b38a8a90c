"""Which weights of a pruned model are kept: one bit a weight, by the parameters' names."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optx import _masked_model as masked_model
from optx._errors import FileError, OptxError, ShapeError, shown
from optx._mask_bits import has_stray_bits, layout, ones, pack, packed_shape, unpack
from optx._mask_files import read_masks, write_masks
from optx._mask_report import MaskReport, report_of
from optx._mask_sources import Pruned, zeros_of

if TYPE_CHECKING:
    from typing_extensions import Self


class Masks(Mapping[str, Tensor]):
    """Which weights of a pruned model are kept, by the names of its parameters; one bit a weight.

    `optx.prune` makes them; `Masks.of` takes them from a model that is pruned already. What is masked is 0
    and is to stay so: ``optx.KeepMask`` sees to it in every step.

    A mapping of names to bool tensors, which are made when they are asked for (True: the weight is kept), on
    the CPU. What it holds never changes.

    Args:
        bits: by name, uint8 of shape (rows, bytes of a row): rows are the weight's first dimension, the
            rest of it is flattened, number j of a row is bit ``j % 8`` of byte ``j // 8``, and bits past the
            last are 0.
        shapes: by name, the weight's.

    Paper values:
        None: what is pruned is the methods' matter.

    Limits: Masks of a model whose weights are quantised or not in memory (offloaded, meta) are taken from
    its checkpoint. Of sharded models each process holds the whole masks, an eighth of a byte a weight.

    Keywords: sparsity, sparse, zeros, pruning, prune, 2:4, n:m, semi-structured, mask.

    Evidence: ``optx run prune``; ``test_masks.py``, ``test_masks_models.py``.

    Raises:
        OptxError: nothing is given, or bits that are no mask of their shape; names it.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Linear(4, 2)
        >>> masks = optx.Masks.from_bool({"weight": torch.tensor([[1, 0, 0, 1], [1, 1, 0, 1]]).bool()})
        >>> masks.apply_(model)
        >>> masks.sparsity, optx.Masks.of(model) == masks
        (0.375, True)
        >>> optx.Masks({"weight": masks.packed("weight")}, {"weight": (2, 4)}) == masks
        True

    Source: the file and the layout are optx's own; PERP, arXiv 2312.15230, is why the mask is kept and not
    taken from zeros anew.
    """

    def __init__(self, bits: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
        if not bits or bits.keys() != shapes.keys():
            what = "no tensor" if not bits else "names in bits that are not those in shapes"
            raise OptxError(f"Masks: there is {what}; give bits and a shape for each weight.")
        self._shapes = {name: tuple(int(size) for size in shapes[name]) for name in bits}
        self._bits = {name: _checked(name, one, self._shapes[name]) for name, one in bits.items()}
        self._digest = ""
        self._model: weakref.ref[nn.Module] | None = None

    # ---- where masks come from -------------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        pruned: Pruned,
        names: str | Sequence[str] | None = None,
        *,
        min_sparsity: float = 0.01,
    ) -> Self:
        """The masks of what is pruned already: a weight that is 0 counts as masked.

        Weights of two or more dimensions are looked at, as biases and norms may start at 0. Of these, one
        with a few zeros is not pruned, and neither is one of nothing but zeros, which is how layers start
        that are to add nothing at first: such are left out, the latter with a warning.

        Args:
            pruned: a module, a state dict, a safetensors file, or a folder of shards (read a tensor at a
                time).
            names: which weights: a list of names, or a regex of whole names. Those have no least sparsity,
                may have one dimension and may be nothing but zeros; of a list, each has to have zeros.
            min_sparsity: least share of zeros of a weight that is not named.

        Raises:
            OptxError: nothing is pruned, or a weight is quantised or not in memory; names it.
            FileError: the file or folder is missing, damaged, or no model's.
        """
        found = zeros_of(pruned, names, min_sparsity)
        made = cls(
            {name: bits for name, (bits, _) in found.items()}, {n: shape for n, (_, shape) in found.items()}
        )
        if isinstance(pruned, nn.Module):
            made._model = weakref.ref(pruned)
        return made

    @classmethod
    def from_bool(cls, masks: Mapping[str, Tensor]) -> Self:
        """From bool tensors of the weights' shapes: True is kept.

        Raises:
            OptxError: one is not bool; names it.
        """
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:  # pyright: ignore[reportUnnecessaryIsInstance]
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptxError(f"Masks.from_bool: {name!r} is {got}; it must be a bool tensor, True: kept.")
        return cls({n: pack(m) for n, m in masks.items()}, {n: tuple(m.shape) for n, m in masks.items()})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """What `save` wrote.

        Raises:
            FileError: the file is missing, damaged, or holds no masks.
        """
        bits, shapes = read_masks(path)
        try:
            return cls(bits, shapes)
        except OptxError as error:
            raise FileError(f"Masks.load: {str(path)!r} is damaged ({error})") from None

    # ---- a mapping -------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        """The mask of one weight: a new bool tensor of its shape, on the CPU."""
        return unpack(self._bits[name], self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __contains__(self, name: object) -> bool:
        return name in self._bits

    def packed(self, name: str) -> Tensor:
        """The mask of one weight as it is held, in a copy: see the class."""
        return self._bits[name].clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one weight."""
        return self._shapes[name]

    def __repr__(self) -> str:
        return f"Masks({len(self)} weights, {self.sparsity:.1%} of {self._numel:,} numbers masked)"

    # ---- what they say ---------------------------------------------------------------------------------

    @property
    def _numel(self) -> int:
        return sum(rows * length for rows, length in map(layout, self._shapes.values()))

    @property
    def sparsity(self) -> float:
        """The share of all numbers of these weights that is masked."""
        return 1.0 - sum(map(ones, self._bits.values())) / max(self._numel, 1)

    def report(self) -> MaskReport:
        """A table: of each weight its shape, zeros, sparsity and pattern. ``print`` shows it, rich too."""
        return report_of((name, self._shapes[name], self._bits[name]) for name in self)

    def digest(self) -> str:
        """A hash of names, shapes and bits, whatever the names' order."""
        if not self._digest:
            found = hashlib.blake2b(digest_size=16)
            for name in sorted(self._bits):
                found.update(repr((name, self._shapes[name])).encode())
                found.update(self._bits[name].numpy().tobytes())
            self._digest = found.hexdigest()
        return self._digest

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self._shapes == other._shapes and all(
            torch.equal(bits, other._bits[name]) for name, bits in self._bits.items()
        )

    def __hash__(self) -> int:
        return hash(self.digest())

    # ---- two of them -----------------------------------------------------------------------------------

    def __or__(self, other: Masks) -> Masks:
        """Union of what is kept: a weight is masked where both mask it; one that either lacks is left out.

        Raises:
            OptxError: they share no name, so that nothing would be masked.
            ShapeError: a weight has two shapes; names it.
        """
        if not isinstance(other, Masks):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        self._check_shapes(other)
        shared = [name for name in self if name in other]
        if not shared:
            raise OptxError(
                "Masks: these two share no weight, so that their union keeps all; & is what masks either's."
            )
        return Masks(
            {n: self._bits[n] | other._bits[n] for n in shared}, {n: self._shapes[n] for n in shared}
        )

    def __and__(self, other: Masks) -> Masks:
        """Intersection of what is kept: a weight is masked where either masks it.

        Raises:
            ShapeError: a weight has two shapes; names it.
        """
        if not isinstance(other, Masks):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        self._check_shapes(other)
        bits = {**self._bits, **other._bits}
        shared = {name: self._bits[name] & other._bits[name] for name in self if name in other}
        return Masks(bits | shared, self._shapes | other._shapes)

    def _check_shapes(self, other: Masks) -> None:
        for name in self:
            if name in other and self._shapes[name] != other._shapes[name]:
                raise ShapeError(
                    f"Masks: {name!r} has shape {self._shapes[name]} in one and {other._shapes[name]} in the "
                    "other."
                )

    # ---- on a model ------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module | None:
        """The model that they were made from, or applied to last, if it is still there."""
        return None if self._model is None else self._model()

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """A model's parameters that have a mask, by the masks' names.

        What DDP, FSDP and torch.compile put into names is not looked at; of tied weights either name serves.

        Raises:
            OptxError: the model lacks one, or it is quantised or not in memory; names it.
            ShapeError: one has another shape; names it.
        """
        return masked_model.parameters_of("Masks.parameters_of", self._shapes, model)

    def apply_(self, model: nn.Module) -> None:
        """Set what is masked to 0, in place; of sharded weights each process its part.

        Raises:
            OptxError: as `parameters_of`, before anything is changed.
            ShapeError: so too.
        """
        masked_model.apply_(self._bits, self._shapes, model)
        self._model = weakref.ref(model)

    def verify(self, model: nn.Module) -> None:
        """Raise unless every masked weight is 0.

        Looked at are the parameters themselves. What an adapter adds counts once it is merged into them;
        while it is beside them (LoRA before ``merge()``), what the layer computes may be dense all the same.

        Raises:
            OptxError: weights are not 0; names the first, and says how many. Or as `parameters_of`.
            ShapeError: as `parameters_of`.
        """
        masked_model.verify(self._bits, self._shapes, model)

    def save(self, path: str | PathLike[str]) -> None:
        """Write them as a safetensors file of bits, whole or not at all.

        Raises:
            OSError: nothing can be written there.
        """
        write_masks(path, self._bits, self._shapes)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._bits, self._shapes)  # a weak reference to a model can't be copied


def _checked(name: str, bits: Any, shape: tuple[int, ...]) -> Tensor:
    wanted = packed_shape(shape)
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or tuple(bits.shape) != wanted:
        got = f"{bits.dtype} of shape {tuple(bits.shape)}" if isinstance(bits, Tensor) else shown(bits)
        raise OptxError(
            f"Masks: the bits of {name!r} are {got}; of a weight of shape {shape} they are uint8 of {wanted}."
        )
    if has_stray_bits(bits, shape):
        raise OptxError(f"Masks: the bits of {name!r} have some past the end of a row; those must be 0.")
    return bits.detach().to("cpu", copy=True).contiguous()
