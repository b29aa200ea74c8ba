"""Small adapters, batches of their cores, and Fishers from known scores: what tests of methods with statistics share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sstmerge.adapters import Adapter, CoreSpace, LoraFactors
from sstmerge.fisher import Fisher, Structure
from sstmerge.fisher.fisher import Counts
from sstmerge.fisher.structures import KroneckerBasis
from sstmerge.merging.methods.registry import CoreBatch, RebasedCores

SHAPES = {"model.layers.0.q": (9, 7), "model.layers.1.q": (9, 7), "model.layers.0.up": (11, 8)}
RANKS = {"math": 2, "code": 3, "safe": 2}
TOKENS = 30


def adapters(
    names: Sequence[str] = ("math", "code", "safe"), *, missing: Mapping[str, str] | None = None
) -> list[Adapter]:
    """Return random adapters; `missing` names a layer that an adapter lacks."""
    result = []
    for name in names:
        random = np.random.default_rng(sum(name.encode()))
        layers = {
            path: LoraFactors(
                A=torch.from_numpy(random.normal(size=(RANKS[name], d_in))),
                B=torch.from_numpy(random.normal(size=(d_out, RANKS[name]))),
                scaling=1.5 if path.endswith("up") else 0.5,
            )
            for path, (d_out, d_in) in SHAPES.items()
            if (missing or {}).get(name) != path
        }
        result.append(Adapter(name, layers))
    return result


def batches(space: CoreSpace, weights: Sequence[float], safety: str | None = None) -> list[CoreBatch]:
    """Return the space's groups as a runner hands them to core methods."""
    names = tuple(adapter.name for adapter in space.adapters)
    cores = space.split(torch.stack([space.core(name) for name in names]))
    index = None if safety is None else names.index(safety)
    return [
        CoreBatch(g.names, g.U, g.V, cores[i], torch.tensor(weights, dtype=torch.float64), names, i, index)
        for i, g in enumerate(space.groups)
    ]


def dense(function: Callable[..., object], merged: Sequence[CoreBatch], *arguments: object, **options: object):
    """Run a core method and return ΔW of every layer, (d_out, d_in), NumPy float64."""
    deltas = {}
    for batch in merged:
        result = function(batch, *arguments, **options)
        U, cores = (result.U, result.cores) if isinstance(result, RebasedCores) else (batch.U, result)
        for i, name in enumerate(batch.names):
            deltas[name] = (U[i].double() @ cores[i] @ batch.V[i].double().mT).numpy()
    return deltas


def deltas_of(adapter: Adapter) -> dict[str, np.ndarray]:
    """Return s B A of every layer; zero where the adapter has none."""
    changes = {path: factors.delta().numpy() for path, factors in adapter.layers.items()}
    return {path: changes.get(path, np.zeros(shape)) for path, shape in SHAPES.items()}


@dataclass(frozen=True)
class Data:
    """Inputs x (N, d_in) and output gradients δ (N, d_out) of every layer, and the sequence of every token."""

    x: dict[str, np.ndarray]
    delta: dict[str, np.ndarray]
    sequence: np.ndarray

    @classmethod
    def random(cls, seed: int, *, sequences: int = 10, size: float = 1.0) -> Data:
        random = np.random.default_rng(seed)
        mix = {path: random.normal(size=(d_in, d_in)) for path, (_, d_in) in SHAPES.items()}
        x = {path: random.normal(size=(TOKENS, d_in)) @ mix[path] for path, (_, d_in) in SHAPES.items()}
        spread = {path: random.uniform(0.2, 2.0, size=d_out) for path, (d_out, _) in SHAPES.items()}
        delta = {path: size * random.normal(size=(TOKENS, d_out)) * spread[path] for path, (d_out, _) in SHAPES.items()}
        return cls(x, delta, np.arange(TOKENS) % sequences)

    def gradients(self, path: str) -> np.ndarray:
        """Return the dense score G_n = Σ_t δ_t x_tᵀ of every sequence, (n, d_out, d_in)."""
        rows = [self.sequence == n for n in range(self.sequence.max() + 1)]
        return np.stack([self.delta[path][row].T @ self.x[path][row] for row in rows])


def fisher(space: CoreSpace, data: Data, structure: str, *, seed: int = 0) -> Fisher:
    """Return the Fisher that collection would have made of these data."""
    kind, statistics, rows = Structure(structure), {}, []
    basis = _random_basis(space, seed)
    for i, group in enumerate(space.groups):
        sums: dict[str, list[torch.Tensor]] = {}
        scores = []
        for j, path in enumerate(group.names):
            U, V = group.U[j].double(), group.V[j].double()
            x, delta = torch.from_numpy(data.x[path]) @ V, torch.from_numpy(data.delta[path]) @ U
            gamma = U.mT @ torch.from_numpy(data.gradients(path)) @ V
            rotated = basis.Q[i][j].mT @ gamma @ basis.P[i][j]
            scores.append(gamma)
            for name, value in {
                "score_sum": gamma.sum(dim=0),
                "square_sum": gamma.square().sum(dim=0),
                "input_covariance": x.mT @ x,
                "output_covariance": delta.mT @ delta,
                "input_count": torch.tensor(float(TOKENS), dtype=torch.float64),
                "rotated_square_sum": rotated.square().sum(dim=0),
                "outer_sum": gamma.flatten(1).mT @ gamma.flatten(1),
            }.items():
                sums.setdefault(name, []).append(value)
        rows.append(torch.stack(scores, dim=1).flatten(1))
        statistics |= {
            f"{n}.{i}": torch.stack([torch.stack(v), torch.zeros_like(torch.stack(v))]) for n, v in sums.items()
        }
        statistics |= {f"kronecker_input_basis.{i}": basis.P[i], f"kronecker_output_basis.{i}": basis.Q[i]}
    statistics["scores"] = torch.cat(rows, dim=1).float()
    tokens = torch.tensor([float(TOKENS), 0.0], dtype=torch.float64)
    return Fisher(kind, space, statistics, Counts(tokens, tokens, tokens, tokens), {"model": "pico"})


def _random_basis(space: CoreSpace, seed: int) -> KroneckerBasis:
    generator = torch.Generator().manual_seed(seed)

    def draw(layers: int, size: int) -> torch.Tensor:
        return torch.eye(size).double() + 0.3 * torch.randn(
            layers, size, size, generator=generator, dtype=torch.float64
        )

    shapes = [group.core_shape for group in space.groups]
    return KroneckerBasis(
        P=tuple(draw(layers, columns) for layers, _, columns in shapes),
        Q=tuple(draw(layers, rows) for layers, rows, _ in shapes),
    )


def regauged(adapter: Adapter) -> Adapter:
    """Return the same weight changes from factors B N and N⁻¹ A."""
    random = np.random.default_rng(5)
    layers = {}
    for path, factors in adapter.layers.items():
        N = torch.from_numpy(random.normal(size=(factors.rank, factors.rank)) + 2 * np.eye(factors.rank))
        layers[path] = LoraFactors(torch.linalg.solve(N, factors.A), factors.B @ N, factors.scaling)
    return Adapter(adapter.name, layers)


def assert_equal(result: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float = 1e-5) -> None:
    """Compare weight changes; bases are float32, so 1e-5 of the largest entry is rounding."""
    assert set(result) == set(expected)
    for path, delta in expected.items():
        np.testing.assert_allclose(result[path], delta, rtol=0, atol=tolerance * max(1.0, np.abs(delta).max()))
