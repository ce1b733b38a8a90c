"""Twenty steps of every method give the losses that they gave when they were recorded.

Bit for bit where the recording's platform is this one's, elsewhere within a millionth.
"""

from __future__ import annotations

import os

import golden_runs
import pytest

import optx
from optx.recipes import _assets
from optx.recipes._assets import AssetError

METHODS = golden_runs.methods()
RUNS = [(name, label) for name in METHODS for label in golden_runs.runs(name)]


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    golden_runs.one_thread()


@pytest.fixture(scope="module")
def minilm() -> None:
    """What a person's cache folder has; in CI it is fetched."""
    if not os.environ.get("CI") and not (_assets.cache_root() / _assets.MINILM.file).exists():
        pytest.skip(f"{_assets.MINILM.file} is not in the cache folder; `optx run merge` brings it")
    try:
        _assets.unpacked(_assets.MINILM)
    except AssetError as error:
        pytest.fail(str(error))


@pytest.mark.parametrize("name", METHODS)
def test_it_is_recorded(name: str) -> None:
    command = f"Type: python tests/golden/record.py {name}"
    try:
        losses = golden_runs.recorded(name)["losses"]
    except FileNotFoundError:
        pytest.fail(f"optx.{name} has no golden run. {command}")
    if set(losses) != set(golden_runs.runs(name)):
        pytest.fail(f"The golden runs of optx.{name} are {list(losses)} no more. {command}")


def test_nothing_else_is_recorded() -> None:
    assert {file.stem for file in golden_runs.FOLDER.iterdir()} == set(METHODS)


@pytest.mark.parametrize(("name", "label"), RUNS)
def test_losses(name: str, label: str, request: pytest.FixtureRequest) -> None:
    if label.startswith("minilm"):
        request.getfixturevalue("minilm")
    told = golden_runs.recorded(name)
    if label in told["losses"]:  # else the test above says so
        check(told["losses"][label], golden_runs.runs(name)[label](), told["platform"], name)


def check(wanted: list[float], got: list[float], platform: dict[str, str], name: str) -> None:
    here = golden_runs.platform_here()
    allowed = 0.0 if platform == here else golden_runs.TOLERANCE
    step, apart = golden_runs.first_difference(wanted, got, allowed), golden_runs.apart(wanted, got)
    assert apart <= allowed, (
        f"The losses differ from step {step} on, by up to {apart:.1e} ({allowed:.0e} allowed). Should this "
        f"change results, type: python tests/golden/record.py {name}\n"
        f"recorded {wanted}\nnow      {got}\nrecorded on {platform}, here {here}"
    )


def test_a_small_change_of_a_rule_is_found() -> None:
    """AdamR's pull is a thousandth stronger."""
    told = golden_runs.recorded("AdamR")
    got = golden_runs.transformed(optx.AdamR, {"weight": 0.05 * 1.001}, golden_runs.tiny(), True)
    with pytest.raises(AssertionError, match=r"differ from step [1-9].*record\.py AdamR"):
        check(told["losses"]["tiny, L2"], got, told["platform"], "AdamR")
    with pytest.raises(AssertionError, match="1e-06 allowed"):  # elsewhere, too
        check(told["losses"]["tiny, L2"], got, {}, "AdamR")
