"""What each tensor of a merge's result is made of: layers put in their places, parameters found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, near
from optx._safetensors import Entry
from optx.delta._adapted_source import Adapted
from optx.delta._checkpoint_source import Source, open_source
from optx.delta._delta import Delta
from optx.delta._lora import lora_difference
from optx.delta._merge_config_json import read_json
from optx.delta._merge_file import MergeFile, ModelRef, Part, Slice
from optx.delta._merge_group import Group, Made, Read, finished
from optx.delta._merge_methods import Resolver, check_models
from optx.delta._merge_settings import Table
from optx.delta._merge_tokenizer import vocabulary_of
from optx.delta._merge_vocabulary import Vocabulary
from optx.delta._model_layers import (
    Layers,
    has_rows_of_tokens,
    is_derived,
    layers_of,
    place_of,
    tied_to,
)
from optx.delta._refusals import check_not_quantised


@dataclass(frozen=True)
class Input:
    """One model's tensor.

    Attributes:
        model: which.
        name: of the tensor, in the model's file.
        shown: the name that filters see; another where a head is the embeddings.
    """

    model: ModelRef
    name: str
    shown: str


@dataclass(frozen=True)
class Output:
    """One tensor of the result.

    Attributes:
        name: of it.
        entry: its shape and dtype.
        inputs: what it is made of, one per model.
        base: the base's place among them.
        dtype: that it is computed in; None: it is copied from the first.
        shared: the method's parameters.
        each: those of each model.
        aligned: whether rows are put in the order of the result's vocabulary first.
    """

    name: str
    entry: Entry
    inputs: Sequence[Input]
    base: int | None
    dtype: torch.dtype | None
    shared: Table
    each: Sequence[Table]
    aligned: bool = False


class Models:
    """The models of a file, opened."""

    def __init__(self, file: MergeFile) -> None:
        self.sources = {model: _open(model) for model in file.models}
        self._layers: dict[ModelRef, Layers] = {}

    def __getitem__(self, model: ModelRef) -> Source:
        return self.sources[model]

    def layers(self, model: ModelRef) -> Layers:
        """Its tensors by layer."""
        if model not in self._layers:
            self._layers[model] = layers_of(self.sources[model].entries)
        return self._layers[model]

    def find(self, model: ModelRef, name: str) -> str | None:
        """The name under which a model has a tensor; None if it hasn't got it."""
        entries = self.sources[model].entries
        return name if name in entries else tied_to(name, entries)

    def reader(self, one: Input) -> Read:
        """What reads a tensor by pieces."""
        source = self.sources[one.model]
        return source.reader(one.name) if isinstance(source, Adapted) else partial(source.piece, one.name)


def _open(model: ModelRef) -> Source:
    source = open_source(model.path, model.text)
    if model.adapter is None:
        return source
    return Adapted(source, lora_difference(Delta, model.adapter, "product", source, offered=True), model.text)


class Plan:
    """A whole merge, tensor by tensor.

    Args:
        file: what is asked for.
        seed: of random masks.

    Attributes:
        file: with the base among the models, as mergekit puts it there.
        models: opened.
        donor: the model whose configuration and tokenizer the result has.
        outputs: by name.
        origins: where each layer of the result is from, with slices: model and number.
        vocabulary: of the result, where the file asks for a tokenizer.
        notes: what a person should know, in sentences.

    Raises:
        OptxError: models that don't go together, or a parameter that lacks; names it.
        ShapeError: tensors of several shapes; names one.
    """

    def __init__(self, file: MergeFile, seed: int = 0) -> None:
        self.file = _with_base(file)
        self.seed = seed
        self.models = Models(self.file)
        self.donor = self.file.base or self.file.slices[0].parts[0].model
        self.origins: list[tuple[ModelRef, int]] = []
        self.outputs: dict[str, Output] = {}
        self.notes: list[str] = []
        self.vocabulary: Vocabulary | None = None
        if self.file.tokenizer is not None:
            models = self.file.models
            self.vocabulary = vocabulary_of(self.file.tokenizer, models, self.donor, self.notes)
        self._resolver = Resolver(self.file)
        self._check_kinds()
        self._check_codes()
        for i, one in enumerate(self.file.slices):
            where = "'models'" if file.whole else f"slices[{i}]"
            check_models(self.file, one, self._base_of(one), where)
        for name, one, names, t in self._whole() if file.whole else self._sliced():
            self._add(name, one, names, t)

    @property
    def entries(self) -> dict[str, Entry]:
        """Of the result."""
        return {name: output.entry for name, output in self.outputs.items()}

    def make(self, name: str) -> Made:
        """One tensor of the result, or what gives its pieces."""
        output = self.outputs[name]
        first, *rest = output.inputs
        if output.dtype is None:
            return self._agreed(output, first, rest)
        group = Group(
            name,
            output.entry.shape,
            output.dtype,
            [one.model.text for one in output.inputs],
            self._aligned(output) if output.aligned else [self.models.reader(one) for one in output.inputs],
            output.base,
            output.shared,
            output.each,
            self.seed,
        )
        return finished(group, self._resolver.method.merge(group), output.entry.dtype)

    def _aligned(self, output: Output) -> list[Read]:
        assert self.vocabulary is not None
        assert output.dtype is not None
        models = [one.model for one in output.inputs]
        tensors = [self.models[one.model].read(one.name).to(output.dtype) for one in output.inputs]
        base = self.file.base if output.base is None else models[output.base]
        made = self.vocabulary.aligned(output.name, models, tensors, base)

        def reader(flat: Tensor) -> Read:
            return lambda begin, end: flat[begin:end]

        return [reader(tensor.reshape(-1)) for tensor in made]

    def _agreed(self, output: Output, first: Input, rest: Sequence[Input]) -> Made:
        """What has no mean: a tensor of integers, which must be the same in all models."""
        whole = self.models[first.model].read(first.name)
        for other in rest:
            theirs = self.models[other.model].read(other.name)
            if theirs.dtype != whole.dtype or not torch.equal(theirs, whole):
                raise OptxError(
                    f"merge: {output.name!r} is {str(whole.dtype).removeprefix('torch.')} and differs "
                    f"between {first.model.text!r} and {other.model.text!r}. Only floats are merged: "
                    "quantised models must be dequantised first."
                )
        return whole

    def _base_of(self, one: Slice) -> ModelRef | None:
        return one.base or self.file.base

    def _check_kinds(self) -> None:
        """Tensors of one name mean one thing in one kind of model only."""
        kinds = {model: read_json(model.path / "config.json").get("model_type") for model in self.file.models}
        own = kinds[self.donor]
        for model, kind in kinds.items():
            if kind is not None and own is not None and kind != own:
                raise OptxError(
                    f"merge: {model.text!r} is a {kind} and {self.donor.text!r} a {own}; they don't go "
                    f"together. "
                    "If they do, let config.json say the same model_type."
                )

    def _check_codes(self) -> None:
        """Codes and scales are copied as they are, between models that are quantised alike, or not at all."""
        file, models = self.file, self.file.models
        tables = [file.parameters, *(one.parameters for one in file.slices)]
        tables += [part.parameters for one in file.slices for part in one.parts]
        changed = file.dtype or file.out_dtype or any(table.get("scale") is not None for table in tables)
        if file.method == "passthrough" and not changed:
            ways = [read_json(model.path / "config.json").get("quantization_config") for model in models]
            if all(way == ways[0] for way in ways):
                return
        for model in models:
            check_not_quantised("merge", self.models[model].entries, repr(model.text), lambda _name: True)

    # ---- which tensors there are ---------------------------------------------------------------------

    def _whole(self) -> Iterator[tuple[str, Slice, list[str], float]]:
        [one] = self.file.slices
        counts = self.models.layers(self.donor).counts
        names = dict.fromkeys(self.models[self.donor].entries)
        for part in one.parts:
            names |= dict.fromkeys(self.models[part.model].entries)
        for name in names:
            if is_derived(name) and name not in self.models[self.donor].entries:
                continue
            place = place_of(name)
            depth = counts.get(place.stack, 1) - 1
            t = 0.0 if place.layer is None else place.layer / depth if depth else 1.0
            yield name, one, [name] * len(one.parts), t

    def _sliced(self) -> Iterator[tuple[str, Slice, list[str], float]]:
        slices = self.file.slices
        stack = self._check_slices()
        for one, early in ((slices[0], True), (slices[-1], False)):
            names = dict[str, None]()
            for part in one.parts:
                layers = self.models.layers(part.model)
                names |= dict.fromkeys(layers.first if early else layers.last)
            for name in names:
                if not is_derived(name) or name in self.models[one.parts[0].model].entries:
                    yield name, one, [name] * len(one.parts), 0.0
        for one in slices:
            begin, end = one.parts[0].layers or (0, 0)
            for i in range(end - begin):
                t = i / (end - begin - 1) if end - begin > 1 else 1.0
                number = len(self.origins)
                self.origins.append((one.parts[0].model, begin + i))
                starts = [(part.layers or (0, 0))[0] + i for part in one.parts]
                inner = dict[str, None]()
                for part, layer in zip(one.parts, starts, strict=True):
                    inner |= dict.fromkeys(self.models.layers(part.model).inner.get((stack, layer), []))
                if not inner:
                    raise OptxError(
                        f"config: {one.parts[0].model.text!r} has no tensor of layer {starts[0]}."
                    )
                for rest in inner:
                    yield f"{stack}.{number}.{rest}", one, [f"{stack}.{s}.{rest}" for s in starts], t

    def _check_slices(self) -> str:
        """The name of the layers' one stack; every range lies within its model."""
        stacks = {model: self.models.layers(model).only(repr(model.text)) for model in self.file.models}
        for i, one in enumerate(self.file.slices):
            for part in one.parts:
                stack, (_, end) = stacks[part.model], part.layers or (0, 0)
                depth = self.models.layers(part.model).counts[stack]
                if end > depth:
                    raise OptxError(
                        f"config: layer_range of slices[{i}] ends at {end}, and {part.model.text!r} has "
                        f"{depth} layers."
                    )
        if len(set(stacks.values())) > 1:
            found = ", ".join(f"{stack!r} in {model.text!r}" for model, stack in stacks.items())
            raise OptxError(
                f"config: the models' layers have several names ({found}): they are of two kinds."
            )
        return next(iter(stacks.values()))

    # ---- one tensor ----------------------------------------------------------------------------------

    def _add(self, name: str, one: Slice, names: Sequence[str], t: float) -> None:
        if is_derived(name):
            self._copy(name, one, names)
            return
        inputs = [self._input(part, own, name) for part, own in zip(one.parts, names, strict=True)]
        models = [part.model for part in one.parts]
        of_file = self._base_of(one)
        base = models.index(of_file) if of_file in models and self._resolver.method.base != "none" else None
        found = [self.models[one.model].entries[one.name] for one in inputs]
        aligned = self._is_aligned(name, models, found)
        self._check_shapes(name, inputs, found, aligned)
        if not self.file.whole:
            self._check_width(inputs[0], found[0])
        if not all(entry.dtype.is_floating_point for entry in found):
            self.outputs[name] = Output(name, found[0], inputs, None, None, {}, [])
            return
        shown = [one.shown for one in inputs]
        shared, each = self._resolver.values(one, name, shown, base, t)
        dtype = self.file.dtype or self._widest(name, found)
        shape = found[0].shape
        if aligned and self.vocabulary is not None:
            shape = (self.vocabulary.size, *shape[1:])
        entry = Entry(shape, self.file.out_dtype or dtype)
        self.outputs[name] = Output(name, entry, inputs, base, dtype, shared, each, aligned)

    def _is_aligned(self, name: str, models: Sequence[ModelRef], found: Sequence[Entry]) -> bool:
        """Whether a tensor's rows have to be put in the order of the result's vocabulary."""
        known = self.vocabulary
        if known is None or not has_rows_of_tokens(name) or not all(entry.shape for entry in found):
            return False
        return not all(known.is_plain(m, entry.shape[0]) for m, entry in zip(models, found, strict=True))

    def _copy(self, name: str, one: Slice, names: Sequence[str]) -> None:
        """What follows from the configuration is taken from the donor, or the first model that has it."""
        owners = [(part.model, own) for part, own in zip(one.parts, names, strict=True)]
        owners.sort(key=lambda owner: owner[0] != self.donor)
        for model, own in owners:
            if own in self.models[model].entries:
                entry = self.models[model].entries[own]
                self.outputs[name] = Output(name, entry, [Input(model, own, own)], None, None, {}, [])
                return

    def _input(self, part: Part, name: str, result: str) -> Input:
        place = self.models.find(part.model, name)
        if place is None:
            entries = self.models[part.model].entries
            raise OptxError(
                f"merge: {part.model.text!r} lacks {name!r}, which {result!r} of the result is made of. "
                f"{near(name, entries)}"
            )
        return Input(part.model, place, name)

    def _check_shapes(
        self, name: str, inputs: Sequence[Input], found: Sequence[Entry], aligned: bool
    ) -> None:
        for one, entry in zip(inputs, found, strict=True):
            if entry.shape[aligned:] != found[0].shape[aligned:]:
                way = "resize one"
                if has_rows_of_tokens(name) and not aligned:
                    way = "give 'tokenizer_source: base' or 'union', which puts equal tokens in equal rows"
                raise ShapeError(
                    f"merge: {name!r} has shape {found[0].shape} in {inputs[0].model.text!r} and "
                    f"{entry.shape} in {one.model.text!r}. To merge them, {way}."
                )

    def _check_width(self, one: Input, entry: Entry) -> None:
        """Layers that follow one another must be of one width: as some layer of the donor."""
        source, place = self.models[self.donor], place_of(one.name)
        layers = range(self.models.layers(self.donor).counts.get(place.stack, 0))
        names = [one.name] if place.layer is None else [place.at(layer) for layer in layers]
        shapes = [source.entries[name].shape for name in names if name in source.entries]
        rows = int(has_rows_of_tokens(one.name))
        if shapes and entry.shape[rows:] not in [shape[rows:] for shape in shapes]:
            raise ShapeError(
                f"merge: {one.name!r} has shape {entry.shape} in {one.model.text!r} and {shapes[0]} in "
                f"{self.donor.text!r}; their layers don't go together."
            )

    def _widest(self, name: str, found: Sequence[Entry]) -> torch.dtype:
        dtype = found[0].dtype
        for entry in found[1:]:
            if entry.dtype != dtype:
                # torch promotes no 8-bit float with another dtype.
                narrow = dtype.itemsize == 1 or entry.dtype.itemsize == 1
                dtype = torch.float32 if narrow else torch.promote_types(dtype, entry.dtype)
        if dtype.itemsize == 1 and self.file.method != "passthrough":
            raise OptxError(
                f"merge: {name!r} is {str(dtype).removeprefix('torch.')} in every model, which nothing can "
                "be computed in; give 'dtype: float32' or another."
            )
        return dtype


def _with_base(file: MergeFile) -> MergeFile:
    """With the base among the models, after the others, where the file lists models without it."""
    if not file.whole or file.base is None:
        return file
    [one] = file.slices
    if any(part.model == file.base for part in one.parts):
        return file
    return replace(file, slices=[replace(one, parts=[*one.parts, Part(file.base, None, {})])])
