"""Checks of magnitude_prune, dare and ties that hold on every backend: bit for bit those of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from sstmerge import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Odd sizes, an empty tensor, one entry, and more than any block takes at a time in the emulation.
SHAPES = [(37,), (0,), (5, 13), (1,), (139,)]


def tensors(dtype: torch.dtype, shapes=SHAPES, *, seed: int = 0, device: str = "cpu") -> list[Tensor]:
    """Normal numbers on a coarse grid, so that magnitudes occur more than once, with both zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    coarse = [torch.where(torch.arange(t.numel()).view(t.shape) % 3 == 0, (4 * t).round() / 4, t) for t in drawn]
    return [tensor.to(dtype).to(device) for tensor in coarse]


def assert_same(found, expected) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=0, atol=0, equal_nan=True)


def check_prune(backend: str, dtype: torch.dtype, density: float, rounding: str = "nearest", device: str = "cpu"):
    values = tensors(dtype, device=device)
    before = [value.clone() for value in values]

    found = ops.magnitude_prune(values, density, rounding=rounding, backend=backend)

    assert_same(found, reference.magnitude_prune(before, density, rounding=rounding))
    assert_same(values, before)


def check_dare(backend: str, dtype: torch.dtype, density: float, *, seed: int = 2**63 + 5, stream=7, device="cpu"):
    values = tensors(dtype, device=device)

    found = ops.dare(values, density, seed, first_stream=stream, backend=backend)

    assert_same(found, reference.dare(values, density, seed, first_stream=stream))


def check_ties(backend: str, dtype: torch.dtype, density: float, method: str = "total", tasks=3, device="cpu"):
    values = [tensors(dtype, seed=task, device=device) for task in range(tasks)]
    weights = [0.3, -1.7, 1.1, 0.0][:tasks]

    found = ops.ties(values, weights, density, majority_sign_method=method, backend=backend)

    assert_same(found, reference.ties(values, weights, density, majority_sign_method=method))


def check_rows(backend: str, dtype: torch.dtype, numel: int, device: str = "cpu"):
    """Tensors as rows, and all three ops on the same rows."""
    stacked = torch.stack([torch.stack(tensors(dtype, [(numel,)] * 3, seed=task)) for task in range(2)]).to(device)

    assert_same(ops.magnitude_prune(stacked[1], 0.4, backend=backend), reference.magnitude_prune(stacked[1], 0.4))
    assert_same(ops.dare(stacked[1], 0.4, 3, backend=backend), reference.dare(stacked[1], 0.4, 3))
    assert_same(
        ops.ties(stacked, [1.0, 0.5], 0.4, backend=backend),
        reference.ties(stacked, [1.0, 0.5], 0.4),
    )


def check_not_finite(backend: str, dtype: torch.dtype, device: str = "cpu"):
    """NaN and infinities are kept first, and NaN reaches the merged entry whatever its sign."""
    first, second = tensors(dtype, [(40,), (40,)], device=device)
    first[[3, 17]] = torch.tensor([torch.nan, -torch.inf], dtype=dtype, device=device)
    second[5] = -torch.nan

    pruned = ops.magnitude_prune([first], 0.05, backend=backend)[0]
    assert pruned.nonzero().flatten().tolist() == [3, 17]
    assert pruned[3].isnan()
    merged = ops.ties([[first], [second]], [1.0, 1.0], 0.5, backend=backend)
    assert merged[0].isnan().nonzero().flatten().tolist() == [3, 5]
    assert merged[0][17] == -torch.inf
    assert_same(merged, reference.ties([[first], [second]], [1.0, 1.0], 0.5))
    assert_same(ops.dare([first], 0.5, 1, backend=backend), reference.dare([first], 0.5, 1))


def check_borders(backend: str, dtype: torch.dtype, device: str = "cpu"):
    """Where all magnitudes are equal, the lowest indices are kept, in every chunk of the tensor."""
    values = torch.ones(300, dtype=dtype, device=device)
    values[::2] = -1
    for kept in (1, 63, 64, 65, 150, 299, 300):
        pruned = ops.magnitude_prune([values], kept / 300, backend=backend)[0]
        assert pruned.nonzero().flatten().tolist() == list(range(kept))


def check_draw(backend: str, dtype: torch.dtype, device: str = "cpu"):
    """Where entries cancel, the positive sign is elected."""
    values = tensors(dtype, [(40,)], device=device)[0]
    for method in ("total", "frequency"):
        merged = ops.ties([[values], [-values]], [1.0, 1.0], 1.0, majority_sign_method=method, backend=backend)
        assert torch.equal(merged[0], values.abs())
