"""Random adapters for methods that need no statistics, and what the tests of several families compute with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

import sstmerge
from sstmerge.adapters import Adapter, LoraFactors

LAYERS = {"layers.0.q_proj": (24, 40), "layers.0.up_proj": (48, 24), "layers.1.q_proj": (24, 40)}
FULL_RANK = 24  # more than any of these layers has
Arrays = dict[str, np.ndarray]


def random_adapter(
    name: str, rank: int, seed: int, *, layers: Sequence[str] = tuple(LAYERS), dtype: torch.dtype = torch.float64
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path, (d_out, d_in) in LAYERS.items():
        A = torch.randn(rank, d_in, generator=generator, dtype=torch.float64).to(dtype)
        B = torch.randn(d_out, rank, generator=generator, dtype=torch.float64).to(dtype)
        factors[path] = LoraFactors(A=A, B=B, scaling=0.5 + rank / 8)
    return Adapter(name, {path: factors[path] for path in layers})


def three_adapters() -> list[Adapter]:
    """Return adapters of different ranks; one of them lacks a layer."""
    return [
        random_adapter("math", 2, seed=1),
        random_adapter("code", 3, seed=2),
        random_adapter("law", 4, seed=3, layers=("layers.0.q_proj", "layers.1.q_proj")),
    ]


def dense(adapter: Adapter) -> Arrays:
    """Return s B A of every layer, zero where the adapter lacks one."""
    deltas = {path: np.zeros(shape) for path, shape in LAYERS.items()}
    for path, factors in adapter.layers.items():
        deltas[path] = factors.scaling * (factors.B.double().numpy() @ factors.A.double().numpy())
    return deltas


def merged(
    adapters: Sequence[Adapter], method: str, weights: Sequence[float] | None = None, **arguments: object
) -> Arrays:
    """Return the dense result of a merge."""
    return dense(sstmerge.merge_adapters(adapters, weights, method, **arguments))


def largest_difference(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> float:
    """Return the largest ‖left − right‖ / ‖right‖ of a layer."""
    return max(np.linalg.norm(left[path] - right[path]) / max(np.linalg.norm(right[path]), 1e-12) for path in right)


def elected_mean(tasks: Sequence[np.ndarray], weights: Sequence[float], method: str = "total") -> np.ndarray:
    """Elect signs and average what agrees, entry by entry (TIES after its trim)."""
    tasks = np.stack(tasks)
    votes = tasks.sum(axis=0) if method == "total" else np.sign(tasks).sum(axis=0)
    elected = np.where(votes >= 0, 1.0, -1.0)
    agrees = np.sign(tasks) == elected
    weighted = np.asarray(weights).reshape(-1, *[1] * (tasks.ndim - 1)) * tasks
    return (weighted * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)


def trimmed(tensor: np.ndarray, density: float) -> np.ndarray:
    """Keep the round(density · size) entries of largest magnitude."""
    flat = tensor.ravel().copy()
    order = np.argsort(-np.abs(flat), kind="stable")
    flat[order[max(1, round(density * flat.size)) :]] = 0.0
    return flat.reshape(tensor.shape)


def polar(vectors: np.ndarray) -> np.ndarray:
    """Return the polar factor; directions that linearly dependent vectors leave open are left out."""
    left, values, right = np.linalg.svd(vectors, full_matrices=False)
    kept = values > 1e-6
    return left[:, kept] @ right[kept]


def positive_sums(basis: np.ndarray) -> np.ndarray:
    """Turn the columns so that each has a positive sum."""
    return basis * np.where(basis.sum(axis=0) < 0, -1.0, 1.0)
