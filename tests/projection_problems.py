"""Problems for project_accumulate with their exact solutions, for tests on any backend."""

from __future__ import annotations

import torch

from sstmerge import ops


def problem(rows, depth, sizes, dtype, *, device="cpu", stride=None):
    """Return x, whose rows are `stride` apart with NaN between them, and one basis per size."""
    generator = torch.Generator(device).manual_seed(rows + 7 * depth)
    wide = torch.full((rows, stride or depth), torch.nan, dtype=dtype, device=device)
    scale = 1 + torch.arange(rows, device=device)[:, None] % 5
    wide[:, :depth] = torch.randn(rows, depth, generator=generator, device=device) * scale
    bases = [torch.randn(depth, size, generator=generator, device=device) / depth**0.5 for size in sizes]
    return wide[:, :depth], [basis.to(dtype) for basis in bases]


def mask_and_weights(x):
    """Return row weights from 0 to 2 and x with NaN where they are 0."""
    weights = (torch.arange(len(x), device=x.device) % 7).float() / 3
    return weights, torch.where(weights[:, None] == 0, torch.nan, x)


def assert_right(backend, x, bases, weights=None, *, tolerance=2e-6, covariance_tolerance=2e-5, symmetric=True):
    """Compare projections and covariances with float64; covariances start at a matrix that must stay in them."""
    starts = [torch.full((basis.shape[1],) * 2, 0.25, dtype=torch.float64, device=x.device) for basis in bases]
    covariances = [start.clone() for start in starts]

    found = ops.project_accumulate(x, bases, covariances=covariances, weights=weights, backend=backend)

    for projection, covariance, start, basis in zip(found, covariances, starts, bases, strict=True):
        exact = x.double() @ basis.double()
        assert projection.dtype == torch.float32
        assert torch.equal(projection.isnan(), exact.isnan())
        assert_close(projection.double().nan_to_num(), exact.nan_to_num(), tolerance)
        row_weights = torch.ones(len(x), device=x.device) if weights is None else weights
        scaled = torch.where(row_weights[:, None] == 0, 0, exact * row_weights.double().sqrt()[:, None])
        assert_close(covariance - start, scaled.mT @ scaled, covariance_tolerance)
        assert not symmetric or torch.equal(covariance, covariance.mT)
    return found, covariances


def assert_close(found, exact, tolerance):
    assert found.shape == exact.shape
    error = (found - exact).abs().max() if exact.numel() else torch.zeros(())
    assert float(error) <= tolerance * float(exact.abs().max() if exact.numel() else 1)
