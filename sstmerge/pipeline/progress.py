"""Progress of long work: a function of what is done, how much of it, and how much there is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sstmerge.fisher import Batch

# Called with what is being done, the number done and the number in all.
Progress = Callable[[str, int, int], None]
_TOKENS = ", tokens"


def no_progress(what: str, done: int, total: int) -> None:
    """Report nothing."""


def in_tokens(what: str) -> tuple[str, bool]:
    """Return the name of a piece of work without its unit, and whether it is counted in tokens."""
    return what.removesuffix(_TOKENS), what.endswith(_TOKENS)


def token_progress(what: str, batches: Sequence[Batch], progress: Progress) -> Callable[[int, int], None]:
    """Turn progress in sequences into progress in tokens.

    Batches come sorted by length, so the share of the sequences that is done says little about the time that is left.

    Args:
        what: What is being done.
        batches: The data; a pass goes over all of them in order, and there may be several passes.
        progress: Called with the tokens (padding not counted) that are done and in all.

    Returns:
        A function of the sequences done and in all.
    """
    sequences = [0, *accumulate(len(batch.index) for batch in batches)]
    tokens = [0, *accumulate(int(batch.attention_mask.sum()) for batch in batches)]

    def report(done: int, total: int) -> None:
        passes, rest = divmod(done, sequences[-1])
        counted = passes * tokens[-1] + tokens[bisect_right(sequences, rest) - 1]
        progress(what + _TOKENS, counted, tokens[-1] * total // sequences[-1])

    return report
