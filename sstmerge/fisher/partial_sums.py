"""Partial sums over the data, added in one fixed order: the bits of a Fisher do not depend on who collected which part.

Floating-point addition is not associative, so a sum over processes, or a sum that was interrupted, differs in its last bits
from one loop over the data. Here the batches are cut into runs, the *leaves*, whose number depends on the data alone; the
batches of a leaf are added one after the other by one process, and leaves are added pairwise, as siblings of a binary tree.
Whoever holds two siblings may add them, in whatever order they came to be: the tree of additions stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sstmerge.errors import FisherError
from sstmerge.fisher.fisher import Counts
from sstmerge.fisher.structures import Structure

# Leaves of a collection. Partial sums that wait for their siblings are as many as the tree is deep, plus one: for `block`
# and sketches, whose sums are gigabytes, four. `global` keeps every sequence anyway and adds little; a leaf is a batch.
MOST_LEAVES_OF_LARGE_SUMS = 8
MOST_LARGE_SUMS = MOST_LEAVES_OF_LARGE_SUMS.bit_length()
_MOST_LEAVES_OF_SMALL_SUMS = 64
_MOST_LEAVES = {Structure.BLOCK: MOST_LEAVES_OF_LARGE_SUMS, Structure.GLOBAL: None}

# A node of the tree: (level, index) holds the leaves from index · 2^level to (index + 1) · 2^level.
Node = tuple[int, int]


class Sums(Protocol):
    """What adds up batches: an `Accumulator`, or the taps of a sketch."""

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sums so far, by name; the tensors themselves."""

    def statistics(self) -> dict[str, Tensor]:
        """Return the sums, and all else that was kept, on the CPU."""


def most_leaves(structure: Structure) -> int | None:
    """Return how many leaves a Fisher of a structure has at most; None for one per batch."""
    return _MOST_LEAVES.get(structure, _MOST_LEAVES_OF_SMALL_SUMS)


def leaf_length(most: int | None, batches: int) -> int:
    """Return how many consecutive batches make a leaf.

    Args:
        most: Leaves at most; None for one per batch.
        batches: Number of batches in all.
    """
    return 1 if most is None else -(-batches // most)


@dataclass
class Part:
    """What some consecutive batches add to a Fisher.

    Attributes:
        sums: Statistics by name, on the CPU, as `Sums.sums`.
        rows: For `global`, the scores (n, D) and the split halves (n,) of every batch, in order.
        counts: What was seen.
    """

    sums: dict[str, Tensor]
    counts: Counts
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, accumulator: Sums, counts: Counts) -> Part:
        """Take what an accumulator holds; on a CPU the part shares its memory."""
        statistics = accumulator.statistics()
        rows = [(statistics["scores"], statistics["score_half"])] if "scores" in statistics else []
        return cls({name: statistics[name] for name in accumulator.sums}, counts, rows)

    def __add__(self, later: Part) -> Part:
        sums = {name: tensor + later.sums[name] for name, tensor in self.sums.items()}
        return Part(sums, self.counts + later.counts, self.rows + later.rows)

    def absorb(self, later: Part) -> None:
        """Add a later part in place."""
        for name, tensor in self.sums.items():
            tensor += later.sums[name]
        self.counts = self.counts + later.counts
        self.rows = self.rows + later.rows

    def statistics(self) -> dict[str, Tensor]:
        """Return the sums, and for `global` all rows in one tensor."""
        if not self.rows:
            return dict(self.sums)
        scores, halves = zip(*self.rows, strict=True)
        return self.sums | {"scores": torch.cat(scores), "score_half": torch.cat(halves)}

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return all of it as named tensors."""
        tensors = {f"{prefix}sums/{name}": tensor for name, tensor in self.sums.items()}
        tensors |= {f"{prefix}counts/{name}": getattr(self.counts, name) for name in Counts.__dataclass_fields__}
        for i, (scores, halves) in enumerate(self.rows):
            tensors |= {f"{prefix}scores/{i}": scores, f"{prefix}halves/{i}": halves}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> Part:
        """Rebuild what `to_tensors` named."""
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        counts = Counts(**{name: own[f"counts/{name}"] for name in Counts.__dataclass_fields__})
        sums = {name.removeprefix("sums/"): tensor for name, tensor in own.items() if name.startswith("sums/")}
        number = sum(name.startswith("scores/") for name in own)
        return cls(sums, counts, [(own[f"scores/{i}"], own[f"halves/{i}"]) for i in range(number)])


class PairwiseSum:
    """The parts of a sum that are there so far, every pair of siblings already added.

    Attributes:
        nodes: Parts by their place in the tree.
    """

    def __init__(self) -> None:
        self.nodes: dict[Node, Part] = {}

    def add(self, node: Node, part: Part) -> None:
        """Add a part, which becomes the sum's own, and all siblings that this completes.

        Args:
            node: Its place; a leaf is (0, number).
            part: The part.
        """
        level, index = node
        while (sibling := self.nodes.pop((level, index ^ 1), None)) is not None:
            earlier, later = (sibling, part) if index % 2 else (part, sibling)
            earlier.absorb(later)
            part, level, index = earlier, level + 1, index // 2
        self.nodes[level, index] = part

    def total(self) -> Part:
        """Return the sum of all parts, from the right to the left.

        Returns:
            The sum.

        Raises:
            FisherError: If there is no part.
        """
        parts = [self.nodes[node] for node in sorted(self.nodes, key=first_leaf)]
        if not parts:
            raise FisherError("Nothing was collected: there is no batch.")
        total = parts.pop()
        while parts:
            total = parts.pop() + total
        return total


def first_leaf(node: Node) -> int:
    """Return the number of the first leaf of a node."""
    level, index = node
    return index << level


def leaves_of(nodes: Iterable[Node]) -> set[int]:
    """Return the numbers of all leaves of some nodes."""
    return {leaf for level, index in nodes for leaf in range(index << level, (index + 1) << level)}
