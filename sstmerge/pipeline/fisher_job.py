"""Collecting one Fisher into a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sstmerge.adapters import CoreSpace, load_adapter
from sstmerge.errors import InputError
from sstmerge.fisher import Batch, Fisher, KroneckerBasis, collect_fisher, reference_points
from sstmerge.fisher.structures import parse_structure
from sstmerge.gevp import KroneckerSpectrum, solve
from sstmerge.pipeline.calibration import CollectionOptions, batches_of, complete, load_all
from sstmerge.pipeline.progress import Progress, no_progress, token_progress
from sstmerge.pipeline.run import Run
from sstmerge.pipeline.sequential import converge


def collect_file(
    load: Callable[[], tuple[nn.Module, Any]],
    adapters: Mapping[str, str],
    data: Sequence[str | Path],
    out: str | Path,
    *,
    labels: str,
    options: CollectionOptions,
    basis: Sequence[str | Path] | None = None,
    like: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    ignore_base_name: bool = False,
    progress: Progress = no_progress,
    run: Run = Run(),  # noqa: B008 (frozen)
) -> Fisher:
    """Collect a Fisher from prompt files and save it.

    Args:
        load: Loads the model and its tokenizer; called after all cheap checks.
        adapters: Directories or hub ids by name: all adapters of the later merge.
        data: Prompt files.
        out: Fisher file to write.
        labels: `data` or `sampled`.
        options: How.
        basis: For `ekfac`: the kfac Fishers of gain and cost.
        like: A Fisher file whose space is used.
        split: Keep rows of this split.
        limit: Keep the first so many rows of each file.
        ignore_base_name: Accept adapters whose recorded base models differ by name.
        progress: Progress.
        run: The processes that share the work, all of which call this function and of which the first one writes, and
            the folder where they keep what is collected (`sstmerge.pipeline.run.opened_run`).

    Returns:
        The Fisher, which is saved too.

    Raises:
        InputError: If an option or input is unusable.
    """
    parse_structure(options.structure)
    if labels not in ("data", "sampled"):
        raise InputError(f"Unknown labels '{labels}'; expected 'data' or 'sampled'.")
    loaded = [load_adapter(source, name=name) for name, source in adapters.items()]
    new_space = CoreSpace.of(loaded, ignore_base_name=ignore_base_name)
    space = run.same_space(new_space if like is None else Fisher.load(like, loaded).space)
    kronecker = _basis(basis, space, options)
    reference_points(options.reference, space)
    examples = load_all(data, split=split, limit=limit)
    if labels == "data" and any(example.response is None for example in examples):
        raise InputError("labels='data' needs a response in every row; these are what the Fisher measures.")
    model, tokenizer = load()
    examples = complete(
        model,
        tokenizer,
        examples,
        space,
        options.reference,
        max_new_tokens=options.completion_tokens,
        progress=progress,
        run=run,
    )
    batches = batches_of(model, tokenizer, examples, options)

    def collect(part_of_data: Sequence[Batch], part: str = "") -> Fisher:
        return collect_fisher(
            model,
            part_of_data,
            space,
            structure=options.structure,
            labels=labels,
            reference=options.reference,
            draws=options.draws if labels == "sampled" else 1,
            weight_sharing=options.weight_sharing,
            basis=kronecker,
            seed=options.seed,
            metadata={"response_tokens": options.response_tokens},
            progress=token_progress(f"{labels} Fisher ({options.structure}) {part}".rstrip(), part_of_data, progress),
            ranks=run.ranks,
            checkpoint=run.checkpoint("-".join(filter(None, ["Fisher", part]))),
        )

    rule = options.stopping_rule
    fisher = collect(batches) if rule is None else converge(batches, collect, rule, ranks=run.ranks)
    if run.ranks.first:
        fisher.save(out)
    return fisher


def _basis(files: Sequence[str | Path] | None, space: CoreSpace, options: CollectionOptions) -> KroneckerBasis | None:
    if not files:
        return None
    if len(files) != 2:
        raise InputError(f"An EK-FAC basis comes from two kfac Fishers (gain, then cost), but {len(files)} were given.")
    gain, cost = (Fisher.load(file, space.adapters).in_space(space) for file in files)
    spectrum = solve(gain, cost)
    if not isinstance(spectrum, KroneckerSpectrum):
        raise InputError(f"An EK-FAC basis comes from kfac Fishers, but these are '{gain.structure}'.")
    return spectrum.basis
