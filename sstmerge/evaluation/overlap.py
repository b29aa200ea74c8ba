"""Prompts that appear where they must not: twice in a set, or in calibration, tuning and test at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from sstmerge.errors import DataError
from sstmerge.evaluation.text import normalise
from sstmerge.prompts import Example

SHOWN = 3


def prompt_key(prompt: str) -> str:
    """Return what two prompts have in common if they are the same but for case, spaces, quotes and punctuation."""
    return " ".join(re.sub(r"[^\w\s]", " ", normalise(prompt)).split()) or normalise(prompt)


@dataclass(frozen=True)
class Overlap:
    """Prompts that two sets share.

    Attributes:
        first: Name of the first set.
        second: Name of the second set.
        pairs: Where each shared prompt is in the two, and its text.
    """

    first: str
    second: str
    pairs: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        """Return a sentence with a few of the prompts."""
        shown = "; ".join(f'{one} = {other} ("{prompt[:60]}")' for one, other, prompt in self.pairs[:SHOWN])
        noun = "prompt" if len(self.pairs) == 1 else "prompts"
        return f"{self.first} and {self.second} share {len(self.pairs)} {noun}: {shown}."


def find_overlaps(sets: Mapping[str, Sequence[Example]]) -> list[Overlap]:
    """Find the prompts that several sets share, by normalised text.

    Args:
        sets: Examples by the name of their set.

    Returns:
        One overlap for each pair of sets that share a prompt, in the order of the sets.
    """
    keyed = {name: _first_of_each(examples) for name, examples in sets.items()}
    found = []
    for first, second in combinations(keyed, 2):
        shared = [key for key in keyed[first] if key in keyed[second]]
        pairs = tuple((keyed[first][key].source, keyed[second][key].source, keyed[first][key].prompt) for key in shared)
        if pairs:
            found.append(Overlap(first, second, pairs))
    return found


def refuse_overlaps(sets: Mapping[str, Sequence[Example]]) -> None:
    """Refuse sets that are not disjoint, such as calibration, tuning and test.

    Args:
        sets: Examples by the name of their set.

    Raises:
        DataError: If two sets share a prompt; the message says which.
    """
    if overlaps := find_overlaps(sets):
        words = " ".join(map(str, overlaps))
        raise DataError(f"{words} What is measured on prompts that a method has seen means nothing: remove them.")


def without(examples: Sequence[Example], *others: Iterable[Example]) -> list[Example]:
    """Return the examples whose prompts are not in other sets, each prompt once: the first example of it.

    Args:
        examples: The examples.
        others: Sets whose prompts are left out.

    Returns:
        What is left, in its order.
    """
    taken = {prompt_key(example.prompt) for other in others for example in other}
    return [example for key, example in _first_of_each(examples).items() if key not in taken]


def _first_of_each(examples: Iterable[Example]) -> dict[str, Example]:
    found: dict[str, Example] = {}
    for example in examples:
        found.setdefault(prompt_key(example.prompt), example)
    return found
