"""Wall time of the merge phase, Fishers at hand: `pytest benchmarks/merge_phase.py --benchmark-only`.

Random adapters of the true shapes of SmolLM2-135M: 210 layers, r = 8, two adapters. Every benchmark asserts its result.
`whole` is what `sstmerge merge --gain … --cost …` does after the files are read: space, solve, project, write back.
"""

from __future__ import annotations

import pytest
import torch

from sstmerge.adapters import Adapter, CoreSpace, LoraFactors
from sstmerge.fisher.fisher import Counts, Fisher
from sstmerge.fisher.structures import Accumulator, GroupScores, Structure
from sstmerge.gevp import solve
from sstmerge.merging import Selection, merge_cores

LAYERS, HIDDEN, INTERMEDIATE, KEY_VALUE, RANK = 30, 576, 1536, 192, 8
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
SEQUENCES, TOKENS = 96, 8


def random_adapter(name: str, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer in range(LAYERS):
        for module, (d_out, d_in) in SHAPES.items():
            A = 0.02 * torch.randn(RANK, d_in, generator=generator)
            B = 0.02 * torch.randn(d_out, RANK, generator=generator)
            layers[f"model.layers.{layer}.{module}"] = LoraFactors(A.bfloat16(), B.bfloat16(), 2.0)
    return Adapter(name, layers)


def random_fisher(space: CoreSpace, structure: str, seed: int) -> Fisher:
    """Return a Fisher of random projections, decaying in scale so that its spectrum is not flat."""
    generator = torch.Generator().manual_seed(seed)
    accumulator = Accumulator(Structure(structure), [group.core_shape for group in space.groups])
    halves = torch.arange(SEQUENCES) % 2
    lengths = torch.full((SEQUENCES,), float(TOKENS))
    for index, group in enumerate(space.groups):
        layers, rows, columns = group.core_shape
        x = torch.randn(layers, SEQUENCES, TOKENS, columns, generator=generator) * torch.linspace(1, 0.1, columns)
        delta = torch.randn(layers, SEQUENCES, TOKENS, rows, generator=generator) * torch.linspace(1, 0.1, rows)
        scores = GroupScores(x, delta, delta.mT @ x, lengths.expand(layers, -1), halves)
        accumulator.update(index, scores, torch.ones(SEQUENCES))
    accumulator.finish_batch(halves)
    per_half = torch.full((2,), SEQUENCES / 2, dtype=torch.float64)
    counts = Counts(per_half, per_half * TOKENS, per_half * TOKENS, per_half)
    return Fisher(Structure(structure), space, accumulator.statistics(), counts, {"weight_sharing": "expand"})


@pytest.fixture(scope="module")
def adapters() -> list[Adapter]:
    return [random_adapter("utility", 0), random_adapter("safety", 1)]


@pytest.fixture(scope="module")
def space(adapters) -> CoreSpace:
    return CoreSpace.of(adapters)


def test_core_space(benchmark, adapters):
    space = benchmark(lambda: CoreSpace.of(adapters))
    assert space.size == 210 * (2 * RANK) ** 2


def test_write_back(benchmark, space):
    adapter = benchmark(lambda: space.to_adapter(space.core("safety"), name="merged"))
    original = space.adapters[1].layers["model.layers.3.mlp.up_proj"].delta()
    written = adapter.layers["model.layers.3.mlp.up_proj"].delta()
    assert float((written - original).norm() / original.norm()) < 1e-2  # bfloat16 factors


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "global", "block"])
def test_solve_and_project(benchmark, space, structure):
    gain, cost = random_fisher(space, structure, 2), random_fisher(space, structure, 3)
    utility, safety = space.core("utility"), space.core("safety")
    rounds = 1 if structure == "block" else 5

    def run():
        return merge_cores(solve(gain, cost), utility, safety, selection=Selection(top=16))

    merged = benchmark.pedantic(run, rounds=rounds)
    assert merged.report.directions == 16


@pytest.mark.parametrize("structure", ["kfac", "global"])
def test_whole(benchmark, adapters, space, structure):
    gain, cost = random_fisher(space, structure, 2), random_fisher(space, structure, 3)

    def run():
        fresh = CoreSpace.of(adapters)
        spectrum = solve(gain, cost)
        merged = merge_cores(spectrum, fresh.core("utility"), fresh.core("safety"), selection=Selection(top=16))
        return fresh.to_adapter(merged.core, name="merged")

    adapter = benchmark(run)
    assert len(adapter.layers) == 210
