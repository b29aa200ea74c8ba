"""Collecting a sketch of a base model into a file, and reading Fishers from either kind of file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sstmerge.adapters import Adapter, CoreSpace
from sstmerge.errors import InputError
from sstmerge.fisher import Fisher, Sketch, collect_sketch, load_sketch, save_sketch
from sstmerge.fisher.sketch_file import is_sketch
from sstmerge.fisher.sketch_plan import SketchPlan
from sstmerge.pipeline.answers import answer
from sstmerge.pipeline.calibration import CollectionOptions, batches_of, load_all
from sstmerge.pipeline.progress import Progress, no_progress, token_progress
from sstmerge.pipeline.run import Run
from sstmerge.prompts import Example, completions_missing, with_responses


def sketch_file(
    load: Callable[[], tuple[nn.Module, Any]],
    data: Sequence[str | Path],
    out: str | Path,
    *,
    labels: str,
    options: CollectionOptions,
    rank: int = 256,
    targets: Sequence[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    announce: Callable[[SketchPlan], None] | None = None,
    progress: Progress = no_progress,
    run: Run = Run(),  # noqa: B008 (frozen)
) -> Sketch:
    """Collect a sketch of a base model from prompt files and save it.

    Args:
        load: Loads the model and its tokenizer; called after all cheap checks.
        data: Prompt files.
        out: File to write.
        labels: `data` (harmful prompts with refusals) or `sampled` (benign prompts).
        options: How; structure, reference and module filter do not apply.
        rank: Columns of the sketch.
        targets: Last names of the layers; all linear layers but the output head by default.
        split: Keep rows of this split.
        limit: Keep the first so many rows of each file.
        announce: Called with what will be collected, before the data pass begins.
        progress: Progress.
        run: The processes that share the work, all of which call this function and of which the first one writes, and
            the folder where they keep what is collected (`sstmerge.pipeline.run.opened_run`).

    Returns:
        The sketch, which is saved too.

    Raises:
        InputError: If an option or input is unusable.
    """
    if labels not in ("data", "sampled"):
        raise InputError(f"Unknown labels '{labels}'; expected 'data' or 'sampled'.")
    examples = load_all(data, split=split, limit=limit)
    if labels == "data" and any(example.response is None for example in examples):
        raise InputError("labels='data' needs a response in every row; these are what the sketch measures.")
    model, tokenizer = load()
    examples = _complete(model, tokenizer, examples, options.completion_tokens, progress, run)
    batches = batches_of(model, tokenizer, examples, options)
    sketch = collect_sketch(
        model,
        batches,
        rank=rank,
        labels=labels,
        draws=options.draws if labels == "sampled" else 1,
        seed=options.seed,
        targets=targets,
        metadata={"response_tokens": options.response_tokens},
        announce=announce if run.ranks.first else None,
        progress=token_progress(f"sketch of rank {rank} ({labels} labels)", batches, progress),
        ranks=run.ranks,
        checkpoint=run.checkpoint("sketch"),
    )
    if run.ranks.first:
        save_sketch(sketch, out)
    return sketch


def load_fishers(paths: Sequence[str | Path], adapters: Sequence[Adapter], *, ignore_base_name: bool) -> list[Fisher]:
    """Read Fishers for some adapters, each from a Fisher file or from a sketch of the base model.

    Args:
        paths: The files.
        adapters: The adapters; those that a Fisher file was collected for, or, for sketches, any of the base model.
        ignore_base_name: Accept adapters whose recorded base models differ by name.

    Returns:
        The Fishers. Sketches are projected into the space of the first Fisher file, where there is one.
    """
    fishers = {path: Fisher.load(path, adapters) for path in paths if not is_sketch(path)}
    collected = [fisher.space for fisher in fishers.values()]
    space = collected[0] if collected else CoreSpace.of(adapters, ignore_base_name=ignore_base_name)
    return [fishers[path] if path in fishers else load_sketch(path).project(space) for path in paths]


def _complete(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int, progress: Progress, run: Run
) -> list[Example]:
    """Give every prompt without a response the greedy answer of the base model."""
    missing = [examples[position] for position in completions_missing(examples)]
    if not missing:
        return list(examples)
    texts = answer(
        model,
        tokenizer,
        missing,
        run,
        point="base",
        max_new_tokens=max_new_tokens,
        progress=lambda done, total: progress("answering prompts without a response", done, total),
    )
    return with_responses(examples, texts)
