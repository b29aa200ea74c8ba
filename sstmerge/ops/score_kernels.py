"""What `sequence_scores` launches: partial sums over chunks of tokens, then sums of them in a fixed order.

The work unit is a chunk of one sequence, so that a few long sequences fill the device too. Chunks are counted from the
shapes alone, and kernels find their rows from the spans: nothing waits for the device, and the bits do not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sstmerge.ops.device import DeviceLimits, device_limits
from sstmerge.ops.launch import Launcher, launcher
from sstmerge.ops.project_kernels import launch_projection
from sstmerge.reference import SequenceScores
from sstmerge.reference.scores import inside_spans

# Fewer units than this leave a GPU partly idle; a constant, so that results do not depend on the GPU.
WANTED_UNITS = 512

# Partial sums of this size are worked off before the next sequences are begun.
WORKSPACE_BYTES = 64 * 2**20

# Rows that a block of the kernels of gram.cuh takes at a time, the edge of its tiles and its threads.
GRAM_ROWS, GRAM_TILE, GRAM_THREADS = 32, 64, 256
GRAM_SHARED_BYTES = 2 * GRAM_ROWS * GRAM_TILE * 4

# The tiles of fused_scores.cuh: columns to (rows, threads), the larger first.
FUSED_TILES = {16: ((128, 256), (64, 128)), 32: ((128, 256), (64, 128)), 64: ((128, 256), (64, 256))}
FUSED_STAGES = 3
HALF_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ScoreProblem:
    """The valid arguments of `sequence_scores`."""

    x: Tensor
    gradient: Tensor
    V: Tensor | None
    U: Tensor | None
    spans: Tensor
    weights: Tensor | None
    rotation: tuple[Tensor, Tensor] | None
    scores: bool
    squares: bool
    covariances: bool
    projected_gradient: bool

    @property
    def rows(self) -> int:
        """R_o."""
        return (self.gradient if self.U is None else self.U).shape[1]

    @property
    def columns(self) -> int:
        """R_i."""
        return (self.x if self.V is None else self.V).shape[1]


@dataclass(frozen=True)
class _Partials:
    """Sums over the chunks of some sequences: Γ (units, R_o, R_i), and Grams (units, R_i, R_i) and (units, R_o, R_o)."""

    scores: Tensor
    inputs: Tensor | None
    outputs: Tensor | None


def launch_scores(backend: str, problem: ScoreProblem) -> SequenceScores:
    """Compute the scores with kernels, without waiting for the device.

    Args:
        backend: Name of a backend that launches kernels.
        problem: What to compute.

    Returns:
        The scores.
    """
    run = _Run(launcher(backend), problem.x.device)
    size = (problem.rows, problem.columns)
    n, tokens = len(problem.spans), len(problem.x)
    result = SequenceScores(
        score_sum=run.zeros(*size),
        scores=run.empty(n, *size) if problem.scores else None,
        square_sum=run.zeros(*size) if problem.squares else None,
        rotated_square_sum=run.zeros(*size) if problem.rotation is not None else None,
        input_covariance=run.zeros(size[1], size[1]) if problem.covariances else None,
        output_covariance=run.zeros(size[0], size[0]) if problem.covariances else None,
        projected_gradient=torch.zeros(tokens, size[0], device=run.device) if problem.projected_gradient else None,
    )
    if n == 0 or tokens == 0:
        if result.scores is not None:
            result.scores.zero_()
        return result
    fused = fused_tile(problem, device_limits(run.device))
    source: _Fused | _Projected
    if fused is not None:
        source = _Fused(run, problem, *fused, result.projected_gradient)
    else:
        source = _Projected(run, problem, backend, result.projected_gradient)
    chunks = count_chunks(n, tokens, source.granule)
    for group in _groups(problem, chunks):
        _add_group(run, problem, source, chunks, group, result)
    return result


def count_chunks(sequences: int, tokens: int, granule: int) -> int:
    """Return into how many chunks every sequence is cut.

    Args:
        sequences: Their number, at least 1.
        tokens: N, which bounds the length of a sequence.
        granule: Rows that a block takes at a time.

    Returns:
        At least 1; no more than fill the device, or than the longest possible sequence has.
    """
    return max(1, min(-(-WANTED_UNITS // sequences), -(-tokens // granule)))


def fused_tile(problem: ScoreProblem, limits: DeviceLimits) -> tuple[int, int, int] | None:
    """Choose the kernel that projects both sides itself.

    Args:
        problem: What to compute.
        limits: Limits of the device.

    Returns:
        Columns, rows and threads of its tile: of the tiles with the least padding the larger one, if it fits the device
        and leaves no multiprocessor idle. None where the sides have to be projected before.
    """
    width = max(problem.rows, problem.columns)
    if problem.V is None or problem.U is None or problem.x.dtype not in HALF_PRECISION or width > max(FUSED_TILES):
        return None
    columns = min(columns for columns in FUSED_TILES if columns >= width)
    (rows, threads), smaller = FUSED_TILES[columns]
    fits = fused_shared_bytes(columns, rows) <= limits.block_shared_bytes
    return (columns, rows, threads) if fits and len(problem.x) >= rows * limits.multiprocessors else (columns, *smaller)


def fused_shared_bytes(columns: int, rows: int) -> int:
    """Return the shared memory of a fused kernel: its pipeline, and the planes of both sides.

    Args:
        columns: Columns of its tile.
        rows: Rows of its tile.

    Returns:
        Bytes per block.
    """
    depth, padding = 64, 8
    pipeline = FUSED_STAGES * (rows * (depth + padding) + depth * (columns + padding)) * 2
    return pipeline + 2 * 2 * rows * (columns + padding) * 2


class _Run:
    """Launches on one device."""

    def __init__(self, kernels: Launcher, device: torch.device) -> None:
        self.kernels = kernels
        self.device = device

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def span_products(self, left: Tensor, right: Tensor, spans: Tensor, chunks: int, partials: Tensor) -> None:
        """Sum left rightᵀ over the tokens of every chunk."""
        columns = left.shape[1], right.shape[1]
        sides = [(side, np.int64(side.stride(0)), np.int32(side.shape[1])) for side in (left, right)]
        self.kernels.launch(
            "gram",
            "span_products",
            (len(partials), _gram_tiles(*columns), 1),
            GRAM_THREADS,
            GRAM_SHARED_BYTES,
            self.device,
            [*sides[0], *sides[1], spans, np.int64(len(left)), np.int32(chunks), partials],
        )

    def batch_products(self, left: Tensor, right: Tensor) -> Tensor:
        """Return leftᵀ right of a batch (b, rows, columns); one side may be a single matrix (rows, columns)."""
        rows, columns = left.shape[-2], (left.shape[-1], right.shape[-1])
        sides = [
            (side, np.int64(side.stride(0) if side.ndim == 3 else 0), np.int32(side.shape[-1]))
            for side in (left, right)
        ]
        out = self.empty(len(left) if left.ndim == 3 else len(right), *columns)
        self.kernels.launch(
            "gram",
            "batch_products",
            (len(out), _gram_tiles(*columns), 1),
            GRAM_THREADS,
            GRAM_SHARED_BYTES,
            self.device,
            [*sides[0], *sides[1], np.int32(rows), out],
        )
        return out

    def sum_chunks(self, partials: Tensor, chunks: int, scores: Tensor) -> None:
        """Sum the chunks of every sequence."""
        threads, size = 256, scores[0].numel()
        self.kernels.launch(
            "score_epilogues",
            "sum_chunks",
            (-(-scores.numel() // threads), 1, 1),
            threads,
            0,
            self.device,
            [partials, np.int64(len(scores)), np.int32(chunks), np.int64(size), scores],
        )

    def add(
        self, values: Tensor, weights: Tensor | None, per_weight: int, sums: Tensor | None, square_sums: Tensor | None
    ) -> None:
        """Add Σ w value and Σ w value² to running sums; one weight for `per_weight` consecutive values."""
        width, units, size = 32, len(values), values[0].numel()
        # Every slice of a block sums about 16 values, unless that takes more than 32 slices.
        slices = min(32, 1 << (-(-units // 16) - 1).bit_length())
        self.kernels.launch(
            "score_epilogues",
            "sum_sequences",
            (-(-size // width), 1, 1),
            width * slices,
            width * slices * 8,
            self.device,
            [values, weights, np.int64(units), np.int32(per_weight), np.int64(size), sums, square_sums],
        )


class _Fused:
    """Partial sums from the tokens themselves."""

    def __init__(
        self, run: _Run, problem: ScoreProblem, columns: int, rows: int, threads: int, projected: Tensor | None
    ) -> None:
        dtype = str(problem.x.dtype).removeprefix("torch.")
        self.granule = rows
        self._run = run
        self._problem = problem
        self._kernel = f"fused_scores_{dtype}_{columns}x{rows}"
        self._threads = threads
        self._shared_bytes = fused_shared_bytes(columns, rows)
        self._projected = projected
        self._sides = (*_side(problem.x, problem.V, columns), *_side(problem.gradient, problem.U, columns))

    def sum(self, spans: Tensor, chunks: int, partials: _Partials) -> None:
        """Fill the partial sums of the sequences with these spans."""
        sizes = (np.int32(chunks), np.int32(self._problem.rows), np.int32(self._problem.columns))
        outputs = (partials.scores, partials.inputs, partials.outputs, self._projected)
        self._run.kernels.launch(
            "fused_scores",
            self._kernel,
            (len(partials.scores), 1, 1),
            self._threads,
            self._shared_bytes,
            self._run.device,
            [*self._sides, spans, np.int64(len(self._problem.x)), *sizes, *outputs],
        )


class _Projected:
    """Partial sums from projections in float32."""

    granule = GRAM_ROWS

    def __init__(self, run: _Run, problem: ScoreProblem, backend: str, projected: Tensor | None) -> None:
        self._run = run
        self._x = _projection(backend, problem.x, problem.V)
        self._gradient = _projection(backend, problem.gradient, problem.U)
        if projected is not None:
            projected.copy_(torch.where(inside_spans(problem.spans, len(problem.x)), self._gradient, 0))

    def sum(self, spans: Tensor, chunks: int, partials: _Partials) -> None:
        """Fill the partial sums of the sequences with these spans."""
        self._run.span_products(self._gradient, self._x, spans, chunks, partials.scores)
        if partials.inputs is not None:
            self._run.span_products(self._x, self._x, spans, chunks, partials.inputs)
        if partials.outputs is not None:
            self._run.span_products(self._gradient, self._gradient, spans, chunks, partials.outputs)


def _add_group(
    run: _Run, problem: ScoreProblem, source: _Fused | _Projected, chunks: int, group: slice, result: SequenceScores
) -> None:
    """Compute the scores of some sequences and add them to the sums."""
    rows, columns = problem.rows, problem.columns
    spans = problem.spans[group].contiguous()
    weights = None if problem.weights is None else problem.weights[group].contiguous()
    units = len(spans) * chunks
    scores = run.empty(len(spans), rows, columns) if result.scores is None else result.scores[group]
    partials = _Partials(
        scores=scores if chunks == 1 else run.empty(units, rows, columns),
        inputs=run.empty(units, columns, columns) if problem.covariances else None,
        outputs=run.empty(units, rows, rows) if problem.covariances else None,
    )
    source.sum(spans, chunks, partials)
    if chunks > 1:
        run.sum_chunks(partials.scores, chunks, scores)
    run.add(scores, weights, 1, result.score_sum, result.square_sum)
    for values, sums in ((partials.inputs, result.input_covariance), (partials.outputs, result.output_covariance)):
        if values is not None:
            run.add(values, weights, chunks, sums, None)
    if problem.rotation is not None:
        Q, P = (matrix.float().contiguous() for matrix in problem.rotation)
        # QᵀΓP = (ΓᵀQ)ᵀP: two products of the kind that sums over rows.
        run.add(run.batch_products(run.batch_products(scores, Q), P), weights, 1, None, result.rotated_square_sum)


def _groups(problem: ScoreProblem, chunks: int) -> list[slice]:
    """Cut the sequences into groups whose partial sums fit the workspace."""
    rows, columns = problem.rows, problem.columns
    elements = chunks * (rows * columns + (rows * rows + columns * columns if problem.covariances else 0))
    step = max(1, WORKSPACE_BYTES // (4 * elements))
    return [slice(first, first + step) for first in range(0, len(problem.spans), step)]


def _side(tokens: Tensor, basis: Tensor | None, columns: int) -> tuple[Tensor, np.int64, np.int32, np.int32, Tensor]:
    """Return one side's arguments of a fused kernel."""
    if basis is None:
        raise ValueError("a fused kernel projects both sides")
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    bytes_apart = tokens.stride(0) * tokens.element_size()
    padded = functional.pad(basis, (0, columns - basis.shape[1])).contiguous()
    if padded.data_ptr() % 16 != 0:
        padded = padded.clone()
    aligned = tokens.data_ptr() % 16 == 0 and bytes_apart % 16 == 0
    return tokens, np.int64(tokens.stride(0)), np.int32(tokens.shape[1]), np.int32(aligned), padded


def _projection(backend: str, tokens: Tensor, basis: Tensor | None) -> Tensor:
    """Return projected tokens with unit stride in the last dimension."""
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    return tokens if basis is None else launch_projection(backend, tokens, [basis], [None], None)[0]


def _gram_tiles(rows: int, columns: int) -> int:
    return -(-rows // GRAM_TILE) * -(-columns // GRAM_TILE)
