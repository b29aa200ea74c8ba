"""TSV-Merge, Iso-C, Iso-CTS and Subspace Boosting against NumPy on full matrices."""

from __future__ import annotations

import numpy as np
import pytest
from method_cases import LAYERS, dense, elected_mean, largest_difference, merged, polar, random_adapter, trimmed

from sstmerge.adapters import CoreSpace

WEIGHTS = [1.0, 0.5, 2.0]
RANKS = (4, 4, 3)


def adapters():
    return [
        random_adapter(n, rank, seed=i) for i, (n, rank) in enumerate(zip(("math", "code", "law"), RANKS, strict=True))
    ]


def weighted_tasks(path):
    return [weight * dense(adapter)[path] for weight, adapter in zip(WEIGHTS, adapters(), strict=True)]


def leading(matrix, count):
    """Return the first singular triplets; vectors of the value zero are arbitrary and left out."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    count = min(count, int((values > 1e-6).sum()))
    return left[:, :count], values[:count], right[:count].T


def test_tsv_m():
    expected = {}
    for path in LAYERS:
        parts = [leading(delta, rank) for delta, rank in zip(weighted_tasks(path), RANKS, strict=True)]
        left, values, right = (np.concatenate([part[i] for part in parts], axis=-1) for i in range(3))
        expected[path] = 1.5 * polar(left) * values @ polar(right).T
    result = merged(adapters(), "tsv_m", WEIGHTS, options={"scale": 1.5})
    assert largest_difference(result, expected) < 1e-5


def test_tsv_m_keeps_an_equal_part_of_the_dimension_for_every_task():
    many = [random_adapter(f"task{i}", 6, seed=i) for i in range(8)]  # 24 / 8 = 3 of their 6 directions
    expected = {}
    for path in LAYERS:
        parts = [leading(dense(adapter)[path], 3) for adapter in many]
        left, values, right = (np.concatenate([part[i] for part in parts], axis=-1) for i in range(3))
        expected[path] = polar(left) * values @ polar(right).T
    assert largest_difference(merged(many, "tsv_m"), expected) < 1e-5


def test_tsv_m_of_an_adapter_with_itself_is_the_adapter():
    one, same = random_adapter("math", 3, seed=1), random_adapter("twin", 3, seed=1)
    assert largest_difference(merged([one, same], "tsv_m"), dense(one)) < 1e-5


@pytest.mark.parametrize("average_over", ["rank", "dimension"])
def test_iso_c(average_over):
    expected = {}
    for path, shape in LAYERS.items():
        left, values, right = leading(sum(weighted_tasks(path)), sum(RANKS))
        mean = values.sum() / (sum(RANKS) if average_over == "rank" else min(shape))
        expected[path] = 0.8 * mean * left @ right.T
    result = merged(adapters(), "iso_c", WEIGHTS, options={"average_over": average_over, "scale": 0.8})
    assert largest_difference(result, expected) < 1e-5


@pytest.mark.parametrize(
    ("average_over", "common_share"), [("rank", 0.7), ("rank", 0.2), ("dimension", 0.3), ("dimension", 0.8)]
)
def test_iso_cts(average_over, common_share):
    expected = {}
    for path, shape in LAYERS.items():
        dimension = sum(RANKS) if average_over == "rank" else min(shape)
        per_task = round((dimension - int(common_share * dimension)) / 3)
        common = dimension - 3 * per_task
        assert common > 0
        tasks = weighted_tasks(path)
        left, values, right = leading(sum(tasks), common)
        parts = [(left, values, right)]
        for task in tasks:
            parts.append(leading(task - left @ (left.T @ task), per_task))
        left, values, right = (np.concatenate([part[i] for part in parts], axis=-1) for i in range(3))
        mean = values.sum() / (len(values) if average_over == "rank" else dimension)
        expected[path] = mean * polar(left) @ polar(right).T
    options = {"average_over": average_over, "common_share": common_share}
    assert largest_difference(merged(adapters(), "iso_cts", WEIGHTS, options=options), expected) < 1e-5


def test_iso_cts_with_common_directions_only_is_iso_c():
    result = merged(adapters(), "iso_cts", WEIGHTS, options={"common_share": 1.0})
    assert largest_difference(result, merged(adapters(), "iso_c", WEIGHTS)) < 1e-6


def boosted(matrix, cutoff, rank):
    left, values, right = leading(matrix, rank)
    reached = np.flatnonzero(np.cumsum(values) / values.sum() >= cutoff - 1e-12)[0]
    return left * np.maximum(values, values[reached]) @ right.T


@pytest.mark.parametrize("cutoff", [0.0, 0.01, 0.4, 0.9, 1.0])
def test_subspace_boosting(cutoff):
    expected = {path: 0.5 * boosted(sum(weighted_tasks(path)), cutoff, sum(RANKS)) for path in LAYERS}
    result = merged(adapters(), "subspace_boosting", WEIGHTS, options={"cutoff": cutoff, "scale": 0.5})
    assert largest_difference(result, expected) < 1e-5


def test_subspace_boosting_of_ties():
    space = CoreSpace.of(adapters())
    expected = {}
    for group in space.groups:
        for i, path in enumerate(group.names):
            U, V = group.U[i].double().numpy(), group.V[i].double().numpy()
            cores = [trimmed(U.T @ dense(adapter)[path] @ V, 0.3) for adapter in adapters()]
            core = elected_mean(cores, WEIGHTS)
            rank = np.linalg.matrix_rank(core, tol=1e-6)
            expected[path] = U @ boosted(core, 0.5, rank) @ V.T
    result = merged(adapters(), "subspace_boosting_ties", WEIGHTS, options={"cutoff": 0.5, "density": 0.3})
    assert largest_difference(result, expected) < 1e-5


def test_one_adapter_with_weight_one_is_itself_where_promised():
    adapter = random_adapter("math", 3, seed=5)
    for method, options in (("tsv_m", {}), ("subspace_boosting", {"cutoff": 1.0})):
        assert largest_difference(merged([adapter], method, options=options), dense(adapter)) < 1e-5
