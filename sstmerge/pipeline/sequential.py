"""Collecting until it is enough: chunks of a random order of the data, and a look at what they give after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sstmerge.errors import InputError
from sstmerge.fisher import Batch, Fisher
from sstmerge.fisher.batch import regroup
from sstmerge.fisher.convergence import CONFIDENCE, FEWEST_GROUPS, Groups, Look, random_chunks, single_look
from sstmerge.fisher.distributed import Ranks
from sstmerge.merging.convergence import Step, pair_look

# Collects the Fisher of a chunk; the text names the chunk within the run.
CollectChunk = Callable[[Sequence[Batch], str], Fisher]


@dataclass(frozen=True)
class StoppingRule:
    """When to stop collecting.

    Attributes:
        tolerance: Relative error that is small enough (`sstmerge.merging.convergence`); None never stops before
            `max_samples`.
        max_samples: Largest number of sequences of each kind; None for all there are.
        check_every: Sequences of each kind between two looks.
        tokens_per_batch: Tokens per forward pass, padding included.
        seed: Seed of the order of the sequences.
    """

    tolerance: float | None
    max_samples: int | None
    check_every: int
    tokens_per_batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.tolerance is not None and not self.tolerance > 0:
            raise InputError(
                f"tolerance must be a number above 0, such as 0.1 for ten per cent, but is {self.tolerance}."
            )
        if self.max_samples is not None and self.max_samples < 1:
            raise InputError(f"max_samples must be at least 1, but is {self.max_samples}.")
        if self.check_every < 1:
            raise InputError(f"check_every must be at least 1, but is {self.check_every}.")


class _Source:
    """One data set on its way into a Fisher, chunk by chunk."""

    def __init__(self, batches: Sequence[Batch], collect: CollectChunk, rule: StoppingRule) -> None:
        self._batches, self._collect, self._rule = batches, collect, rule
        self._chunks = random_chunks(batches, rule.check_every, rule.max_samples, rule.seed)
        self._taken = 0
        self.groups = Groups()

    @property
    def exhausted(self) -> bool:
        return self._taken == len(self._chunks)

    def advance(self) -> None:
        """Collect the next chunk, if there is one."""
        if self.exhausted:
            return
        indices = self._chunks[self._taken]
        batches = regroup(self._batches, indices, self._rule.tokens_per_batch)
        self.groups.add(self._collect(batches, f"chunk-{self._taken}"), len(indices))
        self._taken += 1

    def used(self) -> list[Batch]:
        """Return the batches of the sequences that were collected."""
        indices = [index for chunk in self._chunks[: self._taken] for index in chunk]
        return regroup(self._batches, indices, self._rule.tokens_per_batch)

    def fisher(self, looks: Sequence[Look], tolerance: float | None) -> Fisher:
        """Return the Fisher of all chunks, with what every look found in its metadata."""
        whole = self.groups.whole()
        recorded: dict[str, Any] = {
            "tolerance": tolerance,
            "confidence": CONFIDENCE,
            "sequences": self.groups.sequences,
            "sequences_available": sum(len(batch.index) for batch in self._batches),
            "response_tokens": whole.tokens,
            "converged": bool(looks) and looks[-1].converged,
            "looks": [look.to_dict() for look in looks],
        }
        return replace(whole, metadata={**whole.metadata, "convergence": recorded})


def converge(
    batches: Sequence[Batch],
    collect: CollectChunk,
    rule: StoppingRule,
    *,
    ranks: Ranks = Ranks(),  # noqa: B008 (one process)
) -> Fisher:
    """Collect one Fisher until it is known along the adapters, or the data end.

    Args:
        batches: The data.
        collect: Collects a chunk.
        rule: When to stop.
        ranks: The processes that share the work.

    Returns:
        The Fisher.
    """
    source = _Source(batches, collect, rule)
    (fisher,) = _run([source], lambda number, tolerance: single_look(source.groups, number, tolerance), rule, ranks)
    return fisher


def converge_pair(
    harm: Sequence[Batch],
    benign: Sequence[Batch],
    collect: tuple[CollectChunk, CollectChunk],
    step: Step,
    rule: StoppingRule,
    *,
    damping: float | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 (one process)
) -> tuple[tuple[Fisher, Fisher], tuple[list[Batch], list[Batch]]]:
    """Collect F_gain and F_cost in turns until the merge that they give is known, or the data end.

    Args:
        harm: Harmful prompts with refusals.
        benign: Benign prompts with responses.
        collect: Collect a chunk of F_gain and of F_cost.
        step: The merge's step.
        rule: When to stop.
        damping: Relative damping of F_cost.
        ranks: The processes that share the work.

    Returns:
        F_gain and F_cost, and the batches that they saw.
    """
    sources = [_Source(batches, call, rule) for batches, call in zip((harm, benign), collect, strict=True)]
    gain, cost = (source.groups for source in sources)

    def look(number: int, tolerance: float) -> Look:
        return pair_look(gain, cost, step, number, tolerance=tolerance, damping=damping)

    fishers = _run(sources, look, rule, ranks)
    return (fishers[0], fishers[1]), (sources[0].used(), sources[1].used())


def _run(
    sources: Sequence[_Source], judge: Callable[[int, float], Look], rule: StoppingRule, ranks: Ranks
) -> list[Fisher]:
    looks: list[Look] = []
    while True:
        for source in sources:
            source.advance()
        ended = all(source.exhausted for source in sources)
        enough = all(len(source.groups.parts) >= FEWEST_GROUPS for source in sources)
        if ended or (enough and rule.tolerance is not None):
            looks.append(judge(len(looks) + 1, rule.tolerance or 0.0))
        if ended or (looks and _agreed(looks[-1].converged, ranks)):
            return [source.fisher(looks, rule.tolerance) for source in sources]


def _agreed(converged: bool, ranks: Ranks) -> bool:
    """Return the first process's answer: eigensolvers of other machines may round another way."""
    return bool(ranks.broadcast({"converged": torch.tensor(converged)})["converged"])
