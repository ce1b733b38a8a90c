"""`--config FILE`: a recipe's options from YAML or JSON, as if they were typed before the others."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from optx._errors import OptxError, near
from optx.delta._yaml import load_yaml

RECIPE = "recipe"
"""The key that names the recipe, so that ``optx run --config FILE`` needs no name."""


class Options(argparse.ArgumentParser):
    """A recipe's command line, which reads a file of options first; what is typed wins."""

    _file = ""  # while its options are looked at

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; the file's options stand before the others."""
        typed = list(sys.argv[1:] if args is None else args)
        looked = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        looked.add_argument("--config", type=Path)
        try:
            file = looked.parse_known_args(typed)[0].config
        except argparse.ArgumentError:  # its own parser says it
            file = None
        if file is None:
            return super().parse_known_args(typed, namespace)
        words = self._words(file)
        self._file = f"--config {file}: "
        super().parse_known_args(words)  # so that what is wrong there is said to be there
        self._file = ""
        return super().parse_known_args([*words, *typed], namespace)

    def error(self, message: str) -> NoReturn:
        """Say it, and of a file's option in which file it is."""
        super().error(f"{self._file}{message}")

    def _words(self, file: Path) -> list[str]:
        """The file's options as they are typed."""
        name = self.prog.rpartition(" ")[2]
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        words: list[str] = []
        try:
            options = read(file)
        except OptxError as error:
            self.error(str(error))
        if options.setdefault(RECIPE, name) != name:
            self.error(f"--config {file}: it is of the recipe {options[RECIPE]!r}, and this is {name}.")
        for key, value in options.items():
            dest = str(key).replace("-", "_")
            if dest == RECIPE:
                continue
            if dest not in actions:
                self.error(f"--config {file}: {name} has no option {key!r}. {near(str(key), actions)}")
            words += self._typed(f"--config {file}: {key}", actions[dest], value)
        return words

    def _typed(self, where: str, action: argparse.Action, value: Any) -> list[str]:
        """One option as it is typed; nothing where it has its default."""
        option = action.option_strings[-1]
        if value is None:
            return []
        if action.nargs == 0:  # a switch
            if not isinstance(value, bool):
                self.error(f"{where} is {value!r}; it must be true or false.")
            return [option] if value else []
        if isinstance(value, bool | dict) or value == []:
            self.error(f"{where} is {value!r}; it must be a word, a number, or a list of them.")
        values = [str(one) for one in value] if isinstance(value, list) else [str(value)]
        if action.nargs is None:
            return [f"{option}={','.join(values)}"]
        return [option, *values]


def read(file: Path) -> dict[str, Any]:
    """The options that a file has, by name.

    Raises:
        OptxError: it can't be read, is neither YAML nor JSON, or is no table.
    """
    if file.suffix.lower() == ".json":
        try:
            found = json.loads(file.expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OptxError(f"--config {file} can't be read as JSON ({error}).") from None
    else:
        found = load_yaml(file.expanduser(), "--config")
    if not isinstance(found, dict):
        raise OptxError(f"--config {file} is a {type(found).__name__}; it must be a table of options.")
    return dict(found)
