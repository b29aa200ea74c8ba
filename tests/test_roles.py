"""References that speak of the utility model, in terms of the adapters that it is made of."""

from __future__ import annotations

import pytest
import torch
from builders import random_adapter

from sstmerge.adapters import CoreSpace
from sstmerge.errors import SSTMergeError
from sstmerge.fisher import reference_points
from sstmerge.pipeline.roles import expand_reference, roles_in


@pytest.fixture(scope="module")
def adapters(pico_llama):
    model = pico_llama()
    return {n: random_adapter(model, n, seed=i) for i, n in enumerate(("utility", "utility1", "utility2", "safety"))}


def roles_of(adapters, names, weights):
    return roles_in(CoreSpace.of([adapters[n] for n in (*names, "safety")]), names, "safety", weights)


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["utility"], None),
        (["utility"], [0.5]),
        (["utility1", "utility2"], None),
        (["utility1", "utility2"], [0.25, 2.0]),
    ],
)
@pytest.mark.parametrize(
    ("reference", "of_utility", "of_safety"),
    [
        ("utility", 1.0, 0.0),
        ("1*utility", 1.0, 0.0),
        ("0.5*utility+safety", 0.5, 1.0),
        (" utility + 2*safety", 1.0, 2.0),
    ],
)
def test_utility_is_the_weighted_sum_and_may_be_multiplied(adapters, names, weights, reference, of_utility, of_safety):
    roles = roles_of(adapters, names, weights)
    (point,) = reference_points(expand_reference(reference, roles), roles.space)
    torch.testing.assert_close(point, of_utility * roles.utility + of_safety * roles.safety)


def test_a_factor_that_is_no_number_is_refused_by_what_reads_references(adapters):
    roles = roles_of(adapters, ["utility1", "utility2"], None)
    with pytest.raises(SSTMergeError, match="much"):
        reference_points(expand_reference("much*utility", roles), roles.space)
