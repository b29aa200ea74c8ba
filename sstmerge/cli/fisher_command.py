"""`fisher`: collect one Fisher into a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sstmerge.atomic import refuse_existing_file
from sstmerge.cli.app import ConfigOption, app, fail_on, parse_named
from sstmerge.cli.merge_commands import (
    CheckEvery,
    Device,
    Draws,
    Dtype,
    IgnoreBaseName,
    Limit,
    MaxLength,
    MaxSamples,
    Overwrite,
    Quantization,
    ResponseTokens,
    Seed,
    Split,
    Structure,
    TokensPerBatch,
    Tolerance,
    WeightSharing,
)
from sstmerge.cli.reporting import console
from sstmerge.cli.running import (
    CheckpointBatches,
    Checkpointing,
    CheckpointMinutes,
    Launch,
    Restart,
    in_processes,
    running,
)


@app.command()
def fisher(
    context: typer.Context,
    base: Annotated[str, typer.Option("--base", help="Base model: directory or hub id.")],
    adapter: Annotated[list[str], typer.Option("--adapter", help="NAME=DIR of every adapter of the later merge.")],
    data: Annotated[list[Path], typer.Option("--data", help="Prompt file (JSONL); repeatable.")],
    out: Annotated[Path, typer.Option("--out", help="Fisher file to write (.safetensors).")],
    labels: Annotated[str, typer.Option("--labels", help="data (gain) or sampled (cost).")],
    reference: Annotated[str, typer.Option("--reference", help="NAME, base, A+0.5*B or path:A:B:n.")] = "base",
    structure: Structure = "kfac",
    basis: Annotated[
        list[Path] | None,
        typer.Option("--basis", help="Two kfac Fishers (gain, cost) whose eigenbasis ekfac refits in."),
    ] = None,
    like: Annotated[Path | None, typer.Option("--like", help="Collect in the very space of this Fisher file.")] = None,
    response_tokens: ResponseTokens = None,
    max_length: MaxLength = None,
    tokens_per_batch: TokensPerBatch = 1024,
    draws: Draws = 1,
    weight_sharing: WeightSharing = "expand",
    tolerance: Tolerance = None,
    max_samples: MaxSamples = None,
    check_every: CheckEvery = 16,
    completion_tokens: Annotated[
        int, typer.Option("--completion-tokens", help="Longest generated response of a prompt without one.")
    ] = 32,
    split: Split = None,
    limit: Limit = None,
    dtype: Dtype = "auto",
    device: Device = None,
    quantization: Quantization = None,
    seed: Seed = 0,
    ignore_base_name: IgnoreBaseName = False,
    launch: Launch = None,
    checkpoint: Checkpointing = True,
    checkpoint_minutes: CheckpointMinutes = 5.0,
    checkpoint_batches: CheckpointBatches = None,
    restart: Restart = False,
    overwrite: Overwrite = False,
    config: ConfigOption = None,
) -> None:
    """Collect one Fisher and save it, to be used by any number of merges."""
    refuse_existing_file(out, overwrite=overwrite)
    fail_on(
        labels == "data" and draws != 1,
        f"--draws {draws} draws sampled labels, but --labels data takes those of the data; leave out --draws.",
    )
    in_processes(launch)
    from sstmerge.fisher.convergence import convergence_sentence
    from sstmerge.pipeline.calibration import CollectionOptions
    from sstmerge.pipeline.fisher_job import collect_file
    from sstmerge.pipeline.launch import own_device
    from sstmerge.pipeline.models import load_model, load_tokenizer

    options = CollectionOptions(
        structure=structure,
        reference=reference,
        response_tokens=response_tokens,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        draws=draws,
        weight_sharing=weight_sharing,
        completion_tokens=completion_tokens,
        seed=seed,
        tolerance=tolerance,
        max_samples=max_samples,
        check_every=check_every,
    )
    adapters = parse_named(adapter, "--adapter")
    device = device or own_device()
    with running(context, out) as (run, progress):
        collected = collect_file(
            lambda: (load_model(base, dtype=dtype, device=device, quantization=quantization), load_tokenizer(base)),
            adapters,
            data,
            out,
            labels=labels,
            options=options,
            basis=basis,
            like=like,
            split=split,
            limit=limit,
            ignore_base_name=ignore_base_name,
            progress=progress,
            run=run,
        )
    counts = collected.counts
    console.print(
        f"Wrote {out}: {collected.structure} Fisher of {float(counts.sequences.sum()):g} sequences, "
        f"{collected.tokens:g} response tokens, {len(collected.space.layer_names)} layers."
    )
    if (stopped := convergence_sentence(collected.metadata)) is not None:
        console.print(f"Collecting: {stopped}.")
