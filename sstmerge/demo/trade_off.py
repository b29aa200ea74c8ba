"""Comparing methods at equal safety, in words and in a picture."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from matplotlib.figure import Figure

from sstmerge.pipeline.evaluate import Evaluation, Rate

_SWEPT = re.compile(r"^(?P<method>.+) ×(?P<scale>[0-9.]+)$")


def curves(evaluations: Sequence[Evaluation]) -> dict[str, list[tuple[float, Evaluation]]]:
    """Group evaluations named "METHOD ×SCALE" by method.

    Args:
        evaluations: Evaluations.

    Returns:
        Pairs (scale, evaluation) by method, by rising scale.
    """
    grouped: dict[str, list[tuple[float, Evaluation]]] = {}
    for evaluation in evaluations:
        match = _SWEPT.match(evaluation.name)
        if match:
            grouped.setdefault(match["method"], []).append((float(match["scale"]), evaluation))
    return {method: sorted(points, key=lambda point: point[0]) for method, points in grouped.items()}


def compare_at_equal_safety(evaluations: Sequence[Evaluation], method: str, rival: str) -> list[str]:
    """Say for every point of a method what the rival refuses at the same refusal of harmful prompts.

    The rival's over-refusal and utility are interpolated linearly between the points of its own sweep.

    Args:
        evaluations: Evaluations named "METHOD ×SCALE".
        method: The method.
        rival: The rival.

    Returns:
        One sentence per point that lies within the rival's range of safety, good or bad.
    """
    grouped = curves(evaluations)
    sentences = []
    for scale, point in grouped.get(method, []):
        safety = _value(point.refusal_harmful)
        matched = {
            name: _interpolate(grouped.get(rival, []), safety, name)
            for name in ("refusal_benign", "refusal_borderline", "utility_exact_match")
        }
        if any(value is None for value in matched.values()):
            continue
        sentences.append(
            f"{method} ×{scale:g} refuses {safety:.0%} of harmful prompts. At that safety, over-refusal of ordinary prompts "
            f"is {_value(point.refusal_benign):.0%} against {matched['refusal_benign']:.0%} of {rival}, of borderline "
            f"prompts {_value(point.refusal_borderline):.0%} against {matched['refusal_borderline']:.0%}, and utility "
            f"{_value(point.utility_exact_match):.0%} against {matched['utility_exact_match']:.0%}."
        )
    return sentences


def draw_trade_off(evaluations: Sequence[Evaluation]) -> Figure:
    """Draw refusal of harmful prompts against over-refusal and utility, one curve per method.

    Args:
        evaluations: Evaluations; those not named "METHOD ×SCALE" are drawn as single points.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = {
        "refusal_benign": "over-refusal of ordinary prompts (lower is better)",
        "refusal_borderline": "over-refusal of borderline prompts (lower is better)",
        "utility_exact_match": "utility, exact match (higher is better)",
    }
    grouped = curves(evaluations)
    single = [e for e in evaluations if not _SWEPT.match(e.name)]
    for axis, (name, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for method, points in grouped.items():
            values = [(_value(e.refusal_harmful), _value(getattr(e, name))) for _, e in points]
            axis.plot(*zip(*values, strict=True), marker="o", label=method)
        for evaluation in single:
            x, y = _value(evaluation.refusal_harmful), _value(getattr(evaluation, name))
            axis.plot([x], [y], marker="s", color="black")
            axis.annotate(evaluation.name, (x, y), textcoords="offset points", xytext=(5, 5))
        axis.set(xlabel="refusal of harmful prompts", ylabel=label, xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    figure.axes[0].legend(loc="upper left")
    return figure


def _interpolate(points: Sequence[tuple[float, Evaluation]], safety: float, name: str) -> float | None:
    """Return the rival's value where its refusal of harmful prompts first crosses `safety`; None outside its range."""
    pairs = [(_value(e.refusal_harmful), _value(getattr(e, name))) for _, e in points]
    for (x0, y0), (x1, y1) in itertools.pairwise(pairs):
        if min(x0, x1) <= safety <= max(x0, x1):
            return y0 if x0 == x1 else y0 + (safety - x0) / (x1 - x0) * (y1 - y0)
    return None


def _value(rate: Rate | None) -> float:
    return float("nan") if rate is None else rate.value
