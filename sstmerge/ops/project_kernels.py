"""What `project_accumulate` launches: tiles of rows, dealt to as many blocks as the device runs at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sstmerge.ops.device import DeviceLimits, device_limits
from sstmerge.ops.launch import Launcher, launcher
from sstmerge.reference.projection import add_outer_products

# Copies to shared memory: whole chunks, from addresses that are multiples of one.
CHUNK_BYTES = 16
# A stage holds so many bytes of every row of a tile.
STAGE_ROW_BYTES = 128
# The kernels' registers allow two blocks on a multiprocessor; CUDA keeps a kilobyte of shared memory for each.
BLOCKS_PER_MULTIPROCESSOR = 2
RESERVED_SHARED_BYTES = 1024
# Threads, and elements that they share, of the blocks that add partial sums.
SUM_THREADS, SUM_ELEMENTS = 256, 32


@dataclass(frozen=True)
class Tile:
    """The shape of a kernel of project.cuh: rows and columns of its tiles, stages of its pipeline, and its threads."""

    rows: int
    columns: int
    stages: int
    threads: int = 256

    def shared_bytes(self, element_size: int) -> int:
        """Return the shared memory of a block.

        Args:
            element_size: Bytes of an element.

        Returns:
            Bytes of all stages; each holds rows of x and of the basis, with a chunk of padding per row.
        """
        depth = STAGE_ROW_BYTES // element_size
        stage = self.rows * (STAGE_ROW_BYTES + CHUNK_BYTES) + depth * (self.columns * element_size + CHUNK_BYTES)
        return self.stages * stage


# As in project.cuh, the larger first: they read the basis half as often, the smaller ones occupy more multiprocessors and
# fit into the 99 KB that a block can have on every GPU.
HALF_TILES = {
    16: (Tile(128, 16, 4), Tile(64, 16, 6, threads=128)),
    32: (Tile(128, 32, 4), Tile(64, 32, 6)),
    64: (Tile(128, 64, 4), Tile(64, 64, 5)),
}
WIDE_HALF_TILES = {
    96: (Tile(128, 96, 3), Tile(64, 96, 4)),
    128: (Tile(128, 128, 3), Tile(64, 128, 3)),
}
FLOAT_TILES = {
    16: (Tile(128, 16, 4), Tile(64, 16, 6)),
    32: (Tile(128, 32, 4), Tile(64, 32, 6)),
    64: (Tile(128, 64, 3), Tile(64, 64, 4)),
}


def launch_projection(
    backend: str, x: Tensor, bases: Sequence[Tensor], covariances: Sequence[Tensor | None], weights: Tensor | None
) -> list[Tensor]:
    """Project rows on all bases in one pass and add up their outer products, without waiting for the device.

    Args:
        backend: Name of a backend that launches kernels.
        x: Rows, shape (N, d), unit stride in the last dimension.
        bases: Bases, shape (d, R_k), dtype of `x`.
        covariances: Contiguous matrices (R_k, R_k) in float64 to add to, or None, one per basis.
        weights: Weights of the rows, shape (N,), float32, or None.

    Returns:
        The projections, views of one tensor, shape (N, R_k), float32.
    """
    sizes = [basis.shape[1] for basis in bases]
    if 0 in {*x.shape, sum(sizes)}:
        return [torch.zeros(len(x), size, device=x.device) for size in sizes]
    limits = device_limits(x.device)
    tile = choose_tile(x.dtype, sum(sizes), len(x), limits)
    basis = pack_bases(bases, -(-sum(sizes) // tile.columns) * tile.columns)
    run = _Run(launcher(backend), x.device, tile, limits)
    weights = None if weights is None else weights.contiguous()
    fused = x.dtype != torch.float32 and tile.columns in HALF_TILES
    if not fused:
        projections = run.project(x, basis)
        parts = list(projections[:, : sum(sizes)].split(sizes, dim=1))
        for part, covariance in zip(parts, covariances, strict=True):
            if covariance is not None:
                add_outer_products(covariance, part, weights)
        return parts
    wanted = any(covariance is not None for covariance in covariances)
    projections, partials = run.project_with_gram(x, basis, weights, wanted)
    if partials is not None:
        first = 0
        for size, covariance in zip(sizes, covariances, strict=True):
            if covariance is not None and size > 0:
                run.add_partials(partials, first, covariance)
            first += size
    return list(projections[:, : sum(sizes)].split(sizes, dim=1))


def choose_tile(dtype: torch.dtype, columns: int, rows: int, limits: DeviceLimits) -> Tile:
    """Choose the kernel.

    Args:
        dtype: Dtype of the rows.
        columns: Columns of all bases together.
        rows: Number of rows.
        limits: Limits of the device.

    Returns:
        The tile with the least padding of the columns, and of such the largest that fits the device and leaves no
        multiprocessor idle.
    """
    narrow = FLOAT_TILES if dtype == torch.float32 else HALF_TILES
    if columns <= max(narrow):
        tiles, width = narrow, min(width for width in narrow if width >= columns)
    else:
        tiles = {64: narrow[64]} if dtype == torch.float32 else WIDE_HALF_TILES
        # The least padding, and then the fewest tiles.
        width = min(tiles, key=lambda width: (-(-columns // width) * width, -width))
    for tile in tiles[width][:-1]:
        count = -(-rows // tile.rows) * -(-columns // width)
        if tile.shared_bytes(dtype.itemsize) <= limits.block_shared_bytes and count >= limits.multiprocessors:
            return tile
    return tiles[width][-1]


def pack_bases(bases: Sequence[Tensor], columns: int) -> Tensor:
    """Put bases side by side, as the kernels read them.

    Args:
        bases: Bases, shape (d, R_k).
        columns: Number of columns of the result.

    Returns:
        The columns of all bases and zeros behind them, shape (d, columns), aligned to chunks; a single basis of this
        form is returned as it is.
    """
    only = bases[0]
    if len(bases) == 1 and only.shape[1] == columns and only.is_contiguous() and only.data_ptr() % CHUNK_BYTES == 0:
        return only
    packed = only.new_zeros(only.shape[0], columns)
    torch.cat(list(bases), dim=1, out=packed[:, : sum(basis.shape[1] for basis in bases)])
    return packed


class _Run:
    """Launches of one kernel's shape on one device."""

    def __init__(self, kernels: Launcher, device: torch.device, tile: Tile, limits: DeviceLimits) -> None:
        self._kernels = kernels
        self._device = device
        self._tile = tile
        self._limits = limits

    def project(self, x: Tensor, basis: Tensor) -> Tensor:
        """Return the projections, shape (N, columns of the basis)."""
        projections = torch.empty(len(x), basis.shape[1], device=self._device)
        self._launch(x, basis, [projections])
        return projections

    def project_with_gram(
        self, x: Tensor, basis: Tensor, weights: Tensor | None, gram: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the projections and, where they are wanted, every block's sum of outer products."""
        columns = basis.shape[1]
        projections = torch.empty(len(x), columns, device=self._device)
        partials = torch.empty(self._blocks(x, basis), columns, columns, device=self._device) if gram else None
        self._launch(x, basis, [projections, weights, partials])
        return projections, partials

    def add_partials(self, partials: Tensor, first: int, covariance: Tensor) -> None:
        """Add the rows and columns from `first` on of all partial sums to a covariance."""
        size = len(covariance)
        self._kernels.launch(
            "project_partials",
            "add_gram_partials",
            (-(-size * size // SUM_ELEMENTS), 1, 1),
            SUM_THREADS,
            SUM_THREADS * covariance.element_size(),
            self._device,
            [partials, *map(np.int32, (len(partials), partials.shape[1], first)), covariance, np.int32(size)],
        )

    def _launch(self, x: Tensor, basis: Tensor, outputs: Sequence[Tensor | None]) -> None:
        tile, row_bytes = self._tile, x.stride(0) * x.element_size()
        aligned = x.data_ptr() % CHUNK_BYTES == 0 and (len(x) == 1 or row_bytes % CHUNK_BYTES == 0)
        rows = (np.int64(x.stride(0)), np.int64(len(x)), np.int32(x.shape[1]), np.int32(aligned))
        self._kernels.launch(
            "project",
            f"project_{str(x.dtype).removeprefix('torch.')}_{tile.rows}x{tile.columns}",
            (self._blocks(x, basis), 1, 1),
            tile.threads,
            tile.shared_bytes(x.element_size()),
            self._device,
            [x, *rows, basis, np.int32(basis.shape[1]), *outputs],
        )

    def _blocks(self, x: Tensor, basis: Tensor) -> int:
        tile = self._tile
        tiles = -(-len(x) // tile.rows) * (basis.shape[1] // tile.columns)
        resident = self._limits.shared_bytes // (tile.shared_bytes(x.element_size()) + RESERVED_SHARED_BYTES)
        return min(tiles, self._limits.multiprocessors * max(1, min(resident, BLOCKS_PER_MULTIPROCESSOR)))
