"""What lies in a cache of kernels."""

from __future__ import annotations

from pathlib import Path


def files(cache: Path) -> list[Path]:
    return sorted((cache / "kernels").iterdir())
