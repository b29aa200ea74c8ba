"""Fisher files, and what is refused: options, data, models and files that do not fit."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from builders import GPT2_TARGETS, random_adapter, random_batch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sstmerge.adapters import Adapter, CoreSpace, LoraFactors
from sstmerge.errors import AdapterError, FisherError, InputError, OutputError
from sstmerge.fisher import Fisher, collect_fisher, reference_points, tensor_file
from sstmerge.fisher.fisher import read_header
from sstmerge.gevp import solve
from sstmerge.pipeline.evaluate import measured_kl

STRUCTURES = ("diagonal", "kfac", "ekfac", "block", "global")
BATCH = random_batch([6, 5, 7], response=2)


@pytest.fixture(scope="module")
def model(pico_gpt2):
    return pico_gpt2()


@pytest.fixture(scope="module")
def adapters(model):
    return [
        random_adapter(model, "a", targets=GPT2_TARGETS, seed=1, dtype=torch.float32),
        random_adapter(model, "b", targets=("c_attn",), rank=1, seed=2, dtype=torch.float32),
    ]


@pytest.fixture(scope="module")
def space(adapters):
    return CoreSpace.of(adapters)


@pytest.fixture(scope="module")
def fishers(model, space):
    """One Fisher of every structure."""
    kfac = collect_fisher(model, [BATCH], space, structure="kfac")
    basis = solve(kfac, kfac).basis
    return {
        s: collect_fisher(model, [BATCH], space, structure=s, basis=basis if s == "ekfac" else None) for s in STRUCTURES
    }


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_save_and_load_keep_every_bit(fishers, adapters, tmp_path, structure):
    fisher = fishers[structure]
    fisher.save(tmp_path / "f.safetensors")
    renamed = [Adapter(name, a.layers) for name, a in zip("yx", adapters[::-1], strict=True)]
    again = Fisher.load(tmp_path / "f.safetensors", renamed)
    assert again.structure == structure
    assert again.metadata == fisher.metadata
    assert set(again.statistics) == set(fisher.statistics)
    for name, tensor in fisher.statistics.items():
        assert torch.equal(again.statistics[name], tensor)
        assert again.statistics[name].dtype == tensor.dtype
    assert torch.equal(again.counts.tokens, fisher.counts.tokens)
    assert torch.equal(again.mean_score(), fisher.mean_score())
    assert torch.equal(again.space.core("x"), fisher.space.core("a"))
    assert again.quadratic(again.space.core("x")) == fisher.quadratic(fisher.space.core("a"))
    assert (again + fisher).tokens == 2 * fisher.tokens
    assert solve(again, fisher).eigenvalues.tolist() == solve(fisher, fisher).eigenvalues.tolist()


def test_header_tells_what_is_inside(fishers, tmp_path):
    fishers["kfac"].save(tmp_path / "f.safetensors")
    header = read_header(tmp_path / "f.safetensors")
    assert header["structure"] == "kfac"
    assert [a["name"] for a in header["adapters"]] == ["a", "b"]
    assert header["layers"] == list(fishers["kfac"].space.layer_names)
    assert header["metadata"]["labels"] == "data"
    assert sum(header["counts"]["tokens"]) == 6


def test_saving_to_a_full_disk_leaves_nothing(fishers, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(OutputError, match=r"f.safetensors' could not be written: No space left"):
        fishers["kfac"].save(tmp_path / "f.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "text", "missing"])
def test_unreadable_file(fishers, adapters, tmp_path, damage):
    path = tmp_path / "f.safetensors"
    fishers["global"].save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "text":
        path.write_text("not a Fisher")
    else:
        path.unlink()
    with pytest.raises(FisherError, match=r"f.safetensors' (is not a readable safetensors file|cannot be read)"):
        Fisher.load(path, adapters)


def rewrite(path, *, tensors=lambda t: t, header=lambda h: h):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    content = json.loads(metadata["sstmerge_fisher"])
    metadata["sstmerge_fisher"] = json.dumps(header(content))
    save_file(tensors(load_file(path)), path, metadata=metadata)


def test_files_that_are_no_good_fisher(fishers, adapters, tmp_path):
    path = tmp_path / "f.safetensors"
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(FisherError, match="not a Fisher that sstmerge wrote"):
        Fisher.load(path, adapters)
    fishers["diagonal"].save(path)
    rewrite(path, header=lambda h: h | {"format": 99})
    with pytest.raises(FisherError, match=r"format 99; this version reads format 1"):
        Fisher.load(path, adapters)
    fishers["diagonal"].save(path)
    rewrite(path, tensors=lambda t: t | {"square_sum.0": t["square_sum.0"] * float("nan")})
    with pytest.raises(FisherError, match=r"'square_sum.0' in .*f.safetensors holds NaN"):
        Fisher.load(path, adapters)
    fishers["diagonal"].save(path)
    rewrite(path, tensors=lambda t: {name: v for name, v in t.items() if name != "counts.tokens"})
    with pytest.raises(FisherError, match=r"f.safetensors.*counts.tokens"):
        Fisher.load(path, adapters)


def test_fisher_of_other_adapters(fishers, adapters, model, tmp_path):
    path = tmp_path / "f.safetensors"
    fishers["diagonal"].save(path)
    other = random_adapter(model, "a", targets=GPT2_TARGETS, seed=9, dtype=torch.float32)
    with pytest.raises(AdapterError, match=r"collected for the adapters \['a', 'b'\].*Give the same adapter files"):
        Fisher.load(path, [other, adapters[1]])
    elsewhere = collect_fisher(model, [BATCH], CoreSpace.of([other, adapters[1]]), structure="diagonal")
    with pytest.raises(FisherError, match="different adapters"):
        fishers["diagonal"] + elsewhere
    with pytest.raises(FisherError, match="different adapters"):
        solve(fishers["diagonal"], elsewhere)


# ---- sums of different things ----------------------------------------------------------------------------------------


def test_only_fishers_of_one_kind_are_added(fishers, model, space, pico_gpt2):
    diagonal = fishers["diagonal"]
    with pytest.raises(FisherError, match="'diagonal' and a 'block'"):
        diagonal + fishers["block"]
    with pytest.raises(FisherError, match="labels = 'data' and 'sampled'"):
        diagonal + collect_fisher(model, [BATCH], space, structure="diagonal", labels="sampled")
    with pytest.raises(FisherError, match="reference = 'base' and 'a'"):
        diagonal + collect_fisher(model, [BATCH], space, structure="diagonal", reference="a")
    with pytest.raises(FisherError, match="model = "):
        diagonal + collect_fisher(pico_gpt2(seed=1), [BATCH], space, structure="diagonal")
    with pytest.raises(FisherError, match="weight_sharing = 'expand' and 'reduce'"):
        fishers["kfac"] + collect_fisher(model, [BATCH], space, structure="kfac", weight_sharing="reduce")
    other = collect_fisher(model, [random_batch([6, 6], seed=3)], space, structure="kfac")
    other_basis = collect_fisher(model, [BATCH], space, structure="ekfac", basis=solve(fishers["kfac"], other).basis)
    with pytest.raises(FisherError, match="different eigenbases"):
        fishers["ekfac"] + other_basis


def test_a_structure_gives_only_what_it_kept(fishers):
    with pytest.raises(FisherError, match="'kfac' Fisher keeps no diagonal"):
        fishers["kfac"].diagonal()
    with pytest.raises(FisherError, match="'global' Fisher has no Kronecker factors"):
        fishers["global"].kronecker_factors()
    with pytest.raises(FisherError, match="'diagonal' Fisher has no blocks"):
        fishers["diagonal"].blocks()
    with pytest.raises(FisherError, match="'block' Fisher keeps no single scores"):
        fishers["block"].scores()


# ---- options, data and models that do not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"structure": "full"}, "Unknown structure 'full'.*'global'"),
        ({"labels": "argmax"}, "argmax"),
        ({"weight_sharing": "mean"}, "mean"),
        ({"draws": 0}, "draws=0"),
        ({"draws": 2}, "draws=2 with labels='data'"),
        ({"structure": "ekfac"}, "needs one"),
        ({"reference": "c"}, r"'c'.*none of the adapters \['a', 'b'\]"),
        ({"reference": "a+2.5.1*b"}, r"2.5.1\*b"),
        ({"reference": "path:a:b"}, "path:A:B:n"),
        ({"reference": "path:a:b:0"}, "path:A:B:n"),
        ({"reference": torch.ones(3)}, r"coordinates, but got \(3,\)"),
    ],
)
def test_options(model, space, options, words):
    with pytest.raises(InputError, match=f"(?s){words}"):
        collect_fisher(model, [BATCH], space, **options)


def test_references_are_points(space):
    a, b = space.core("a"), space.core("b")
    for text, expected in {
        "base": 0 * a,
        "a": a,
        "a+0.5*b": a + 0.5 * b,
        "base+-1e-1*b": -0.1 * b,
        ".5*a + 2*b": 0.5 * a + 2 * b,
    }.items():
        (found,) = reference_points(text, space)
        torch.testing.assert_close(found, expected, msg=text)
    thirds = reference_points("path:base:a+b:3", space)
    torch.testing.assert_close(torch.stack(thirds), torch.stack([(i + 0.5) / 3 * (a + b) for i in range(3)]))


def test_data_without_a_response(model, space):
    with pytest.raises(InputError, match="no response token"):
        collect_fisher(model, [random_batch([5, 6], response=0)], space)
    with pytest.raises(InputError, match="no response token"):
        collect_fisher(model, [], space)


def test_one_batch_without_a_response_among_others(model, space):
    empty = random_batch([5, 6], response=0, first_index=3)
    alone, both = (collect_fisher(model, batches, space) for batches in ([BATCH], [BATCH, empty]))
    assert both.tokens == alone.tokens
    assert torch.equal(both.mean_score(), alone.mean_score())


def test_layers_that_the_model_does_not_have(model, pico_llama):
    space = CoreSpace.of([random_adapter(pico_llama(), "a")])
    with pytest.raises(AdapterError, match=r"6 adapted layers are not in the model, such as 'model.layers.0"):
        collect_fisher(model, [BATCH], space)


def test_model_of_another_width(model):
    layers = {"transformer.h.0.attn.c_attn": LoraFactors(torch.ones(1, 64), torch.ones(192, 1), 1.0)}
    with pytest.raises(AdapterError, match=r"'transformer.h.0.attn.c_attn' maps 32 to 96 .* 64 to 192 in the adapters"):
        collect_fisher(model, [BATCH], CoreSpace.of([Adapter("a", layers)]))


def test_adapted_layer_that_gets_no_gradient(pico_gpt2, space):
    model = pico_gpt2()
    inner = model.transformer.h[0].mlp.forward
    model.transformer.h[0].mlp.forward = lambda x: inner(x).detach()
    with pytest.raises(FisherError, match=r"Layer 'transformer.h.0.mlp.c_fc' received no gradient"):
        collect_fisher(model, [BATCH], space)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "block", "global"])
def test_numbers_that_overflow(pico_llama, structure):
    broken = pico_llama()
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    space = CoreSpace.of([random_adapter(broken, "a")])
    with pytest.raises(FisherError, match=r"layer 'model.layers.\d.*' are not finite.*bfloat16 or float32"):
        collect_fisher(broken, [BATCH], space, structure=structure, labels="sampled")
    half = pico_llama().half()
    half.model.layers[1].mlp.down_proj.weight.data *= 3e4
    with pytest.raises(FisherError, match=r"layer 'model.layers.\d.*' are not finite"):
        collect_fisher(half, [BATCH], space, structure=structure)


def test_models_that_are_no_language_model(model, space):
    with pytest.raises(InputError, match="GPT2Model has no output embeddings"):
        collect_fisher(model.transformer, [BATCH], space)


def test_peft_model_with_merged_weights(pico_llama):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(pico_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    space = CoreSpace.of([random_adapter(pico_llama(), "a")])
    wrapped.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter"):
        collect_fisher(wrapped, [BATCH], space)


def test_measured_kl_refuses_batches_without_a_response(model):
    from contextlib import nullcontext

    with pytest.raises(InputError, match="no batch holds a response token"):
        measured_kl(model, [random_batch([5], response=0)], nullcontext, nullcontext)
