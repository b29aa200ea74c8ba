"""The merge phase under pytest-benchmark, a quick part of `benchmarks/merge_phase.py`: SmolLM2-135M shapes, r = 16.

pytest benchmarks/ --benchmark-only
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pytest_benchmark")

from merge_rivals import PeftMerge, plain_torch  # noqa: E402
from merge_shapes import MODELS, random_adapter, random_fisher  # noqa: E402

from sstmerge.adapters import CoreSpace  # noqa: E402
from sstmerge.gevp import solve  # noqa: E402
from sstmerge.merging import Selection, merge_cores  # noqa: E402

SHAPE, RANK = MODELS["SmolLM2-135M"], 16


@pytest.fixture(scope="module")
def adapters():
    return [
        random_adapter(name, SHAPE, RANK, dtype=torch.bfloat16, device=torch.device("cpu"))
        for name in ("utility", "safety")
    ]


@pytest.fixture(scope="module")
def space(adapters):
    return CoreSpace.of(adapters)


def test_core_space(benchmark, adapters):
    fresh = benchmark(lambda: CoreSpace.of(adapters))
    assert fresh.size == 210 * (2 * RANK) ** 2


def test_write_back(benchmark, space):
    adapter = benchmark(lambda: space.to_adapter(space.core("safety"), name="merged"))
    path = "model.layers.3.mlp.up_proj"
    original, written = space.adapters[1].layers[path].delta(), adapter.layers[path].delta()
    assert float((written - original).norm() / original.norm()) < 1e-2  # bfloat16 factors


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "global"])
def test_merge_with_fishers_at_hand(benchmark, adapters, space, structure):
    gain, cost = (random_fisher(space, structure, seed, sequences=32) for seed in (2, 3))
    basis = space.basis_description(), space.basis_tensors()

    def merge():
        rebuilt = CoreSpace.from_basis(adapters, *basis)
        utility, safety = rebuilt.core("utility"), rebuilt.core("safety")
        merged = merge_cores(solve(gain, cost), utility, safety, selection=Selection(top=16))
        return rebuilt.to_adapter(merged.core, name="merged"), merged.report

    adapter, report = benchmark.pedantic(merge, rounds=3, warmup_rounds=1)
    assert len(adapter.layers) == 210
    assert report.directions == 16


@pytest.mark.parametrize("what", ["call", "formula"])
def test_peft_dare_linear(benchmark, adapters, what):
    peft = PeftMerge(SHAPE, adapters, RANK)
    call = peft.whole("dare_linear") if what == "call" else peft.formula("dare_linear")

    def setup():
        peft.clear()

    benchmark.pedantic(call, setup=setup, rounds=3, warmup_rounds=1)
    if what == "call":
        assert "merged" in peft.model.peft_config


def test_plain_torch_dare_linear(benchmark, adapters):
    merged = benchmark.pedantic(plain_torch(adapters), rounds=3, warmup_rounds=1)
    assert len(merged) == 210
