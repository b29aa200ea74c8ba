"""When a pair of Fishers has seen enough for the merge at hand: its predicted KL is known, and its step stays the same."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sstmerge.fisher.convergence import FEWEST_GROUPS, Groups, Interval, Look, jackknife_error, ratio_interval
from sstmerge.gevp import Spectrum, solve

# The change of the utility model that a merge would make, (D,) in the space of the spectrum.
Step = Callable[[Spectrum], Tensor]


def adapters_sum(spectrum: Spectrum) -> Tensor:
    """Return the sum of all adapters, (D,): the step where nothing is selected."""
    space = spectrum.space
    return sum((space.core(adapter.name) for adapter in space.adapters), space.zero())


def pair_look(
    gain: Groups, cost: Groups, step: Step, number: int, *, tolerance: float, damping: float | None = None
) -> Look:
    """Judge a pair of Fishers by the merge that would come from it.

    The merge is made again without each group of the data in turn. Its predicted KL, ½ ΔᵀF_costΔ, is measured on the
    group that was left out, so that it is not flattered by having been minimised on the same data; its spread over the
    groups gives the interval. How far the steps Δ differ from each other, with the jackknife's factor, is the standard error
    of the step, relative to its size; both are Frobenius norms of weight changes, because F_cost is nearly zero along
    directions that were chosen for that. The step is the safety adapter's projection on the selected subspace, so that
    directions count as much as they move the merge, and the choice among others, which is noise, does not.

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
    count = min(len(gain.parts), len(cost.parts))
    whole = cost.whole()
    seen = (gain.sequences, cost.sequences), (gain.tokens, cost.tokens)
    if count < FEWEST_GROUPS:
        change = step(solve(gain.whole(), whole, damping=damping))
        return Look(number, *seen, Interval(0.5 * whole.quadratic(change), float("inf")), float("inf"), False)
    steps = []
    most = max(len(gain.parts), len(cost.parts))
    for left_out in range(most):
        # A data set that gave fewer groups gives up one of them more often.
        pair = gain.without(left_out % len(gain.parts)), cost.without(left_out % len(cost.parts))
        steps.append(step(solve(*pair, damping=damping)))
    weights = [part.tokens for part in cost.parts]
    totals = [0.5 * part.quadratic(change) * part.tokens for part, change in zip(cost.parts, steps, strict=False)]
    kl = ratio_interval(totals, weights, number)
    error = jackknife_error(steps)
    return Look(number, *seen, kl, error, kl.relative <= tolerance and error <= tolerance)
