"""Parameters that are spread over a device mesh (DTensors): what of them lies here, and sums over all of it.

Kernels step the local shards. Whatever a step does to single elements is then right at once, and sums are
completed over the mesh in between: one small all-reduce for each process group and level. What decides which
path a param group takes must be the same on all processes, or one would wait for the others forever; so what
only one of them can see (the memory of its shard) is an error, see `surprise`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError
from optx._names import is_dtensor
from optx.kernels.step.tiles import matrix
from optx.step.memory import answers_itself
from optx.step.rounding import shard_number, step_key

_KINDS = ("Shard", "_StridedShard", "Replicate")

Share = tuple[Tensor, "Shards"]
"""Sums over what lies here, in float64, which are to be completed in place; and over which processes."""


@dataclass(frozen=True)
class Shards:
    """How parameters lie over their mesh.

    Attributes:
        mesh: a DeviceMesh.
        dims: of the mesh, those over which they are cut; over the others they are the same everywhere.
        groups: this process's process groups along these.
        salt: for random draws: another in each shard, the same in its replicas.
    """

    mesh: Any
    dims: tuple[int, ...]
    groups: tuple[Any, ...]
    salt: int

    @classmethod
    def of(cls, p: Tensor) -> Shards | None:
        """Those of a parameter; None where it is an ordinary tensor."""
        if not is_dtensor(p):
            return None
        spread: Any = p
        mesh = spread.device_mesh
        dims = tuple(i for i, one in enumerate(spread.placements) if type(one).__name__ != "Replicate")
        number = shard_number(p)
        salt = step_key(0, 0, number) if number else 0
        return cls(mesh, dims, tuple(mesh.get_group(dim) for dim in dims), salt)

    @classmethod
    def summed_over(cls, t: Tensor) -> Shards | None:
        """Those over which a sum that torch took of a DTensor is still to be completed, if there are any."""
        if not is_dtensor(t):
            return None
        spread: Any = t
        mesh = spread.device_mesh
        dims = tuple(i for i, one in enumerate(spread.placements) if one.is_partial())
        return cls(mesh, dims, tuple(mesh.get_group(dim) for dim in dims), 0) if dims else None


def why_not_spread(t: Tensor) -> str | None:
    """Why kernels can't serve the shards of a DTensor, whatever lies here; None if they can.

    The same on all processes.
    """
    spread: Any = t
    local: Any = spread._local_tensor
    other = [one for one in spread.placements if type(one).__name__ not in _KINDS]
    if other:
        return f"is a DTensor placed as {other[0]}, which is neither sharded nor replicated"
    kind: type[Any] = type(local)
    if answers_itself(kind) and not hasattr(local, "wait"):
        return f"is a DTensor of {kind.__name__}, which answers torch's functions in its own way"
    return "is on the meta device, without memory" if local.is_meta else None


def why_no_window(t: Tensor) -> str | None:
    """Why what lies here of a DTensor is not some rows and some columns of it as a matrix; None if it is.

    The same on all processes.
    """
    for one in dict.fromkeys(t.placements if is_dtensor(t) else ()):  # type: ignore[attr-defined]
        if type(one).__name__ == "Replicate":
            continue
        if type(one).__name__ != "Shard" or one.dim > 1:
            return f"it sums over rows or columns of parameters that are sharded as {one}"
    return None


def window_of(t: Any) -> tuple[int, int, int, int]:
    """What lies here of a DTensor as a matrix: first row, first column, rows, columns."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offsets = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    height, width = matrix(shape)
    if len(shape) < 2:
        return 0, int(sum(offsets)), height, width
    return int(offsets[0]), int(offsets[1]) * math.prod(t.shape[2:]), height, width


def has_whole_rows(t: Any) -> bool:
    """Whether each row of a DTensor lies in one process; the same on all."""
    cut = [one for one in t.placements if type(one).__name__ != "Replicate"]
    return not cut or (t.ndim > 1 and all(one.dim == 0 for one in cut))


def here(t: Tensor) -> Tensor:
    """What of a tensor lies in this process; itself where it is not spread.

    DTensor.to_local() would make it ready for autograd, which takes a hundred times as long.
    """
    if not is_dtensor(t):
        return t
    spread: Any = t
    local = spread._local_tensor
    return local.wait() if type(local).__name__ == "AsyncCollectiveTensor" else local


def all_here(tensors: Sequence[Any]) -> list[Tensor]:
    """What of DTensors lies in this process."""
    return [t._local_tensor for t in tensors]


def specs_of(tensors: Sequence[Any]) -> list[Any]:
    """How DTensors are spread."""
    return [t._spec for t in tensors]


def spread_alike(t: Any, p: Any) -> bool:
    """Whether two DTensors lie in the same way over the same mesh."""
    return t._spec is p._spec or (t.placements == p.placements and t.device_mesh == p.device_mesh)


def spread_as(t: Any, p: Any, name: str, what: str) -> Any:
    """What goes with a DTensor element by element, spread as that is; itself where it is already.

    All processes take part where it is not.

    Raises:
        OptxError: it is an ordinary tensor.
    """
    if not is_dtensor(t):
        raise OptxError(
            f"optx: parameter {name!r} is a DTensor, {what} is a {type(t).__name__} of shape "
            f"{tuple(t.shape)}. Spread it too: torch.distributed.tensor.distribute_tensor(it, p.device_mesh, "
            "p.placements)."
        )
    return t if spread_alike(t, p) else t.redistribute(p.device_mesh, p.placements)


def alike(t: Any, p: Any) -> Any:
    """What arithmetic made beside a DTensor, spread as that is."""
    if not is_dtensor(t) or not is_dtensor(p) or spread_alike(t, p):
        return t
    return t.redistribute(p.device_mesh, p.placements)


def surprise(reason: str) -> OptxError:
    """The error of what only this process can see of its shards."""
    rank = torch.distributed.get_rank()
    return OptxError(
        f"optx: on rank {rank} kernels can't serve the local shards: {reason}. The other ranks go on with "
        "them, so this one can't step in another way; wrap with fused=False on all ranks."
    )


_talk: Any = torch.distributed


def complete(shares: Iterable[Share]) -> None:
    """Add up over the mesh what each process has summed of its shards, in place.

    One all-reduce for each process group. All processes must come here with as many numbers.
    """
    blocks: dict[tuple[Any, torch.device], list[Tensor]] = {}
    for sums, shards in shares:
        # With a shard on the CPU and its mesh on the GPU, processes only talk through the GPU.
        kind = shards.mesh.device_type
        device = sums.device if sums.device.type == kind else torch.device(kind)
        for group in shards.groups:
            blocks.setdefault((group, device), []).append(sums)
    for (group, device), parts in blocks.items():
        if len(parts) == 1 and parts[0].is_contiguous() and parts[0].device.type == device.type:
            _talk.all_reduce(parts[0], group=group)
            continue
        joined = torch.cat([part.reshape(-1).to(device) for part in parts])
        _talk.all_reduce(joined, group=group)
        at = 0
        for part in parts:
            part.copy_(joined[at : at + part.numel()].view(part.shape))
            at += part.numel()
