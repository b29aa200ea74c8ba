"""When a Fisher has seen enough: error bars from random groups of the data, valid however often they are looked at.

Data come in chunks, cut from one random order of the sequences, so that every chunk is a sample of the whole data set. The
chunks are dealt out to at most sixteen groups. The spread of a ratio over the groups gives its interval (linearised ratio;
Wolter 2007, "Introduction to Variance Estimation"). What is no ratio, a step, is estimated again from halves of the
groups: balanced half-samples (McCarthy 1969, Review of the International Statistical Institute 37), the same for all
structures, because a Fisher is a sum. Leaving out one group at a time would not do: a step depends on which directions are
selected, it jumps, and the delete-one jackknife of what jumps does not shrink with the data (Shao & Wu 1989, Annals of
Statistics 17).

Who looks after every chunk and stops at the first good-looking interval sees an interval that is too narrow. Here look l may
err with probability α / (l (l + 1)) only. These add up to α over any number of looks, so that with probability 1 − α no
interval of the whole run is wrong, the one it stops at included, whatever the rule by which it stops: a union bound, the
simplest way to spend α (Lan & DeMets 1983, https://doi.org/10.1093/biomet/70.3.659; Darling & Robbins 1967,
https://doi.org/10.1073/pnas.58.1.66, on confidence sequences). Tighter sequences exist (Howard et al. 2021,
https://arxiv.org/abs/1810.08240), but need bounds or many more than sixteen observations. What remains an approximation
is each single interval: Student's t over the groups, whose contributions are sums over sequences and hence nearly normal.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from sstmerge.fisher.batch import Batch
from sstmerge.fisher.fisher import Fisher

MOST_GROUPS = 16
# A t interval of fewer groups is too wide to be of use, and its width too noisy.
FEWEST_GROUPS = 3
CONFIDENCE = 0.95
# Rows of the Hadamard matrix of order 8: any two of these halves of eight groups share half of their members.
_HALVES = ((0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 1, 1, 0, 0, 1, 1), (0, 1, 0, 1, 0, 1, 0, 1), (0, 1, 1, 0, 1, 0, 0, 1))


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval.

    Attributes:
        estimate: The estimate.
        half_width: Half of the interval's width, infinite where there are too few groups.
    """

    estimate: float
    half_width: float

    @property
    def relative(self) -> float:
        """Half width over estimate; infinite for an estimate of zero."""
        return self.half_width / abs(self.estimate) if self.estimate else math.inf


@dataclass(frozen=True)
class Look:
    """What one look found.

    Attributes:
        number: Number of the look, from 1.
        sequences: Sequences seen: of a single Fisher, or of gain and cost.
        tokens: Response tokens seen, likewise.
        kl: The predicted KL divergence on benign data, nats per response token, with its interval; of a single Fisher
            ½ φᵀFφ of the adapter φ whose interval is relatively the widest, which is a KL for sampled labels alone.
        step_error: Relative standard error of the selected step; None of a single Fisher.
        converged: Whether this is enough.
        measured: What `kl` is, in words: "held-out KL" of halves' merges, "in-sample KL" of the whole's merge with too few
            groups for halves, "predicted KL" or "½φᵀFφ" of an adapter.
    """

    number: int
    sequences: tuple[int, ...]
    tokens: tuple[float, ...]
    kl: Interval
    step_error: float | None
    converged: bool
    measured: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, an infinite half width as None."""
        plain = asdict(self)
        plain["kl"] = {name: value if math.isfinite(value) else None for name, value in plain["kl"].items()}
        if self.step_error is not None and not math.isfinite(self.step_error):
            plain["step_error"] = None
        return plain


def convergence_sentence(metadata: Mapping[str, Any]) -> str | None:
    """Return what a Fisher's metadata say about when its collection stopped, in words; None where all data were taken."""
    recorded = metadata.get("convergence")
    if recorded is None:
        return None
    look = recorded["looks"][-1]
    kl, error = look["kl"], look["step_error"]
    # Files of before this was recorded: a step's error was known where there were halves, and only there.
    measured = look.get("measured", "estimate" if error is None else "held-out KL")
    unit = "nats/token" if measured.endswith("KL") else "per token"
    width, few = (
        ("", ", too few groups for an interval") if kl["half_width"] is None else (f" ± {kl['half_width']:.2g}", "")
    )
    moved = "" if error is None else f", step error {error:.0%}"
    found = ""
    if recorded["tolerance"] is not None:
        found = f"{'converged' if recorded['converged'] else 'not converged'} to {recorded['tolerance']:.0%} with "
    used = f"{recorded['sequences']} of {recorded['sequences_available']} sequences"
    return f"{found}{used}: {measured} {kl['estimate']:.2g}{width} {unit}{few}{moved}"


class Groups:
    """The chunks of one Fisher, dealt out in turn.

    Attributes:
        parts: The Fisher of every group.
        sequences: Sequences seen, each once, however many draws and points it was used for.
    """

    def __init__(self) -> None:
        self.parts: list[Fisher] = []
        self.sequences = 0
        self._chunks = 0

    def add(self, chunk: Fisher, sequences: int) -> None:
        """Add the Fisher of a chunk of so many sequences."""
        if len(self.parts) < MOST_GROUPS:
            self.parts.append(chunk)
        else:
            turn = self._chunks % MOST_GROUPS
            self.parts[turn] = self.parts[turn] + chunk
        self._chunks += 1
        self.sequences += sequences

    def whole(self) -> Fisher:
        """Return the Fisher of all groups."""
        return functools.reduce(operator.add, self.parts)

    def half(self, split: Sequence[int], side: int) -> Fisher:
        """Return the Fisher of the groups on one side (0 or 1) of a split (`half_samples`)."""
        chosen = [part for part, where in zip(self.parts, split, strict=True) if where == side]
        return functools.reduce(operator.add, chosen)

    @property
    def tokens(self) -> float:
        """Weighted response tokens of all groups."""
        return sum(part.tokens for part in self.parts)


def spent(look: int) -> float:
    """Return the probability of error that look l = 1, 2, … may spend: α / (l (l + 1))."""
    return (1 - CONFIDENCE) / (look * (look + 1))


def ratio_interval(totals: Sequence[float], weights: Sequence[float], look: int) -> Interval:
    """Return Σ totals / Σ weights with its interval at a look, from the spread over groups (linearised ratio).

    Args:
        totals: What every group contributes to the numerator.
        weights: What it contributes to the denominator, above zero in all.
        look: Number of the look, from 1.
    """
    numerator, denominator = torch.tensor(totals, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    count = len(numerator)
    estimate = numerator.sum() / denominator.sum()
    if count < FEWEST_GROUPS:
        return Interval(float(estimate), math.inf)
    residuals = (numerator - estimate * denominator) / denominator.sum()
    error = math.sqrt(count / (count - 1) * float(residuals.square().sum()))
    return Interval(float(estimate), float(stdtrit(count - 1, 1 - spent(look) / 2)) * error)


def single_look(groups: Groups, number: int, tolerance: float) -> Look:
    """Judge one Fisher by itself: along every adapter of its space, the vectors that all merges are made of.

    Args:
        groups: Its groups.
        number: Number of the look, from 1.
        tolerance: Largest relative half width of ½ φᵀFφ, for every adapter φ.

    Returns:
        The look.
    """
    space = groups.parts[0].space
    weights = [part.tokens for part in groups.parts]
    intervals = []
    for adapter in space.adapters:
        core = space.core(adapter.name)
        totals = [0.5 * part.quadratic(core) * part.tokens for part in groups.parts]
        intervals.append(ratio_interval(totals, weights, number))
    widest = max(intervals, key=lambda interval: interval.relative)
    measured = "predicted KL" if groups.parts[0].metadata.get("labels") == "sampled" else "½φᵀFφ"
    return Look(number, (groups.sequences,), (groups.tokens,), widest, None, widest.relative <= tolerance, measured)


def half_samples(groups: int) -> list[list[int]]:
    """Return balanced ways to split groups in two; every one says of each group whether it is on side 0 or 1.

    Args:
        groups: Number of groups, at least 2.
    """
    rows = [[half[i % len(half)] for i in range(groups)] for half in _HALVES]
    return [row for row in rows if len(set(row)) == 2]


def half_sample_error(halves: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float], fisher: Fisher) -> float:
    """Return the standard error of a vector relative to its size, both in a Fisher's metric.

    Two estimates from independent shares a and 1 − a of the data differ by a vector whose expected square is that of the
    error of an estimate from all data, times 1 / (a (1 − a)).

    Args:
        halves: Its estimates from both sides of every split, each (D,).
        shares: Share of the data on one side of every split.
        fisher: The metric.

    Returns:
        The error; infinite for a vector of size zero.
    """
    count = len(halves)
    mean = torch.stack([(one + other) / 2 for one, other in halves]).mean(dim=0)
    size = fisher.quadratic(mean)
    squares = [a * (1 - a) * fisher.quadratic(x - y) for (x, y), a in zip(halves, shares, strict=True)]
    return math.sqrt(sum(squares) / count / size) if size > 0 else math.inf


def random_chunks(batches: Sequence[Batch], size: int, most: int | None, seed: int) -> list[list[int]]:
    """Cut the sequences of a data set, in a random order, into chunks.

    Args:
        batches: The data set.
        size: Sequences per chunk, at least 1; the last chunk takes up a rest of less than half of that.
        most: Largest number of sequences in all; None for all.
        seed: Seed of the order.

    Returns:
        The indices (`Batch.index`) of every chunk, ascending.
    """
    indices = torch.cat([batch.index.cpu() for batch in batches]).sort().values
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))
    chosen = indices[order][:most]
    starts = list(range(0, len(chosen), size))
    if len(starts) > 1 and len(chosen) - starts[-1] < size / 2:
        starts.pop()
    ends = [*starts[1:], len(chosen)]
    return [sorted(chosen[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]
