"""The mutation tester knows every module that it is there for; it runs by hand, see mutation/README.md."""

from __future__ import annotations

from pathlib import Path

from mutation.table import FOLDERS, PLUMBING, TABLE

ROOT = Path(__file__).parents[1]


def test_every_module_of_the_folders_is_in_the_table_or_said_to_compute_nothing() -> None:
    there = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
    known = [*TABLE, *PLUMBING]
    assert sorted(known) == sorted(set(known))
    assert sorted(there - set(known)) == []
    assert [module for module in known if not (ROOT / module).is_file()] == []


def test_every_part_of_wraps_machinery_is_in_the_table() -> None:
    said = {
        "_cache",
        "_catalog",
        "_doctor",
        "_errors",
        "_files",
        "_names",
        "_plan",
    }  # they tell, or find files
    there = {path.stem for path in (ROOT / "optx").glob("_[a-z]*.py")} - said
    assert sorted(there - {Path(module).stem for module in TABLE if module.count("/") == 1}) == []


def test_every_module_has_tests() -> None:
    for module, names in TABLE.items():
        assert names, module
        assert [n for n in names.split() if not (ROOT / "tests" / f"test_{n}.py").is_file()] == []
