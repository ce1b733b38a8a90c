"""The mutation tester knows every module that it is there for; it runs by hand, see mutation/README.md."""

from __future__ import annotations

from pathlib import Path

from mutation.plumbing import PLUMBING
from mutation.table import FOLDERS, TABLE, path_of

ROOT = Path(__file__).parents[2]


def test_every_module_of_the_folders_is_in_the_table_or_said_to_compute_nothing() -> None:
    there = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
    known = [*TABLE, *PLUMBING]
    assert sorted(known) == sorted(set(known))
    assert sorted(there - set(known)) == []
    assert [module for module in known if not (ROOT / module).is_file()] == []


def test_every_module_has_tests() -> None:
    for module, names in TABLE.items():
        assert names, module
        assert [n for n in names.split() if path_of(n, ROOT) is None] == []
