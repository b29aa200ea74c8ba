"""The typer application, its configuration files, progress bars and error handling."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sstmerge.errors import InputError, SSTMergeError

app = typer.Typer(
    name="sstmerge",
    help="Merge LoRA adapters by measured effect: safety gained per unit of damage to benign work.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
error_console = Console(stderr=True)


def main() -> None:
    """Run the command line; errors that sstmerge raises on purpose end it with exit code 2."""
    # Commands register themselves on import.
    from sstmerge.cli import data_commands, demo_command, fisher_command, merge_commands, method_commands  # noqa: F401

    try:
        app()
    except SSTMergeError as error:
        error_console.print(f"[bold red]Error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Read a YAML file whose keys are the command's flags; flags given on the command line win.

    Args:
        context: The command's context.
        path: The file, or None.

    Returns:
        The path.

    Raises:
        InputError: If the file is no mapping of known flags.
    """
    if path is None:
        return None
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The configuration '{path}' cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"The configuration '{path}' must be a mapping of flags to values, such as `top: 8`.")
    flags = {name.lstrip("-"): p for p in context.command.params for name in p.opts if name.startswith("--")}
    values: dict[str, Any] = {}
    for key, value in content.items():
        parameter = flags.get(str(key).replace("_", "-"))
        if parameter is None or parameter.name is None:
            raise InputError(f"The configuration '{path}' has the key '{key}', which is no flag: {sorted(flags)}.")
        values[parameter.name] = _as_flag_value(value, multiple=getattr(parameter, "multiple", False))
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _as_flag_value(value: Any, *, multiple: bool) -> Any:
    if multiple:
        return [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return str(value) if isinstance(value, Path) else value


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with the same names as the flags; flags win.",
        callback=load_config,
        is_eager=True,
        show_default=False,
    ),
]


@contextmanager
def progress_bars() -> Iterator[Any]:
    """Show one bar per kind of work; yields a function of what is done, how much, and how much there is.

    Yields:
        The function.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=error_console, transient=False) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def parse_named(values: list[str] | None, option: str, form: str = "NAME=DIR") -> dict[str, str]:
    """Split arguments such as NAME=DIR.

    Args:
        values: Arguments.
        option: Flag they were given to, for messages.
        form: Their form, for messages.

    Returns:
        What follows the sign by what goes before it.

    Raises:
        InputError: If an argument has another form, or a name comes twice.
    """
    named: dict[str, str] = {}
    for value in values or []:
        name, separator, directory = value.partition("=")
        if not separator or not name or not directory:
            raise InputError(f"{option} expects {form}, but got '{value}'.")
        if name in named:
            raise InputError(f"{option} names '{name}' twice.")
        named[name] = directory
    return named


def fail_on(condition: bool, message: str) -> None:
    """Raise an InputError if a condition holds.

    Args:
        condition: The condition.
        message: The sentence.

    Raises:
        InputError: If the condition holds.
    """
    if condition:
        raise InputError(message)
