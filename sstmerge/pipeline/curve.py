"""Trade-off curves from one pair of Fishers: predicted gain against predicted benign KL, without any model."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from sstmerge.adapters import save_adapter
from sstmerge.atomic import atomic_directory
from sstmerge.errors import InputError
from sstmerge.gevp import Spectrum
from sstmerge.merging import Merge, MergeReport, Rule, Selection, merge_cores, parse_rule
from sstmerge.merging.selection import efficiency_order
from sstmerge.pipeline.merge import load_solved
from sstmerge.pipeline.roles import AdapterSource


@dataclass(frozen=True)
class CurvePoint:
    """One merge of a curve.

    Attributes:
        method: Rule, or "task arithmetic".
        scale: Factor of the safety adapter.
        directions: Directions kept.
        gain_kept: Share of the gain energy kept at scale 1.
        predicted_kl: Predicted benign KL, nats per response token.
        predicted_gain: First-order gain of the refusals' log-probability, nats per response token.
        norm: Frobenius norm of the change.
        warnings: What to look at before believing the point; not in `curve.csv`.
    """

    method: str
    scale: float
    directions: int
    gain_kept: float
    predicted_kl: float
    predicted_gain: float
    norm: float
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, method: str, report: MergeReport) -> CurvePoint:
        """Return the point of a merge's report."""
        fields = [name for name in cls.__dataclass_fields__ if name != "method"]
        return cls(method, **{name: getattr(report, name) for name in fields})


def trade_off_curve(
    gain: str | Path,
    cost: str | Path,
    *,
    utility: AdapterSource | Sequence[AdapterSource],
    safety: AdapterSource,
    out: str | Path,
    budgets: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    rule: str = "project",
    selection: Selection = Selection(),  # noqa: B008 (frozen)
    utility_weights: Sequence[float] | None = None,
    damping: float | None = None,
    rank: int | None = None,
    write_adapters: bool = False,
    ignore_base_name: bool = False,
    overwrite: bool = False,
) -> list[CurvePoint]:
    """Merge at many budgets or scales, and write a table and a picture of what is predicted.

    Args:
        gain: Fisher file of harmful prompts.
        cost: Fisher file of benign prompts.
        utility: Utility adapters.
        safety: The safety adapter.
        out: Directory for `curve.csv`, `curve.json`, `curve.png`, `spectrum.png` and, if asked for, one adapter per point.
        budgets: Predicted benign KLs; exactly one of budgets and scales.
        scales: Factors of the safety adapter.
        rule: `project`, `wiener` or `joint`.
        selection: Which directions.
        utility_weights: Weights of the utility adapters.
        damping: Relative damping.
        rank: Rank limit of the adapters.
        write_adapters: Write every point as an adapter directory, too.
        ignore_base_name: Accept different base model names.
        overwrite: Replace `out`.

    Returns:
        The points: the rule's, then those of task arithmetic at equal predicted KL (budgets) or equal scale.

    Raises:
        InputError: If both or none of budgets and scales are given, or they are empty.
    """
    if (budgets is None) == (scales is None) or not (budgets or scales):
        raise InputError("Give either budgets or scales, at least one value.")
    roles, spectrum = load_solved(
        gain,
        cost,
        utility=utility,
        safety=safety,
        damping=damping,
        utility_weights=utility_weights,
        ignore_base_name=ignore_base_name,
    )
    parsed = parse_rule(rule)
    unfiltered = Selection(mu=0.0)
    merges: list[tuple[str, Merge]] = []
    for method, method_rule, chosen in ((rule, parsed, selection), ("task arithmetic", Rule.WIENER, unfiltered)):
        for value in budgets or scales or ():
            point = merge_cores(
                spectrum,
                roles.utility,
                roles.safety,
                rule=method_rule,
                scale=None if budgets else value,
                selection=replace(chosen, budget=value) if budgets else chosen,
            )
            merges.append((method, point))
    points = [CurvePoint.of(method, merged.report) for method, merged in merges]
    with atomic_directory(out, overwrite=overwrite) as folder:
        _write_csv(points, folder / "curve.csv")
        reports = [{"method": method, **merged.report.to_dict()} for method, merged in merges]
        (folder / "curve.json").write_text(json.dumps(reports, indent=2) + "\n")
        draw_curve(points).savefig(folder / "curve.png", dpi=150)
        draw_spectrum(spectrum, roles.safety).savefig(folder / "spectrum.png", dpi=150)
        if write_adapters:
            for number, (method, merged) in enumerate(merges):
                adapter = roles.space.to_adapter(merged.core, name=method, rank=rank)
                save_adapter(adapter, folder / f"{number:02d}-{method.replace(' ', '-')}")
    return points


def draw_curve(points: Sequence[CurvePoint]) -> Figure:
    """Draw predicted gain and gain energy against predicted benign KL.

    Args:
        points: The points of one or several methods.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method in dict.fromkeys(point.method for point in points):
        chosen = sorted((p for p in points if p.method == method), key=lambda p: p.predicted_kl)
        kl = [p.predicted_kl for p in chosen]
        left.plot(kl, [p.predicted_gain for p in chosen], marker="o", label=method)
        right.plot(kl, [p.gain_kept * p.scale**2 for p in chosen], marker="o", label=method)
    left.set_ylabel("predicted gain of refusals, nats per token (first order)")
    right.set_ylabel("gain energy, in units of the safety adapter's")
    for axis in (left, right):
        axis.set_xlabel("predicted KL on benign data, nats per token")
        axis.grid(alpha=0.3)
    left.legend()
    return figure


def draw_spectrum(spectrum: Spectrum, safety: Tensor) -> Figure:
    """Draw the eigenvalues, and how much of the safety adapter's gain and cost the best directions hold.

    Args:
        spectrum: The solved pair.
        safety: The safety adapter, shape (D,).

    Returns:
        The figure.
    """
    order = efficiency_order(spectrum.eigenvalues)
    eigenvalues, squares = spectrum.eigenvalues[order], spectrum.coordinates(safety)[order].square()
    gain, cost = (eigenvalues * squares).cumsum(0), squares.cumsum(0)
    rank = range(1, len(order) + 1)
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if not len(order):
        left.text(0.5, 0.5, "no direction has a λ above zero", ha="center", transform=left.transAxes)
        return figure
    positive = eigenvalues.clamp_min(float(eigenvalues[0]) * 1e-12)
    left.loglog(rank, positive)
    left.set(xlabel="direction, by falling λ", ylabel="λ, gain per unit of cost")
    right.semilogx(rank, gain / gain[-1], label="gain energy")
    right.semilogx(rank, cost / cost[-1], label="cost energy")
    right.set(xlabel="directions kept", ylabel="share of the listed directions' energy")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


def _write_csv(points: Sequence[CurvePoint], path: Path) -> None:
    with path.open("w", newline="") as file:
        columns = [name for name in CurvePoint.__dataclass_fields__ if name != "warnings"]
        writer = csv.DictWriter(file, fieldnames=columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(vars(point) for point in points)
