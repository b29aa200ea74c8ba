"""From prompt files to the two Fishers: examples, missing responses, batches, collection."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from sstmerge.adapters import CoreSpace
from sstmerge.errors import InputError
from sstmerge.fisher import Batch, Fisher, KroneckerBasis, collect_fisher, installed_taps, reference_points
from sstmerge.gevp import KroneckerSpectrum, solve
from sstmerge.merging import ModuleFilter, module_filter
from sstmerge.merging.convergence import Step, adapters_sum
from sstmerge.pipeline.answers import answer
from sstmerge.pipeline.progress import Progress, no_progress, token_progress
from sstmerge.pipeline.run import Run
from sstmerge.pipeline.sequential import StoppingRule, converge_pair
from sstmerge.prompts import (
    Example,
    completions_missing,
    context_length,
    encode,
    load_examples,
    make_batches,
    with_responses,
)


@dataclass(frozen=True)
class CollectionOptions:
    """How Fishers are collected.

    Attributes:
        structure: One of `diagonal`, `kfac`, `ekfac`, `block`, `global`.
        reference: Where scores are taken (`sstmerge.fisher.reference_points`).
        response_tokens: Only the first so many tokens of every response enter the loss; None for all.
        max_length: Longest sequence in tokens; the model's context by default.
        tokens_per_batch: Tokens per forward pass, padding included.
        draws: Label draws per forward pass of the cost Fisher.
        weight_sharing: `expand` or `reduce`, for `kfac`.
        completion_tokens: Longest response that is generated for a benign prompt without one.
        seed: Seed of the sampled labels.
        module_share: Collect only in this share of the modules, the best of a pilot; None for all.
        dimension_share: Share of the basis vectors of each of them.
        pilot: Sequences of each kind in the pilot.
        tolerance: Stop collecting when the merge's predicted KL and its step are known to this relative error; None
            collects all there is (`sstmerge.pipeline.sequential`).
        max_samples: Collect at most so many sequences of each kind, a random choice; None for all.
        check_every: Sequences of each kind between two looks.
        refusal_weight: Weight of a second part of F_cost, the empirical Fisher of the harmful prompts' refusals as responses
            to the benign prompts: what makes harmless requests refused counts as cost, though the model hardly refuses
            them yet, so that the KL cannot see it. A refusal's token counts so many times as one of a benign response,
            whatever `draws` is. 0 for the KL alone.
    """

    structure: str = "kfac"
    reference: str = "utility"
    response_tokens: int | None = None
    max_length: int | None = None
    tokens_per_batch: int = 1024
    draws: int = 1
    weight_sharing: str = "expand"
    completion_tokens: int = 32
    seed: int = 0
    module_share: float | None = None
    dimension_share: float = 1.0
    pilot: int = 16
    tolerance: float | None = None
    max_samples: int | None = None
    check_every: int = 16
    refusal_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.refusal_weight < math.inf:
            raise InputError(f"refusal_weight must be a finite number >= 0, but is {self.refusal_weight}.")
        if self.refusal_weight and self.stopping_rule is not None:
            raise InputError("refusal_weight takes all data; leave out tolerance and max_samples.")
        for name in ("draws", "pilot", "tokens_per_batch", "completion_tokens", "response_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, but is {value}.")
        for name in ("module_share", "dimension_share"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise InputError(f"{name} must lie in (0, 1], but is {value}.")
        of_filter = [n for n in ("dimension_share", "pilot") if getattr(self, n) != getattr(CollectionOptions, n)]
        if of_filter and self.module_share is None:
            raise InputError(
                f"{' and '.join(of_filter)} belong to the module filter; give module_share too (1 keeps all modules)."
            )
        _ = self.stopping_rule  # refuses numbers that make no sense before a model is loaded

    @property
    def stopping_rule(self) -> StoppingRule | None:
        """When to stop collecting, where all there is may be too much."""
        if self.tolerance is None and self.max_samples is None:
            return None
        return StoppingRule(self.tolerance, self.max_samples, self.check_every, self.tokens_per_batch, self.seed)


def load_all(paths: str | Path | Sequence[str | Path], *, split: str | None, limit: int | None) -> list[Example]:
    """Read one or several prompt files.

    Args:
        paths: A file, a hub id, or several.
        split: Keep rows of this split.
        limit: Keep the first so many rows of each file.

    Returns:
        All examples, file after file.
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    return [example for path in listed for example in load_examples(str(path), split=split, limit=limit)]


def complete(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    space: CoreSpace,
    reference: str,
    *,
    max_new_tokens: int,
    progress: Progress = no_progress,
    run: Run = Run(),  # noqa: B008 (frozen)
) -> list[Example]:
    """Give every prompt without a response the greedy answer of the reference model.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        examples: Prompts, some without a response.
        space: The core space.
        reference: The reference; on a path, its first point answers.
        max_new_tokens: Longest answer.
        progress: Progress.
        run: The processes that share the work, and where answers are kept.

    Returns:
        Examples that all have responses.
    """
    missing = [examples[position] for position in completions_missing(examples)]
    if not missing:
        return list(examples)
    with installed_taps(model, space, reference_points(reference, space)[0]):
        answers = answer(
            model,
            tokenizer,
            missing,
            run,
            point=f"{reference} {space.fingerprint}",
            max_new_tokens=max_new_tokens,
            progress=lambda done, total: progress("answering benign prompts without a response", done, total),
        )
    return with_responses(examples, answers)


def refused(benign: Sequence[Example], harm: Sequence[Example], options: CollectionOptions) -> list[Example]:
    """Pair benign prompts with refusals, for the part of F_cost that `refusal_weight` asks for.

    Args:
        benign: Benign prompts; their own responses are not looked at.
        harm: Harmful prompts with refusals.
        options: `refusal_weight`, which multiplies the weights of the prompts, and so do `draws`, as each draw counts the
            benign responses once more; and the seed of the pairing.

    Returns:
        Every benign prompt with the refusal of a harmful one drawn at random; none where the weight is 0.
    """
    if not options.refusal_weight:
        return []
    draw, weight = random.Random(options.seed), options.refusal_weight * options.draws
    return [replace(example, response=draw.choice(harm).response, weight=weight * example.weight) for example in benign]


def batches_of(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], options: CollectionOptions
) -> list[Batch]:
    """Encode examples and cut them into batches."""
    limit = options.max_length or context_length(model.config, tokenizer)
    encoded = encode(examples, tokenizer, max_length=limit, response_tokens=options.response_tokens)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    return make_batches(encoded, pad_token_id=padding, tokens_per_batch=options.tokens_per_batch)


def collect_pair(
    model: nn.Module,
    space: CoreSpace,
    harm: Sequence[Batch],
    benign: Sequence[Batch],
    options: CollectionOptions,
    *,
    refusals: Sequence[Batch] = (),
    home: CoreSpace | None = None,
    progress: Progress = no_progress,
    run: Run = Run(),  # noqa: B008 (frozen)
    name: str = "",
    step: Step = adapters_sum,
    damping: float | None = None,
) -> tuple[Fisher, Fisher]:
    """Collect F_gain (labels from the data) and F_cost (labels sampled from the model) at one reference.

    Refusals of benign prompts (`refused`) are a part of F_cost with the labels of the data.

    `ekfac` takes two passes: one of `kfac` whose generalized eigenbasis the second one refits eigenvalues in. With a
    tolerance the first pass decides how much is collected, and the second one sees the same sequences.

    Args:
        model: The base model.
        space: The core space.
        harm: Harmful prompts with refusals.
        benign: Benign prompts with responses.
        options: How.
        refusals: What `refused` made of the benign prompts; none leaves F_cost the curvature of the KL.
        home: The space that the reference is a point of, where `space` is only part of it.
        progress: Progress.
        run: The processes that share the work, and where it is checkpointed.
        name: What tells this pair from others of the run.
        step: The merge that the pair is for, where `options.tolerance` asks whether it is known well enough; by default the
            adapters' sum.
        damping: Relative damping of F_cost in that merge.

    Returns:
        F_gain and F_cost.

    Raises:
        InputError: If an option is unusable.
    """
    rule = options.stopping_rule

    def collect(
        batches: Sequence[Batch],
        what: str,
        labels: str,
        structure: str,
        part: str = "",
        basis: KroneckerBasis | None = None,
    ) -> Fisher:
        return collect_fisher(
            model,
            batches,
            space,
            structure=structure,
            labels=labels,
            reference=options.reference,
            reference_space=home,
            draws=options.draws if labels == "sampled" else 1,
            weight_sharing=options.weight_sharing,
            basis=basis,
            seed=options.seed,
            metadata={"response_tokens": options.response_tokens},
            progress=token_progress(" ".join(filter(None, [what, f"({structure})", part])), batches, progress),
            ranks=run.ranks,
            checkpoint=run.checkpoint("-".join(filter(None, [name, *what.split(), structure, part]))),
        )

    def cost(batches: Sequence[Batch], **how: Any) -> Fisher:
        found = collect(batches, "benign Fisher", "sampled", **how)
        return found.with_penalty(collect(refusals, "refusal Fisher", "data", **how)) if refusals else found

    gain = partial(collect, what="harm Fisher", labels="data")
    first = options.structure if options.structure != "ekfac" else "kfac"
    if rule is None:
        pair = gain(harm, structure=first), cost(benign, structure=first)
    else:
        chunks = [lambda b, part, c=c: c(b, structure=first, part=part) for c in (gain, cost)]
        pair, (harm, benign) = converge_pair(
            harm, benign, (chunks[0], chunks[1]), step, rule, damping=damping, ranks=run.ranks
        )
    if options.structure != "ekfac":
        return pair
    spectrum = solve(*pair, ranks=run.ranks)
    if not isinstance(spectrum, KroneckerSpectrum):
        raise InputError("An EK-FAC basis comes from a pair of kfac Fishers.")
    refitted = [c(b, structure="ekfac", basis=spectrum.basis) for c, b in ((gain, harm), (cost, benign))]
    # What the looks of the first pass found is known of the second one, too.
    kept = [replace(b, metadata={**a.metadata, **b.metadata}) for a, b in zip(pair, refitted, strict=True)]
    return kept[0], kept[1]


def choose_modules(
    model: nn.Module,
    space: CoreSpace,
    harm: Sequence[Batch],
    benign: Sequence[Batch],
    options: CollectionOptions,
    *,
    progress: Progress = no_progress,
    run: Run = Run(),  # noqa: B008 (frozen)
) -> ModuleFilter:
    """Choose modules and basis vectors on a pilot of the first sequences.

    Args:
        model: The base model.
        space: The whole core space.
        harm: Harmful prompts with refusals.
        benign: Benign prompts with responses.
        options: `module_share`, `dimension_share` and `pilot`.
        progress: Progress.
        run: The processes that share the work, and where it is checkpointed.

    Returns:
        The filter.
    """
    few_harm, few_benign = _first_sequences(harm, options.pilot), _first_sequences(benign, options.pilot)
    diagonal = replace(options, structure="diagonal", tolerance=None, max_samples=None)
    pair = collect_pair(model, space, few_harm, few_benign, diagonal, progress=progress, run=run, name="pilot")
    share = 1.0 if options.module_share is None else options.module_share
    return module_filter(*pair, modules=share, dimensions=options.dimension_share)


def _first_sequences(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Keep the sequences whose index is below `count`."""
    kept = [batch.select(batch.index < count) for batch in batches]
    return [batch for batch in kept if len(batch.index)]
