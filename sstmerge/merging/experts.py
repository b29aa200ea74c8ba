"""Many experts: each one's gain against the cost of all the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import repeat
from operator import add

from torch import Tensor

from sstmerge.errors import InputError
from sstmerge.fisher import Fisher
from sstmerge.gevp import Spectrum, solve
from sstmerge.merging.selection import Selection
from sstmerge.merging.sst import Merge, MergeReport, Rule, merge_cores

# A direction's gain over the sum of its gain and of the others' mean cost: of two experts that is Fisher merging.
DEFAULT_SELECTION = Selection(mu=1.0)
_OWN = "each at its own expert"


def merge_experts(
    fishers: Mapping[str, Fisher],
    experts: Mapping[str, Tensor],
    *,
    scales: Mapping[str, float] | None = None,
    rule: Rule = Rule.WIENER,
    selection: Selection | None = None,
    pooled_cost: Fisher | None = None,
    damping: float | None = None,
) -> tuple[Tensor, dict[str, MergeReport]]:
    """Merge T experts, φ = Σ_t a_t P_t φ_t, where P_t filters by gain F_t against cost mean_{s≠t} F_s.

    Collect every Fisher at its own expert (`reference="NAME"`): there is the minimum of its loss that the quadratic model is
    about, and what must survive. Fishers at one common point are taken, too, and did much worse (dev/LOG.md: at the mean of
    eight experts every one of them is nearly forgotten).

    Args:
        fishers: Fisher of every expert's own data, by name; all taken at one reference, or each at the expert of its name.
        experts: Coordinates of every expert, shape (D,), by name.
        scales: Factor a_t by name; 1 by default. Shrinking takes from what an expert needs, too: of 4 to 20 experts 1 to 2
            was best where it was measured, without a rule, so sweep it.
        rule: `wiener` or `project`.
        selection: Which directions of every expert; μ = 1 by default for `wiener`, 99 % of the gain energy for `project`.
            The cost is the mean of the others, each per response token of its own data: one with long responses counts no
            more than one that answers in a word, and μ weighs a mean, not a sum.
        pooled_cost: One cost Fisher for all experts, instead of the mean of the others.
        damping: Relative damping.

    Returns:
        The merged coordinates, shape (D,), and the report of every expert.

    Raises:
        InputError: If names do not match, there are fewer than two experts, the rule is not one of a single filter, or the
            Fishers were taken at several points that are not their own experts.
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
    if selection is None:
        selection = DEFAULT_SELECTION if rule is Rule.WIENER else Selection()
    total: Tensor | None = None
    reports = {}
    for name, spectrum in expert_spectra(fishers, pooled_cost=pooled_cost, damping=damping):
        merged: Merge = merge_cores(
            spectrum,
            0.0 * experts[name],
            experts[name],
            rule=rule,
            scale=(scales or {}).get(name),
            selection=selection,
        )
        total = merged.core if total is None else total + merged.core
        reports[name] = merged.report
    if total is None:
        raise InputError("No expert was given.")
    return total, reports


def expert_spectra(
    fishers: Mapping[str, Fisher], *, pooled_cost: Fisher | None = None, damping: float | None = None
) -> Iterator[tuple[str, Spectrum]]:
    """Solve every expert's gain against the mean cost of the others, each in nats per response token of its own data.

    Args:
        fishers: As for `merge_experts`.
        pooled_cost: One cost Fisher for all experts, instead of the mean of the others.
        damping: Relative damping.

    Yields:
        Name and spectrum, expert after expert.

    Raises:
        InputError: The Fishers were taken at several points that are not their own experts.
    """
    comparable = _at_one_reference(fishers)
    costs = repeat(pooled_cost) if pooled_cost else _sums_of_the_others(_of_equal_tokens(list(comparable.values())))
    for (name, gain), cost in zip(comparable.items(), costs, strict=False):
        yield name, solve(gain, cost, damping=damping)


def _of_equal_tokens(fishers: Sequence[Fisher]) -> list[Fisher]:
    """Return the Fishers with weights that make their response tokens equal, so that long responses count no more."""
    if len(fishers) == 2:
        return list(fishers)  # each other's cost: there is nothing to be weighed
    tokens = [fisher.tokens for fisher in fishers]
    mean = sum(tokens) / len(tokens)
    return [fisher.weighted(mean / own) if own else fisher for fisher, own in zip(fishers, tokens, strict=True)]


def _sums_of_the_others(fishers: Sequence[Fisher], outside: tuple[Fisher, ...] = ()) -> Iterator[Fisher]:
    """Yield for each Fisher the sum of all others, in T log T additions and with log T sums in memory."""
    if len(fishers) == 1:
        yield reduce(add, outside)
        return
    middle = len(fishers) // 2
    halves = fishers[:middle], fishers[middle:]
    for own, others in (halves, halves[::-1]):
        yield from _sums_of_the_others(own, (reduce(add, (*outside, *others)),))


def _at_one_reference(fishers: Mapping[str, Fisher]) -> Mapping[str, Fisher]:
    """Return the Fishers as ones that can be added: taken at one point, or each at its own expert.

    A Fisher records the name that its expert had when it was collected, which need not be today's.

    Raises:
        InputError: They were taken at several points that are not their own experts.
    """
    references = {name: fisher.metadata.get("reference") for name, fisher in fishers.items()}
    if len(set(references.values())) == 1:
        return fishers
    strays = any(where != name and where in fishers for name, where in references.items())
    if strays or len(set(references.values())) < len(references):
        found = ", ".join(f"that of '{name}' at '{where}'" for name, where in references.items())
        raise InputError(
            f"Expected Fishers that were all taken at one reference, or each at its own expert; but found {found}. Collect "
            "each with its own expert's name as --reference."
        )
    return {n: replace(fisher, metadata={**fisher.metadata, "reference": _OWN}) for n, fisher in fishers.items()}
