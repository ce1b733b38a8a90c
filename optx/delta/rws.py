"""Robust weight signatures: robustness against one corruption as a small patch of the shallowest layers.

Source: Robust Weight Signatures, arXiv 2302.12480, section 3.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from optx._errors import FileError, OptxError, ShapeError, near
from optx._files import written_aside
from optx._safetensors import Entry, Reader, brief, entry_of, parsed
from optx.delta._checkpoint_source import Checkpoint, open_source
from optx.delta._claim import claimed
from optx.delta._delta import Delta
from optx.delta._first_layers import shallowest
from optx.delta._name_filter import chooser
from optx.delta._patch import Patch, patch
from optx.delta._quantize import Coded, Form, check_quantize, encode, packed_bytes

__all__ = ["Patch", "Signature", "extract", "patch", "shallowest"]


class Signature(Mapping[str, Tensor]):
    """What makes a model robust against one corruption: a change by tensor name, full or quantized.

    Reading a name gives the change as float32. Patch a model with it by `optx.patch`, or a checkpoint on the
    disk by ``signature.delta().apply(checkpoint, out)``.

    Attributes:
        tensors: by name, a float32 tensor or the codes of one.

    Example:
        >>> import torch, optx
        >>> signature = optx.Signature({"w": torch.tensor([-1.0, -0.4, 0.1, 0.2, 1.0])})
        >>> signature.quantize(5)["w"]
        tensor([-1.0000, -0.5000,  0.0000,  0.0000,  1.0000])
    """

    def __init__(self, tensors: Mapping[str, Tensor | Coded]) -> None:
        self.tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor.decode() if isinstance(tensor, Coded) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"<Signature of {len(self)} tensors, {self.nbytes:,} bytes>"

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers or codes, without names."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def quantize(self, levels: int = 16, form: Form = "linear") -> Signature:
        """The same in integer codes, packed into 1, 2, 4 or 8 bits each.

        Args:
            levels: how many values a tensor may have, 2 to 256; 16 takes 4 bits.
            form: ``"linear"``: evenly spaced between a tensor's smallest and largest number. ``"log"``: the
                sign, and log2 of the magnitude in half as many levels; zeros become the smallest magnitude.
                ``"tanh"``: evenly spaced after a tanh.

        Raises:
            OptxError: levels out of range.
        """
        check_quantize(levels, form)
        return Signature({name: encode(self[name], levels, form) for name in self})

    def subset(self, include: str | None = None, exclude: str | None = None) -> Signature:
        """Only the tensors whose whole name matches ``include`` and not ``exclude`` (regexes)."""
        keep = chooser(include, exclude)
        return Signature({name: tensor for name, tensor in self.tensors.items() if keep(name)})

    def delta(self) -> Delta:
        """The signature as an `optx.Delta` that applies to any checkpoint with these names and shapes."""
        entries = {name: Entry(tuple(t.shape), torch.float32) for name, t in self.tensors.items()}
        return Delta(entries, self.__getitem__, recipe=("signature", _digest(self)))

    def save(self, path: str | PathLike[str]) -> Path:
        """Write a safetensors file, beside the target first and then renamed."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        about = {
            name: {"shape": t.shape, "levels": t.levels, "form": t.form, "low": t.low, "high": t.high}
            for name, t in self.tensors.items()
            if isinstance(t, Coded)
        }
        raw = {n: t.codes if isinstance(t, Coded) else t.contiguous() for n, t in self.tensors.items()}
        target = Path(path).expanduser()
        with claimed(target):
            try:
                with written_aside(target) as aside:
                    save_file(raw, aside, {"optx.signature": json.dumps(about)})
            except SafetensorError as error:  # such as a full disk's
                raise FileError(f"{str(target)!r} could not be written: {error}.") from error
        return target

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Signature:
        """What `save` wrote.

        Raises:
            FileError: the file is missing, damaged, or no signature's.
        """
        reader = Reader(Path(path).expanduser())
        try:
            about = parsed(reader.metadata["optx.signature"])
            if not isinstance(about, dict):
                raise ValueError("its description is no table")
            found = {name: _stored(name, reader.read(name), about.get(name)) for name in reader.entries}
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
            why = (
                "nested too deep" if isinstance(error, RecursionError) else f"{type(error).__name__}: {error}"
            )
            why = brief(why.rstrip("."), quote=False)
            raise FileError(f"{str(path)!r} is no signature's file, or is damaged ({why}).") from None
        return cls(found)


def extract(
    pretrained: Checkpoint,
    standard: Checkpoint,
    robust: Checkpoint,
    *,
    layers: Iterable[str] | str | None = None,
    quantize: int | None = None,
    form: Form = "linear",
) -> Signature:
    """The part of a robust fine-tuning's change that is orthogonal to the standard fine-tuning's.

    With t = robust - pretrained and a = standard - pretrained, tensor by tensor: t - (<t, a> / <a, a>) a.

    Args:
        pretrained: what both were fine-tuned from: a module, a state dict, a safetensors file or a folder.
        standard: fine-tuned on clean data, likewise.
        robust: fine-tuned on corrupted data.
        layers: the tensors to keep: names as from `optx.shallowest`, or a regex (full match). None: all that
            are floating; the paper keeps the shallowest layers.
        quantize: number of levels; None keeps float32. See `Signature.quantize`.
        form: of quantization.

    Paper values:
        ``layers=optx.shallowest(model, 7)``: VGG16, the first 7 convolutions (authors' code). Both models
            come from ImageNet's weights: SGD, lr 0.01, momentum 0.9, weight decay 5e-4, a tenth of it at
            epochs 20 and 40 of 50; corruptions of severity 5.

    Limits: One signature is against one corruption. That shallow layers suffice is the paper's finding on
    VGG16 and ResNet50, not a law.

    Keywords: RWS, robust weight signatures, robustness, corruptions.

    Evidence: ``optx run merge``; ``test_rws.py``.

    Raises:
        OptxError: a name that a checkpoint lacks, or an option out of range.
        ShapeError: a tensor has other shapes in the three.

    Example:
        >>> import torch, optx
        >>> pretrained, standard = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, 1.0, 0.0])}
        >>> robust = {"w": torch.tensor([2.0, 0.0, 3.0])}
        >>> optx.rws.extract(pretrained, standard, robust)["w"]
        tensor([ 1., -1.,  3.])

    Source: arXiv 2302.12480, section 3.
    """
    if quantize is not None:
        check_quantize(quantize, form)
    sources = [
        open_source(given, what)
        for given, what in ((pretrained, "pretrained"), (standard, "standard"), (robust, "robust"))
    ]
    names = _chosen(sources[0].entries, sources[0].tied, layers)
    for source, what in zip(sources[1:], ("standard", "robust"), strict=True):
        for name in names:
            place = source.tied.get(name, name)
            if place not in source.entries:
                raise OptxError(f"rws.extract: {what} lacks {name!r}. {near(name, source.entries)}")
            if source.entries[place].shape != sources[0].entries[name].shape:
                raise ShapeError(
                    f"rws.extract: {name!r} has shape {source.entries[place].shape} in {what} and "
                    f"{sources[0].entries[name].shape} in pretrained. Leave it out of layers=."
                )
    found: dict[str, Tensor | Coded] = {}
    for name in names:
        before, clean, hard = (s.read(s.tied.get(name, name)).to("cpu", torch.float32) for s in sources)
        part = orthogonal(hard - before, clean - before)
        found[name] = part if quantize is None else encode(part, quantize, form)
    return Signature(found)


def orthogonal(change: Tensor, along: Tensor) -> Tensor:
    """A change without its part along another one: t - (<t, a> / <a, a>) a, sums in float64."""
    t, a = change.flatten().double(), along.flatten().double()
    size = a.dot(a)
    if size == 0:
        return change
    return (t - (t.dot(a) / size) * a).view(change.shape).to(torch.float32)


def _chosen(
    entries: Mapping[str, Entry], tied: Mapping[str, str], layers: Iterable[str] | str | None
) -> list[str]:
    floating = [name for name, entry in entries.items() if entry.dtype.is_floating_point]
    if layers is None or isinstance(layers, str):
        keep = chooser(layers, None)
        names = [name for name in floating if keep(name)]
    else:
        names = list(dict.fromkeys(tied.get(name, name) for name in layers))
        for name in names:
            if name not in floating:
                raise OptxError(f"rws.extract: pretrained has no floating {name!r}. {near(name, floating)}")
    if not names:
        raise OptxError(f"rws.extract: layers={layers!r} chooses nothing. {near(str(layers), floating)}")
    return names


def _digest(signature: Signature) -> str:
    made = hashlib.blake2b(digest_size=16)
    for name in signature:
        made.update(name.encode() + signature[name].contiguous().numpy().tobytes())
    return made.hexdigest()


def _stored(name: str, tensor: Tensor, about: object) -> Tensor | Coded:
    """A tensor of a file, or codes with what the file says of them; ValueError where it makes no sense."""
    if about is None:
        return tensor
    if not isinstance(about, dict):
        raise ValueError(f"what it says of {brief(name)} is no table")
    told = cast(dict[str, Any], about)
    shape, levels, form = (
        entry_of(name, {"dtype": "U8", "shape": told["shape"]}).shape,
        told["levels"],
        told["form"],
    )
    low, high = told["low"], told["high"]
    if type(levels) is not int or not isinstance(form, str):
        raise ValueError(f"the levels or the form of {brief(name)} are none")
    check_quantize(levels, form)
    if not all(type(bound) in (int, float) and abs(bound) < 1e300 for bound in (low, high)):
        raise ValueError(f"a bound of {brief(name)} is no number")
    if tensor.dtype != torch.uint8 or tuple(tensor.shape) != (packed_bytes(math.prod(shape), levels),):
        raise ValueError(f"the codes of {brief(name)} are not as many as its shape says")
    return Coded(tensor, shape, levels, cast(Form, form), float(low), float(high))
