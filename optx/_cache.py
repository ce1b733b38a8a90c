"""Where optx keeps what it can make or fetch again: compiled kernels, models and texts."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_root() -> Path:
    """``OPTX_CACHE_DIR``, else the platform's folder for caches; not made here."""
    if chosen := os.environ.get("OPTX_CACHE_DIR"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")).expanduser() / "optx" / "cache"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/optx").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "optx"
