"""The work of a collection: every batch at every reference point, cut into leaves, shared among processes, half done."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sstmerge.fisher.batch import Batch
from sstmerge.fisher.fisher import Counts
from sstmerge.fisher.partial_sums import PairwiseSum, Part, Sums, leaf_length

SumsT = TypeVar("SumsT", bound=Sums)


@dataclass(frozen=True)
class Item:
    """One batch at one reference point.

    Attributes:
        point: Number of the reference point.
        batch: Number of the batch.
        leaf: The leaf that it belongs to (`sstmerge.fisher.partial_sums`).
        place: Its place in the leaf.
        last: Whether it is the last one of the leaf.
    """

    point: int
    batch: int
    leaf: int
    place: int
    last: bool


def all_items(most_leaves: int | None, points: int, batches: int) -> list[Item]:
    """Return all items in order, point after point.

    Args:
        most_leaves: Leaves at most; None for one per item.
        points: Number of reference points.
        batches: Number of batches.
    """
    total = points * batches
    length = leaf_length(most_leaves, total)
    return [
        Item(*divmod(number, batches), *divmod(number, length), last=(number + 1) % length == 0 or number + 1 == total)
        for number in range(total)
    ]


def share(items: Sequence[Item], batches: Sequence[Batch], done: Collection[int], rank: int, size: int) -> list[Item]:
    """Return the items of one process: neighbouring leaves with about as many tokens, padding included, as the others'.

    Args:
        items: All items.
        batches: The batches.
        done: Leaves that are there already.
        rank: Number of the process.
        size: Number of processes.
    """
    leaves: dict[int, list[Item]] = {}
    for item in items:
        if item.leaf not in done:
            leaves.setdefault(item.leaf, []).append(item)
    costs = {leaf: sum(batches[item.batch].input_ids.numel() for item in members) for leaf, members in leaves.items()}
    total, before, own = sum(costs.values()), 0, list[Item]()
    for leaf, members in leaves.items():
        # The middle of the leaf on a line of all tokens decides whose it is.
        if (2 * before + costs[leaf]) * size // (2 * total) == rank:
            own += members
        before += costs[leaf]
    return own


def sequences_of(items: Iterable[Item], batches: Sequence[Batch]) -> int:
    """Return the number of sequences that some items pass through the model."""
    return sum(len(batches[item.batch].index) for item in items)


class Collected(Generic[SumsT]):
    """What a process has collected so far.

    Args:
        new_accumulator: Makes an empty accumulator.
        unfinished: Leaves that an earlier run began, which this one goes on with.
    """

    def __init__(self, new_accumulator: Callable[[], SumsT], unfinished: Mapping[int, Part] | None = None) -> None:
        self.sum = PairwiseSum()
        self._new_accumulator = new_accumulator
        self._begun = dict(unfinished or {})
        self._accumulator: SumsT | None = None
        self._counts = Counts.zero()
        self._leaf, self._done = -1, 0

    def accumulator(self, item: Item) -> SumsT:
        """Return the accumulator that an item, the next one, is added to."""
        if self._accumulator is None:
            self._leaf, self._counts = item.leaf, Counts.zero()
            self._accumulator = self._new_accumulator()
            if item.place:
                begun = self._begun.pop(item.leaf)
                self._counts = begun.counts
                for name, tensor in self._accumulator.sums.items():
                    tensor.copy_(begun.sums[name])
        return self._accumulator

    def add(self, item: Item, counts: Counts) -> None:
        """Count an item whose scores are in its accumulator, and close its leaf if it was the last."""
        accumulator = self.accumulator(item)
        self._counts, self._done = self._counts + counts, item.place + 1
        if item.last:
            self.sum.add((0, item.leaf), Part.of(accumulator, self._counts))
            self._accumulator, self._done = None, 0

    def unfinished(self) -> tuple[int, int, Part] | None:
        """Return the leaf that is being collected, how many of its items are done, and their sum; None between leaves."""
        if self._accumulator is None or not self._done:
            return None
        return self._leaf, self._done, Part.of(self._accumulator, self._counts)
