"""Shares with their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

NORMAL_QUANTILE_95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """A count out of a total, with the 95 % interval of Wilson (1927)."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """The share, or NaN where the total is 0."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval; (0, 1) where the total is 0."""
        if not self.total:
            return 0.0, 1.0
        share, z2 = self.value, NORMAL_QUANTILE_95**2 / self.total
        middle = (share + z2 / 2) / (1 + z2)
        half = math.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_json(self) -> dict[str, Any]:
        """Return count, total, share and interval."""
        low, high = self.interval
        return {"count": self.count, "total": self.total, "value": self.value, "low": low, "high": high}

    def __str__(self) -> str:
        """Return the share and its interval, as ".62 [.52, .71]"."""
        low, high = self.interval
        return f"{_short(self.value)} [{_short(low)}, {_short(high)}]"


def _short(share: float) -> str:
    return f"{share:.2f}".removeprefix("0") if share < 0.995 else "1.0"
