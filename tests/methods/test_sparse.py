"""TIES, DARE and magnitude pruning, dense and in core space, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_cases import (
    FULL_RANK,
    LAYERS,
    dense,
    elected_mean,
    largest_difference,
    merged,
    positive_sums,
    random_adapter,
    three_adapters,
    trimmed,
)

import sstmerge
from sstmerge.adapters import CoreSpace
from sstmerge.merging.methods import DeltaLayer, sparse, trimming

WEIGHTS = [1.0, 0.5, 2.0]


def trimmed_as_a_whole(deltas, layers, density):
    """Trim the flattened weight change of a whole adapter."""
    flat = trimmed(np.concatenate([deltas[path].ravel() for path in layers]), density)
    parts = np.split(flat, np.cumsum([deltas[path].size for path in layers])[:-1])
    result = {path: np.zeros_like(delta) for path, delta in deltas.items()}
    return result | {path: part.reshape(deltas[path].shape) for path, part in zip(layers, parts, strict=True)}


def expected_ties(adapters, density, trim_over, majority_sign, scale):
    tasks = []
    for adapter in adapters:
        deltas = dense(adapter)
        if trim_over == "model":
            tasks.append(trimmed_as_a_whole(deltas, list(adapter.layers), density))
        else:
            tasks.append({path: trimmed(delta, density) for path, delta in deltas.items()})
    return {p: scale * elected_mean([task[p] for task in tasks], WEIGHTS, majority_sign) for p in LAYERS}


def test_magnitude_prune():
    tasks = [dense(adapter) for adapter in three_adapters()]
    expected = {p: sum(w * trimmed(t[p], 0.3) for w, t in zip(WEIGHTS, tasks, strict=True)) for p in LAYERS}
    result = merged(three_adapters(), "magnitude_prune", WEIGHTS, options={"density": 0.3}, rank=FULL_RANK)
    assert largest_difference(result, expected) < 1e-6


@pytest.mark.parametrize("trim_over", ["model", "tensor"])
@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_ties(trim_over, majority_sign, density):
    options = {"density": density, "trim_over": trim_over, "majority_sign": majority_sign, "scale": 0.7}
    result = merged(three_adapters(), "ties", WEIGHTS, options=options, rank=FULL_RANK)
    assert largest_difference(result, expected_ties(three_adapters(), **options)) < 1e-6


@pytest.mark.parametrize("method", ["ties", "core_ties", "knots_ties"])
def test_blocks_of_entries_do_not_matter(monkeypatch, method):
    expected = merged(three_adapters(), method, WEIGHTS, rank=5)
    for module in (sparse, trimming):
        monkeypatch.setattr(module, "BLOCK", 37)
    assert largest_difference(merged(three_adapters(), method, WEIGHTS, rank=5), expected) == 0


def test_the_two_trims_of_ties_differ_where_layers_differ_in_size():
    small = random_adapter("math", 2, seed=1)
    factors = small.layers["layers.0.up_proj"]
    small.layers["layers.0.up_proj"] = type(factors)(factors.A, factors.B, factors.scaling / 1000)
    other = random_adapter("code", 2, seed=2)
    # Entries of the small layer are among the largest of no adapter as a whole.
    for trim_over, survives in (("model", False), ("tensor", True)):
        result = merged([small, other], "ties", [1.0, 0.0], options={"density": 0.2, "trim_over": trim_over})
        assert bool(np.abs(result["layers.0.up_proj"]).max() > 1e-6) == survives


def test_the_threshold_over_all_layers_is_the_exact_order_statistic():
    class Layers:
        names = ("a", "b")

        def __iter__(self):
            for name, values in self.values.items():
                yield DeltaLayer(name, values, None, ("math",), 0)

    generator = torch.Generator().manual_seed(0)
    layers = Layers()
    layers.values = {
        n: torch.randn(1, 7, k, generator=generator) * 10.0**e for n, k, e in (("a", 30, 0), ("b", 50, -3))
    }
    everything = torch.cat([v.flatten() for v in layers.values.values()]).abs().sort(descending=True).values
    for density in (1e-6, 0.1, 0.5, 0.73, 1.0):
        found = trimming.whole_adapter_thresholds(layers, trimming.deltas_of, density)
        assert found["math"] == float(everything[max(1, round(density * everything.numel())) - 1])


def test_dare_keeps_scaled_entries_of_which_the_seed_decides():
    adapter = random_adapter("math", 3, seed=1)
    exact, options = dense(adapter), {"density": 0.4}
    first = merged([adapter], "dare", options=options, seed=7, rank=FULL_RANK)
    masks = {}
    for path, delta in first.items():
        masks[path] = np.abs(delta) > 1e-4 * np.abs(exact[path])
        np.testing.assert_allclose(delta, masks[path] * exact[path] / 0.4, atol=1e-5)
        assert abs(masks[path].mean() - 0.4) < 0.06
    assert (masks["layers.0.q_proj"] != masks["layers.1.q_proj"]).mean() > 0.4  # every layer has its own mask
    again = sstmerge.merge_adapters([adapter], None, "dare", options={"density": 0.4, "seed": 7}, rank=FULL_RANK)
    assert largest_difference(dense(again), first) == 0
    assert largest_difference(merged([adapter], "dare", options=options, seed=8, rank=FULL_RANK), first) > 0.5


@pytest.mark.parametrize("method", ["dare", "core_dare"])
def test_dare_is_unbiased(method):
    adapters, rank = three_adapters()[:2], {"rank": FULL_RANK} if method == "dare" else {}
    exact = merged(adapters, "task_arithmetic")
    draws = [merged(adapters, method, options={"density": 0.5}, seed=seed, **rank) for seed in range(200)]
    for path in LAYERS:
        mean = sum(draw[path] for draw in draws) / len(draws)
        error = np.linalg.norm(mean - exact[path]) / np.linalg.norm(exact[path])
        assert error < 0.12  # √(p / (1 − p) / 200) = 0.07 is what chance leaves


def test_dare_masks_do_not_depend_on_order_or_company():
    math, code, law = three_adapters()
    options = {"options": {"density": 0.6}, "seed": 3, "rank": FULL_RANK}
    together = merged([math, code, law], "dare", [1.0, 0.5, 2.0], **options)
    assert largest_difference(merged([law, math, code], "dare", [2.0, 1.0, 0.5], **options), together) < 1e-6
    alone = [merged([adapter], "dare", [w], **options) for adapter, w in ((math, 1.0), (code, 0.5), (law, 2.0))]
    assert largest_difference({p: sum(part[p] for part in alone) for p in LAYERS}, together) < 1e-6


def test_dare_ties_is_ties_of_what_dare_keeps():
    dropped = [merged([a], "dare", options={"density": 0.6}, seed=3, rank=FULL_RANK) for a in three_adapters()]
    # The truncation leaves rounding where DARE left zeros.
    dropped = [{p: np.where(np.abs(d) > 1e-5, d, 0.0) for p, d in task.items()} for task in dropped]
    expected = {p: 0.5 * elected_mean([trimmed(t[p], 0.4) for t in dropped], WEIGHTS) for p in LAYERS}
    options = {"density": 0.6, "trim_density": 0.4, "scale": 0.5}
    result = merged(three_adapters(), "dare_ties", WEIGHTS, options=options, seed=3, rank=FULL_RANK)
    assert largest_difference(result, expected) < 1e-5


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("trim_over", ["model", "tensor"])
def test_core_ties_is_ties_of_the_cores(trim_over, majority_sign):
    adapters = three_adapters()
    bases = {}
    for group in CoreSpace.of(adapters).groups:
        for i, path in enumerate(group.names):
            bases[path] = [positive_sums(basis[i].double().numpy()) for basis in (group.U, group.V)]
    cores = [{p: bases[p][0].T @ dense(adapter)[p] @ bases[p][1] for p in LAYERS} for adapter in adapters]
    if trim_over == "model":
        tasks = [trimmed_as_a_whole(c, list(a.layers), 0.3) for c, a in zip(cores, adapters, strict=True)]
    else:
        tasks = [{path: trimmed(core, 0.3) for path, core in task.items()} for task in cores]
    merged_cores = {p: elected_mean([task[p] for task in tasks], WEIGHTS, majority_sign) for p in LAYERS}
    expected = {p: bases[p][0] @ core @ bases[p][1].T for p, core in merged_cores.items()}
    options = {"density": 0.3, "trim_over": trim_over, "majority_sign": majority_sign}
    result = merged(adapters, "core_ties", WEIGHTS, options=options)
    assert largest_difference(result, expected) < 1e-5


def test_core_dare_keeps_scaled_core_entries():
    adapters = three_adapters()
    space = CoreSpace.of(adapters)
    adapter = adapters[0]
    result = merged([adapter, *adapters[1:]], "core_dare", [1.0, 0.0, 0.0], options={"density": 0.5}, seed=1)
    kept = []
    for group in space.groups:
        for i, path in enumerate(group.names):
            U, V = group.U[i].double().numpy(), group.V[i].double().numpy()
            before, after = U.T @ dense(adapter)[path] @ V, U.T @ result[path] @ V
            mask = np.abs(after) > 1e-4
            np.testing.assert_allclose(after, mask * before / 0.5, atol=1e-4)
            kept.append(mask.mean())
    assert 0.3 < np.mean(kept) < 0.7


def test_core_dare_ties_with_density_one_is_core_ties():
    options = {"density": 1.0, "trim_density": 0.3}
    result = merged(three_adapters(), "core_dare_ties", WEIGHTS, options=options)
    expected = merged(three_adapters(), "core_ties", WEIGHTS, options={"density": 0.3, "trim_over": "tensor"})
    assert largest_difference(result, expected) < 1e-6
    dropped = merged(three_adapters(), "core_dare_ties", WEIGHTS, options={"density": 0.5, "trim_density": 0.3}, seed=1)
    assert largest_difference(dropped, expected) > 0.1
