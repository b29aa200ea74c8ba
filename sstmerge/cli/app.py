"""The typer application, its configuration files and error handling."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sstmerge.cli.configuration import read_yaml
from sstmerge.cli.memory_check import ignore_memory
from sstmerge.cli.reporting import log_as_json, show_error
from sstmerge.errors import InputError, Interrupted, SSTMergeError

app = typer.Typer(
    name="sstmerge",
    help="Merge LoRA adapters by measured effect: safety gained per unit of damage to benign work.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; errors that sstmerge raises on purpose end it with exit code 2."""
    # Commands register themselves on import.
    from sstmerge.cli import (  # noqa: F401
        data_commands,
        demo_command,
        fisher_command,
        merge_commands,
        method_commands,
        sketch_command,
    )

    log_as_json(False)
    common = typer.Typer(add_completion=False)
    common.command()(_flags_of_all)
    command: Any = typer.main.get_command(app)
    for subcommand in command.commands.values():
        subcommand.params.extend(p for p in typer.main.get_command(common).params if p.name != "help")
    try:
        command()
    except SSTMergeError as error:
        if not getattr(error, "reported", False):  # by another process of the run
            show_error(str(error))
        sys.exit(128 + error.signal if isinstance(error, Interrupted) else 2)
    except Exception as error:
        sentence = _lack_of_resources(error)
        if sentence is None:
            raise
        show_error(sentence)
        sys.exit(2)


def _flags_of_all(
    log_json: Annotated[
        bool,
        typer.Option(
            "--log-json",
            expose_value=False,
            callback=log_as_json,
            help="Write progress, warnings and errors to stderr as JSON, one object per line.",
        ),
    ] = False,
    ignore_memory: Annotated[
        bool,
        typer.Option(
            "--ignore-memory",
            expose_value=False,
            callback=ignore_memory,
            help="Go on although the estimate says that the memory will not suffice.",
        ),
    ] = False,
) -> None:
    """Declare the flags that every command has, without being parameters of its function."""


def _lack_of_resources(error: Exception) -> str | None:
    """Say what the machine could not give; None for any other error, which is a bug and keeps its traceback."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error):
        return (
            f"The memory is used up ({error or 'MemoryError'}). Choose a smaller --structure (kfac), fewer rows (--limit), "
            "fewer --tokens-per-batch, or --module-share."
        )
    if isinstance(error, OSError):
        return f"A file cannot be used: {error}."
    return None


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
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"The configuration '{path}' must be a mapping of flags to values, such as `top: 8`.")
    flags = {name.lstrip("-"): p for p in context.command.params for name in p.opts if name.startswith("--")}
    values: dict[str, Any] = {}
    for key, value in content.items():
        parameter = flags.get(str(key).replace("_", "-"))
        if parameter is None or parameter.name is None:
            raise InputError(f"The configuration '{path}' has the key '{key}', which is no flag: {sorted(flags)}.")
        if value is not None:
            values[parameter.name] = _as_flag_value(
                value, str(key), path, multiple=getattr(parameter, "multiple", False)
            )
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _as_flag_value(value: Any, key: str, path: Path, *, multiple: bool) -> Any:
    """Return a value in the form in which it would come from the command line: text, or a list of texts."""
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in listed) or (isinstance(value, list) and not multiple):
        raise InputError(
            f"The configuration '{path}' gives '{key}' a value that is no {'list of ' * multiple}plain text."
        )
    return listed if multiple else value


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
