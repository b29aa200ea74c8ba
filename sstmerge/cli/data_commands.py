"""`evaluate`, `check`, `inspect` and `doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sstmerge.atomic import refuse_existing_file
from sstmerge.cli.app import ConfigOption, app, fail_on, parse_named
from sstmerge.cli.merge_commands import Device, Dtype, Limit, Overwrite, Quantization, Safety, Split, Utility
from sstmerge.cli.recording import recorded
from sstmerge.cli.reporting import console, progress_bars

Prompts = Annotated[Path | None, typer.Option(show_default=False)]


@app.command()
def evaluate(
    context: typer.Context,
    base: Annotated[str, typer.Option("--base", help="Base model: directory or hub id.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="NAME=DIR of every adapter to evaluate; repeatable.")
    ] = None,
    harmful: Annotated[Path | None, typer.Option("--harmful", help="Prompts that should be refused.")] = None,
    benign: Annotated[Path | None, typer.Option("--benign", help="Prompts that should be answered.")] = None,
    borderline: Annotated[Path | None, typer.Option("--borderline", help="Harmless prompts that look harmful.")] = None,
    utility_tasks: Annotated[
        Path | None, typer.Option("--utility-tasks", help="Tasks whose response must be met exactly.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="Measure the KL from this one, on the responses of --benign and --borderline: an adapter's NAME or base.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file with all numbers and completions.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer to a prompt.")] = 24,
    utility_new_tokens: Annotated[int, typer.Option("--utility-new-tokens", help="Longest answer to a task.")] = 40,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Prompts decoded together.")] = 128,
    split: Split = None,
    limit: Limit = None,
    dtype: Dtype = "auto",
    device: Device = None,
    quantization: Quantization = None,
    overwrite: Overwrite = False,
    config: ConfigOption = None,
) -> None:
    """Measure refusal on harmful, over-refusal on benign prompts, utility, degenerate output, and KL to a reference."""
    from sstmerge.adapters import load_adapter
    from sstmerge.pipeline.calibration import CollectionOptions, batches_of
    from sstmerge.pipeline.evaluate import PromptSets, table, write_json
    from sstmerge.pipeline.evaluate_job import BASE, adapter_state, evaluate_states, kl_examples
    from sstmerge.pipeline.models import load_model, load_tokenizer
    from sstmerge.prompts import load_examples

    fail_on(not (harmful or benign or borderline or utility_tasks), "Give at least one prompt file, such as --harmful.")
    if out is not None:
        refuse_existing_file(out, overwrite=overwrite)
    files = {"harmful": harmful, "benign": benign, "borderline": borderline, "utility": utility_tasks}
    prompts = PromptSets(
        **{name: load_examples(str(f), split=split, limit=limit) for name, f in files.items() if f is not None}
    )
    adapters = {n: load_adapter(d, name=n) for n, d in parse_named(adapter, "--adapter").items()}
    fail_on(BASE in adapters, f"'{BASE}' is the base model itself; give the adapter another name.")
    fail_on(
        reference is not None and reference not in {BASE, *adapters},
        f"--reference '{reference}' is neither '{BASE}' nor one of the adapters {sorted(adapters)}.",
    )
    answered = kl_examples(prompts) if reference is not None else []
    with recorded(context, out), progress_bars() as progress:
        model, tokenizer = load_model(base, dtype=dtype, device=device, quantization=quantization), load_tokenizer(base)
        states = {name: adapter_state(model, a) for name, a in {BASE: None, **adapters}.items()}
        evaluations = evaluate_states(
            model,
            tokenizer,
            states,
            prompts,
            reference=reference,
            kl_batches=batches_of(model, tokenizer, answered, CollectionOptions()) if answered else (),
            max_new_tokens=max_new_tokens,
            utility_new_tokens=utility_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
        if out is not None:
            write_json([evaluation.to_json() for evaluation in evaluations], out)
    console.print(table(evaluations))
    if out is not None:
        console.print(f"Wrote {out}")


@app.command()
def check(
    context: typer.Context,
    base: Annotated[str, typer.Option("--base", help="Base model: directory or hub id.")],
    safety: Safety,
    harm: Annotated[list[Path], typer.Option("--harm", help="Harmful prompts with refusals.")],
    benign: Annotated[list[Path], typer.Option("--benign", help="Benign prompts.")],
    utility: Utility = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file with the findings.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer to a prompt.")] = 24,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Prompts decoded together.")] = 128,
    split: Split = None,
    limit: Limit = None,
    dtype: Dtype = "auto",
    device: Device = None,
    quantization: Quantization = None,
    config: ConfigOption = None,
) -> None:
    """Look at data and adapters before a merge: over-refusal, borderline prompts, one-string refusals, overlap, labels."""
    from sstmerge.evaluation.generate import generate
    from sstmerge.pipeline.calibration import load_all
    from sstmerge.pipeline.check import check as run_check
    from sstmerge.pipeline.evaluate import write_json
    from sstmerge.pipeline.evaluate_job import adapter_state
    from sstmerge.pipeline.models import load_model, load_tokenizer
    from sstmerge.pipeline.roles import load_named

    named = {adapter.name: adapter for adapter in load_named(utility or [], safety)}
    sets = load_all(harm, split=split, limit=limit), load_all(benign, split=split, limit=limit)
    done, total = 0, len(named) * sum(map(len, sets))
    with recorded(context, out), progress_bars() as progress:
        model, tokenizer = load_model(base, dtype=dtype, device=device, quantization=quantization), load_tokenizer(base)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress("answering prompts", done, total)

        def generate_with(name: str, examples):  # type: ignore[no-untyped-def]
            with adapter_state(model, named[name])():
                return generate(
                    model,
                    tokenizer,
                    examples,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    progress=advance,
                )

        utilities = [name for name in named if name != "safety"]
        found = run_check(*sets, safety="safety", utilities=utilities, generate_with=generate_with)
        if out is not None:
            write_json(found.to_json(), out)
    console.print(found.table())
    if out is not None:
        console.print(f"Wrote {out}")


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="Fisher file, sketch, or adapter directory.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the header of a Fisher file or sketch as JSON.")
    ] = False,
) -> None:
    """Show what is in a Fisher file, a sketch, an adapter, or a merged adapter with its report."""
    from sstmerge.pipeline.inspection import file_header, inspect

    if as_json:
        fail_on(not path.is_file(), "--json shows the header of a Fisher file or sketch; give one.")
        console.print_json(json.dumps(file_header(path)))
        return
    for table in inspect(path):
        console.print(table)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="File or directory that a command wrote with --out.")],
    inputs: Annotated[bool, typer.Option("--inputs", help="Compare the inputs with their hashes, too.")] = False,
) -> None:
    """Check an output against its manifest; exit code 1 and a line per file where something differs."""
    from sstmerge.pipeline.manifest import manifest_path, read_manifest
    from sstmerge.pipeline.manifest import verify as compare

    differences = compare(path, inputs=inputs)
    for difference in differences:
        console.print(f"{difference.file} {difference.words}", markup=False, highlight=False, soft_wrap=True)
    if differences:
        raise typer.Exit(1)
    files = len(read_manifest(path)["outputs"])
    console.print(f"{path}: {files} file(s) as {manifest_path(path).name} says.", markup=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Print versions and backends with the reason for each that is missing, and check every op against its reference."""
    from sstmerge.pipeline.doctor import diagnose, render

    diagnosis = diagnose()
    console.print(render(diagnosis))
    if not diagnosis.ok:
        raise typer.Exit(1)
