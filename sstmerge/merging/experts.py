"""Many experts: each one's gain against the cost of all the others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import add

from torch import Tensor

from sstmerge.errors import InputError
from sstmerge.fisher import Fisher
from sstmerge.gevp import solve
from sstmerge.merging.selection import Selection
from sstmerge.merging.sst import Merge, MergeReport, Rule, merge_cores


def merge_experts(
    fishers: Mapping[str, Fisher],
    experts: Mapping[str, Tensor],
    *,
    scales: Mapping[str, float] | None = None,
    rule: Rule = Rule.PROJECT,
    selection: Selection = Selection(),  # noqa: B008 (frozen)
    pooled_cost: Fisher | None = None,
    damping: float | None = None,
) -> tuple[Tensor, dict[str, MergeReport]]:
    """Merge T experts, φ = Σ_t a_t P_t φ_t, where P_t filters by gain F_t against cost Σ_{s≠t} F_s.

    Args:
        fishers: Fisher of every expert's own data, by name.
        experts: Coordinates of every expert, shape (D,), by name.
        scales: Factor a_t by name; 1 by default.
        rule: `project` or `wiener`.
        selection: Which directions of every expert.
        pooled_cost: One cost Fisher for all experts, instead of the sum of the others.
        damping: Relative damping.

    Returns:
        The merged coordinates, shape (D,), and the report of every expert.

    Raises:
        InputError: If names do not match, there are fewer than two experts, or the rule is not one of a single filter.
    """
    if rule not in (Rule.PROJECT, Rule.WIENER):
        raise InputError(f"Many experts are merged by 'project' or 'wiener', not by '{rule}'.")
    if set(fishers) != set(experts) or len(experts) < 2:
        raise InputError(
            f"Expected one Fisher for each of at least two experts; got Fishers for {sorted(fishers)} and experts "
            f"{sorted(experts)}."
        )
    unknown = set(scales or {}) - set(experts)
    if unknown:
        raise InputError(f"scales names {sorted(unknown)}, which are no experts.")
    total: Tensor | None = None
    reports = {}
    for name, expert in experts.items():
        cost = pooled_cost or reduce(add, (fisher for other, fisher in fishers.items() if other != name))
        spectrum = solve(fishers[name], cost, damping=damping)
        merged: Merge = merge_cores(
            spectrum, 0.0 * expert, expert, rule=rule, scale=(scales or {}).get(name), selection=selection
        )
        total = merged.core if total is None else total + merged.core
        reports[name] = merged.report
    if total is None:
        raise InputError("No expert was given.")
    return total, reports
