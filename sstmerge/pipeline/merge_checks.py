"""Options of a merge that cannot work are refused before a model is loaded."""

from __future__ import annotations

import math

from sstmerge.adapters import CoreSpace
from sstmerge.errors import InputError
from sstmerge.fisher.structures import parse_structure
from sstmerge.merging import Rule, Selection, parse_rule
from sstmerge.merging.sst import check_options
from sstmerge.pipeline.calibration import CollectionOptions


def check_rule(rule: str, scale: float | None, selection: Selection, damping: float | None) -> Rule:
    """Check what a merge is asked for, as far as no adapter tells.

    Args:
        rule: Name of the rule.
        scale: Factor of the safety adapter.
        selection: Which directions are kept.
        damping: Relative damping of F_cost.

    Returns:
        The rule.

    Raises:
        InputError: If there is no such rule, a number makes no sense, or options contradict each other.
    """
    parsed = parse_rule(rule)
    if scale is not None and not math.isfinite(scale):
        raise InputError(f"scale must be a finite number, but is {scale}.")
    if damping is not None and not 0.0 <= damping < math.inf:
        raise InputError(f"damping must be a finite number >= 0, but is {damping}.")
    if parsed is Rule.REFIT and (selection.mu is not None or selection.exponent != 1.0):
        raise InputError(
            "mu and exponent belong to other rules; 'refit' takes top, fraction, energy or budget, and in Python "
            "refit=RefitOptions(mu=…)."
        )
    # Refitting starts from the projection.
    check_options(Rule.PROJECT if parsed is Rule.REFIT else parsed, scale, selection)
    return parsed


def check_merge(
    space: CoreSpace,
    rule: str,
    *,
    scale: float | None,
    selection: Selection,
    damping: float | None,
    rank: int | None,
    options: CollectionOptions,
) -> Rule:
    """Check all options of a merge that collects its Fishers.

    Args:
        space: The adapters' space.
        rule: Name of the rule.
        scale: Factor of the safety adapter.
        selection: Which directions are kept.
        damping: Relative damping of F_cost.
        rank: Rank limit of the result.
        options: How the Fishers are collected.

    Returns:
        The rule.

    Raises:
        InputError: If an option cannot work.
    """
    parsed = check_rule(rule, scale, selection, damping)
    parse_structure(options.structure)
    if parsed is Rule.REFIT and options.module_share is not None:
        raise InputError("The rule 'refit' works in the whole space; leave out the module filter.")
    space.check_rank(rank)
    if selection.top is not None and selection.top > space.size:
        raise InputError(
            f"top asks for {selection.top} directions, but the space of these adapters has {space.size}; give at most that."
        )
    return parsed
