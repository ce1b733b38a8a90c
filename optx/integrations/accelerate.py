"""Accelerate: wrap and attach first, then ``prepare``; one more line has checkpoints hold the adapters alone.

    >>> import torch, optx
    >>> from accelerate import Accelerator
    >>> accelerator = Accelerator(cpu=True)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
    >>> handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
    >>> frozen = optx.trainable_only(model, handle)
    >>> opt = optx.wrap(torch.optim.AdamW(handle.parameters(), lr=1e-3), optx.PerpGrad())
    >>> model, opt = accelerator.prepare(model, opt)
    >>> saving = optx.integrations.accelerate.adapters_only(accelerator, handle)

The training loop, accumulation, clipping and schedulers are Accelerate's own, unchanged. What
``accelerator.save_state(folder)`` writes is what ``optx.attach(model, folder)`` reads (PEFT reads the
adapters of it), and ``accelerator.load_state(folder)`` restores it exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optx.inject._handle import Handle
from optx.integrations._accelerate_checkpoints import AdaptersOnly as AdaptersOnly
from optx.integrations._metrics import collect_all

if TYPE_CHECKING:
    from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]


def adapters_only(accelerator: Accelerator, *handles: Handle) -> AdaptersOnly:
    """Have ``save_state`` write adapters in the place of the whole model, and ``load_state`` restore them.

    A checkpoint holds the adapters (as `Handle.save` writes them: PEFT's format where there is one; several
    in folders by their names), what else of the model trains or has changed since this call (batch norm's
    averages, modules trained whole), and as before optimizers, schedulers, scaler, random state and what was
    registered. Frozen weights that nobody has written to are left out: make the same base model before
    ``load_state``, which warns if it is another. Whole checkpoints of before load as they did.

    Args:
        accelerator: after ``prepare``.
        *handles: of one prepared model. Call once for each model that has some, always in the same order; a
            second one's adapters are in the checkpoint's folder ``model_1``.

    Returns:
        An object whose ``remove()`` undoes it.

    Raises:
        OptxError: the handles are of no prepared model; or it is saved by FSDP1, DeepSpeed or Megatron-LM,
            which write the model before anyone is asked. (FSDP2 is served, with torch's distributed
            checkpoints in place of the file of what else has changed.)

    Example:
        >>> import torch, optx, os, tempfile
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1))
        >>> handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
        >>> frozen = optx.trainable_only(model, handle)
        >>> model = accelerator.prepare(model)
        >>> saving = optx.integrations.accelerate.adapters_only(accelerator, handle)
        >>> folder = tempfile.mkdtemp()
        >>> _ = accelerator.save_state(folder)
        >>> os.path.exists(os.path.join(folder, "adapter_model.safetensors"))
        True
        >>> os.path.exists(os.path.join(folder, "model.safetensors"))
        False
        >>> accelerator.load_state(folder)
        >>> saving.remove()
    """
    return AdaptersOnly(accelerator, handles)


def metrics(accelerator: Accelerator, *handles: Handle) -> dict[str, float]:
    """What optx knows of the Accelerator's optimizers and of handles, for its trackers.

    Call it once before training: what no step computes by itself is measured from the first call on; with
    FSDP2, it is measured where ``optx.wrap(..., metrics=True)`` said so on all ranks.

    Args:
        accelerator: after ``prepare``; each of its optimizers that `optx.wrap` made is told of, a second
            one's names with its number (``optx_2/lr``).
        *handles: of `optx.attach`.

    Returns:
        Plain floats: `Wrapped.metrics` and `Handle.metrics`.

    Example:
        >>> import torch, optx
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True)
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = optx.wrap(torch.optim.AdamW(model.parameters(), lr=1e-3), optx.PerpGrad())
        >>> model, opt = accelerator.prepare(model, opt)
        >>> accelerator.backward(model(torch.ones(2, 4)).sum())
        >>> opt.step()
        >>> accelerator.log(optx.integrations.accelerate.metrics(accelerator), step=1)
    """
    state: Any = accelerator
    return collect_all(state._optimizers, handles)
