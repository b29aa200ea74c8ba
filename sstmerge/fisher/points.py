"""The reference: the point (or path of points) of the core space at which a Fisher is evaluated."""

from __future__ import annotations

import re

from torch import Tensor

from sstmerge.adapters import CoreSpace
from sstmerge.errors import InputError

BASE = "base"
# [weight *] name
_TERM = re.compile(r"(?:(?P<weight>-?(?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?)\s*\*\s*)?(?P<name>\S.*)")


def reference_points(reference: str, space: CoreSpace) -> list[Tensor]:
    """Return the core coordinates that a reference names.

    Args:
        reference: `base` (no adapter); an adapter's name; a weighted sum such as `math+0.5*code`; or `path:A:B:n`, the n
            midpoints of equal pieces of the straight line from A to B, each of them one of the former.
        space: The space that holds the adapters.

    Returns:
        Coordinates, each of shape (D,); a Fisher is averaged over them.

    Raises:
        InputError: If the text does not parse, or names an adapter that the space does not hold.
    """
    if not reference.startswith("path:"):
        return [_weighted_sum(reference, space)]
    parts = reference.split(":")
    if len(parts) != 4 or not parts[3].isdigit() or int(parts[3]) < 1:
        raise InputError(
            f"The reference '{reference}' must have the form path:A:B:n with n >= 1, such as path:u:u+s:3."
        )
    start, end, count = _weighted_sum(parts[1], space), _weighted_sum(parts[2], space), int(parts[3])
    return [start + (i + 0.5) / count * (end - start) for i in range(count)]


def _weighted_sum(text: str, space: CoreSpace) -> Tensor:
    names = {adapter.name for adapter in space.adapters}
    if text == BASE:
        return space.zero()
    if text in names:  # before parsing, since a name may hold '+' or '*'
        return space.core(text)
    weights: dict[str, float] = {}
    for term in text.split("+"):
        match = _TERM.fullmatch(term.strip())
        if match is None or match["name"] not in names | {BASE}:
            raise InputError(
                f"The reference '{text}' must be '{BASE}', an adapter's name, or a weighted sum such as A+0.5*B; '{term}' "
                f"is none of the adapters {sorted(names)}."
            )
        if match["name"] != BASE:
            weights[match["name"]] = weights.get(match["name"], 0.0) + float(match["weight"] or 1.0)
    return space.combination(weights)
