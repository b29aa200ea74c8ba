"""Scores of sequences: the gradients of their log-likelihoods with respect to a layer's core, and sums of them."""

from __future__ import annotations

import torch
from torch import Tensor

from sstmerge import reference
from sstmerge.errors import InputError
from sstmerge.ops.backends import BackendName, choose_backend
from sstmerge.ops.score_kernels import ScoreProblem, launch_scores
from sstmerge.ops.validation import as_tensor
from sstmerge.reference import SequenceScores

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    backend: BackendName = "auto",
) -> SequenceScores:
    """Project the tokens of sequences and sum their outer products: `Γ_n = Σ_t δ̃_t x̃_tᵀ` with x̃ = Vᵀx and δ̃ = Uᵀδ.

    Rows outside all spans contribute nothing, whatever they hold, so padding and batching change nothing. In half precision
    with at most 64 columns in both bases, a GPU reads every token once and writes nothing but the sums. The same
    arguments give the same bits.

    Args:
        x: Inputs of the layer, shape (N, d_in), float32, bfloat16 or float16.
        gradient: Gradients at the layer's output, shape (N, d_out), dtype of `x`.
        V: Basis of the inputs, shape (d_in, R_i), dtype of `x`; None where `x` is projected already: (N, R_i) in float32.
        U: Basis of the outputs, shape (d_out, R_o), dtype of `gradient`; None where `gradient` is projected already:
            (N, R_o) in float32.
        spans: First row and the row behind the last of every sequence, shape (n, 2), int64; empty ones are allowed, in any
            order. They must not overlap. The reference refuses spans that are no spans within the N rows, which
            kernels cannot do without waiting for the device: the scores of such a sequence are NaN.
        weights: w, one weight per sequence, shape (n,), float32, 1 by default; the tokens of a sequence of weight 0 may
            hold anything.
        scores: Whether to return Γ of every sequence.
        squares: Whether to sum Γ².
        rotation: Q, shape (R_o, R_o), and P, shape (R_i, R_i), float32 or float64 (rounded to float32 by kernels), to sum
            (QᵀΓP)²; None for not.
        covariances: Whether to sum x̃x̃ᵀ and δ̃δ̃ᵀ over the tokens.
        projected_gradient: Whether to return δ̃.
        backend: A name that `backends` lists; "auto" takes the kernels on a GPU and the reference elsewhere. The
            reference waits for the device.

    Returns:
        The sums over the sequences and what was asked for.

    Raises:
        InputError: Shapes, dtypes or devices do not fit, spans are seen to be wrong, or the backend's name is unknown.
        BackendError: The backend asked for is not available or lacks this op.
    """
    problem = ScoreProblem(
        x=_tokens("x", x, "V", V),
        gradient=_tokens("gradient", gradient, "U", U),
        V=None if V is None else as_tensor("V", V),
        U=None if U is None else as_tensor("U", U),
        spans=as_tensor("spans", spans),
        weights=None if weights is None else as_tensor("weights", weights),
        rotation=None if rotation is None else (as_tensor("Q", rotation[0]), as_tensor("P", rotation[1])),
        scores=scores,
        squares=squares,
        covariances=covariances,
        projected_gradient=projected_gradient,
    )
    _check(problem)
    chosen = choose_backend("sequence_scores", backend, problem.x.device)
    if chosen != "reference":
        return launch_scores(chosen, problem)
    _check_spans(problem.spans, len(problem.x))
    return reference.sequence_scores(
        problem.x,
        problem.gradient,
        problem.V,
        problem.U,
        problem.spans,
        weights=problem.weights,
        scores=scores,
        squares=squares,
        rotation=problem.rotation,
        covariances=covariances,
        projected_gradient=projected_gradient,
    )


def _tokens(name: str, value: Tensor, basis_name: str, basis: Tensor | None) -> Tensor:
    """Return one side's tokens, after a check of them against their basis."""
    tokens = as_tensor(name, value)
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise InputError(f"{name} must have the shape (tokens, features), not {tuple(tokens.shape)}")
    if basis is None:
        if tokens.dtype != torch.float32:
            raise InputError(
                f"{name} counts as projected already, because {basis_name} is None, and must then be float32, not "
                f"{tokens.dtype}: give {basis_name}, or convert with .float()"
            )
        return tokens
    if tokens.dtype not in ACTIVATION_DTYPES:
        raise InputError(f"{name} must be float32, bfloat16 or float16, not {tokens.dtype}")
    columns = as_tensor(basis_name, basis)
    if columns.ndim != 2 or columns.shape[0] != tokens.shape[1] or columns.shape[1] == 0:
        raise InputError(
            f"{basis_name} must have the shape ({tokens.shape[1]}, columns), one row per feature of {name}, not "
            f"{tuple(columns.shape)}"
        )
    _check_like(basis_name, columns, tokens.dtype, name, tokens.device)
    return tokens


def _check(problem: ScoreProblem) -> None:
    x, gradient = problem.x, problem.gradient
    if len(gradient) != len(x):
        raise InputError(f"x and gradient must have a row per token, but have {len(x)} and {len(gradient)} rows")
    if problem.V is not None and problem.U is not None:
        _check_like("gradient", gradient, x.dtype, "x", x.device)
    _check_like("gradient", gradient, gradient.dtype, "x", x.device)
    _check_shape("spans", problem.spans, (len(problem.spans) if problem.spans.ndim else 0, 2))
    _check_like("spans", problem.spans, torch.int64, "x", x.device)
    if problem.weights is not None:
        _check_shape("weights", problem.weights, (len(problem.spans),))
        _check_like("weights", problem.weights, torch.float32, "x", x.device)
    if problem.rotation is None:
        return
    for name, matrix, size in zip(("Q", "P"), problem.rotation, (problem.rows, problem.columns), strict=True):
        _check_shape(f"rotation's {name}", matrix, (size, size))
        if matrix.dtype not in {torch.float32, torch.float64}:
            raise InputError(
                f"rotation's {name} must be float32 or float64, not {matrix.dtype}: convert it with .float()"
            )
        _check_like(f"rotation's {name}", matrix, matrix.dtype, "x", x.device)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} must have the shape {shape}, not {tuple(tensor.shape)}")


def _check_like(name: str, tensor: Tensor, dtype: torch.dtype, like_name: str, device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.device != device:
        raise InputError(
            f"{name} ({tensor.dtype} on {tensor.device}) must be {dtype} on {device}, the device of {like_name}"
        )


def _check_spans(spans: Tensor, tokens: int) -> None:
    """Refuse spans that leave the rows or overlap; waits for the device."""
    start, stop = spans.unbind(dim=1)
    wrong = ((start < 0) | (stop < start) | (stop > tokens)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise InputError(f"spans[{i}] is {spans[i].tolist()}, which is no span [first, behind last) of {tokens} rows")
    used = spans[stop > start]
    used = used[used[:, 0].argsort()]
    overlapping = (used[1:, 0] < used[:-1, 1]).nonzero()
    if len(overlapping):
        i = int(overlapping[0])
        raise InputError(f"the spans {used[i].tolist()} and {used[i + 1].tolist()} overlap: a token has one sequence")
