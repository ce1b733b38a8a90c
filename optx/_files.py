"""Files are written beside their target and renamed: a kill leaves the old file whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path


@contextmanager
def written_aside(path: str | PathLike[str]) -> Generator[Path]:
    """A temporary file in the target's folder, which takes the target's name at the end.

    If the block raises, the temporary file is deleted and the target is what it was.
    """
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        aside = Path(folder, "part")
        aside.touch()
        mode = aside.stat().st_mode
        yield aside
        aside.chmod(mode)  # safetensors leaves its files to their owner alone
        os.replace(aside, target)
