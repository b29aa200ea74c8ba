"""Task arithmetic, its truncation, its stacked factors and the rank-one recipe, against dense NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_cases import LAYERS, dense, largest_difference, merged, random_adapter, three_adapters

import sstmerge
from sstmerge.errors import InputError

WEIGHTS = [1.0, -0.5, 0.25]


def weighted_sum(adapters, weights=WEIGHTS):
    tasks = [dense(adapter) for adapter in adapters]
    return {path: sum(w * task[path] for w, task in zip(weights, tasks, strict=True)) for path in LAYERS}


@pytest.mark.parametrize("method", ["task_arithmetic", "cat"])
def test_the_sum_is_exact(method):
    assert largest_difference(merged(three_adapters(), method, WEIGHTS), weighted_sum(three_adapters())) < 1e-6


def test_svd_is_the_best_approximation_of_the_largest_rank():
    expected = {}
    for path, total in weighted_sum(three_adapters()).items():
        left, values, right = np.linalg.svd(total, full_matrices=False)
        expected[path] = left[:, :4] * values[:4] @ right[:4]
    result = sstmerge.merge_adapters(three_adapters(), WEIGHTS, "svd")
    assert {factors.rank for factors in result.layers.values()} == {4}
    assert largest_difference(dense(result), expected) < 1e-6


def test_cat_keeps_the_factors_as_they_are():
    adapters = three_adapters()
    result = sstmerge.merge_adapters(adapters, WEIGHTS, "cat")
    stacked = torch.cat([adapter.layers["layers.1.q_proj"].A for adapter in adapters])
    assert torch.equal(result.layers["layers.1.q_proj"].A, stacked)
    assert {factors.rank for factors in result.layers.values()} == {9}
    assert not result.layers["layers.0.up_proj"].A[5:].any()  # padding: only two adapters have this layer
    with pytest.raises(InputError, match="rank of 'cat' is that of its factors"):
        sstmerge.merge_adapters(adapters, WEIGHTS, "cat", rank=3)


@pytest.mark.parametrize(
    ("modules", "chosen"), [("", LAYERS), ("up_proj", ("layers.0.up_proj",)), (r"layers\.0", LAYERS)]
)
def test_rank_one_keeps_the_leading_direction_of_the_safety_adapter(modules, chosen):
    adapters = three_adapters()
    expected = {}
    for path in LAYERS:
        math, code, law = (dense(adapter)[path] for adapter in adapters)
        left, values, right = np.linalg.svd(code, full_matrices=False)
        in_chosen = path in chosen and (modules != r"layers\.0" or path.startswith("layers.0"))
        expected[path] = math + 0.25 * law + in_chosen * -0.5 * values[0] * np.outer(left[:, 0], right[0])
    result = merged(adapters, "rank_one", WEIGHTS, safety="code", options={"modules": modules})
    assert largest_difference(result, expected) < 1e-6


@pytest.mark.parametrize(
    ("options", "safety", "message"),
    [
        ({"modules": "mlp_gate"}, "code", "found in no module path"),
        ({"modules": "("}, "code", "no regular expression"),
        ({}, None, "needs to know which adapter is the safety adapter"),
        ({}, "medicine", "none of the adapters"),
    ],
)
def test_rank_one_says_what_is_wrong(options, safety, message):
    with pytest.raises(InputError, match=message):
        sstmerge.merge_adapters(three_adapters(), None, "rank_one", options=options, safety=safety)


def test_one_adapter_with_weight_one_is_itself():
    adapter = random_adapter("math", 3, seed=5)
    for method in ("task_arithmetic", "svd", "cat"):
        assert largest_difference(merged([adapter], method), dense(adapter)) < 1e-6
