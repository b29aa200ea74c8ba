"""How well a judge agrees with people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from sstmerge.errors import DataError
from sstmerge.evaluation.rates import Rate


@dataclass(frozen=True)
class Agreement:
    """Agreement of two sets of labels.

    Attributes:
        agreed: Share of items with the same label.
        kappa: Cohen's κ (1960), (p_o − p_e) / (1 − p_e): 1 for the same labels, 0 for chance. 1 where both sets hold one
            and the same label only.
        confusion: Number of items for each pair (judge, person).
    """

    agreed: Rate
    kappa: float
    confusion: dict[tuple[Hashable, Hashable], int]


def agreement(judge: Sequence[Hashable], person: Sequence[Hashable]) -> Agreement:
    """Compare the labels of a judge with those of a person, or of two people.

    Args:
        judge: One label for each item.
        person: One label for each item.

    Returns:
        Their agreement.

    Raises:
        DataError: If there are no items, or not one label of each for every item.
    """
    if len(judge) != len(person) or not judge:
        raise DataError(f"Agreement needs the same items labelled twice, got {len(judge)} and {len(person)} labels.")
    total = len(judge)
    same = sum(one == other for one, other in zip(judge, person, strict=True))
    first, second = Counter(judge), Counter(person)
    chance = sum(first[label] * second[label] for label in first) / total**2
    kappa = 1.0 if chance == 1 else (same / total - chance) / (1 - chance)
    return Agreement(Rate(same, total), kappa, dict(Counter(zip(judge, person, strict=True))))
