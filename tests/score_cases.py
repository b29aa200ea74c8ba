"""Problems for sequence_scores, their exact answers in float64, and checks that run on any backend and device."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from sstmerge import ops
from sstmerge.ops import SequenceScores

# Largest error relative to the largest element. Half precision: 16 bits of every projected number are kept.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-5, torch.float16: 5e-5}


@dataclass(frozen=True)
class ScoreCase:
    """The arguments of sequence_scores."""

    x: Tensor
    gradient: Tensor
    V: Tensor | None
    U: Tensor | None
    spans: Tensor
    weights: Tensor | None
    rotation: tuple[Tensor, Tensor]

    def run(self, backend: str, **options) -> SequenceScores:
        """Ask for everything, unless options say otherwise."""
        asked = {"scores": True, "squares": True, "rotation": self.rotation, "covariances": True}
        asked |= {"projected_gradient": True, "weights": self.weights} | options
        return ops.sequence_scores(self.x, self.gradient, self.V, self.U, self.spans, backend=backend, **asked)

    def to(self, device: torch.device | str) -> ScoreCase:
        """Move all tensors."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, rotation=tuple(matrix.to(device) for matrix in self.rotation))


def score_case(
    spans: list[tuple[int, int]],
    *,
    columns: tuple[int, int] = (4, 4),
    depths: tuple[int, int] = (24, 40),
    dtype: torch.dtype = torch.float32,
    tokens: int | None = None,
    projected: str = "",
    weighted: bool = True,
) -> ScoreCase:
    """Draw a problem with columns (R_o, R_i) and depths (d_out, d_in); rows outside the spans hold NaN.

    `projected` names the sides that are projected already: "", "x", "gradient" or both. With weights, every third
    sequence has weight 0.
    """
    generator = torch.Generator().manual_seed(sum(columns) + 7 * len(spans))
    tokens = max(stop for _, stop in spans) + 3 if tokens is None else tokens
    inside = torch.zeros(tokens, dtype=torch.bool)
    for start, stop in spans:
        inside[start:stop] = True

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def side(name: str, depth: int, width: int) -> tuple[Tensor, Tensor | None]:
        raw = name not in projected.split()
        rows = draw(tokens, depth if raw else width)
        rows[~inside] = torch.nan
        if not raw:
            return rows, None
        return rows.to(dtype), (draw(depth, width) / depth**0.5).to(dtype)

    gradient, U = side("gradient", depths[0], columns[0])
    x, V = side("x", depths[1], columns[1])
    weights = torch.rand(len(spans), generator=generator) + 0.5
    weights[::3] = 0
    rotation = (draw(columns[0], columns[0]), draw(columns[1], columns[1]))
    return ScoreCase(
        x,
        gradient,
        V,
        U,
        torch.tensor(spans, dtype=torch.int64).reshape(-1, 2),
        weights if weighted else None,
        rotation,
    )


def exact_scores(case: ScoreCase) -> SequenceScores:
    """Compute everything in float64, one sequence after the other."""
    x = case.x.double() if case.V is None else case.x.double() @ case.V.double()
    gradient = case.gradient.double() if case.U is None else case.gradient.double() @ case.U.double()
    Q, P = (matrix.double() for matrix in case.rotation)
    rows, columns = gradient.shape[1], x.shape[1]
    sums = {
        "score_sum": torch.zeros(rows, columns),
        "square_sum": torch.zeros(rows, columns),
        "rotated_square_sum": torch.zeros(rows, columns),
        "input_covariance": torch.zeros(columns, columns),
        "output_covariance": torch.zeros(rows, rows),
    }
    sums = {name: value.double().to(x.device) for name, value in sums.items()}
    scores, projected = [], torch.zeros_like(gradient)
    for i, (start, stop) in enumerate(case.spans.tolist()):
        weight = 1.0 if case.weights is None else case.weights[i].double()
        inputs, outputs = x[start:stop], gradient[start:stop]
        projected[start:stop] = outputs
        score = outputs.mT @ inputs
        scores.append(score)
        if weight == 0:
            continue
        sums["score_sum"] += weight * score
        sums["square_sum"] += weight * score.square()
        sums["rotated_square_sum"] += weight * (Q.mT @ score @ P).square()
        sums["input_covariance"] += weight * inputs.mT @ inputs
        sums["output_covariance"] += weight * outputs.mT @ outputs
    stacked = torch.stack(scores) if scores else x.new_zeros(0, rows, columns)
    return SequenceScores(scores=stacked, projected_gradient=projected, **sums)


def deviation(found: SequenceScores, exact: SequenceScores) -> float:
    """Return the largest error of any result, relative to its largest element; NaN where NaN was not expected."""
    worst = 0.0
    for field in fields(SequenceScores):
        value, expected = getattr(found, field.name), getattr(exact, field.name)
        assert value.shape == expected.shape, field.name
        kept = torch.float32 if field.name in {"scores", "projected_gradient"} else torch.float64
        assert value.dtype == kept, field.name
        if value.numel() == 0:
            continue
        error = (value.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
        worst = float(torch.maximum(error.cpu(), torch.tensor(worst)))
    return worst


def assert_exact(case: ScoreCase, backend: str) -> None:
    """Compare everything with the exact answer."""
    raw = [tokens.dtype for tokens, basis in ((case.x, case.V), (case.gradient, case.U)) if basis is not None]
    tolerance = TOLERANCES[raw[0] if raw else torch.float32]
    assert deviation(case.run(backend), exact_scores(case)) < tolerance


def assert_same_bits(first: SequenceScores, second: SequenceScores) -> None:
    """Compare all bits; results that were not asked for must be missing in both."""
    for field in fields(SequenceScores):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert (a is None) == (b is None), field.name
        assert a is None or torch.equal(a.cpu(), b.cpu()), field.name


def assert_permutation_changes_nothing(case: ScoreCase, backend: str) -> None:
    """Give the sequences in another order: the same scores to the bit, the same sums to rounding."""
    order = torch.arange(len(case.spans)).roll(2).flip(0).to(case.spans.device)
    weights = None if case.weights is None else case.weights[order]
    found, permuted = case.run(backend), replace(case, spans=case.spans[order], weights=weights).run(backend)
    assert torch.equal(found.scores[order], permuted.scores)
    # Scores are rotated in float32, and on some processors MKL rounds a matrix otherwise at another place in memory, in a
    # batch as in one product for all. Nothing else that is summed may change.
    assert deviation(replace(found, scores=permuted.scores), permuted) < 1e-6
    kept = {"scores": permuted.scores, "rotated_square_sum": permuted.rotated_square_sum}
    assert deviation(replace(found, **kept), permuted) < 1e-12


def assert_padding_changes_nothing(case: ScoreCase, backend: str) -> None:
    """Move the sequences of a packed problem apart, with NaN between them."""
    lengths = case.spans[:, 1] - case.spans[:, 0]
    width = int(lengths.max()) + 5
    starts = torch.arange(len(lengths), device=lengths.device) * width
    inside = torch.arange(width, device=lengths.device) < lengths[:, None]

    def padded(tokens: Tensor) -> Tensor:
        rows = tokens.new_full((len(lengths), width, tokens.shape[1]), torch.nan)
        rows[inside] = tokens
        return rows.flatten(0, 1)

    apart = replace(
        case, x=padded(case.x), gradient=padded(case.gradient), spans=torch.stack([starts, starts + lengths], dim=1)
    )
    found, expected = apart.run(backend), case.run(backend)
    projected = found.projected_gradient.unflatten(0, (len(lengths), width))
    assert not projected[~inside].any()
    assert deviation(replace(found, projected_gradient=projected[inside]), expected) < 1e-5


RAGGED = [(3, 50), (50, 50), (70, 99), (60, 61), (110, 241)]
PACKED = [(0, 40), (40, 41), (41, 110), (110, 130)]
SPANS = {
    "ragged": RAGGED,
    "one long": [(2, 700)],
    "all empty": [(5, 5), (0, 0)],
    "more sequences than rows of a chunk": [(i, i + 1) for i in range(0, 12, 2)],
    "whole tiles": [(0, 128), (128, 256)],
}
COLUMNS = [(1, 3), (4, 16), (17, 5), (32, 32), (20, 48), (64, 64), (96, 70)]
