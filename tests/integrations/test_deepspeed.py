"""DeepSpeed on two CPU processes: under ZeRO-1 and ZeRO-2 adapters train, a wrapped optimizer is refused.

By hand: ``pip install wheel; DS_BUILD_OPS=0 pip install deepspeed==0.19.8`` and a C++ compiler, with which
DeepSpeed builds its communication at first use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process says."""
    folder = tmp_path_factory.mktemp("deepspeed")
    script = Path(__file__).with_name("deepspeed_run.py")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(folder)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, *words], check=True, env=environment, timeout=1200)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("stage", ["1", "2"])
def test_zero_1_and_2(stage: str, found: list[dict[str, Any]]) -> None:
    for told in (one[stage] for one in found):
        assert told["kind"] == "DEEPSPEED"
        assert told["off"] <= 1e-6
        assert "replaced by one flat tensor" in told["wrapped"]
        assert "saves with DeepSpeed" in told["adapters_only"]
        assert told["kept"]
