"""Where PEFT 0.21 is wrong or silent: right here, or refused in words. Every row of the table in docs/PEFT.md."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import (
    DENSE_TYPES,
    FACTOR_TYPES,
    PEFT_TYPES,
    Network,
    assert_unchanged,
    build,
    config,
    deltas,
    lora_layers,
    pefts,
    snapshot,
    worst,
)

from sstmerge import add_weighted_adapter
from sstmerge.errors import AdapterError, InputError

BOTH = ["a0", "a1"]


def weighted_sum(model, weights):
    parts = [deltas(model, f"a{number}") for number in range(len(weights))]
    return {path: sum(w * part[path] for w, part in zip(weights, parts, strict=True)) for path in parts[0]}


def refuses(model, message, *arguments, error=InputError, **options):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        add_weighted_adapter(model, *arguments, **options)
    assert_unchanged(model, before)


# ---- right where PEFT is wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_rslora_is_not_scaled_by_the_root_of_the_rank(kind):
    model = build({"use_rslora": True}, {"use_rslora": True})
    expected = weighted_sum(model, [0.5, 0.5])
    assert worst(deltas(pefts(model, BOTH, [0.5, 0.5], "merged", kind, svd_rank=8), "merged"), expected) > 0.5
    add_weighted_adapter(model, BOTH, [0.5, 0.5], "merged", kind, svd_rank=8)
    assert worst(deltas(model, "merged"), expected) < 1e-5
    assert model.peft_config["merged"].use_rslora is False


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "linear_exact"])
def test_biases_of_lora_b_are_merged(kind):
    model = build({"lora_bias": True}, {"lora_alpha": 2})
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["a0"].bias.normal_()
    add_weighted_adapter(model, BOTH, [0.5, -1.0], "merged", kind)
    for layer in lora_layers(model).values():
        torch.testing.assert_close(layer.lora_B["merged"].bias, 0.5 * 2 * layer.lora_B["a0"].bias)


@pytest.mark.parametrize("kind", ["ties", "ties_svd", "dare_linear", "core_ties"])
def test_biases_of_lora_b_are_refused_by_other_types(kind):
    model = build({"lora_bias": True}, {})
    refuses(model, "lora_bias", BOTH, [1, 1], "merged", kind, density=0.5)


def test_half_precision_stays_half_precision():
    model = build({}, {}, dtype=torch.bfloat16)
    assert (
        next(iter(lora_layers(pefts(model, BOTH, [1.0, 1.0], "m")).values())).lora_A["m"].weight.dtype is torch.float32
    )
    for number, kind in enumerate((*PEFT_TYPES, "linear_exact", "core_ties")):
        add_weighted_adapter(model, BOTH, [1, 1], f"m{number}", kind, density=0.5)
        for layer in lora_layers(model).values():
            assert {layer.lora_A[f"m{number}"].weight.dtype, layer.lora_B[f"m{number}"].weight.dtype} == {
                torch.bfloat16
            }


def test_float32_adapters_on_a_bfloat16_base_are_not_rounded():
    """PEFT's `cat` writes into factors of the base's dtype."""
    model = build({}, {}, dtype=torch.bfloat16, autocast=True)
    add_weighted_adapter(model, BOTH, [0.5, 2.0], "merged", "cat")
    assert worst(deltas(model, "merged"), weighted_sum(model, [0.5, 2.0])) < 1e-6


@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
def test_a_rank_larger_than_a_layer_is_padded(kind):
    model = build({}, {})
    add_weighted_adapter(model, BOTH, [0.5, 2.0], "merged", kind, svd_rank=30, density=1.0 if kind == "svd" else 0.5)
    for layer in lora_layers(model).values():
        assert layer.lora_A["merged"].weight.shape[0] == layer.lora_B["merged"].weight.shape[1] == 30
    if kind == "svd":
        assert worst(deltas(model, "merged"), weighted_sum(model, [0.5, 2.0])) < 1e-5


def test_rank_pattern_with_linear_can_be_saved_and_loaded(tmp_path):
    change = {"rank_pattern": {"first": 2}}
    model = build(change, change)
    add_weighted_adapter(model, BOTH, [0.5, 0.5], "merged", "linear")
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    loaded = PeftModel.from_pretrained(Network(), tmp_path / "merged", adapter_name="merged")
    assert worst(deltas(loaded, "merged"), deltas(model, "merged")) == 0
    theirs = pefts(build(change, change), BOTH, [0.5, 0.5], "merged", "linear")
    assert worst(deltas(model, "merged"), deltas(theirs, "merged")) < 1e-6


def test_convolutions_of_one_and_three_dimensions_have_an_svd():
    change = {"target_modules": ["conv1", "conv3"]}
    model = build(change, change)
    with pytest.raises((RuntimeError, IndexError)):
        pefts(model, BOTH, [0.5, 2.0], "merged", "svd")
    add_weighted_adapter(model, BOTH, [0.5, 2.0], "merged", "svd", svd_rank=8)
    assert worst(deltas(model, "merged"), weighted_sum(model, [0.5, 2.0])) < 1e-5


def test_the_layers_of_every_adapter_are_kept():
    """With layers_to_transform in the first adapter, PEFT's configuration leaves out layers of the second."""

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Network() for _ in range(2)])

    make = lambda **changes: config(layers_pattern="layers", **changes)  # noqa: E731
    model = get_peft_model(Stack(), make(layers_to_transform=[0]), adapter_name="a0")
    model.add_adapter("a1", make(layers_to_transform=[1]))
    add_weighted_adapter(model, BOTH, [1.0, 2.0], "merged", "cat")
    merged, first, second = (deltas(model, name) for name in ("merged", "a0", "a1"))
    assert merged.keys() == first.keys() | second.keys()
    assert worst(merged, first | {path: 2 * delta for path, delta in second.items()}) < 1e-6


def test_a_trained_copy_of_a_module_is_taken_over_with_its_weight():
    """PEFT takes an untrained copy, and none at all if the first adapter has none."""
    for owner in (0, 1):
        changes = [{}, {}]
        changes[owner] = {"modules_to_save": ["head"]}
        model = build(*changes)
        head = model.base_model.model.head
        with torch.no_grad():
            head.modules_to_save[f"a{owner}"].weight.normal_()
        trained, base = head.modules_to_save[f"a{owner}"].weight, head.original_module.weight
        theirs = pefts(model, BOTH, [1.0, 1.0], "whole").base_model.model.head.modules_to_save
        assert "whole" not in theirs or torch.equal(theirs["whole"].weight, base)
        add_weighted_adapter(model, BOTH, [1.0, 1.0], "whole", "svd")
        assert torch.equal(head.modules_to_save["whole"].weight, trained)
        add_weighted_adapter(model, BOTH, [0.25, 0.25], "part", "svd")
        torch.testing.assert_close(head.modules_to_save["part"].weight, base + 0.25 * (trained - base))


def test_new_dropout_is_off_in_evaluation_mode():
    model = build({"lora_dropout": 0.5}, {"lora_dropout": 0.5}).eval()
    assert any(module.training for module in pefts(model, BOTH, [1.0, 1.0], "merged").modules())
    add_weighted_adapter(model, BOTH, [1.0, 1.0], "merged", "svd")
    assert not any(module.training for module in model.modules())


def test_other_adapters_keep_their_gradients():
    """PEFT freezes every parameter whose name contains the new adapter's name."""
    model = build({}, {})
    model.set_adapter("a1")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    theirs = pefts(model, BOTH, [1.0, 1.0], "a")
    assert not any(p.requires_grad for name, p in theirs.named_parameters() if ".a1." in name)
    add_weighted_adapter(model, BOTH, [1.0, 1.0], "a", "svd")
    assert before == {name: p.requires_grad for name, p in model.named_parameters() if name in before}
    assert any(before.values())


def test_a_single_adapter_is_cut_to_a_rank_if_one_is_given():
    model = build({})
    add_weighted_adapter(model, ["a0"], [1.0], "merged", "svd", svd_rank=2)
    for path, delta in deltas(model, "a0").items():
        left, values, right = torch.linalg.svd(delta)
        best = left[:, :2] @ torch.diag(values[:2]) @ right[:2]
        torch.testing.assert_close(deltas(model, "merged")[path], best, atol=1e-5, rtol=1e-5)


def test_equal_magnitudes_at_the_threshold_keep_the_number_of_entries():
    model = build({}, {})
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for name in BOTH:
                layer.lora_A[name].weight.copy_(torch.ones_like(layer.lora_A[name].weight))
    add_weighted_adapter(model, BOTH, [0.5, 0.5], "merged", "magnitude_prune", density=0.3)
    for layer in lora_layers(model).values():
        A = layer.lora_A["merged"].weight.flatten()
        kept = int(0.3 * len(A))
        assert bool((A[:kept] != 0).all())
        assert not bool(A[kept:].any())


def test_a_corrected_retry_works():
    model = build({}, {"r": 8})
    with pytest.raises(InputError, match="same r"):
        add_weighted_adapter(model, BOTH, [1, 1], "merged", "linear")
    add_weighted_adapter(model, BOTH, [1, 1], "merged", "svd")
    assert "merged" in model.peft_config


# ---- refused where PEFT is silent or fails half way ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "arguments", "options"),
    [
        ("Invalid combination_type: 'foosvd'", (BOTH, [1, 1], "m", "foosvd"), {}),
        ("Invalid combination_type", (["a0"], [1], "m", "foo"), {}),
        ("already has an adapter 'a1'", (BOTH, [1, 1], "a1"), {}),
        ("without a dot", (BOTH, [1, 1], "m.n"), {}),
        ("Adapter zz does not exist", (["a0", "zz"], [1, 1], "m"), {}),
        ("No adapter was given", ([], [], "m"), {}),
        ("must be a list", ("a0", [1], "m"), {}),
        ("2 adapters .* but 1 weights", (BOTH, [1], "m"), {}),
        ("2 adapters .* but 3 weights", (BOTH, [1, 1, 1], "m"), {}),
        ("weight of adapter 'a1' must be a finite", (BOTH, [1, float("nan")], "m"), {}),
        ("weight of adapter 'a0' must be a finite", (BOTH, ["x", 1], "m"), {}),
        ("needs a density", (BOTH, [1, 1], "m", "ties"), {}),
        ("needs a density", (BOTH, [1, 1], "m", "dare_linear_svd"), {}),
        ("needs a density", (BOTH, [1, 1], "m", "core_dare_ties"), {}),
        ("density is the share", (BOTH, [1, 1], "m", "dare_linear"), {"density": 0.0}),
        ("density is the share", (BOTH, [1, 1], "m", "dare_linear"), {"density": 1.5}),
        ("density is the share", (BOTH, [1, 1], "m", "svd"), {"density": -1}),
        ("density is the share", (BOTH, [1, 1], "m", "ties"), {"density": float("nan")}),
        ("keeps none of the 80 entries of lora_A", (BOTH, [1, 1], "m", "ties"), {"density": 0.01}),
        ("keeps none of the 720 entries of its", (BOTH, [1, 1], "m", "ties_svd"), {"density": 0.001}),
        ("svd_rank must be", (BOTH, [1, 1], "m"), {"svd_rank": 0}),
        ("svd_rank must be", (BOTH, [1, 1], "m"), {"svd_rank": 2.0}),
        ("svd_clamp is the quantile", (BOTH, [1, 1], "m"), {"svd_clamp": 0.1}),
        ("svd_clamp is the quantile", (BOTH, [1, 1], "m"), {"svd_clamp": 7}),
        ("svd_clamp belongs", (BOTH, [1, 1], "m", "linear_exact"), {"svd_clamp": 0.9}),
        ("svd_driver must be", (BOTH, [1, 1], "m"), {"svd_driver": "fast"}),
        ("majority_sign_method must be", (BOTH, [1, 1], "m", "ties"), {"majority_sign_method": "x", "density": 0.5}),
        ("'sst' needs gain=", (BOTH, [1, 1], "m", "sst"), {}),
        ("belong to combination_type 'sst'", (BOTH, [1, 1], "m", "svd"), {"gain": "file"}),
        ("rank limit is 50", (BOTH, [1, 1], "m", "linear_exact"), {"svd_rank": 50}),
    ],
)
def test_bad_arguments(message, arguments, options):
    refuses(build({}, {}), message, *arguments, **options)


@pytest.mark.parametrize("kind", FACTOR_TYPES)
def test_different_ranks_where_factors_are_added(kind):
    refuses(build({}, {"r": 8}), "same r value.*'first'", BOTH, [1, 1], "m", kind, density=0.5)
    same_largest_rank = build({"r": 8, "rank_pattern": {"first": 2}}, {"r": 8})
    refuses(same_largest_rank, "layer 'first' has", BOTH, [1, 1], "m", kind, density=0.5)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("use_dora", {"use_dora": True}),
        ("bias='all'", {"bias": "all"}),
        ("alora_invocation_tokens", {"alora_invocation_tokens": [1]}),
    ],
)
def test_adapters_that_are_not_plain_lora(message, change):
    for order in ([{}, change], [change, {}]):
        refuses(build(*order), message, BOTH, [1, 1], "m", error=AdapterError)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_initialisations_that_change_the_base(init):
    model = build({}, {})
    model.peft_config["a0"].init_lora_weights = init  # as in an adapter that was loaded
    refuses(model, f"'{init}', which changes the base", BOTH, [1, 1], "m", error=AdapterError)


def test_pissa_leaves_the_base_alone():
    model = build({"init_lora_weights": "pissa"}, {})
    refuses(model, "pissa", BOTH, [1, 1], "m", error=AdapterError)


def test_target_parameters():
    model = get_peft_model(Network(), LoraConfig(r=2, target_parameters=["first.weight"]), adapter_name="a0")
    refuses(model, "does not support targeting nn.Parameter", ["a0"], [1], "m", error=AdapterError)


def test_grouped_convolutions():
    base = Network()
    base.conv2 = torch.nn.Conv2d(4, 8, 3, groups=2)
    model = get_peft_model(base, config(target_modules=["conv2"]), adapter_name="a0")
    model.add_adapter("a1", config(target_modules=["conv2"]))
    for kind in ("svd", "cat", *DENSE_TYPES, "linear_exact"):
        refuses(model, "2 groups", BOTH, [1, 1], "m", kind, density=0.5, error=AdapterError)
    theirs = pefts(model, BOTH, [1.0, 0.5], "m", "linear")
    add_weighted_adapter(model, BOTH, [1.0, 0.5], "m", "linear")
    ours, others = (lora_layers(m)["conv2"] for m in (model, theirs))
    torch.testing.assert_close(ours.lora_A["m"].weight, others.lora_A["m"].weight)
    torch.testing.assert_close(ours.lora_B["m"].weight, others.lora_B["m"].weight)


def test_trained_token_embeddings():
    change = {"trainable_token_indices": {"embedding": [1, 2]}}
    model = build(change, change)
    add_weighted_adapter(model, BOTH, [1, 1], "untrained", "svd")
    with torch.no_grad():
        model.base_model.model.embedding.token_adapter.trainable_tokens_delta["a1"].add_(1.0)
    refuses(model, "'a1' has trained token embeddings", BOTH, [1, 1], "m", error=AdapterError)


def test_two_trained_copies_of_one_module():
    change = {"modules_to_save": ["head"]}
    refuses(build(change, change), "found 1 such instance", BOTH, [1, 1], "m", error=AdapterError)


def test_adapters_that_are_merged_at_the_moment():
    model = build({}, {})
    model.merge_adapter(["a0"])
    refuses(model, "merged into the base weights at the moment", BOTH, [1, 1], "m", error=AdapterError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(value):
    model = build({}, {})
    with torch.no_grad():
        lora_layers(model)["second"].lora_B["a1"].weight[0, 0] = value
    before = torch.random.get_rng_state()
    with pytest.raises(AdapterError, match=r"'second.lora_B' of adapter 'a1' holds NaN"):
        add_weighted_adapter(model, BOTH, [1, 1], "m")
    assert "m" not in model.peft_config
    assert torch.equal(before, torch.random.get_rng_state())


def test_adapters_on_the_meta_device():
    model = build({}, {})
    layer = lora_layers(model)["first"]
    layer.lora_A["a1"].to("meta")
    with pytest.raises(AdapterError, match="meta device"):
        add_weighted_adapter(model, BOTH, [1, 1], "m")
    assert "m" not in model.peft_config


def test_models_of_another_kind():
    with pytest.raises(AdapterError, match="LoraModel, but got a Network"):
        add_weighted_adapter(Network(), BOTH, [1, 1], "m")
    from peft import IA3Config

    other = get_peft_model(Network(), IA3Config(target_modules=["first"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match="around a IA3Model"):
        add_weighted_adapter(other, ["default"], [1], "m")
