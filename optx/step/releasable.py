"""Which param groups can be stepped one tensor at a time, in backward, and why others can't."""

from __future__ import annotations

from optx._names import is_dtensor
from optx.step.paths import GroupPath
from optx.step.plan import waiting
from optx.step.transform import Host, Transform


def why_not_released(wrapped: Host, path: GroupPath) -> str | None:
    """Why a group must wait for all gradients; None if it need not."""
    if names := waiting(wrapped.transforms, path.program):
        return f"{' and '.join(names)} waits for a total over all gradients, so no weight may move before."
    if path.reason is not None:
        return f"it is not fused ({path.reason}), and a base steps all of its tensors at once."
    for transform in wrapped.transforms:
        if transform.serves(path.group) and _looks_at_all(transform):
            return f"{type(transform).__name__} looks at all gradients before the step."
    sharded = any(map(is_dtensor, path.group["params"]))
    if sharded and (path.program.left or any(level.sums for level in path.program.levels)):
        return (
            "its weights are DTensors, and sums over their shards (a transform's, or metrics=True's) are "
            "taken by all processes together, after backward."
        )
    return None


def _looks_at_all(transform: Transform) -> bool:
    kind = type(transform)
    if kind.around_step is not Transform.around_step:
        return True
    return kind.looks_at_gradients and kind.before_step is not Transform.before_step
