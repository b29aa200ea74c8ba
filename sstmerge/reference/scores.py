"""The twin of `sstmerge.ops.sequence_scores`, and its result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sstmerge.reference.projection import project_accumulate


@dataclass(frozen=True)
class SequenceScores:
    """Scores of sequences and their sums; what was not asked for is None.

    Attributes:
        score_sum: Σ w Γ, shape (R_o, R_i), float64.
        scores: Γ of every sequence, without its weight, shape (n, R_o, R_i), float32.
        square_sum: Σ w Γ², shape (R_o, R_i), float64.
        rotated_square_sum: Σ w (QᵀΓP)², shape (R_o, R_i), float64.
        input_covariance: Σ w Σ x̃x̃ᵀ, shape (R_i, R_i), float64.
        output_covariance: Σ w Σ δ̃δ̃ᵀ, shape (R_o, R_o), float64.
        projected_gradient: δ̃, shape (N, R_o), float32; zero outside the spans.
    """

    score_sum: Tensor
    scores: Tensor | None = None
    square_sum: Tensor | None = None
    rotated_square_sum: Tensor | None = None
    input_covariance: Tensor | None = None
    output_covariance: Tensor | None = None
    projected_gradient: Tensor | None = None


@torch.no_grad()
def sequence_scores(
    x: Tensor,
    gradient: Tensor,
    V: Tensor | None,
    U: Tensor | None,
    spans: Tensor,
    *,
    weights: Tensor | None = None,
    scores: bool = True,
    squares: bool = False,
    rotation: tuple[Tensor, Tensor] | None = None,
    covariances: bool = False,
    projected_gradient: bool = False,
) -> SequenceScores:
    """Compute the scores of sequences. See `sstmerge.ops.sequence_scores`.

    Tokens are projected as by `project_accumulate`; all other products are formed in float32, or in float64 if the tokens
    are float64. This twin waits for the device.

    Args:
        x: Inputs, shape (N, d_in), or projected already, (N, R_i).
        gradient: Output gradients, shape (N, d_out), or projected already, (N, R_o).
        V: Input basis, shape (d_in, R_i), or None.
        U: Output basis, shape (d_out, R_o), or None.
        spans: First row and the row behind the last of every sequence, shape (n, 2), int64.
        weights: w, shape (n,).
        scores: Whether to return Γ.
        squares: Whether to sum Γ².
        rotation: Q (R_o, R_o) and P (R_i, R_i).
        covariances: Whether to sum x̃x̃ᵀ and δ̃δ̃ᵀ.
        projected_gradient: Whether to return δ̃.

    Returns:
        The scores.
    """
    inputs, gradients = _projected(x, V), _projected(gradient, U)
    rows, columns = gradients.shape[1], inputs.shape[1]
    weight = torch.ones(len(spans), device=x.device) if weights is None else weights
    weight = weight.double()
    gamma = inputs.new_zeros(len(spans), rows, columns)
    input_covariance = torch.zeros(columns, columns, dtype=torch.float64, device=x.device)
    output_covariance = torch.zeros(rows, rows, dtype=torch.float64, device=x.device)
    for sequences, tokens, inside in _groups_of_like_length(spans):
        x_tokens = torch.where(inside, inputs[tokens], 0)
        gradient_tokens = torch.where(inside, gradients[tokens], 0)
        gamma[sequences] = gradient_tokens.mT @ x_tokens
        if covariances:
            input_covariance += _weighted_sum(weight[sequences], x_tokens.mT @ x_tokens)
            output_covariance += _weighted_sum(weight[sequences], gradient_tokens.mT @ gradient_tokens)
    rotated = None
    if rotation is not None:
        Q, P = (matrix.to(gamma.dtype) for matrix in rotation)
        rotated = _weighted_sum(weight, (Q.mT @ gamma @ P).double().square())
    return SequenceScores(
        score_sum=_weighted_sum(weight, gamma),
        scores=gamma if scores else None,
        square_sum=_weighted_sum(weight, gamma.double().square()) if squares else None,
        rotated_square_sum=rotated,
        input_covariance=input_covariance if covariances else None,
        output_covariance=output_covariance if covariances else None,
        projected_gradient=torch.where(inside_spans(spans, len(x)), gradients, 0) if projected_gradient else None,
    )


def inside_spans(spans: Tensor, tokens: int) -> Tensor:
    """Tell which rows belong to a sequence, without waiting for the device.

    Args:
        spans: Spans within the rows, shape (n, 2), int64.
        tokens: N, the number of rows.

    Returns:
        Truth values, shape (N, 1).
    """
    steps = torch.zeros(tokens + 1, dtype=torch.int32, device=spans.device)
    ones = torch.ones(len(spans), dtype=torch.int32, device=spans.device)
    steps.index_add_(0, spans[:, 0], ones).index_add_(0, spans[:, 1], -ones)
    return steps[:tokens].cumsum(0)[:, None] > 0


def _projected(tokens: Tensor, basis: Tensor | None) -> Tensor:
    return tokens if basis is None else project_accumulate(tokens, basis)


def _groups_of_like_length(spans: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield groups of sequences that need little padding: lengths of a group differ by less than a factor of two.

    Args:
        spans: Spans, shape (n, 2).

    Yields:
        The indices of b sequences (b,), the rows of their tokens (b, L), and whether they are tokens of the sequence
        at all (b, L, 1); the rows of others are 0.
    """
    lengths = spans[:, 1] - spans[:, 0]
    sizes = torch.frexp(lengths.double()).exponent
    for size in sizes[lengths > 0].unique().tolist():
        sequences = ((sizes == size) & (lengths > 0)).nonzero().flatten()
        steps = torch.arange(int(lengths[sequences].max()), device=spans.device)
        inside = steps < lengths[sequences, None]
        yield sequences, torch.where(inside, spans[sequences, :1] + steps, 0), inside[:, :, None]


def _weighted_sum(weight: Tensor, matrices: Tensor) -> Tensor:
    """Return Σ w M in float64, for w (n,) and M (n, rows, columns), without the terms of weight zero."""
    weighted = weight[:, None, None] * matrices.double()
    return torch.where(weight[:, None, None] != 0, weighted, 0).sum(dim=0)
