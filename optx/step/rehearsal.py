"""Steps that are none: torch.distributed.checkpoint takes one to make an optimizer's state."""

from __future__ import annotations

from optx.step.transform import Host


def is_rehearsal(optimizer: Host) -> bool:
    """Whether a step was torch.distributed.checkpoint's, with lr 0 and zero gradients, to make the state."""
    if any(float(group.get("lr", 1.0)) != 0.0 for group in optimizer.param_groups):
        return False
    return not any(
        p.grad is not None and bool(p.grad.any()) for group in optimizer.param_groups for p in group["params"]
    )
