"""Our own types: exact in ΔW, free of the gauge of the factors, and SST from Fishers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import gain_and_cost
from peft import LoraConfig, get_peft_model
from peft_models import build, deltas, lora_layers, snapshot, worst

from sstmerge import CoreSpace, Selection, adapter_from_model, add_weighted_adapter, merge_cores, solve
from sstmerge.errors import AdapterError, FisherError

BOTH = ["a0", "a1"]
CORE_TYPES = ("linear_exact", "core_magnitude_prune", "core_ties", "core_dare_linear", "core_dare_ties")


def cores(model):
    """Return U, V and the cores Uᵀ ΔW_t V of every layer, NumPy."""
    space = CoreSpace.of([adapter_from_model(model, name) for name in BOTH])
    found = {}
    for group in space.groups:
        for i, path in enumerate(group.names):
            U, V = group.U[i].double().numpy(), group.V[i].double().numpy()
            found[path] = U, V, [U.T @ deltas(model, name)[path].numpy() @ V for name in BOTH]
    return found


def trimmed(matrix, density):
    kept = max(1, round(density * matrix.size))
    threshold = np.sort(np.abs(matrix), axis=None)[-kept]
    return np.where(np.abs(matrix) >= threshold, matrix, 0.0)


def ties(matrices, weights):
    sign = np.where(sum(matrices) >= 0, 1.0, -1.0)
    agrees = [(np.sign(m) == sign) for m in matrices]
    total = sum(w * m * a for w, m, a in zip(weights, matrices, agrees, strict=True))
    return total / np.maximum(sum(a.astype(float) for a in agrees), 1)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, -2.0]])
def test_the_formulas(weights):
    model = build({"r": 3}, {"lora_alpha": 2})
    formulas = {
        "linear_exact": lambda c: weights[0] * c[0] + weights[1] * c[1],
        "core_magnitude_prune": lambda c: sum(w * trimmed(x, 0.4) for w, x in zip(weights, c, strict=True)),
        "core_ties": lambda c: ties([trimmed(x, 0.4) for x in c], weights),
    }
    for kind, formula in formulas.items():
        add_weighted_adapter(model, BOTH, weights, kind, kind, density=0.4)
        expected = {p: torch.from_numpy(U @ formula(c) @ V.T) for p, (U, V, c) in cores(model).items()}
        assert worst(deltas(model, kind), expected) < 1e-5


def test_dropping_core_entries():
    """Every entry of a core of a lone adapter is dropped or doubled; with ties, entries of another sign go too."""
    model = build({}, {})
    torch.manual_seed(0)
    add_weighted_adapter(model, BOTH, [1.0, 0.0], "dare", "core_dare_linear", density=0.5)
    torch.manual_seed(0)
    add_weighted_adapter(model, BOTH, [1.0, 1.0], "both", "core_dare_linear", density=0.5)
    torch.manual_seed(0)
    add_weighted_adapter(model, BOTH, [1.0, 1.0], "ties", "core_dare_ties", density=0.5)
    kept = []
    for path, (U, V, (first, second)) in cores(model).items():
        core = U.T @ deltas(model, "dare")[path].numpy() @ V
        mask = np.abs(core) > np.abs(first)
        np.testing.assert_allclose(core, 2 * first * mask, atol=1e-4)
        kept.append(mask.mean())
        other = U.T @ (deltas(model, "both")[path].numpy()) @ V - core
        np.testing.assert_allclose(other, 2 * second * (np.abs(other) > np.abs(second)), atol=1e-4)
        np.testing.assert_allclose(
            U.T @ deltas(model, "ties")[path].numpy() @ V,
            ties([np.round(core, 5), np.round(other, 5)], [1, 1]),
            atol=2e-4,
        )
    assert 0.3 < np.mean(kept) < 0.7


@pytest.mark.parametrize("kind", CORE_TYPES)
def test_free_of_the_gauge(kind):
    model, other = build({}, {}, dtype=torch.float64), build({}, {}, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in lora_layers(other).values():
            for name in BOTH:
                N = torch.randn(4, 4, generator=generator, dtype=torch.float64) + 3 * torch.eye(4)
                layer.lora_A[name].weight.copy_(torch.linalg.solve(N, layer.lora_A[name].weight))
                layer.lora_B[name].weight.copy_(layer.lora_B[name].weight @ N)
    assert worst(deltas(other, "a0"), deltas(model, "a0")) < 1e-12
    for each in (model, other):
        torch.manual_seed(1)
        add_weighted_adapter(each, BOTH, [0.5, 1.0], "merged", kind, density=0.5)
    assert worst(deltas(other, "merged"), deltas(model, "merged")) < 1e-5


@pytest.mark.parametrize("kind", CORE_TYPES)
def test_the_seed_is_torchs(kind):
    draws = "dare" in kind
    results = []
    for seed in (1, 1, 2):
        model = build({}, {})
        torch.manual_seed(seed)
        add_weighted_adapter(model, BOTH, [0.5, 1.0], "merged", kind, density=0.5)
        results.append(deltas(model, "merged"))
    assert worst(results[0], results[1]) == 0
    assert (worst(results[0], results[2]) > 0.1) is draws


def test_without_loss_or_cut_to_a_rank():
    model = build({"r": 3}, {"target_modules": ["second"]})
    add_weighted_adapter(model, BOTH, [0.5, 2.0], "whole", "linear_exact")
    assert model.peft_config["whole"].r == 7
    expected = {path: 0.5 * delta for path, delta in deltas(model, "a0").items()}
    expected["second"] = expected["second"] + 2.0 * deltas(model, "a1")["second"]
    assert worst(deltas(model, "whole"), expected) < 1e-6
    add_weighted_adapter(model, BOTH, [0.5, 2.0], "cut", "linear_exact", svd_rank=2)
    for path, delta in expected.items():
        left, values, right = np.linalg.svd(delta.numpy())
        np.testing.assert_allclose(deltas(model, "cut")[path], (left[:, :2] * values[:2]) @ right[:2], atol=1e-4)


def test_convolutions_and_embeddings():
    change = {"target_modules": ["embedding", "conv1", "conv2", "pointwise"], "r": 2}
    model = build(change, change)
    add_weighted_adapter(model, BOTH, [0.5, 2.0], "merged", "linear_exact")
    expected = {p: 0.5 * d + 2.0 * deltas(model, "a1")[p] for p, d in deltas(model, "a0").items()}
    assert worst(deltas(model, "merged"), expected) < 1e-5


# ---- SST -------------------------------------------------------------------------------------------------------------

ROLES = ["utility", "safety"]


@pytest.fixture
def live(pico_gpt2):
    torch.manual_seed(0)
    make = lambda rank, targets: LoraConfig(  # noqa: E731
        r=rank, lora_alpha=rank / 2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=True
    )
    model = get_peft_model(pico_gpt2(), make(2, ["c_attn"]), adapter_name="utility")
    model.add_adapter("safety", make(3, ["c_attn", "c_fc"]))
    return model


@pytest.fixture
def fishers(live, pico_gpt2):
    space = CoreSpace.of([adapter_from_model(live, name) for name in ROLES])
    return gain_and_cost(pico_gpt2(), space, "kfac")


@pytest.mark.parametrize("from_files", [False, True])
def test_sst(live, fishers, from_files, tmp_path):
    gain, cost = fishers
    selection = Selection(top=7)
    space = gain.space
    expected = merge_cores(
        solve(gain, cost), 0.5 * space.core("utility"), space.core("safety"), scale=0.8, selection=selection
    )
    given = {"gain": gain, "cost": cost}
    if from_files:
        for role, fisher in given.items():
            fisher.save(tmp_path / role)
        given = {role: tmp_path / role for role in given}
    add_weighted_adapter(live, ROLES, [0.5, 0.8], "merged", "sst", selection=selection, **given)
    adapter = space.to_adapter(expected.core, name="expected")
    assert worst(deltas(live, "merged"), {path: f.delta() for path, f in adapter.layers.items()}) < 1e-5


def test_sst_with_fishers_of_other_adapters(live, fishers):
    gain, cost = fishers
    with torch.no_grad():
        next(iter(lora_layers(live).values())).lora_A["safety"].weight.add_(0.1)
    before = snapshot(live)
    with pytest.raises(AdapterError, match=r"collected for other adapters than \['safety'\]"):
        add_weighted_adapter(live, ROLES, [1, 1], "merged", "sst", gain=gain, cost=cost)
    assert snapshot(live)["configs"] == before["configs"]


def test_sst_with_fishers_of_two_structures(live, fishers, pico_gpt2):
    diagonal = gain_and_cost(pico_gpt2(), fishers[0].space, "diagonal")[1]
    with pytest.raises(FisherError, match="with the same structure"):
        add_weighted_adapter(live, ROLES, [1, 1], "merged", "sst", gain=fishers[0], cost=diagonal)
    assert "merged" not in live.peft_config
