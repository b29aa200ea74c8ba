"""When a pair of Fishers has seen enough for the merge at hand: its predicted KL is known, and its step stays the same."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sstmerge.fisher.convergence import (
    FEWEST_GROUPS,
    Groups,
    Interval,
    Look,
    half_sample_error,
    half_samples,
    ratio_interval,
)
from sstmerge.gevp import Spectrum, solve

# The change of the utility model that a merge would make, (D,) in the space of the spectrum.
Step = Callable[[Spectrum], Tensor]


def adapters_sum(spectrum: Spectrum) -> Tensor:
    """Return the sum of all adapters, (D,): the step where nothing is selected."""
    space = spectrum.space
    return space.combination({adapter.name: 1.0 for adapter in space.adapters})


def pair_look(
    gain: Groups, cost: Groups, step: Step, number: int, *, tolerance: float, damping: float | None = None
) -> Look:
    """Judge a pair of Fishers by the merge that would come from it.

    The merge is made from one half of the data and from the other, for several splits in halves. The predicted KL of a
    half's merge, ½ ΔᵀF_costΔ, is measured on the groups of the other half, so that it is not flattered by having been
    minimised on the same data; its spread over the groups gives the interval. How far the steps Δ of two halves differ is
    the standard error of the step, relative to its size, in what matters of it: in the metric of F_cost and in that of
    F_gain, whichever is larger. (Its Frobenius norm would count directions that change nothing.) Too few groups to be split
    give the KL of the whole's merge on the whole, which is flattered and has no interval.

    Args:
        gain: Groups of F_gain.
        cost: Groups of F_cost.
        step: The merge's step, from a solved pair.
        number: Number of the look, from 1.
        tolerance: Largest relative half width of the KL's interval, and largest relative error of the step.
        damping: Relative damping of F_cost.

    Returns:
        The look.
    """
    whole = gain.whole(), cost.whole()
    seen = (gain.sequences, cost.sequences), (gain.tokens, cost.tokens)
    if min(len(gain.parts), len(cost.parts)) < FEWEST_GROUPS:
        change = step(solve(*whole, damping=damping))
        kl = Interval(0.5 * whole[1].quadratic(change), float("inf"))
        return Look(number, *seen, kl, float("inf"), False, "in-sample KL")
    gain_splits, cost_splits = half_samples(len(gain.parts)), half_samples(len(cost.parts))
    count = max(len(gain_splits), len(cost_splits))
    halves, shares = [], []
    totals = [0.0] * len(cost.parts)
    for i in range(count):
        # A data set that gave fewer groups has fewer ways to be split; it takes some of them again.
        of_gain, of_cost = gain_splits[i % len(gain_splits)], cost_splits[i % len(cost_splits)]
        one, other = (
            step(solve(gain.half(of_gain, side), cost.half(of_cost, side), damping=damping)) for side in (0, 1)
        )
        for group, (part, side) in enumerate(zip(cost.parts, of_cost, strict=True)):
            totals[group] += 0.5 * part.quadratic(one if side == 1 else other) * part.tokens / count
        halves.append((one, other))
        shares.append(
            sum(part.tokens for part, side in zip(cost.parts, of_cost, strict=True) if side == 0) / cost.tokens
        )
    kl = ratio_interval(totals, [part.tokens for part in cost.parts], number)
    error = max(half_sample_error(halves, shares, fisher) for fisher in whole)
    converged = kl.relative <= tolerance and error <= tolerance
    return Look(number, *seen, kl, error, converged, "held-out KL")
