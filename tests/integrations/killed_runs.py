"""A run in Accelerate and one in Lightning, which kill themselves on the way.

To be started by ``accelerate launch``: one start for both, as each is a fork of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import accelerate_run
import lightning_run
import torch


def ended_by(run: Callable[[], object]) -> int:
    """The signal that ended a process that calls this; 0 if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] & 127


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    signals = [
        ended_by(lambda: accelerate_run.Run().train(folder / "accelerate", kill=True)),
        ended_by(lambda: lightning_run.run(folder / "lightning", lightning_run.Killed())),
    ]
    (folder / "signals").write_text(" ".join(map(str, signals)))
