"""Safety-subspace merging: from a spectrum to the merged adapter.

With c(φ) the coordinates of a weight change in the generalized eigenbasis, φ_u the utility adapters and φ_s the safety
adapter,

    project   c(φ_u) + a · 1[i selected] · c(φ_s)       the F_cost-metric projection
    wiener    c(φ_u) + a · (λ_i / (λ_i + μ))^β · c(φ_s)     μ = 0: no filter, φ_u + a φ_s; β is 1 by default
    joint     w_i c(φ_s) + (1 − w_i) c(φ_u), w_i = λ_i / (λ_i + μ)   the Pareto path of the two quadratic losses
    refit     coefficients learned again inside the selected subspace (`sstmerge.pipeline.refit`, needs the model)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from sstmerge.errors import InputError
from sstmerge.gevp import Spectrum
from sstmerge.merging.cautions import about_budget, cautions
from sstmerge.merging.selection import Selection, efficiency_order, largest, select, shrinkage

# The directions kept where the user chooses none: those that hold this share of the safety adapter's gain energy.
DEFAULT_ENERGY = 0.99
_BISECTIONS = 60
# Share of a budget that counts as all of it.
_SPENT = 0.999
# Entries, 8 MiB in float64: memory that the allocator keeps.
_PIECE = 2**20


class Rule(StrEnum):
    """How the spectrum becomes a merged adapter."""

    PROJECT = "project"
    WIENER = "wiener"
    JOINT = "joint"
    REFIT = "refit"


@dataclass(frozen=True)
class MergeReport:
    """What a merge keeps and what it is predicted to cost, all without running the model.

    Attributes:
        rule: Rule.
        structure: Structure of the Fishers.
        scale: Factor a that was applied to the safety adapter.
        mu: Shrinkage, None for `project`.
        exponent: Power of the weights of `wiener`; 1 for the other rules.
        damping: Relative damping of F_cost.
        directions: Directions with a weight above one half.
        directions_in_all: Dimension of the space.
        gain_kept: Share of the safety adapter's gain energy φᵀF_gain φ that the change keeps at scale 1; with a module
            filter, of the part of the adapter that the filter leaves.
        predicted_kl: ½ Δᵀ F_cost Δ of the change Δ from the utility model, nats per benign response token. Structures other
            than `global` leave out that layers act together, `global` that other prompts differ: experiment C measured 5
            times as much for `kfac`, 16 for `diagonal`, 25 for `ekfac` and thousands for `global` (docs/RESULTS.md).
        predicted_kl_task_arithmetic: The same for the whole safety adapter at the same scale.
        predicted_gain: g · Δ, first-order change of the refusals' log-probability, nats per response token.
        norm: Frobenius norm of Δ.
        norm_task_arithmetic: Frobenius norm of the scaled safety adapter.
        directions_per_layer: Kept directions by layer; empty for `global`, whose directions span all layers.
        norm_per_layer: Frobenius norm of Δ by layer.
        spectrum: The largest eigenvalues λ, up to 64.
        gain_sequences: Effective number of sequences behind F_gain.
        cost_sequences: Effective number of sequences behind F_cost.
        warnings: Sentences about what to look at.
    """

    rule: str
    structure: str
    scale: float
    mu: float | None
    exponent: float
    damping: float
    directions: int
    directions_in_all: int
    gain_kept: float
    predicted_kl: float
    predicted_kl_task_arithmetic: float
    predicted_gain: float
    norm: float
    norm_task_arithmetic: float
    directions_per_layer: dict[str, int]
    norm_per_layer: dict[str, float]
    spectrum: list[float]
    gain_sequences: float
    cost_sequences: float
    warnings: tuple[str, ...] = ()

    @property
    def length(self) -> float:
        """Norm of the change over that of the adapter as trained."""
        return self.norm * abs(self.scale) / self.norm_task_arithmetic if self.norm_task_arithmetic else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Merge:
    """A merged point of the core space.

    Attributes:
        core: Coordinates, shape (D,), float64.
        report: What was kept.
        kept: Which directions of the spectrum have a part in the change, shape (m,), bool.
    """

    core: Tensor
    report: MergeReport
    kept: Tensor


def parse_rule(name: str) -> Rule:
    """Return the rule of that name.

    Args:
        name: One of the values of `Rule`.

    Returns:
        The rule.

    Raises:
        InputError: If there is none.
    """
    try:
        return Rule(name)
    except ValueError:
        raise InputError(f"Unknown rule '{name}'; expected one of {[r.value for r in Rule]}.") from None


def merge_cores(
    spectrum: Spectrum,
    utility: Tensor,
    safety: Tensor,
    *,
    rule: Rule = Rule.PROJECT,
    scale: float | None = None,
    selection: Selection = Selection(),  # noqa: B008 (frozen)
) -> Merge:
    """Merge a safety adapter into the utility adapters.

    Args:
        spectrum: The solved pair of Fishers.
        utility: φ_u, the (weighted sum of) utility adapters, shape (D,); may be zero. Coordinates in `spectrum.space`
            (`spectrum.space.core(name)`), not in a space computed anew, whose bases may be others.
        safety: φ_s, shape (D,), in the same space.
        rule: `project`, `wiener` or `joint`.
        scale: Factor a of the safety adapter, 1 by default. A budget sets it where directions (or μ) are chosen already;
            otherwise the budget sets the directions (or μ), and the scale only where even all of them cost less.
        selection: Which directions; for `project` without any choice, those that hold 99 % of the gain energy.

    Returns:
        The merged point and its report.

    Raises:
        InputError: If options contradict each other.
    """
    check_options(rule, scale, selection)
    source = safety - utility if rule is Rule.JOINT else safety
    coordinates = spectrum.coordinates(source)
    weights, mu = _weights(spectrum, source, coordinates, rule, 1.0 if scale is None else scale, selection)
    rest = 1.0 if mu == 0.0 and not selection.counts_directions else 0.0
    change = spectrum.apply_filter(source, weights, rest, coordinates=coordinates)
    if scale is None:
        scale = 1.0
        if selection.budget is not None and (
            _directions_given(rule, selection)
            # Even all directions, or the weakest filter, cost less than the budget.
            or 0.5 * spectrum.cost.quadratic(change) < _SPENT * selection.budget
        ):
            scale = _scale_for(spectrum, change, selection.budget)
    change.mul_(scale)
    of_safety = coordinates if source is safety else spectrum.coordinates(safety)
    in_eigenbasis = of_safety, (weights * coordinates).mul_(scale)
    summary = report(spectrum, safety, change, in_eigenbasis, weights, rule, scale, mu, selection.exponent)
    if selection.budget is not None:
        summary = replace(summary, warnings=(*summary.warnings, about_budget(spectrum.gain.structure)))
    return Merge(utility + change, summary, weights != 0)


def report(
    spectrum: Spectrum,
    safety: Tensor,
    change: Tensor,
    coordinates: tuple[Tensor, Tensor],
    weights: Tensor,
    rule: Rule,
    scale: float,
    mu: float | None,
    exponent: float = 1.0,
) -> MergeReport:
    """Describe a change of the utility model.

    Args:
        spectrum: The solved pair of Fishers.
        safety: The safety adapter as trained, shape (D,): what the change is compared with.
        change: The change, shape (D,).
        coordinates: Those of the safety adapter and of the change in the eigenbasis, each (m,).
        weights: Weight per direction, shape (m,).
        rule: Rule.
        scale: Factor that was applied.
        mu: Shrinkage.
        exponent: Power of the weights.

    Returns:
        The report.
    """
    space = spectrum.space
    kept = weights > 0.5
    # No direction that is not listed has a gain.
    whole_gain, gain = (_gain_energy(spectrum.eigenvalues, c) for c in coordinates)
    # Summed as they are, booleans would all be converted to int64 first.
    parts = space.split(kept) if spectrum.complete else []
    counts = [part.view(torch.int8).sum(dim=(1, 2), dtype=torch.int32) for part in parts]
    norms = torch.cat([torch.linalg.vector_norm(part, dim=(1, 2)) for part in space.split(change)])
    effective = spectrum.gain.effective_sequences, spectrum.cost.effective_sequences
    predicted_kl = 0.5 * spectrum.cost.quadratic(change)
    norm, norm_of_safety = float(change.norm()), float(safety.norm())
    length = norm / norm_of_safety if norm_of_safety else 1.0
    return MergeReport(
        rule=rule.value,
        structure=spectrum.gain.structure.value,
        scale=scale,
        mu=mu,
        exponent=exponent,
        damping=spectrum.damping,
        directions=int(kept.count_nonzero()),
        directions_in_all=space.size,
        gain_kept=gain / (scale**2 * whole_gain) if whole_gain > 0 and scale else 0.0,
        predicted_kl=predicted_kl,
        predicted_kl_task_arithmetic=0.5 * scale**2 * spectrum.cost.quadratic(safety),
        predicted_gain=float(spectrum.gain.mean_score() @ change),
        norm=norm,
        norm_task_arithmetic=abs(scale) * norm_of_safety,
        directions_per_layer=(
            {n: c for n, c in zip(space.layer_names, torch.cat(counts).tolist(), strict=True) if c} if counts else {}
        ),
        norm_per_layer=dict(zip(space.layer_names, norms.tolist(), strict=True)),
        spectrum=largest(spectrum.eigenvalues, min(64, len(spectrum.eigenvalues))).tolist(),
        gain_sequences=effective[0],
        cost_sequences=effective[1],
        warnings=tuple(cautions(spectrum, length, predicted_kl, effective, filtered=rule is Rule.WIENER and bool(mu))),
    )


def _gain_energy(eigenvalues: Tensor, coordinates: Tensor) -> float:
    """Return Σ λ_i c_i², a piece at a time: no vector of the size of the space is made for it."""
    pieces = zip(eigenvalues.split(_PIECE), coordinates.split(_PIECE), strict=True)
    return sum(float(values @ c.square()) for values, c in pieces)


def check_options(rule: Rule, scale: float | None, selection: Selection) -> None:
    """Refuse options that contradict each other.

    Args:
        rule: Rule.
        scale: Factor of the safety adapter; None where none was given.
        selection: Which directions.

    Raises:
        InputError: If they do.
    """
    if rule is Rule.REFIT:
        raise InputError("The rule 'refit' evaluates the model; use sstmerge.merge or sstmerge.pipeline.refit.")
    if rule is Rule.PROJECT and selection.mu is not None:
        raise InputError(
            "mu belongs to the rules 'wiener' and 'joint'; 'project' takes top, fraction, energy or budget."
        )
    if rule is not Rule.WIENER and selection.exponent != 1.0:
        raise InputError(f"exponent belongs to the rule 'wiener'; '{rule}' has none.")
    if rule in (Rule.WIENER, Rule.JOINT) and selection.mu is None and selection.budget is None:
        raise InputError(
            f"The rule '{rule}' needs mu (the λ at which half of a direction is kept, with exponent 1) or a budget."
        )
    if scale is not None and selection.budget is not None and _directions_given(rule, selection):
        raise InputError(
            "The directions are chosen already, so the budget sets the scale; give either scale or budget."
        )


def _directions_given(rule: Rule, selection: Selection) -> bool:
    """Whether the weights do not depend on the budget, which then sets the scale."""
    return selection.counts_directions if rule is Rule.PROJECT else selection.mu is not None


def _weights(
    spectrum: Spectrum, source: Tensor, coordinates: Tensor, rule: Rule, scale: float, selection: Selection
) -> tuple[Tensor, float | None]:
    """Return the weight of every direction (m,), and μ."""
    eigenvalues, dimension = spectrum.eigenvalues, spectrum.space.size
    if rule is Rule.PROJECT:
        if selection.budget is not None and not selection.counts_directions:
            return _within_budget(spectrum, source, coordinates, scale, selection.budget), None
        chosen = selection if selection.counts_directions else Selection(energy=DEFAULT_ENERGY)
        return select(chosen, eigenvalues, coordinates, dimension), None
    mask = select(selection, eigenvalues, coordinates, dimension)
    mu = selection.mu if selection.mu is not None else _mu_for(spectrum, source, coordinates, mask, scale, selection)
    return mask * shrinkage(eigenvalues, mu, selection.exponent), mu


def _scale_for(spectrum: Spectrum, change: Tensor, budget: float) -> float:
    """Return the scale at which the predicted KL equals the budget."""
    cost = 0.5 * spectrum.cost.quadratic(change)
    if not cost > 0:
        raise InputError("The selected directions have no cost on the benign data, so a budget cannot set their scale.")
    return math.sqrt(budget / cost)


def _within_budget(spectrum: Spectrum, source: Tensor, coordinates: Tensor, scale: float, budget: float) -> Tensor:
    """Keep the most efficient directions, the last of them in part, so that the predicted KL equals the budget."""
    rank = torch.empty_like(spectrum.eigenvalues)
    rank[efficiency_order(spectrum.eigenvalues)] = torch.arange(len(rank)).to(rank)

    def weights(position: float) -> Tensor:
        return (position - rank).clamp(0.0, 1.0)

    def spent(position: float) -> float:
        filtered = spectrum.apply_filter(source, weights(position), coordinates=coordinates)
        return 0.5 * spectrum.cost.quadratic(scale * filtered)

    if spent(len(rank)) <= budget:
        return torch.ones_like(rank)
    return weights(_bisect(spent, 0.0, float(len(rank)), budget))


def _mu_for(
    spectrum: Spectrum, source: Tensor, coordinates: Tensor, mask: Tensor, scale: float, selection: Selection
) -> float:
    """Return the smallest μ whose predicted KL at this scale stays within the budget."""
    positive = spectrum.eigenvalues[spectrum.eigenvalues > 0]
    if not len(positive):
        raise InputError("No direction has a λ above zero; the gain Fisher holds no score.")

    def spent(strength: float) -> float:
        """Return the predicted KL at μ = exp(−strength): it rises with the strength."""
        weights = mask * shrinkage(spectrum.eigenvalues, math.exp(-strength), selection.exponent)
        return 0.5 * spectrum.cost.quadratic(scale * spectrum.apply_filter(source, weights, coordinates=coordinates))

    budget = selection.budget or 0.0
    if not selection.counts_directions and 0.5 * spectrum.cost.quadratic(scale * source) <= budget:
        return 0.0
    weakest, strongest = -math.log(float(positive.max())) - 40.0, -math.log(float(positive.min())) + 20.0
    if spent(strongest) <= budget:
        # No shrinkage, unless μ = 0 would bring back what lies in no direction (`global`).
        return 0.0 if selection.counts_directions else math.exp(-strongest)
    return math.exp(-_bisect(spent, weakest, strongest, budget))


def _bisect(spent: Callable[[float], float], low: float, high: float, budget: float) -> float:
    """Return the largest argument found in [low, high] whose (rising) value stays within the budget."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if spent(middle) <= budget:
            low = middle
        else:
            high = middle
    return low
