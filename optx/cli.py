"""The ``optx`` command: run recipes, list methods, measure steps, look at the machine."""

from __future__ import annotations

import importlib
import importlib.util
import textwrap
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

import optx
from optx import _catalog
from optx._errors import OptxError, near
from optx.delta import cli as delta_cli

# Everything after the recipe's name is the recipe's, --help too.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}

app = typer.Typer(
    help="Training-time methods for PyTorch, one line each.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
bench = typer.Typer(help="Measure on this machine.", no_args_is_help=True)


@app.callback(invoke_without_command=True)
def front(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Training-time methods for PyTorch, one line each."""
    if version:
        from optx import __version__

        typer.echo(f"optx {__version__}")
        raise typer.Exit


app.add_typer(bench, name="bench")
delta_cli.add_to(app)


def _stop(message: str, code: int = 1) -> typer.Exit:
    """An exit that says why in plain words."""
    Console(stderr=True, highlight=False).print(message, markup=False, soft_wrap=True)
    return typer.Exit(code)


@app.command(context_settings={**_PASS_ON, "help_option_names": []})
def run(context: typer.Context, recipe: Annotated[str, typer.Argument(help="its name")] = "") -> None:
    """Run a recipe: ``optx run NAME [options]``; ``optx run NAME --help`` lists its options.

    ``--config FILE`` reads options from YAML or JSON, and the recipe's name too if that is left out.
    """
    args = list(context.args)
    if recipe.partition("=")[0] == "--config":
        args = [recipe, *args]
        recipe = _recipe_of(args)
    names = [entry.name for entry in _catalog.recipes()]
    if recipe in ("", "--help", "-h"):
        typer.echo("Usage: optx run RECIPE [options]; optx run RECIPE --help lists its options.\n")
        _show("Recipes", _catalog.recipes(), long=True)
        return
    if recipe not in names:
        raise _stop(f"optx run: there is no recipe {recipe!r}. {near(recipe, names)}", 2)
    _need("recipes", "optx run: recipes need")
    from optx.recipes._assets import AssetError

    try:
        importlib.import_module(f"optx.recipes.{recipe}").main(args)
    except AssetError as error:
        raise _stop(f"optx run {recipe}: {error}") from None
    except KeyboardInterrupt:
        raise _stop("Interrupted.", 130) from None


def _recipe_of(args: list[str]) -> str:
    """The recipe that the file of ``--config`` is of."""
    from optx.recipes._config_file import RECIPE, read

    file = args[0].partition("=")[2] or "".join(args[1:2])
    try:
        found = read(Path(file)).get(RECIPE)
    except OptxError as error:
        raise _stop(f"optx run: {error}", 2) from None
    if not isinstance(found, str):
        raise _stop(
            f"optx run: --config {file} names no recipe. Add the line `recipe: finetune`, or type the name.",
            2,
        )
    return found


@app.command("list")
def list_(
    word: Annotated[str, typer.Argument(help="only what has it in its name or card; names come first")] = "",
    long: Annotated[bool, typer.Option("--long", help="each with its paper and a line of code")] = False,
) -> None:
    """List the methods and the recipes, one line each; with a word, those that have to do with it."""
    methods, recipes, told = _catalog.methods(), _catalog.recipes(), list[_catalog.Entry]()
    fused = _catalog.fused(word)
    if word.strip():
        found, told = _catalog.search(word)
        found, told = (found, told) if found else (told, [])
        if not found and not fused:
            raise _stop(f"optx list: no method for {word!r}; {_NONE}")
        methods = [entry for entry in found if entry.verb != "run"]
        recipes = [entry for entry in found if entry.verb == "run"]
    for title, entries in (("Methods", methods), ("Recipes", recipes)):
        if entries:
            _show(title, entries, long)
    if fused:
        _say(Text(fused))
    if told:
        _say(Text(f"In the cards of: {', '.join(entry.name for entry in told)}.", "dim"))


@app.command()
def show(
    method: Annotated[str, typer.Argument(help="its name, as optx list has it, or what else it is called")],
    long: Annotated[bool, typer.Option("--long", help="the whole docstring")] = False,
) -> None:
    """Show a method: how it is called, an example that runs, limits, the paper's values, arguments."""
    card = _catalog.card(method)
    if card is None:
        raise _stop(f"optx show: there is no method {method!r}; {_instead(method)}", 2)
    entry = card.entry
    _say(Text.assemble((entry.name, "bold"), "  ", (entry.verb, "cyan"), "  ", (entry.paper, "dim")))
    _say(Text(entry.summary))
    calls = (("\n".join(card.calls), "green"), (card.example, "green"))
    for text, style in (*calls, *((part, "") for part in ([card.body] if long else card.short))):
        _say(Text(f"\n{textwrap.indent(text, '    ')}", style))
    more = [] if long else [f"optx show {entry.name} --long"]
    also = [", ".join(card.also)] if card.also else []
    _say(Text())
    for label, lines in (("paper", card.links), ("run", card.shown), ("more", more), ("also", also)):
        for line in lines:
            _say(Text(f"    {label:<7}{line}", "dim"))


# What a person is told who looks for what is not here.
_NONE = (
    "optx has none, your own takes twenty lines: .github/CONTRIBUTING.md. What a method can do is in its "
    "card, as `optx show LoRA --long` prints it."
)


def _instead(method: str) -> str:
    """What may be meant by a name that no method has."""
    if fused := _catalog.fused(method):
        return fused
    word = method.removeprefix("optx.")
    if any(word.partition(".")[0] == entry.name for entry in _catalog.functions()):
        return f"help(optx.{word}) in Python tells of it."
    for entry in _catalog.engines():
        if word.lower() in (entry.name.lower(), entry.name.lower().rpartition(".")[2]):
            return f"help(optx.{entry.name}) in Python tells of it."
    if word.partition(".")[0] in dir(optx):
        return f"help(optx.{word}) in Python tells of it."
    if close := _catalog.similar(method):
        return f"near: {', '.join(map(repr, close))}."
    found, told = _catalog.search(method)
    names = ", ".join(entry.name for entry in (found or told)[:5])
    return f"`optx list {method}` finds {names}." if names else _NONE


def _say(text: Text) -> None:
    """Print a line as it is, however wide the terminal."""
    Console(highlight=False).print(text, soft_wrap=True)


@bench.command("step", context_settings={**_PASS_ON, "help_option_names": []})
def bench_step(context: typer.Context) -> None:
    """Time optimizer steps against torch's fused AdamW, with the floor that memory traffic sets."""
    importlib.import_module("optx.recipes._bench_step").main(context.args)


@bench.command("bases", context_settings={**_PASS_ON, "help_option_names": []})
def bench_bases(context: typer.Context) -> None:
    """Time each fused optimizer against its library's own step, with the floor of the memory traffic."""
    importlib.import_module("optx.recipes._bench_bases").main(context.args)


@bench.command("attach", context_settings={**_PASS_ON, "help_option_names": []})
def bench_attach(context: typer.Context) -> None:
    """Time adapters beside PEFT's on SmolLM2-135M, and count the activations both keep."""
    _need("recipes", "optx bench attach: it needs")
    if importlib.util.find_spec("peft") is None:
        raise _stop("optx bench attach: it measures beside PEFT. Type:\n    python -m pip install peft")
    importlib.import_module("optx.recipes._bench_attach").main(context.args)


@bench.command("families", context_settings={**_PASS_ON, "help_option_names": []})
def bench_families(context: typer.Context) -> None:
    """What every injection serves by default in every family of models, and whether it is right."""
    _need("recipes", "optx bench families: it needs")
    importlib.import_module("optx.recipes._bench_families").main(context.args)


@bench.command("hft", context_settings={**_PASS_ON, "help_option_names": []})
def bench_hft(context: typer.Context) -> None:
    """Time what HFT's frozen half saves of a training step, part by part, beside the least it could take."""
    _need("recipes", "optx bench hft: it needs")
    importlib.import_module("optx.recipes._bench_hft").main(context.args)


@bench.command("share", context_settings={**_PASS_ON, "help_option_names": []})
def bench_share(context: typer.Context) -> None:
    """Time and memory of weights that are read from one short array, beside dense ones."""
    _need("recipes", "optx bench share: it needs")
    importlib.import_module("optx.recipes._bench_share").main(context.args)


@bench.command("head", context_settings={**_PASS_ON, "help_option_names": []})
def bench_head(context: typer.Context) -> None:
    """Time a step of output heads of 10,000 to 1,000,000 classes, in factors and dense."""
    importlib.import_module("optx.recipes._bench_head").main(context.args)


@bench.command("delta", context_settings={**_PASS_ON, "help_option_names": []})
def bench_delta(context: typer.Context) -> None:
    """Prune a checkpoint on the disk with DARE; time beside copying it, and peak memory."""
    importlib.import_module("optx.recipes._bench_delta").main(context.args)


@bench.command("merge", context_settings={**_PASS_ON, "help_option_names": []})
def bench_merge(context: typer.Context) -> None:
    """Time merges of three models beside mergekit's."""
    if importlib.util.find_spec("mergekit") is None:
        raise _stop(
            "optx bench merge: it measures beside mergekit. Type:\n    python -m pip install mergekit"
        )
    importlib.import_module("optx.recipes._bench_merge").main(context.args)


@bench.command("rf8", context_settings={**_PASS_ON, "help_option_names": []})
def bench_rf8(context: typer.Context) -> None:
    """Time RF8's packing beside copying, and linear modules of bytes beside float32 and int8."""
    importlib.import_module("optx.recipes._bench_rf8").main(context.args)


@bench.command("softmax", context_settings={**_PASS_ON, "help_option_names": []})
def bench_softmax(context: typer.Context) -> None:
    """Time softmax of long rows in two passes beside three, and beside torch's."""
    importlib.import_module("optx.recipes._bench_softmax").main(context.args)


@app.command(context_settings={**_PASS_ON, "help_option_names": []})
def audit(context: typer.Context) -> None:
    """Compile every GPU kernel ahead of time, without a GPU, and read what it became."""
    raise typer.Exit(importlib.import_module("optx._audit").main(context.args))


@app.command()
def doctor() -> None:
    """Show versions, devices and threads, and which paths steps take here and why."""
    from optx._doctor import examine

    console = Console(highlight=False)
    broken = 0
    for finding in examine():
        broken += not finding.good
        console.print(f"{finding.topic:<24}", style=None if finding.good else "red", end="")
        console.print(finding.found, markup=False, soft_wrap=True, style=None if finding.good else "red")
    if broken:
        raise _stop(f"{broken} of these are broken.")


def _need(extra: str, sentence: str) -> None:
    """Stop if something of an extra is not installed."""
    if missing := _catalog.missing_requirements(extra):
        raise _stop(
            f"{sentence} {', '.join(missing)}, not installed here. Type:\n"
            f"    {_catalog.install_command(extra)}"
        )


def _show(title: str, entries: list[_catalog.Entry], long: bool) -> None:
    """One line an entry, as wide as the terminal; or its paper, its whole first line and its use."""
    console = Console(highlight=False)
    console.print(f"[bold underline]{title}")
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        if not long:
            room = max(20, console.width - width - 10)
            line = textwrap.shorten(entry.summary, room, placeholder=" …")
            name, verb = f"{entry.name:<{width}}", f"{entry.verb:<6}"
            console.print(Text.assemble((name, "bold"), "  ", (verb, "cyan"), "  ", line), soft_wrap=True)
            continue
        head = Text.assemble((entry.name, "bold"), "  ", (entry.verb, "cyan"), "  ", (entry.paper, "dim"))
        console.print(head)
        for part in (Text(entry.summary), Text(entry.use, "green")):
            console.print(Padding(part, (0, 0, 0, 4)))
    console.print()


def main() -> None:
    """Entry point of the ``optx`` command."""
    app()


if __name__ == "__main__":
    main()
