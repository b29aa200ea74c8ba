"""What all methods without statistics promise: no dependence on the gauge, on the order, or on how layers are batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import regauged
from method_cases import FULL_RANK, LAYERS, largest_difference, merged, three_adapters

import sstmerge
from sstmerge.errors import InputError
from sstmerge.merging.methods import REGISTRY, runner

WEIGHTS = [1.0, 0.5, 2.0]
# PEFT's types on factors promise none of this; test_factorwise.py has them.
METHODS = [method for name, method in REGISTRY.methods.items() if not name.startswith("peft_")]
DATA_FREE = [method for method in METHODS if set(method.needs) <= {"safety"}]


def arguments(method):
    given = {"safety": "code"} if method.needs else {}
    if "majority_sign" in {option.name for option in method.options}:
        given["options"] = {"majority_sign": "frequency"}  # has draws, which signs of basis vectors could decide
    return given | ({"rank": FULL_RANK} if method.acts_on == "delta" else {})


@pytest.fixture(params=DATA_FREE, ids=lambda method: method.name)
def method(request):
    return request.param


def test_the_split_into_factors_does_not_matter(method):
    adapters = three_adapters()
    other = [regauged(adapter, condition=50.0, seed=i) for i, adapter in enumerate(adapters)]
    assert not torch.allclose(adapters[0].layers["layers.0.q_proj"].A, other[0].layers["layers.0.q_proj"].A)
    result = merged(other, method.name, WEIGHTS, **arguments(method))
    assert largest_difference(result, merged(adapters, method.name, WEIGHTS, **arguments(method))) < 1e-4


def test_the_order_of_the_adapters_does_not_matter(method):
    math, code, law = three_adapters()
    result = merged([law, code, math], method.name, [2.0, 0.5, 1.0], **arguments(method))
    expected = merged([math, code, law], method.name, WEIGHTS, **arguments(method))
    assert largest_difference(result, expected) < 1e-4


def test_batches_of_layers_do_not_matter(method, monkeypatch):
    expected = merged(three_adapters(), method.name, WEIGHTS, **arguments(method))
    monkeypatch.setattr(runner, "_BATCH_BYTES", 1)
    assert largest_difference(merged(three_adapters(), method.name, WEIGHTS, **arguments(method)), expected) < 1e-6


def test_the_same_call_gives_the_same_bits(method):
    first, again = (
        sstmerge.merge_adapters(three_adapters(), WEIGHTS, method.name, **arguments(method)) for _ in range(2)
    )
    assert first.fingerprint == again.fingerprint


def test_linear_methods_follow_their_scale(method):
    if "scale" not in {option.name for option in method.options}:
        return
    small, large = (merged(three_adapters(), method.name, WEIGHTS, options={"scale": scale}) for scale in (0.5, 1.0))
    for path in LAYERS:
        np.testing.assert_allclose(2 * small[path], large[path], atol=1e-4)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("density", 0.0),
        ("density", 1.5),
        ("density", float("nan")),
        ("trim_density", 0.0),
        ("cutoff", -0.1),
        ("common_share", 1.1),
        ("majority_sign", "most"),
        ("trim_over", "row"),
        ("seed", -1),
        ("average_over", "all"),
    ],
)
def test_options_out_of_range_are_refused_by_name(option, value):
    concerned = [method for method in DATA_FREE if option in {o.name for o in method.options}]
    assert concerned
    for method in concerned:
        with pytest.raises(InputError, match=rf"^{option} must"):
            sstmerge.merge_adapters(three_adapters(), WEIGHTS, method.name, options={option: value})
