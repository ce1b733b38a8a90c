"""What the pages say of runs is what the runs' results say."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")  # recipes import it where they load models

from optx.recipes import _bench_delta, _bench_merge, _bench_step, _pages, _report, _run, grokking

ROOT = Path(__file__).parents[2]
PAGES = {page: (ROOT / page).read_text() for page in _pages.PAGES}
COMMITTED = sorted(file.stem for file in (ROOT / _pages.RESULTS).glob("*.json"))

DECIMAL = re.compile(r"(?<![\d.])\d+\.\d+(?!\.?\d)")


# ---- what is committed --------------------------------------------------------------------------------


def test_everything_that_measures_has_results() -> None:
    assert set(_pages.names()) == set(COMMITTED)
    blocks = [found[1] for found in _pages.BLOCK.finditer(PAGES["recipes/README.md"])]
    assert sorted(blocks) == sorted(_pages.names())


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_its_results_make(page: str) -> None:
    """If not: ``python -m optx.recipes._pages write``; it says, too, which settings are not the defaults."""
    assert _pages.rewritten(PAGES[page], page) == PAGES[page]


@pytest.mark.parametrize("name", COMMITTED)
def test_results_are_of_a_whole_run(name: str) -> None:
    text = (ROOT / _pages.RESULTS / f"{name}.json").read_text()
    results = json.loads(text)
    assert _pages.complaints(name, results) == []
    assert _pages.written(_pages.rounded(results)) + "\n" == text  # and nobody typed in it
    if _pages.source(name).arms is None:
        return
    picture = ROOT / _pages.RESULTS / f"{name}.png"
    assert picture.stat().st_size < 100_000
    assert known_by(picture) == _pages.checksum(text)


def known_by(picture: Path) -> Any:
    """The checksum of the results that a picture was drawn from."""
    from PIL import Image

    with Image.open(picture) as image:
        return image.info["results"]


@pytest.mark.parametrize("name", COMMITTED)
def test_prose_beside_a_block_has_no_figure_that_the_block_lacks(name: str) -> None:
    [section] = [s for s in PAGES["recipes/README.md"].split("\n## ") if f"<!-- results:{name} " in s]
    assert strangers(_pages.BLOCK.sub("", section), section) == set()


def test_evidence_in_the_readme_has_no_figure_that_no_block_has() -> None:
    evidence = PAGES["README.md"].split("\n## Evidence\n")[1].split("\n## ")[0]
    assert strangers(evidence, PAGES["recipes/README.md"]) == set()


def strangers(prose: str, page: str) -> set[str]:
    """Decimals of a text that no block of the page has."""
    blocks = " ".join(found[3] for found in _pages.BLOCK.finditer(page))
    return set(DECIMAL.findall(prose)) - set(DECIMAL.findall(blocks))


# ---- how it is made -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of grokking that takes a second."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    grokking.main(["--p", "5", "--steps", "11", "--width", "8", "--out", str(folder)])
    return folder


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with pages, whose blocks are empty."""
    (tmp_path / "recipes").mkdir()
    for page, wanted in zip(_pages.PAGES, (" tables picture", ""), strict=True):
        text = f"Before.\n<!-- results:grokking{wanted} -->\n<!-- /results -->\nAfter 0.5.\n"
        (tmp_path / page).write_text(text)
    return tmp_path


def test_a_run_is_taken_in_and_told(run: Path, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _pages.add(run, root=clone) == ["grokking"]
    assert _pages.write(clone) == list(_pages.PAGES)
    assert _pages.write(clone) == []
    front, page = ((clone / page).read_text() for page in _pages.PAGES)
    assert "![a + b mod 5, 11 epochs](recipes/results/grokking.png)" in front
    assert "![a + b mod 5, 11 epochs](results/grokking.png)" in page
    assert "```sh\noptx run grokking --steps 11 --p 5 --width 8\n```" in page
    assert "sh\n" not in front
    assert "3 seeds, steps 11, seed 0, p 5," in page
    assert "**Other than by default:** steps 11 (default: 2000), p 5" in " ".join(page.split())
    for text in (front, page):
        assert text.startswith("Before.\n<!-- results:grokking")
        assert text.endswith("\n<!-- /results -->\nAfter 0.5.\n")
    # What the terminal says is in the page, cell by cell.
    results = json.loads((clone / _pages.RESULTS / "grokking.json").read_text())
    [table] = _pages.source("grokking").tables(results)
    _report.tell([table])
    shown = capsys.readouterr().out
    assert all(row[1] in shown and f"| {row[1]} |" in page for row in table.laid()[1])


def test_numbers_are_kept_to_five_digits(run: Path, clone: Path) -> None:
    _pages.add(run, root=clone)
    text = (clone / _pages.RESULTS / "grokking.json").read_text()
    kept, made = json.loads(text)["arms"], json.loads((run / "results.json").read_text())["arms"]
    assert kept.keys() == made.keys()
    for key, log in made.items():
        assert kept[key].keys() == log.keys()
        for name, values in log.items():
            assert kept[key][name] == pytest.approx(values, rel=5.1e-5)
    assert max(len(digits) for digits in re.findall(r"[1-9]\d*(?=e-|[,\]])", text)) <= 5
    assert known_by(clone / _pages.RESULTS / "grokking.png") == _pages.checksum(text)


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda results: results["arms"].pop(key)


def _two_seeds(results: dict[str, Any]) -> None:
    results["arms"] = {key: one for key, one in results["arms"].items() if not key.endswith("/2")}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without("stablemax/1"), "it has no stablemax/1"),
        (_two_seeds, "2 seeds, of at least 3"),
        (lambda results: results.pop("environment"), "it has no environment"),
    ],
)
def test_part_of_a_run_is_refused(
    change: Callable[[dict[str, Any]], Any], said: str, run: Path, clone: Path
) -> None:
    part = clone / "part"
    part.mkdir()
    results = json.loads((run / "results.json").read_text())
    change(results)
    (part / "results.json").write_text(json.dumps(results))
    (part / "grokking.png").write_bytes((run / "grokking.png").read_bytes())
    with pytest.raises(_pages.PageError, match=f"is not a whole run of grokking: {said}"):
        _pages.add(part, root=clone)
    assert not (clone / _pages.RESULTS).exists()


def test_a_run_that_goes_on_is_refused(run: Path, clone: Path) -> None:
    part = clone / "part"
    part.mkdir()
    (part / "results.json").write_bytes((run / "results.json").read_bytes())
    with pytest.raises(_pages.PageError, match="has no picture of a recipe"):
        _pages.add(part, root=clone)
    (part / "grokking.png").write_bytes((run / "grokking.png").read_bytes())
    os.utime(part / "grokking.png", (0, 0))
    with pytest.raises(_pages.PageError, match="goes on or was interrupted"):
        _pages.add(part, root=clone)
    os.utime(part / "grokking.png")
    (part / "checkpoint.pt").touch()
    with pytest.raises(_pages.PageError, match="goes on or was interrupted"):
        _pages.add(part, root=clone)
    assert not (clone / _pages.RESULTS).exists()


def _environment(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda results: results["environment"].update({name: value})


def _in_an_arm(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda results: results["arms"]["adamw/0"].update({name: value})


def _renamed(results: dict[str, Any]) -> None:
    for seed in range(3):
        results["arms"][f"a <!-- /results -->/{seed}"] = results["arms"][f"adamw/{seed}"]


def _part(run: Path, clone: Path, results: bytes | None = None, picture: bytes | None = None) -> Path:
    """A copy of the run, with other files."""
    part = clone / "part"
    part.mkdir(exist_ok=True)
    for name, content in (("results.json", results), ("grokking.png", picture)):
        (part / name).write_bytes((run / name).read_bytes() if content is None else content)
    return part


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda results: results.update(environment=None), "it has no environment"),
        (lambda results: results.update(settings=[]), "it has no settings"),
        (lambda results: results.update(arms=[]), "it has no arms"),
        (lambda results: results["environment"].pop("device"), "lack something .*'device'"),
        (lambda results: results["settings"].pop("p"), "lack something .*'p'"),
        (_in_an_arm("test", []), "lack something"),
        (_in_an_arm("test", ["0.5"]), "lack something"),
        (_in_an_arm("test", [float("nan")]), "not a file of results: .*not JSON compliant"),
        (_environment("device", "a <!-- /results -->"), "have <!-- in a name"),
        (_environment("device", "a --> b"), "have --> in a name"),
        (_renamed, "have <!-- in a name"),
    ],
)
def test_what_the_page_cannot_tell_is_refused_before_anything_is_written(
    change: Callable[[dict[str, Any]], Any], said: str, run: Path, clone: Path
) -> None:
    results = json.loads((run / "results.json").read_text())
    change(results)
    part = _part(run, clone, json.dumps(results).encode())
    with pytest.raises(_pages.PageError, match=said):
        _pages.add(run, part, root=clone)  # the first one is whole, and not kept either
    assert not (clone / _pages.RESULTS).exists()


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (b"{", "not a file of results: Expecting"),
        (b"\xff", "not a file of results: .*decode"),
        (b"[]", "it has no settings"),
        (b'{"arms": 1e999}', "not a file of results: .*not JSON compliant"),
    ],
)
def test_no_results_are_refused(results: bytes, said: str, run: Path, clone: Path) -> None:
    part = _part(run, clone, results)
    with pytest.raises(_pages.PageError, match=said):
        _pages.add(part, root=clone)
    (part / "results.json").unlink()
    with pytest.raises(_pages.PageError, match=r"has no results\.json"):
        _pages.add(part, root=clone)
    assert not (clone / _pages.RESULTS).exists()


def test_a_picture_that_is_none_is_refused(run: Path, clone: Path) -> None:
    from PIL import Image

    whole, gif = (run / "grokking.png").read_bytes(), io.BytesIO()
    Image.new("RGB", (2, 2)).save(gif, "gif")
    for content in (b"", gif.getvalue(), whole[:200], whole[: len(whole) // 2]):
        with pytest.raises(_pages.PageError, match=r"grokking\.png is not a whole PNG picture: "):
            _pages.add(_part(run, clone, picture=content), root=clone)
    assert not (clone / _pages.RESULTS).exists()


def test_a_recipe_as_a_file_is_refused(run: Path, clone: Path) -> None:
    file = clone / "grokking.json"
    file.write_bytes((run / "results.json").read_bytes())
    with pytest.raises(_pages.PageError, match=r"of a recipe\. Give its run's folder"):
        _pages.add(file, root=clone)
    bench = clone / "bench-merge.json"
    bench.write_text('{"settings": {}, "environment": {}}')
    with pytest.raises(_pages.PageError, match="results of bench-merge lack something"):
        _pages.add(bench, root=clone)
    assert not (clone / _pages.RESULTS).exists()


def test_a_page_that_cannot_be_made_leaves_all_as_it_was(run: Path, clone: Path) -> None:
    (clone / "recipes/README.md").write_text("<!-- results:grokking table -->\n<!-- /results -->")
    before = (clone / "README.md").read_text()
    with pytest.raises(_pages.PageError, match="asks for table"):
        _pages.add(run, root=clone)
    assert not (clone / _pages.RESULTS).exists()
    (clone / _pages.RESULTS).mkdir()
    (clone / _pages.RESULTS / "grokking.json").write_bytes((run / "results.json").read_bytes())
    with pytest.raises(_pages.PageError, match="asks for table"):
        _pages.write(clone)
    assert (clone / "README.md").read_text() == before


def test_a_block_of_nothing_and_a_wrong_part(run: Path, clone: Path) -> None:
    _pages.add(run, root=clone)
    page = clone / "README.md"
    page.write_text("<!-- results:groking -->\n<!-- /results -->")
    with pytest.raises(_pages.PageError, match="'groking' is none of adapt, "):
        _pages.write(clone)
    page.write_text("<!-- results:grokking table -->\n<!-- /results -->")
    with pytest.raises(_pages.PageError, match="asks for table, not command, settings, tables, picture"):
        _pages.write(clone)


def test_settings_of_another_time_are_said() -> None:
    options, settings = grokking.options(), _run.settings_of(grokking.options().parse_args([]))
    assert _run.command(options, settings) == "optx run grokking"
    made = _pages.Source(grokking.options, lambda results: [])
    where = {"date": "d", "optx": "o", "torch": "t", "python": "p", "device": "c", "threads": 2}
    about = _pages.about(made, {"settings": settings, "environment": where})
    assert about.endswith("Run on d with optx o, torch t, Python p: c, 2 threads.")
    then = {**settings, "momentum": 0.5}
    del then["width"], then["model"]  # the latter is off by default: all is as it was
    about = _pages.about(made, {"settings": then, "environment": where})
    assert about.endswith("**Other than by default:** momentum, which is gone, no width yet.")


def test_more_seeds_and_arms_are_in_the_command() -> None:
    made = _pages.Source(grokking.options, lambda results: [], ["adamw"])
    results: dict[str, Any] = {"settings": {}, "arms": {f"adamw/{seed}": {} for seed in range(4)}}
    assert _pages._command(made, results) == "optx run grokking --seeds 4"
    results["arms"] = {f"{arm}/{seed}": {} for arm in ("adamw", "other") for seed in range(3)}
    assert _pages._command(made, results) == "optx run grokking --arms adamw,other"


def test_mean_and_range_over_seeds() -> None:
    assert _report.ranged([3.0, 1.0, 2.0]) == "2.000 (1.000 to 3.000)"
    assert _report.ranged([87.46, 84.3], "{:.1f}", "{:.0f}") == "85.9 (84 to 87)"
    assert _report.ranged([0.5]) == "0.500"


# ---- benchmarks ---------------------------------------------------------------------------------------


def block_of(name: str, file: Path, clone: Path) -> str:
    """What the page has of a benchmark's file."""
    assert _pages.add(file, root=clone) == [name]
    page = clone / "recipes/README.md"
    page.write_text(f"<!-- results:{name} -->\n<!-- /results -->")
    _pages.write(clone)
    return page.read_text()


def test_bench_merge_is_written_and_told(clone: Path) -> None:
    pytest.importorskip("mergekit.merge_methods")
    file = clone / "bench-merge.json"
    _bench_merge.main(["--tensors", "1", "--rows", "4", "--rounds", "1", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["command"] == "optx bench merge --tensors 1 --rows 4 --rounds 1"
    assert found["environment"]["threads"] == _run.environment()["threads"]
    block = block_of("bench-merge", file, clone)
    assert f"```sh\n{found['command']}\n```" in block
    seconds = found["seconds"]["TIES"]
    assert f" {seconds['optx'] / seconds['mergekit']:.2f} |\n" in block.split("| TIES |")[1]


# Of a dozen subjects each is a kernel of its own, which takes seconds to compile.
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])
def test_bench_step_is_written_and_told(whole: bool, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bench_step, "first_step_seconds", lambda: (3.5, 0.4))  # two processes
    if not whole:
        few = ("torch fused=True", "AdamW through wrap()", "PerpGrad + AdamR")
        chosen = [s for s in _bench_step.subjects(peers=False, compiled=False) if s.name in few]
        monkeypatch.setattr(_bench_step, "subjects", lambda *_: chosen)
    file = clone / "bench-step.json"
    _bench_step.main(["--shapes", "small", "--rounds", "1", "--no-peers", "--json", str(file)])
    block = block_of("bench-step", file, clone)
    assert "optx bench step --shapes small --rounds 1 --no-peers\n" in block
    assert "| step | floor | 200 x 1000 |" in block
    assert re.search(r"\| PerpGrad \+ AdamR \| 1\.43 \| \d+\.\d\d \(\d+\.\d\d\) \|", block)
    assert "takes 3.5 s, compiling, and 0.4 s" in " ".join(block.split())


def test_bench_delta_is_written_and_told(clone: Path) -> None:
    file = clone / "bench-delta.json"
    with pytest.raises(SystemExit):
        _bench_delta.main(["--operation", "dare,nothing"])
    _bench_delta.main(["--size", "0.001", "--rounds", "1", "--folder", str(clone), "--json", str(file)])
    found = json.loads(file.read_text())
    assert list(found["operations"]) == ["dare"]
    assert "folder" not in found["settings"]
    block = block_of("bench-delta", file, clone)
    [[ours], [copied]] = (found["operations"]["dare"][kind] for kind in ("optx", "copy"))
    assert f"| time / copy | {ours / copied:.2f} |\n" in block
    assert f"| peak memory | {found['operations']['dare']['memory'][0] / 1e6:.0f} MB |\n" in block
