"""The merged adapter in the model: exchange with files, and nothing else changed, whatever happens."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft_models import PEFT_TYPES, PEFTS_OWN, Network, assert_unchanged, build, deltas, lora_layers, snapshot, worst

import sstmerge
from sstmerge import add_weighted_adapter, load_adapter, peft_backend, save_adapter
from sstmerge.peft_drop_in import backend

BOTH = ["a0", "a1"]
OURS = ("linear_exact", "core_magnitude_prune", "core_ties", "core_dare_linear", "core_dare_ties")
IDS = torch.tensor([[1, 5, 7, 2]])


def existing(state, before):
    return {key: value for key, value in state.items() if key in before}


@pytest.mark.parametrize("kind", [*PEFT_TYPES, *OURS])
def test_everything_else_stays(kind):
    model = build({}, {}).train()
    model.set_adapter("a1")
    before = snapshot(model)
    add_weighted_adapter(model, BOTH, [0.5, 0.7], "merged", kind, density=0.5)
    after = snapshot(model)
    assert all(torch.equal(after["state"][key], value) for key, value in before["state"].items())
    for key in ("requires_grad", "training", "configs"):
        assert existing(after[key], before[key]) == before[key]
    assert (after["active"], after["targeted"]) == (before["active"], before["targeted"])
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".merged" in name)


@pytest.mark.parametrize("kind", [*PEFT_TYPES, *OURS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_bit_by_bit(kind, dtype, tmp_path):
    model = build({}, {}, dtype=dtype)
    add_weighted_adapter(model, BOTH, [0.5, 0.7], "merged", kind, density=0.5)
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    loaded = PeftModel.from_pretrained(
        Network().to(dtype), tmp_path / "merged", adapter_name="merged", autocast_adapter_dtype=False
    )
    for path, layer in lora_layers(model).items():
        other = lora_layers(loaded)[path]
        assert other.scaling["merged"] == layer.scaling["merged"] == 1.0
        for part in ("lora_A", "lora_B"):
            ours, theirs = getattr(layer, part)["merged"].weight, getattr(other, part)["merged"].weight
            assert theirs.dtype is dtype
            assert torch.equal(ours, theirs)
    read = load_adapter(tmp_path / "merged")  # sstmerge reads it too
    assert max(float((read.layers[p].delta() - d).norm()) for p, d in deltas(model, "merged").items()) < 1e-9


@pytest.mark.parametrize("kind", ["linear", "svd", "ties_svd", "linear_exact"])
def test_merging_it_into_the_base_gives_the_base_plus_its_weight_change(kind):
    model = build({}, {})
    add_weighted_adapter(model, BOTH, [0.5, 0.7], "merged", kind, density=0.5)
    model.set_adapter("merged")
    expected = {
        path: layer.base_layer.weight.detach().double() + deltas(model, "merged")[path]
        for path, layer in lora_layers(model).items()
    }
    with torch.no_grad():
        output = model(IDS)
    merged = model.merge_and_unload()
    for path, weight in expected.items():
        torch.testing.assert_close(merged.get_submodule(path).weight.double(), weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(merged(IDS), output, atol=1e-5, rtol=1e-4)


def test_a_merged_file_is_swapped_into_a_live_model(tmp_path):
    model = build({}, {})
    model.save_pretrained(tmp_path / "all")
    adapters = [load_adapter(tmp_path / "all" / name) for name in BOTH]
    space = sstmerge.CoreSpace.of(adapters)
    save_adapter(space.to_adapter(space.core("a0") - space.core("a1"), name="merged"), tmp_path / "merged")
    model.load_adapter(tmp_path / "merged", "merged")  # PEFT's own
    model.set_adapter("merged")
    expected = {path: delta - deltas(model, "a1")[path] for path, delta in deltas(model, "a0").items()}
    assert worst(deltas(model, "merged"), expected) < 1e-5


@pytest.mark.parametrize("kind", ["dare_ties", "ties_svd", "svd", "linear_exact"])
def test_an_unexpected_failure_is_undone(kind, monkeypatch):
    model = build({"modules_to_save": ["head"], "trainable_token_indices": {"embedding": [1]}}, {}).train()
    before = snapshot(model)
    layers = iter(range(10))
    original = backend.insert.__globals__["Layer"].write

    def fails_at_the_second_layer(self, *arguments):
        if next(layers) == 1:
            raise MemoryError("out of memory")
        original(self, *arguments)

    monkeypatch.setattr(backend.insert.__globals__["Layer"], "write", fails_at_the_second_layer)
    with pytest.raises(MemoryError):
        add_weighted_adapter(model, BOTH, [1, 1], "merged", kind, density=0.5)
    assert_unchanged(model, before)
    monkeypatch.undo()
    add_weighted_adapter(model, BOTH, [1, 1], "merged", kind, density=0.5)
    model.set_adapter("merged")
    model(IDS)


def test_the_tuner_is_as_good_as_the_model():
    model, other = build({}, {}), build({}, {})
    add_weighted_adapter(model, BOTH, [1, 1], "merged")
    add_weighted_adapter(other.base_model, BOTH, torch.tensor([1.0, 1.0]), "merged")
    assert worst(deltas(model, "merged"), deltas(other, "merged")) == 0


def test_same_call_same_bits():
    for kind in ("svd", "ties_svd", "core_ties"):
        first, second = build({}, {}), build({}, {})
        for model in (first, second):
            add_weighted_adapter(model, BOTH, [0.3, 1.0], "merged", kind, density=0.5)
        assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


# ---- the backend -----------------------------------------------------------------------------------------------------


def test_the_backend_takes_pefts_place_and_gives_it_back():
    assert LoraModel.add_weighted_adapter is PEFTS_OWN
    model = build({}, {})
    with peft_backend():
        with peft_backend():
            model.add_weighted_adapter(BOTH, [0.5, 0.5], "inner", combination_type="linear_exact")
        model.add_weighted_adapter(BOTH, weights=[0.5, 0.5], adapter_name="outer", combination_type="linear_exact")
    assert LoraModel.add_weighted_adapter is PEFTS_OWN
    assert worst(deltas(model, "inner"), deltas(model, "outer")) == 0
    with pytest.raises(ValueError, match="Invalid combination_type"):
        model.add_weighted_adapter(BOTH, [0.5, 0.5], "after", combination_type="linear_exact")


def test_the_backend_gives_it_back_after_an_error():
    with pytest.raises(KeyError), peft_backend():
        raise KeyError
    assert LoraModel.add_weighted_adapter is PEFTS_OWN


def test_blocks_of_two_threads_may_overlap():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with peft_backend():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with peft_backend():
        thread.start()
        assert entered.wait(10)
    assert LoraModel.add_weighted_adapter is not PEFTS_OWN
    leave.set()
    thread.join()
    assert LoraModel.add_weighted_adapter is PEFTS_OWN


def test_copies_do_not_share_memory_with_what_they_were_cut_from():
    model = build({}, {})
    add_weighted_adapter(model, BOTH, [0.5, 0.5], "merged", "ties_svd", density=0.5)
    for layer in lora_layers(copy.copy(model)).values():
        for tensor in (layer.lora_A["merged"].weight, layer.lora_B["merged"].weight):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
