"""Starts of PEFT's LoRA files that moved the base: made again from it, or refused.

PEFT's PiSSA and OLoRA take the factors' start off the base, and their files hold factors of that other base;
PEFT takes the start off again whenever it loads one. A file that PEFT converted
(``path_initial_model_for_weight_conversion``) is a plain LoRA, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from optx._errors import FileError, TargetError
from optx.inject._computes import weight_now
from optx.inject._low_rank_start import START, factors_of
from optx.inject._weights import in_sum_precision, is_conv, is_transposed
from optx.inject.lora import LoRA

# Starts that leave the base as it is; what is trained from them is a plain LoRA.
_PLAIN = ("gaussian", "eva", "orthogonal", "mica")

# Starts that moved the base and can't be made again, by how they begin.
_LOST = {
    "pissa_niter_": "whose start was drawn at random, so that its base can't be made again (PEFT's own "
    "reload draws another)",
    "corda": "whose start came from data and was taken off the base, and is not in the file",
    "lora_ga": "whose start came from gradients and was taken off the base, and is not in the file",
    "loftq": "which quantised the base and took its start off it, and neither is in the file",
}


def init_of(config: Mapping[str, Any], where: str) -> str:
    """LoRA's ``init`` of a configuration: a start that is taken off the base at loading, or the plain one.

    Raises:
        FileError: a start that moved the base and can't be made again, or one that is not known.
    """
    start = config.get("init_lora_weights", True)
    if start is None or isinstance(start, bool) or start in _PLAIN:
        return "kaiming"
    if start == "pissa" or str(start).lower() == "olora":
        return str(start).lower()
    lost = next((why for begin, why in _LOST.items() if str(start).startswith(begin)), None)
    why = lost or "which optx does not know: it may have moved the base"
    raise FileError(
        f"{where} was trained with PEFT's init_lora_weights={start!r}, {why}. Where the training ran, save "
        "it with path_initial_model_for_weight_conversion, as a LoRA of the original base, or merge it."
    )


def starts_of(
    lora: LoRA, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], where: str
) -> dict[str, Tensor]:
    """What PEFT would take off the weights of a model, by module path and suffix.

    Args:
        lora: the file's.
        tensors: the file's, by module path and suffix; embeddings have no such start.
        modules: the model's, by path.
        where: for errors.
    """
    found: dict[str, Tensor] = {}
    for key, A in tensors.items():
        path, end = key.removesuffix(".lora_A.weight"), ".lora_B.weight"
        B = tensors.get(path + end)
        if path == key or B is None:
            continue
        if path not in modules:
            raise FileError(
                f"{where} has init_lora_weights={lora.init!r} for {path!r}, which is no module; optx has "
                "that start for modules alone. Merge it in PEFT (merge_and_unload) to use it here."
            )
        module = modules[path]
        weight = in_sum_precision(weight_now(module, path).detach())
        if is_transposed(module) and lora.init == "olora":
            raise FileError(
                f"{where} has an OLoRA of {path!r}, a Conv1D: PEFT takes a start off it that is not its "
                "factors'. Merge it in PEFT (merge_and_unload) to use it here."
            )
        W = weight.flatten(1) if is_conv(module) else weight.t() if is_transposed(module) else weight
        rank = lora.rank_at(path)
        A0, B0 = start_of(lora, W, path, where)
        if A.shape[:1] == (rank,) and B.shape[1:2] == (rank,) and A.numel() == A0.numel():
            found[path + START[".lora_A.weight"]] = A0.reshape(A.shape)
            found[path + START[end]] = B0.reshape(B.shape)
    return found


def start_of(lora: LoRA, W: Tensor, path: str, where: str) -> tuple[Tensor, Tensor]:
    """A0 and B0 of one weight (out, in)."""
    rank = lora.rank_at(path)
    try:
        return factors_of(lora.init, W, rank, lora.scale_at(path, rank), path)
    except TargetError as error:
        raise FileError(
            f"{where} can't be read for this model: {str(error).removeprefix('attach: ')}"
        ) from None
