"""Reading and writing PEFT adapters, with PEFT itself as the oracle."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from builders import LLAMA_TARGETS, adapter_deltas, random_adapter, relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from sstmerge.adapters import (
    Adapter,
    CoreSpace,
    LoraFactors,
    adapter_from_model,
    changed_weight,
    load_adapter,
    save_adapter,
)
from sstmerge.errors import AdapterError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ONE_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def peft_model(model, seed=0, **options):
    """Wrap a model with PEFT and fill every factor at random, since PEFT starts with B = 0."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(LLAMA_TARGETS)} | options
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def peft_deltas(wrapped, adapter_name="default"):
    """Return PEFT's own weight changes, (d_out, d_in), by path in the base model."""
    deltas = {}
    for path, module in wrapped.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight") and adapter_name in module.lora_A:
            delta = module.get_delta_weight(adapter_name).detach()
            deltas[path] = delta.T if module.fan_in_fan_out else delta
    return deltas


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3},
        "alpha_pattern": {"v_proj": 32, r"layers\.1\.mlp\.down_proj": 5, "mlp": 99, "proj": 99},
    },
    "patterns_rslora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}, "use_rslora": True},
    "one_layer": {"layers_to_transform": [1]},
    "all_linear": {"target_modules": "all-linear"},
    "regular_expression": {"target_modules": r".*layers\.0.*\.(q_proj|up_proj)"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_directory_of_peft(pico_llama, tmp_path, variant):
    wrapped = peft_model(pico_llama(), **VARIANTS[variant])
    wrapped.save_pretrained(tmp_path / "math")
    adapter = load_adapter(tmp_path / "math")
    expected = peft_deltas(wrapped)
    assert adapter.name == "math"
    assert set(adapter.layers) == set(expected)
    for path, delta in adapter_deltas(adapter).items():
        assert relative_error(delta, expected[path]) < 1e-6, path
    assert adapter.dtype == torch.float32
    live = adapter_from_model(wrapped)
    assert live.fingerprint == adapter.fingerprint
    assert live.config == adapter.config


def test_conv1d_of_gpt2(pico_gpt2, tmp_path):
    wrapped = peft_model(pico_gpt2(), target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    wrapped.save_pretrained(tmp_path)
    adapter, expected = load_adapter(tmp_path), peft_deltas(wrapped)
    assert adapter.layers["transformer.h.0.attn.c_attn"].shape == (96, 32)
    for path, delta in adapter_deltas(adapter).items():
        assert relative_error(delta, expected[path]) < 1e-6
    assert adapter.config["fan_in_fan_out"] is True


def test_named_adapter_of_a_live_model(pico_llama):
    wrapped = peft_model(pico_llama())
    wrapped.add_adapter("second", LoraConfig(r=3, target_modules=["o_proj"], init_lora_weights=False))
    adapter = adapter_from_model(wrapped, "second")
    assert adapter.name == "second"
    assert set(adapter.layers) == {f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)}
    with pytest.raises(AdapterError, match=r"\['default', 'second'\], but not 'third'"):
        adapter_from_model(wrapped, "third")
    with pytest.raises(AdapterError, match="LlamaForCausalLM"):
        adapter_from_model(pico_llama())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_load_round_trip_is_exact(pico_llama, tmp_path, dtype):
    adapter = random_adapter(pico_llama(), rank=3, scaling=1.0, dtype=dtype, base_model="org/pico")
    save_adapter(adapter, tmp_path / "out")
    again = load_adapter(tmp_path / "out")
    assert again.fingerprint == adapter.fingerprint
    assert again.dtype == dtype
    assert again.base_model == "org/pico"
    assert again.config["target_modules"] == sorted(LLAMA_TARGETS)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_what_was_saved(pico_llama, pico_gpt2, tmp_path, family):
    build, targets = {
        "llama": (pico_llama, [("q_proj", "down_proj"), ("q_proj", "v_proj")]),
        "gpt2": (pico_gpt2, [("c_attn",), ("c_attn", "c_fc")]),
    }[family]
    a = random_adapter(build(), "a", targets=targets[0], rank=2, seed=1, dtype=torch.float32)
    b = random_adapter(build(), "b", targets=targets[1], rank=3, seed=2, dtype=torch.float32)
    if family == "gpt2":
        a, b = (Adapter(x.name, x.layers, config={**x.config, "fan_in_fan_out": True}) for x in (a, b))
    space = CoreSpace.of([a, b])
    merged = space.to_adapter(space.core("a") - 0.7 * space.core("b"), name="merged")
    save_adapter(merged, tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == merged.layers[space.layer_names[0]].rank
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]

    dense = build()
    modules = dict(dense.named_modules())
    for sign, adapter in ((1.0, a), (-0.7, b)):
        for path, delta in adapter_deltas(adapter).items():
            change = sign * delta.float()
            modules[path].weight.data += change.T if family == "gpt2" else change
    loaded = PeftModel.from_pretrained(build(), tmp_path / "out").eval()
    assert set(peft_deltas(loaded)) == set(a.layers) | set(b.layers)
    ids = torch.arange(4, 24).view(2, 10)
    expected = dense(ids).logits
    assert relative_error(loaded(ids).logits, expected) < 1e-4
    assert relative_error(build()(ids).logits, expected) > 1e-2


def test_a_written_adapter_stays_off_layers_nobody_adapted(pico_llama, tmp_path):
    wrapped = peft_model(pico_llama(), target_modules=["q_proj"], layers_to_transform=[1])
    wrapped.save_pretrained(tmp_path / "one")
    space = CoreSpace.of([load_adapter(tmp_path / "one")])
    save_adapter(space.to_adapter(space.core("one"), name="merged"), tmp_path / "out")
    loaded = PeftModel.from_pretrained(pico_llama(), tmp_path / "out")
    assert set(peft_deltas(loaded)) == {"model.layers.1.self_attn.q_proj"}


def test_extra_files_and_options_of_save(pico_llama, tmp_path):
    adapter = random_adapter(pico_llama(), scaling=1.0)
    save_adapter(adapter, tmp_path / "out", extra_files={"report.json": "{}"})
    assert (tmp_path / "out" / "report.json").read_text() == "{}"
    with pytest.raises(OSError, match="exists and is not empty"):
        save_adapter(adapter, tmp_path / "out")
    save_adapter(adapter, tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [CONFIG, WEIGHTS]
    with pytest.raises(AdapterError, match=r"ranks \[2\] and scalings \[0.5\]"):
        save_adapter(random_adapter(pico_llama(), scaling=0.5), tmp_path / "other")


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(pico_llama, tmp_path):
    """A good directory, which each test damages."""
    peft_model(pico_llama()).save_pretrained(tmp_path / "bad")
    return tmp_path / "bad"


def edit_weights(directory, edit):
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS)


def edit_config(directory, **changes):
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factor_that_is_not_finite(directory, value):
    edit_weights(directory, lambda t: t[ONE_KEY.format("B")].__setitem__((0, 0), value))
    with pytest.raises(AdapterError, match=r"'model.layers.0.self_attn.q_proj.lora_B.weight' of adapter 'bad'.*NaN"):
        load_adapter(directory)


def test_missing_factor(directory):
    edit_weights(directory, lambda t: t.pop(ONE_KEY.format("B")))
    with pytest.raises(AdapterError, match=r"'model.layers.0.self_attn.q_proj' of adapter 'bad' lacks its lora_B"):
        load_adapter(directory)


def test_rank_other_than_configured(directory):
    edit_config(directory, r=8)
    with pytest.raises(AdapterError, match=r"down_proj.lora_A.weight' of adapter 'bad' has shape \(4, 48\).*rank 8"):
        load_adapter(directory)


def test_factors_that_do_not_fit(directory):
    edit_weights(directory, lambda t: t.__setitem__(ONE_KEY.format("B"), torch.ones(32, 3)))
    with pytest.raises(AdapterError, match=r"Layer 'model.layers.0.self_attn.q_proj' of adapter 'bad'.*\(32, 3\)"):
        load_adapter(directory)


def test_factor_that_is_no_matrix(directory):
    edit_weights(directory, lambda t: t.__setitem__(ONE_KEY.format("A"), torch.ones(4, 32, 1, 1)))
    with pytest.raises(AdapterError, match=r"q_proj.lora_A.weight' of adapter 'bad' must be a matrix"):
        load_adapter(directory)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"trainable_token_indices": [1, 2]}, r"\[1, 2\]"),
        ({"r": 0}, "r=0"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
    ],
)
def test_configuration_that_is_not_plain_lora(directory, changes, words):
    edit_config(directory, **changes)
    with pytest.raises(AdapterError, match=f"(?s)'bad'.*{words}"):
        load_adapter(directory)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"target_modules": ["embed_tokens"]},
    ],
)
def test_adapters_of_peft_that_are_not_plain_lora(pico_llama, tmp_path, options):
    wrapped = peft_model(pico_llama(), **options)
    wrapped.save_pretrained(tmp_path / "bad")
    with pytest.raises(AdapterError, match="'bad'"):
        load_adapter(tmp_path / "bad")
    with pytest.raises(AdapterError, match="'default'"):
        adapter_from_model(wrapped)


def test_live_model_with_an_adapted_embedding(pico_llama):
    """Its embedding factors are no linear layer's and must not be dropped silently."""
    wrapped = peft_model(pico_llama(), target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(AdapterError, match=r"embed_tokens"):
        adapter_from_model(wrapped)


def test_adapted_output_head(pico_llama, tmp_path):
    """PEFT writes a copy of the head's frozen base weights beside its factors; the factors alone are the adapter."""
    wrapped = peft_model(pico_llama(), target_modules=["q_proj", "lm_head"])
    wrapped.save_pretrained(tmp_path / "head")
    adapter, expected = load_adapter(tmp_path / "head"), peft_deltas(wrapped)
    assert set(adapter.layers) == set(expected)
    assert relative_error(adapter.layers["lm_head"].delta(), expected["lm_head"]) < 1e-6


def test_pickled_weights_are_not_loaded(directory):
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"no adapter_model.safetensors.*pickled adapter_model.bin"):
        load_adapter(directory)


def test_unknown_tensor(directory):
    edit_weights(directory, lambda t: t.__setitem__("base_model.model.model.norm.weight", torch.ones(3)))
    with pytest.raises(AdapterError, match=r"'bad' holds the tensor 'base_model.model.model.norm.weight'"):
        load_adapter(directory)


def test_damaged_weights(directory):
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:100])
    with pytest.raises(AdapterError, match=r"adapter 'bad' is not a readable safetensors file"):
        load_adapter(directory)


@pytest.mark.parametrize("text", ["{", "[1]", "\ud800"])
def test_broken_configuration(directory, text):
    (directory / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(AdapterError, match=r"adapter_config.json of adapter 'bad'"):
        load_adapter(directory)


def test_missing_directory_and_file(tmp_path):
    with pytest.raises(AdapterError, match="neither a directory nor a hub id"):
        load_adapter(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="neither a directory nor a hub id"):
        load_adapter(tmp_path / "file")
    with pytest.raises(AdapterError, match=r"has no adapter_config.json.*save_pretrained"):
        load_adapter(tmp_path)


def test_zero_adapter(directory):
    edit_weights(directory, lambda t: [tensor.zero_() for key, tensor in t.items() if "lora_B" in key])
    with pytest.raises(AdapterError, match=r"'bad' .* changes nothing"):
        load_adapter(directory)


# ---- adapters that do not belong together -----------------------------------------------------------------------------


def test_adapters_of_other_hidden_sizes(pico_llama):
    a = random_adapter(pico_llama(), "a")
    wide = {path: LoraFactors(torch.ones(2, 64), torch.ones(f.shape[0], 2), 1.0) for path, f in a.layers.items()}
    with pytest.raises(
        AdapterError, match=r"Layer 'model.layers.0.*' is 32 x 32 in adapter 'a' but 32 x 64 in adapter 'b'"
    ):
        CoreSpace.of([a, Adapter("b", wide)])


def test_adapters_of_other_base_models(pico_llama):
    a = random_adapter(pico_llama(), "a", base_model="org/first")
    b = random_adapter(pico_llama(), "b", base_model="org/second", seed=1)
    with pytest.raises(AdapterError, match=r"'a' was trained on 'org/first' but adapter 'b' on 'org/second'"):
        CoreSpace.of([a, b])
    assert CoreSpace.of([a, b], ignore_base_name=True).size > 0
    local = random_adapter(pico_llama(), "b", base_model="/models/First/", seed=1)
    assert CoreSpace.of([a, local]).size > 0


def test_names_of_adapters(pico_llama):
    a = random_adapter(pico_llama(), "a")
    with pytest.raises(AdapterError, match=r"distinct names"):
        CoreSpace.of([a, a])
    with pytest.raises(AdapterError, match=r"at least one"):
        CoreSpace.of([])


def test_a_transposed_weight_gets_the_transposed_change():
    adapter = Adapter("a", {"c_attn": LoraFactors(A=torch.ones(1, 3), B=torch.tensor([[1.0], [2.0]]), scaling=0.5)})
    transposed = replace(adapter, config={"fan_in_fan_out": True})

    plain = changed_weight(torch.zeros(2, 3), adapter, "c_attn.weight")
    other = changed_weight(torch.zeros(3, 2), transposed, "c_attn.weight")

    assert plain.tolist() == [[0.5, 0.5, 0.5], [1.0, 1.0, 1.0]]
    assert torch.equal(other, plain.mT)
    with pytest.raises(
        AdapterError, match=r"changes 'c_attn.weight' in the shape \(2, 3\), but the base model has \(3, 2\)"
    ):
        changed_weight(torch.zeros(3, 2), adapter, "c_attn.weight")
