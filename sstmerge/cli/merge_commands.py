"""`merge` by SST and `curve`; `merge` by other methods is in `method_commands`, `fisher` in `fisher_command`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sstmerge.cli.app import ConfigOption, app, fail_on
from sstmerge.cli.method_commands import METHOD_ONLY, SST, merge_by_method, refuse_flags
from sstmerge.cli.recording import recorded
from sstmerge.cli.reporting import console, warn
from sstmerge.cli.running import (
    RUNNING_ONLY,
    CheckpointBatches,
    Checkpointing,
    CheckpointMinutes,
    Launch,
    Restart,
    in_processes,
    running,
)
from sstmerge.errors import InputError

Base = Annotated[str | None, typer.Option("--base", help="Base model: directory or hub id.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda:0, auto, …; a GPU if there is one.")]
Quantization = Annotated[str | None, typer.Option("--quantization", help="4bit or 8bit (bitsandbytes).")]
Utility = Annotated[
    list[str] | None, typer.Option("--utility", help="Utility adapter: directory or hub id; repeatable.")
]
UtilityWeight = Annotated[
    list[float] | None, typer.Option("--utility-weight", help="Weight of each utility adapter, in order.")
]
Safety = Annotated[str, typer.Option("--safety", help="Safety adapter: directory or hub id.")]
Out = Annotated[Path, typer.Option("--out", help="Where the result is written.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")]
Structure = Annotated[str, typer.Option("--structure", help="diagonal, kfac, ekfac, block or global.")]
WeightSharing = Annotated[str, typer.Option("--weight-sharing", help="K-FAC over tokens: expand or reduce.")]
ResponseTokens = Annotated[
    int | None, typer.Option("--response-tokens", help="Only the first N tokens of every response enter the loss.")
]
MaxLength = Annotated[int | None, typer.Option("--max-length", help="Longest sequence in tokens; the model's context.")]
TokensPerBatch = Annotated[int, typer.Option("--tokens-per-batch", help="Tokens per forward pass, padding included.")]
Draws = Annotated[int, typer.Option("--draws", help="Draws of sampled labels per forward pass.")]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance", help="Stop collecting when this relative error is reached, such as 0.1; all data without."
    ),
]
MaxSamples = Annotated[
    int | None, typer.Option("--max-samples", help="Collect at most N sequences of each kind, a random choice.")
]
CheckEvery = Annotated[int, typer.Option("--check-every", help="Sequences between two looks, with --tolerance.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the sampled labels.")]
Split = Annotated[str | None, typer.Option("--split", help="Use only rows of this split of the prompt files.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Use only the first N rows of each prompt file.")]
Damping = Annotated[
    float | None, typer.Option("--damping", help="Relative damping of F_cost; the structure's default.")
]
Rule = Annotated[str, typer.Option("--rule", help="project, wiener, joint or refit.")]
Scale = Annotated[float | None, typer.Option("--scale", help="Factor of the safety adapter; 1 by default.")]
Top = Annotated[int | None, typer.Option("--top", help="Keep the K directions of largest λ.")]
Fraction = Annotated[float | None, typer.Option("--fraction", help="Keep this share of all directions.")]
Energy = Annotated[float | None, typer.Option("--energy", help="Keep directions with this share of the gain energy.")]
Mu = Annotated[float | None, typer.Option("--mu", help="Shrinkage of wiener and joint, in units of λ.")]
Exponent = Annotated[float, typer.Option("--exponent", help="Power of the weights of wiener.")]
Budget = Annotated[float | None, typer.Option("--budget", help="Predicted benign KL to spend, nats per token.")]
Rank = Annotated[int | None, typer.Option("--rank", help="Rank limit of the result; lossless by default.")]
IgnoreBaseName = Annotated[
    bool, typer.Option("--ignore-base-name", help="Accept adapters whose recorded base models differ by name.")
]


@app.command()
def merge(
    context: typer.Context,
    out: Out,
    method: Annotated[str, typer.Option("--method", help="sst, or one that `sstmerge methods` lists.")] = SST,
    safety: Annotated[
        str | None,
        typer.Option("--safety", help="Safety adapter: directory or hub id; with --adapter, the NAME of one of them."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="[NAME=]DIR of an adapter, for other methods than sst; repeatable."),
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="Weight of each --adapter, in order; 1 by default.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="KEY=VALUE of an option of the method; repeatable.")
    ] = None,
    fisher_file: Annotated[
        list[str] | None, typer.Option("--fisher", help="NAME=FILE, the Fisher of an --adapter's own data; repeatable.")
    ] = None,
    aligned: Annotated[
        Path | None, typer.Option("--aligned", help="Directory of an aligned model, beside the --base it came from.")
    ] = None,
    base: Base = None,
    utility: Utility = None,
    utility_weight: UtilityWeight = None,
    harm: Annotated[list[Path] | None, typer.Option("--harm", help="Harmful prompts with refusals (JSONL).")] = None,
    benign: Annotated[list[Path] | None, typer.Option("--benign", help="Benign prompts (JSONL).")] = None,
    gain: Annotated[
        Path | None, typer.Option("--gain", help="Fisher or sketch of harmful prompts, instead of --harm.")
    ] = None,
    cost: Annotated[
        Path | None, typer.Option("--cost", help="Fisher or sketch of benign prompts, instead of --benign.")
    ] = None,
    rule: Rule = "project",
    scale: Scale = None,
    top: Top = None,
    fraction: Fraction = None,
    energy: Energy = None,
    mu: Mu = None,
    exponent: Exponent = 1.0,
    budget: Budget = None,
    rank: Rank = None,
    structure: Structure = "kfac",
    reference: Annotated[str, typer.Option("--reference", help="utility, base, NAME+…, or path:A:B:n.")] = "utility",
    damping: Damping = None,
    response_tokens: ResponseTokens = None,
    max_length: MaxLength = None,
    tokens_per_batch: TokensPerBatch = 1024,
    draws: Draws = 1,
    weight_sharing: WeightSharing = "expand",
    tolerance: Tolerance = None,
    max_samples: MaxSamples = None,
    check_every: CheckEvery = 16,
    refusal_weight: Annotated[
        float,
        typer.Option(
            "--refusal-weight", help="Count refusals of benign prompts as cost with this weight; 0: KL alone."
        ),
    ] = 0.0,
    completion_tokens: Annotated[
        int, typer.Option("--completion-tokens", help="Longest generated response of a benign prompt without one.")
    ] = 32,
    module_share: Annotated[
        float | None,
        typer.Option("--module-share", help="Collect only in this share of the modules, chosen on a pilot."),
    ] = None,
    dimension_share: Annotated[
        float, typer.Option("--dimension-share", help="Share of the basis vectors of each chosen module.")
    ] = 1.0,
    pilot: Annotated[int, typer.Option("--pilot", help="Sequences of each kind in the pilot.")] = 16,
    split: Split = None,
    limit: Limit = None,
    dtype: Dtype = "auto",
    device: Device = None,
    quantization: Quantization = None,
    seed: Seed = 0,
    stability: Annotated[bool, typer.Option(help="Solve the split halves too and report their agreement.")] = True,
    ignore_base_name: IgnoreBaseName = False,
    launch: Launch = None,
    checkpoint: Checkpointing = True,
    checkpoint_minutes: CheckpointMinutes = 5.0,
    checkpoint_batches: CheckpointBatches = None,
    restart: Restart = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost; load no weights.")] = False,
    config: ConfigOption = None,
) -> None:
    """Merge a safety adapter into utility adapters, from prompts (with the model) or from two Fishers (without).

    With --method and --adapter: merge adapters by any other method, without a model.
    """
    if method != SST:
        merge_by_method(context)
        return
    refuse_flags(context, METHOD_ONLY, "belong to other methods than sst; name one (--method)")
    fail_on(safety is None, "Give the --safety adapter; or adapters (--adapter) and another --method than sst.")
    from sstmerge.merging import Selection
    from sstmerge.pipeline import merge as job
    from sstmerge.pipeline.calibration import CollectionOptions
    from sstmerge.pipeline.launch import own_device
    from sstmerge.pipeline.models import load_model, load_tokenizer
    from sstmerge.pipeline.plan import plan_merge

    selection = Selection(top=top, fraction=fraction, energy=energy, mu=mu, budget=budget, exponent=exponent)
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
        module_share=module_share,
        dimension_share=dimension_share,
        pilot=pilot,
        tolerance=tolerance,
        max_samples=max_samples,
        check_every=check_every,
        refusal_weight=refusal_weight,
    )
    shared: dict[str, Any] = {
        "utility": utility or [],
        "safety": safety,
        "utility_weights": utility_weight or None,
        "ignore_base_name": ignore_base_name,
    }
    asked: dict[str, Any] = {
        "rule": rule,
        "scale": scale,
        "selection": selection,
        "damping": damping,
        "rank": rank,
    }
    finishing: dict[str, Any] = {"out": out, "stability": stability, "overwrite": overwrite, **asked}
    if gain is not None or cost is not None:
        fail_on(gain is None or cost is None, "--gain and --cost belong together; give both Fisher files.")
        fail_on(bool(base or harm or benign), "Give --gain and --cost, or --base with --harm and --benign, not both.")
        fail_on(rule == "refit", "The rule 'refit' evaluates the model; give --base, --harm and --benign.")
        fail_on(dry_run, "--dry-run plans a collection, but --gain and --cost are collected already; leave it out.")
        collecting = (*asdict(options), "split", "limit", "dtype", "device", "quantization", *RUNNING_ONLY)
        refuse_flags(context, collecting, "belong to the collection of Fishers; --gain and --cost are collected")
        with recorded(context, out):
            result = job.merge_from_fishers(gain, cost, **shared, **finishing)  # type: ignore[arg-type]
    else:
        fail_on(
            not (base and harm and benign),
            "Give --base, --harm and --benign (or --gain and --cost with Fishers that were collected before).",
        )
        if dry_run:
            rows = {"split": split, "limit": limit}
            console.print(plan_merge(base, harm, benign, options, out=out, **rows, **shared, **asked))  # type: ignore[arg-type]
            return
        in_processes(launch)
        with running(context, out) as (run, progress):
            result = job.merge(
                partial(load_model, base, dtype=dtype, device=device or own_device(), quantization=quantization),  # type: ignore[arg-type]
                tokenizer=load_tokenizer(base),  # type: ignore[arg-type]
                harm=harm,  # type: ignore[arg-type]
                benign=benign,  # type: ignore[arg-type]
                options=options,
                split=split,
                limit=limit,
                progress=progress,
                run=run,
                **shared,
                **finishing,
            )
        if not run.ranks.first:
            return
    console.print(report_table(result))
    for sentence in result.merge.report.warnings:
        warn(sentence)
    console.print(f"Wrote {out}")


@app.command()
def curve(
    context: typer.Context,
    gain: Annotated[Path, typer.Option("--gain", help="Fisher or sketch of harmful prompts.")],
    cost: Annotated[Path, typer.Option("--cost", help="Fisher or sketch of benign prompts.")],
    safety: Safety,
    out: Annotated[Path, typer.Option("--out", help="Directory for curve.csv, curve.png and the adapters.")],
    utility: Utility = None,
    utility_weight: UtilityWeight = None,
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="Comma-separated benign KLs, nats per token.")
    ] = None,
    scales: Annotated[str | None, typer.Option("--scales", help="Comma-separated scales.")] = None,
    rule: Rule = "project",
    top: Top = None,
    fraction: Fraction = None,
    energy: Energy = None,
    mu: Mu = None,
    exponent: Exponent = 1.0,
    rank: Rank = None,
    damping: Damping = None,
    write_adapters: Annotated[
        bool, typer.Option("--write-adapters", help="Write every point as an adapter too.")
    ] = False,
    ignore_base_name: IgnoreBaseName = False,
    overwrite: Overwrite = False,
    config: ConfigOption = None,
) -> None:
    """Draw gain against benign KL over many budgets or scales, from one pair of Fishers, without any model."""
    from sstmerge.merging import Selection
    from sstmerge.pipeline.curve import trade_off_curve

    fail_on((budgets is None) == (scales is None), "Give either --budgets or --scales.")
    with recorded(context, out):
        points = trade_off_curve(
            gain,
            cost,
            utility=utility or [],
            safety=safety,
            utility_weights=utility_weight or None,
            budgets=_numbers(budgets, "--budgets"),
            scales=_numbers(scales, "--scales"),
            rule=rule,
            selection=Selection(top=top, fraction=fraction, energy=energy, mu=mu, exponent=exponent),
            damping=damping,
            out=out,
            rank=rank,
            write_adapters=write_adapters,
            ignore_base_name=ignore_base_name,
            overwrite=overwrite,
        )
    table = Table("method", "scale", "directions", "predicted KL", "gain kept", "predicted gain")
    for point in points:
        table.add_row(
            point.method,
            f"{point.scale:.3f}",
            str(point.directions),
            f"{point.predicted_kl:.5f}",
            f"{point.gain_kept:.3f}",
            f"{point.predicted_gain:.4f}",
        )
    console.print(table)
    for sentence in dict.fromkeys(sentence for point in points for sentence in point.warnings):
        warn(sentence)
    console.print(f"Wrote {out}")


def report_table(result: Any) -> Table:
    """Return the report of a merge as a table.

    Args:
        result: A `MergeResult`.

    Returns:
        The table.
    """
    from sstmerge.fisher.convergence import convergence_sentence

    report, stability = result.merge.report, result.stability
    table = Table(title=f"Merge: {report.rule}, {report.structure}", show_header=False)
    kept = "directions of a weight above 1/2" if report.rule in ("wiener", "joint") else "directions kept"
    table.add_row(kept, f"{report.directions} of {report.directions_in_all}")
    table.add_row("scale", f"{report.scale:.4f}")
    if report.mu is not None:
        table.add_row("mu", f"{report.mu:.4g}" + (f", exponent {report.exponent:g}" if report.exponent != 1.0 else ""))
    table.add_row("gain kept (scale 1)", f"{report.gain_kept:.1%}")
    table.add_row(
        "predicted benign KL, nats/token",
        f"{report.predicted_kl:.5f} (task arithmetic at this scale: {report.predicted_kl_task_arithmetic:.5f})",
    )
    table.add_row("predicted gain of refusals, nats/token", f"{report.predicted_gain:.4f}")
    table.add_row("norm", f"{report.norm:.3f} (task arithmetic: {report.norm_task_arithmetic:.3f})")
    table.add_row("length, adapter as trained = 1", f"{report.length:.2f}")
    table.add_row("largest λ", ", ".join(f"{value:.4g}" for value in report.spectrum[:6]))
    table.add_row("effective sequences", f"{report.gain_sequences:.0f} harm, {report.cost_sequences:.0f} benign")
    for role, fisher in (("harm", result.gain), ("benign", result.cost)):
        if (stopped := convergence_sentence(fisher.metadata)) is not None:
            table.add_row(f"{role} data", stopped)
    if stability is not None:
        table.add_row(
            "split halves",
            f"overlap of the top {stability.directions}: {stability.subspace_overlap:.2f} "
            f"(chance {stability.chance_overlap:.3f}); held-out gain {stability.held_out_gain:.1%}, "
            f"in-sample {stability.in_sample_gain:.1%}; held-out cost {stability.held_out_cost:.1%}",
        )
        table.add_row(
            "benign KL of a half's step",
            f"{stability.held_out_kl:.2g} nats/token on the other half, {stability.in_sample_kl:.2g} on its own",
        )
    table.add_row("rank of the result", str(next(iter(result.adapter.layers.values())).rank))
    return table


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} expects comma-separated numbers, but got '{text}'.") from None
