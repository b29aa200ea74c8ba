"""What a merge would do and cost, found without loading any weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sstmerge.adapters import CoreSpace
from sstmerge.fisher import reference_points
from sstmerge.fisher.structures import Structure, parse_structure
from sstmerge.merging import Selection
from sstmerge.pipeline.calibration import CollectionOptions, load_all
from sstmerge.pipeline.merge_checks import check_merge
from sstmerge.pipeline.models import load_tokenizer, parameter_count
from sstmerge.pipeline.process_memory import available_bytes
from sstmerge.pipeline.roles import AdapterSource, expand_reference, load_roles
from sstmerge.prompts import Example, encode, prompt_tokens

_UNLIMITED = 10**9


def plan_merge(
    base: str,
    harm: Sequence[str | Path],
    benign: Sequence[str | Path],
    options: CollectionOptions,
    *,
    utility: AdapterSource | Sequence[AdapterSource],
    safety: AdapterSource,
    utility_weights: Sequence[float] | None = None,
    ignore_base_name: bool = False,
    split: str | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    rule: str = "project",
    scale: float | None = None,
    selection: Selection = Selection(),  # noqa: B008 (frozen)
    damping: float | None = None,
    rank: int | None = None,
) -> Table:
    """Check every input that can be checked without weights, and estimate the cost.

    Args:
        base: Base model: directory or hub id.
        harm: Harmful prompts.
        benign: Benign prompts.
        options: How the Fishers would be collected.
        utility: Utility adapters.
        safety: The safety adapter.
        utility_weights: Weights of the utility adapters.
        ignore_base_name: Accept different base model names.
        split: Keep rows of this split.
        limit: Keep the first so many rows of each file.
        out: Where the result would go.
        rule: Rule of the merge.
        scale: Factor of the safety adapter.
        selection: Which directions would be kept.
        damping: Relative damping of F_cost.
        rank: Rank limit of the result.

    Returns:
        A table: layers, core size, sequences, tokens, floating-point operations, sizes in memory.

    Raises:
        InputError: If an option cannot work, or an input is unusable.
    """
    roles = load_roles(utility, safety, utility_weights, ignore_base_name=ignore_base_name)
    space = roles.space
    check_merge(space, rule, scale=scale, selection=selection, damping=damping, rank=rank, options=options)
    structure = parse_structure(options.structure)
    points = len(reference_points(expand_reference(options.reference, roles), space))
    tokenizer = load_tokenizer(base)
    parameters = parameter_count(base)
    sets = {
        "harm": load_all(harm, split=split, limit=limit),
        "benign": load_all(benign, split=split, limit=limit),
    }
    counts = {name: min(len(examples), options.max_samples or len(examples)) for name, examples in sets.items()}
    tokens = {name: round(_tokens(s, tokenizer, options) * counts[name] / len(s)) for name, s in sets.items()}
    missing = sum(example.response is None for example in sets["benign"])
    passes = 2 if structure is Structure.EKFAC else 1
    # Forward 2 and activation gradients 2 FLOP per parameter and token; each further draw repeats the backward half.
    benign_flop = 2 + 2 * options.draws + (4 if options.refusal_weight else 0)
    flop = passes * points * parameters * (4 * tokens["harm"] + benign_flop * tokens["benign"])
    table = Table(title="Plan (nothing is run)", show_header=False)
    table.add_row("base model", f"{base}: {parameters / 1e6:,.1f} M parameters")
    table.add_row("adapters", ", ".join(f"{a.name} ({a.source})" for a in space.adapters))
    table.add_row(
        "adapted layers", f"{len(space.layer_names)} in {len(space.groups)} shapes; core dimension {space.size:,}"
    )
    for name, count in counts.items():
        at_most = f" of {len(sets[name])}, at most" if options.max_samples or options.tolerance else ""
        table.add_row(f"{name} prompts", f"{count} sequences{at_most}, {tokens[name]:,} tokens")
    if missing:
        table.add_row("responses to generate", f"{missing} of at most {options.completion_tokens} tokens")
    table.add_row("structure", f"{structure.value} at {points} reference point(s), {passes} pass(es)")
    table.add_row("calibration", f"about {flop / 1e12:,.2f} TFLOP (forward and activation gradients)")
    table.add_row(
        "memory of both Fishers", f"about {_fisher_bytes(structure, space, counts, points, options) / 1e6:,.1f} MB"
    )
    free = available_bytes()
    table.add_row("free memory", "unknown" if free is None else f"{free / 1e6:,.1f} MB")
    table.add_row("output", str(out))
    return table


def _tokens(examples: Sequence[Example], tokenizer: Any, options: CollectionOptions) -> int:
    answered = [e for e in examples if e.response is not None]
    limit = options.max_length or _UNLIMITED
    encoded = encode(answered, tokenizer, max_length=limit, response_tokens=options.response_tokens)
    prompts = [len(prompt_tokens(e, tokenizer)) for e in examples if e.response is None]
    answer = min(options.completion_tokens, options.response_tokens or _UNLIMITED)
    return sum(len(e.input_ids) for e in encoded) + sum(min(n + answer, limit) for n in prompts)


def _fisher_bytes(
    structure: Structure, space: CoreSpace, counts: dict[str, int], points: int, options: CollectionOptions
) -> int:
    shapes = [group.core_shape for group in space.groups]
    if structure is Structure.GLOBAL:
        benign_rows = options.draws + (1 if options.refusal_weight else 0)
        rows = points * (counts["harm"] + benign_rows * counts["benign"])
        return rows * space.size * 4
    per_layer = {
        Structure.DIAGONAL: lambda o, i: 8 * o * i,
        Structure.KFAC: lambda o, i: 8 * (o * o + i * i),
        Structure.EKFAC: lambda o, i: 8 * (o * o + i * i + o * i),
        Structure.BLOCK: lambda o, i: 4 * (o * i) ** 2,
    }[structure]
    # Two Fishers, two split halves each.
    return int(4 * sum(layers * per_layer(rows, columns) for layers, rows, columns in shapes))
