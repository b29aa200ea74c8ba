"""PEFT's types on files, against PEFT's own functions on lora_A and lora_B."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_cases import LAYERS, random_adapter
from peft.utils import merge_utils

import sstmerge
from sstmerge.errors import InputError

WEIGHTS = [1.0, -0.5, 0.25]
DENSITY = 0.25  # keeps a whole number of the entries of every factor below


def adapters():
    return [random_adapter(name, 4, seed=i, dtype=torch.float32) for i, name in enumerate(("math", "code", "law"))]


def factors_by(function):
    """Return A and B of every layer as PEFT's function merges them."""
    expected = {}
    for path in LAYERS:
        layers = [adapter.layers[path] for adapter in adapters()]
        totals = torch.tensor([w * f.scaling for w, f in zip(WEIGHTS, layers, strict=True)])
        roots = totals.abs().sqrt()
        expected[path] = (
            function([f.A for f in layers], roots * totals.sign()),
            function([f.B for f in layers], roots),
        )
    return expected


PEFTS = {
    "peft_linear": (merge_utils.task_arithmetic, {}),
    "peft_magnitude_prune": (lambda t, w: merge_utils.magnitude_prune(t, w, DENSITY), {"density": DENSITY}),
    "peft_ties": (lambda t, w: merge_utils.ties(t, w, DENSITY), {"density": DENSITY}),
    "peft_dare_linear": (lambda t, w: merge_utils.dare_linear(t, w, 1.0), {"density": 1.0}),
    "peft_dare_ties": (
        lambda t, w: merge_utils.dare_ties(t, w, 1.0, "frequency"),
        {"density": 1.0, "majority_sign": "frequency"},
    ),
}


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("method", PEFTS)
def test_factors_are_pefts(method):
    function, options = PEFTS[method]
    merged = sstmerge.merge_adapters(adapters(), WEIGHTS, method, options=options)
    for path, (A, B) in factors_by(function).items():
        assert merged.layers[path].scaling == 1.0
        torch.testing.assert_close(merged.layers[path].A, A, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merged.layers[path].B, B, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["peft_dare_linear", "peft_dare_ties"])
def test_masks_follow_the_seed_and_keep_the_mean(method):
    def merged(seed):
        layers = sstmerge.merge_adapters(adapters()[:1], [1.0], method, options={"density": 0.5}, seed=seed).layers
        return layers["layers.0.up_proj"].B

    source = adapters()[0].layers["layers.0.up_proj"]
    kept = merged(1) != 0
    assert 0.3 < float(kept.float().mean()) < 0.7
    np.testing.assert_allclose(merged(1)[kept], (2 * source.scaling**0.5 * source.B)[kept], rtol=1e-5)
    assert torch.equal(merged(1), merged(1))
    assert not torch.equal(merged(1), merged(2))


def test_lora_A_and_lora_B_have_masks_of_their_own():
    square = {path: f for path, f in random_adapter("one", 24, seed=0).layers.items() if path == "layers.0.q_proj"}
    one = sstmerge.adapters.Adapter("one", square)
    merged = sstmerge.merge_adapters([one], None, "peft_dare_linear", options={"density": 0.5}).layers[
        "layers.0.q_proj"
    ]
    assert not torch.equal(merged.A[:, :24] == 0, merged.B == 0)


def test_different_ranks_are_refused():
    given = [random_adapter("math", 2, seed=0), random_adapter("code", 3, seed=1)]
    with pytest.raises(InputError, match=r"takes adapters of one rank; layer 'layers.0.q_proj' has .*'code': 3"):
        sstmerge.merge_adapters(given, None, "peft_linear")
