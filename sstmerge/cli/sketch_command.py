"""`sketch`: second moments of a base model, for merges of adapters that do not exist yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sstmerge.atomic import refuse_existing_file
from sstmerge.cli.app import ConfigOption, app, fail_on
from sstmerge.cli.memory_check import check_sums
from sstmerge.cli.merge_commands import (
    Device,
    Draws,
    Dtype,
    Limit,
    MaxLength,
    Overwrite,
    Quantization,
    ResponseTokens,
    Seed,
    Split,
    TokensPerBatch,
)
from sstmerge.cli.reporting import console, warn
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
def sketch(
    context: typer.Context,
    base: Annotated[str, typer.Option("--base", help="Base model: directory or hub id.")],
    data: Annotated[list[Path], typer.Option("--data", help="Prompt file (JSONL); repeatable.")],
    out: Annotated[Path, typer.Option("--out", help="Sketch file to write (.safetensors).")],
    labels: Annotated[str, typer.Option("--labels", help="data (gain) or sampled (cost).")],
    rank: Annotated[int, typer.Option("--rank", help="Columns of the sketch; narrower layers are kept exactly.")] = 256,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="Last name of layers, such as q_proj; repeatable. All but the head by default."),
    ] = None,
    response_tokens: ResponseTokens = None,
    max_length: MaxLength = None,
    tokens_per_batch: TokensPerBatch = 1024,
    draws: Draws = 1,
    completion_tokens: Annotated[
        int, typer.Option("--completion-tokens", help="Longest generated response of a prompt without one.")
    ] = 32,
    split: Split = None,
    limit: Limit = None,
    dtype: Dtype = "auto",
    device: Device = None,
    quantization: Quantization = None,
    seed: Seed = 0,
    launch: Launch = None,
    checkpoint: Checkpointing = True,
    checkpoint_minutes: CheckpointMinutes = 5.0,
    checkpoint_batches: CheckpointBatches = None,
    restart: Restart = False,
    overwrite: Overwrite = False,
    config: ConfigOption = None,
) -> None:
    """Sketch a base model once; `merge` and `curve` take it as --gain or --cost for any adapters, without data."""
    refuse_existing_file(out, overwrite=overwrite)
    fail_on(
        labels == "data" and draws != 1,
        f"--draws {draws} draws sampled labels, but --labels data takes those of the data; leave out --draws.",
    )
    in_processes(launch)
    from sstmerge.fisher.partial_sums import MOST_LARGE_SUMS
    from sstmerge.fisher.sketch_plan import SketchPlan
    from sstmerge.pipeline.calibration import CollectionOptions
    from sstmerge.pipeline.launch import own_device
    from sstmerge.pipeline.models import load_model, load_tokenizer
    from sstmerge.pipeline.sketch_job import sketch_file

    options = CollectionOptions(
        reference="base",
        response_tokens=response_tokens,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        draws=draws,
        completion_tokens=completion_tokens,
        seed=seed,
    )

    def announce(plan: SketchPlan) -> None:
        check_sums(context, MOST_LARGE_SUMS * plan.bytes)
        console.print(
            f"Sketching {len(plan.layers)} layers with rank {rank}: a file of {plan.bytes / 1e6:,.1f} MB, and up to "
            f"{MOST_LARGE_SUMS} times as much in memory."
        )
        for name, reason in plan.left_out.items():
            warn(f"'{name}' is left out: {reason}.")

    device = device or own_device()
    with running(context, out) as (run, progress):
        collected = sketch_file(
            lambda: (load_model(base, dtype=dtype, device=device, quantization=quantization), load_tokenizer(base)),
            data,
            out,
            labels=labels,
            options=options,
            rank=rank,
            targets=target or None,
            split=split,
            limit=limit,
            announce=announce,
            progress=progress,
            run=run,
        )
    console.print(
        f"Wrote {out}: sketch of rank {rank} of {float(collected.counts.sequences.sum()):g} sequences, "
        f"{float(collected.counts.tokens.sum()):g} response tokens, {len(collected.layers)} layers."
    )
