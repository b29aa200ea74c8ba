"""Side by side with PEFT's own function: the same weight changes for every type, seed and dtype."""

from __future__ import annotations

import pytest
import torch
from peft_models import DENSE_TYPES, FACTOR_TYPES, PEFT_TYPES, build, deltas, factors, lora_layers, names, pefts, worst

from sstmerge import add_weighted_adapter

WEIGHTS = {2: [0.7, -0.4], 3: [1.0, 0.5, -0.3]}
# Relative Frobenius error of a layer's weight change. Half precision rounds the merged factors, PEFT's `svd` does not; a
# truncated SVD in float32 is off by its rounding over the gap between the values that are kept and those that are not.
TRUNCATED = 3e-5
TOLERANCE = {torch.float32: 2e-6, torch.float64: 2e-7, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def compare(model, kind, *, seed=3, density=0.6, dtype=torch.float32, **options):
    adapters = names(model)
    arguments = (adapters, WEIGHTS[len(adapters)], "merged", kind)
    torch.manual_seed(seed)
    theirs = pefts(model, *arguments, density=density, **options)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    add_weighted_adapter(model, *arguments, density=density, **options)
    assert torch.equal(torch.get_rng_state(), state), "the generator must be left as PEFT leaves it"
    tolerance = (
        max(TOLERANCE[dtype], TRUNCATED) if kind.endswith("svd") and dtype is torch.float32 else TOLERANCE[dtype]
    )
    assert worst(deltas(model, "merged"), deltas(theirs, "merged")) < tolerance
    return theirs


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_every_type_and_seed(kind, seed):
    compare(build({}, {"lora_alpha": 2}, seed=seed), kind, seed=seed + 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_every_dtype(kind, dtype):
    model = build({}, {"lora_alpha": 2}, dtype=dtype)
    # A density at which no entry ties with the threshold: there PEFT leaves the choice to topk.
    compare(model, kind, dtype=dtype, density=untied_density(model, kind))


def untied_density(model, kind):
    for percent in range(60, 20, -1):
        density = percent / 100
        if not any(tied(tensor, density) for tensor in pruned_tensors(model, kind)):
            return density
    raise AssertionError("every density has a tie")


def pruned_tensors(model, kind):
    for layer in lora_layers(model).values():
        for name in names(model):
            if kind in DENSE_TYPES:
                yield layer.get_delta_weight(name)
            else:
                yield from (layer.lora_A[name].weight, layer.lora_B[name].weight)


def tied(tensor, density):
    ordered = tensor.detach().abs().flatten().sort(descending=True).values
    kept = int(density * len(ordered))
    return bool(ordered[kept - 1] == ordered[kept])


@pytest.mark.parametrize("kind", PEFT_TYPES)
@pytest.mark.parametrize("majority_sign_method", ["total", "frequency"])
def test_three_adapters_of_different_scalings(kind, majority_sign_method):
    model = build({}, {"lora_alpha": 2}, {"lora_alpha": 16})
    compare(model, kind, majority_sign_method=majority_sign_method)


@pytest.mark.parametrize("kind", ["cat", "svd", *DENSE_TYPES])
def test_different_ranks_and_layers(kind):
    model = build({"r": 2}, {"r": 5, "target_modules": ["second"]}, {"r": 3})
    theirs = compare(model, kind)
    assert model.peft_config["merged"].r == theirs.peft_config["merged"].r


@pytest.mark.parametrize("kind", FACTOR_TYPES)
def test_layers_that_only_some_adapters_have(kind):
    compare(build({"target_modules": ["first"]}, {}), kind)


@pytest.mark.parametrize("svd_rank", [1, 3, 7])
@pytest.mark.parametrize("kind", ["svd", *DENSE_TYPES])
def test_a_rank_of_ones_own(kind, svd_rank):
    model = build({}, {})
    compare(model, kind, svd_rank=svd_rank)
    assert all(layer.r["merged"] == svd_rank for layer in lora_layers(model).values())


@pytest.mark.parametrize("options", [{"svd_full_matrices": False}, {"svd_driver": None}])
def test_options_of_the_svd_change_nothing(options):
    compare(build({}, {}), "svd", **options)
    compare(build({}, {}), "ties_svd", **options)


@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_rslora_of_the_second_adapter(kind):
    """PEFT is right where the first adapter is not rank-stabilised, since the new one inherits from it."""
    compare(build({}, {"use_rslora": True}), kind)


@pytest.mark.parametrize("kind", PEFT_TYPES)
@pytest.mark.parametrize("targets", [["embedding", "first"], ["conv2", "pointwise"]])
def test_embeddings_and_convolutions(kind, targets):
    change = {"target_modules": targets, "r": 2}
    compare(build(change, change), kind)


@pytest.mark.parametrize("kind", [k for k in PEFT_TYPES if "svd" not in k])
def test_one_dimensional_convolutions(kind):
    compare(build({"target_modules": ["conv1"]}, {"target_modules": ["conv1"]}), kind)


@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_transposed_layers(kind, pico_gpt2):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    make = lambda alpha: LoraConfig(  # noqa: E731
        r=3, lora_alpha=alpha, target_modules=["c_attn", "c_fc"], init_lora_weights=False, fan_in_fan_out=True
    )
    model = get_peft_model(pico_gpt2(), make(6), adapter_name="a0")
    model.add_adapter("a1", make(2))
    compare(model, kind)


@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_a_single_adapter_is_reweighted(kind):
    model = build({})
    theirs = pefts(model, ["a0"], [-0.5], "merged", kind, density=0.5)
    add_weighted_adapter(model, ["a0"], [-0.5], "merged", kind, density=0.5)
    assert worst(deltas(model, "merged"), deltas(theirs, "merged")) < 1e-6


def test_density_one_draws_nothing():
    model = build({}, {})
    for kind in ("dare_linear", "dare_linear_svd"):
        compare(model, kind, density=1.0)
        model.delete_adapter("merged")


@pytest.mark.parametrize("clamp", [0.9, 0.99, 1.0])
def test_clamping(clamp):
    """PEFT clamps the factors of LAPACK's SVD; ours are the same up to the signs of the singular vectors."""
    model = build({}, {})
    theirs = pefts(model, ["a0", "a1"], [0.7, -0.4], "merged", "svd")
    add_weighted_adapter(model, ["a0", "a1"], [0.7, -0.4], "merged", "svd", svd_clamp=clamp)
    plain = build({}, {})
    add_weighted_adapter(plain, ["a0", "a1"], [0.7, -0.4], "merged", "svd")
    for path, layer in lora_layers(model).items():
        A, B = factors(lora_layers(theirs)[path], "merged")
        own_A, own_B = factors(lora_layers(plain)[path], "merged")
        signs = (A * own_A).sum(dim=1).sign()
        A, B = signs[:, None] * A, B * signs
        bound = float(torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp))
        ours_A, ours_B = factors(layer, "merged")
        torch.testing.assert_close(ours_A, A.clamp(-bound, bound), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours_B, B.clamp(-bound, bound), atol=1e-5, rtol=1e-4)
        assert clamp == 1.0 or not torch.equal(ours_B, own_B)


@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_the_configuration_is_pefts(kind):
    model = build({"lora_dropout": 0.1}, {"lora_alpha": 2})
    theirs = pefts(model, ["a0", "a1"], [1.0, 1.0], "merged", kind, density=0.5)
    add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "merged", kind, density=0.5)
    assert model.peft_config["merged"].to_dict() == theirs.peft_config["merged"].to_dict()
    ours, pefts_ = dict(model.named_parameters()), dict(theirs.named_parameters())
    assert {k: (p.shape, p.dtype, p.requires_grad) for k, p in ours.items()} == {
        k: (p.shape, p.dtype, p.requires_grad) for k, p in pefts_.items()
    }
    assert model.active_adapters == theirs.active_adapters == ["a0"]
