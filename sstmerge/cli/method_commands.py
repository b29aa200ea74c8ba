"""`methods`, and `merge` by a method that merges adapter files without a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from sstmerge.cli.app import app, fail_on, parse_named
from sstmerge.cli.named_paths import name_and_path
from sstmerge.cli.recording import recorded
from sstmerge.cli.reporting import console, progress_bars

SST = "sst"
# Flags of `merge` that only methods other than sst take, and all that these take.
METHOD_ONLY = ("adapter", "weight", "option", "fisher_file", "aligned")
_SHARED = ("method", "out", "safety", "gain", "cost", "base", "rank", "dtype", "seed", "config")
_SWITCHES = ("ignore_base_name", "overwrite", "dry_run")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to show all about it.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print all methods as a page in Markdown.")] = False,
) -> None:
    """List the merging methods with what they need, or show one of them in full."""
    from sstmerge.pipeline.method_merge import available_methods, find_method
    from sstmerge.pipeline.method_pages import markdown_page, method_table, overview_table

    fail_on(as_markdown and name is not None, "--markdown prints all methods; leave out the name.")
    if as_markdown:
        typer.echo(markdown_page(available_methods().values()), nl=False)
    elif name is None:
        console.print(overview_table(available_methods().values()))
        console.print("sst, this project's own, takes roles: sstmerge merge --safety DIR --utility DIR … (--help).")
    else:
        console.print(method_table(find_method(name)))


def merge_by_method(context: typer.Context) -> None:
    """Run `merge` with the parameters of a method that merges adapter files.

    Args:
        context: The context of the command.
    """
    from sstmerge.pipeline.method_merge import StatisticsFiles, find_method, merge_adapters, plan_adapters, plan_table

    given = context.params
    method = find_method(given["method"])
    taken = {*METHOD_ONLY, *_SHARED, *_SWITCHES}
    refuse_flags(context, [name for name in given if name not in taken], f"are no flags of the method '{method.name}'")
    fail_on(not given["adapter"], f"Method '{method.name}' merges the adapters given by --adapter; give at least one.")
    arguments: dict[str, Any] = {
        "adapters": _adapters(given["adapter"]),
        "weights": given["weight"] or None,
        "method": method.name,
        "options": _options(given["option"], method),
        "safety": given["safety"],
        "statistics": StatisticsFiles(
            fishers=parse_named(given["fisher_file"], "--fisher", "NAME=FILE"),
            gain=given["gain"],
            cost=given["cost"],
            aligned=given["aligned"],
            base=given["base"],
        ),
        "rank": given["rank"],
        "dtype": None if given["dtype"] == "auto" else given["dtype"],
        "seed": given["seed"] if _is_given(context, "seed") else None,
        "ignore_base_name": given["ignore_base_name"],
    }
    if given["dry_run"]:
        console.print(plan_table(plan_adapters(**arguments), given["out"]))
        return
    with recorded(context, given["out"]), progress_bars() as progress:
        merged = merge_adapters(**arguments, out=given["out"], overwrite=given["overwrite"], progress=progress)
    rank = next(iter(merged.layers.values())).rank
    dtype = str(merged.dtype).removeprefix("torch.")
    console.print(f"Wrote {given['out']}: {method.name}, {len(merged.layers)} layers of rank {rank}, {dtype}.")


def refuse_flags(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse flags that would have no effect.

    Args:
        context: The context of the command.
        names: Names of its parameters.
        why: How the sentence that begins with the flags goes on.

    Raises:
        InputError: One of them was given, as a flag or in a configuration.
    """
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    useless = [flags[name] for name in names if _is_given(context, name)]
    fail_on(bool(useless), f"{', '.join(useless)} {why}.")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _adapters(values: list[str]) -> dict[str, str]:
    """Return the directories by name; the name of one without a name is the last component of its path."""
    named = []
    for value in values:
        name, directory = name_and_path(value)
        named.append((Path(value).name if name is None else name, directory))
    names = [name for name, _ in named]
    twice = next((name for name in names if names.count(name) > 1), None)
    fail_on(twice is not None, f"Two adapters have the name '{twice}'; tell them apart with --adapter NAME=DIR.")
    fail_on(
        not all(name and directory for name, directory in named), f"--adapter expects [NAME=]DIR, but got {values}."
    )
    return dict(named)


def _options(values: list[str] | None, method: Any) -> dict[str, Any]:
    """Return the values of KEY=VALUE arguments, in the types of the method's options."""
    options = {}
    known = {option.name: option for option in method.options}
    for key, text in parse_named(values, "--option", "KEY=VALUE").items():
        name = key.replace("-", "_")
        options[name] = known[name].parse(text) if name in known else text
    return options
