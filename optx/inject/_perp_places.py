"""What PERP finds in a model: the head, biases, and masks of what is pruned."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from optx._errors import OptxError, ShapeError, TargetError, near
from optx._masks import Masks
from optx._module_paths import bare_path, paths_of
from optx.inject._computes import weight_of
from optx.inject._injection import Site
from optx.inject._quantised import kind_of
from optx.inject._targets import check_servable
from optx.inject._weights import shape_of


def head_of(model: nn.Module, head: bool | str) -> str:
    """The path of the head, empty if none is to be served.

    Args:
        model: whose.
        head: whether there is one to find, or its path.

    Raises:
        TargetError: it is not found.
    """
    if not head:
        return ""
    modules = {path: module for path, module in model.named_modules() if path}
    if isinstance(head, str):
        path = paths_of(model).here.get(head, "")
        if not path:
            raise TargetError(f"attach: Perp's head={head!r} is no module. {near(head, modules)}")
        return path
    found = getattr(model, "get_output_embeddings", lambda: None)()
    path = next((path for path, module in modules.items() if module is found), "")
    if not path:
        raise TargetError(
            f"attach: Perp has head=True, and this {type(model).__name__} says of no module that it is its "
            "output head. Name it by its path: head='lm_head'."
        )
    return path


def masked_parameters(masks: Masks, model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters that have a mask, by name; codes of a quantised model too.

    Raises:
        TargetError: the model lacks one.
        ShapeError: one has another shape.
    """
    own = {bare_path(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    for name in masks:
        if name not in own:
            raise TargetError(
                f"attach: masks have {name!r}, and this {type(model).__name__} has no such parameter: they "
                f"are another model's. {near(name, own)}"
            )
        if own[name].is_floating_point() and tuple(own[name].shape) != masks.shape(name):
            _raise_shape(name, masks, tuple(own[name].shape))
    return {name: own[name] for name in masks}


def _raise_shape(name: str, masks: Masks, shape: tuple[int, ...]) -> None:
    raise ShapeError(
        f"attach: the mask of {name!r} has shape {masks.shape(name)}, the weight {shape}: it is another "
        "model's."
    )


def given_bits(masks: Masks, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The packed masks of those modules that have one, by module.

    Raises:
        ShapeError: one has another shape than its weight.
    """
    names = {path: name for path in modules if (name := weight_name(path)) in masks}
    for path, name in names.items():
        shape = tuple(shape_of(modules[path]))
        if masks.shape(name) != shape:
            _raise_shape(name, masks, shape)
    return {path: masks.packed(name) for path, name in names.items()}


def found_bits(modules: Mapping[str, nn.Module], what: str) -> dict[str, Tensor]:
    """The packed masks of those modules that are pruned, by module, where none are given.

    Args:
        modules: linear ones and convolutions, by path.
        what: it is for, for errors.

    Raises:
        TargetError: none is pruned, or one holds codes.
    """
    for path, module in modules.items():
        if kind := kind_of(module):
            raise TargetError(
                f"attach: the weight of {path!r} is {kind}, whose zeros are codes, so {what} needs the masks "
                "of the model before it was quantised. Pass masks=optx.Masks.of(that)."
            )
    try:
        masks = Masks.of({weight_name(path): weight_of(module, path) for path, module in modules.items()})
    except OptxError as error:
        raise TargetError(f"attach: {what} is for pruned weights, and no masks are given ({error})") from None
    return given_bits(masks, modules)


def weight_name(path: str) -> str:
    """What masks call the weight of a module."""
    return bare_path(f"{path}.weight")


def has_bias(module: nn.Module) -> bool:
    """Whether a module has a bias of its own."""
    bias = module._parameters.get("bias")  # pyright: ignore[reportPrivateUsage]
    return bias is not None and bias.is_floating_point()


def acts(site: Site, model: nn.Module) -> bool:
    """Whether something that is attached there would act."""
    try:
        check_servable(site, model)
    except TargetError:
        return False
    return True
