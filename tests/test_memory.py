"""Memory: what a run is estimated to need, and that collecting does not grow with the number of batches."""

from __future__ import annotations

import gc
from math import prod
from types import SimpleNamespace

import pytest
import torch
from builders import random_adapter, random_batch
from cli_runs import run_command

from sstmerge.adapters import CoreSpace
from sstmerge.cli.memory_check import check_memory
from sstmerge.errors import InputError
from sstmerge.fisher import collect_fisher
from sstmerge.fisher.structures import Structure
from sstmerge.pipeline.memory_estimate import (
    Estimate,
    estimate_collection,
    model_bytes,
    points_of,
    read_layers,
    statistics_bytes,
)
from sstmerge.pipeline.process_memory import available_bytes, peak_bytes, resident_bytes

PAGES = 2**20


def test_headers_alone_give_layers_and_cores(valid):
    layers = read_layers(list(valid.adapters.values()))
    assert (layers["model.layers.1.up_proj"].outputs, layers["model.layers.1.up_proj"].inputs) == (8, 6)
    assert {layer.rank for layer in layers.values()} == {4}
    assert [layer.core for layer in layers.values()] == [(4, 4)] * 3
    assert read_layers(["owner/adapter"]) == {}


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "block", "global"])
def test_statistics_are_estimated_to_within_a_tenth(valid, structure):
    """The files hold what the estimate counts, and bases and counts besides."""
    layers = read_layers(list(valid.adapters.values()))
    size = valid.fishers[structure][0].stat().st_size
    tensors = statistics_bytes(Structure(structure), layers, rows=24)
    assert tensors <= size
    if structure in ("block", "kfac", "ekfac"):
        assert tensors > 0.3 * size


def test_a_model_is_measured_by_its_headers(job, pico_llama):
    parameters = sum(parameter.numel() for parameter in pico_llama().parameters())
    assert model_bytes(job["base"]) == 4 * parameters
    assert model_bytes(job["base"], dtype="bfloat16") == 2 * parameters
    assert model_bytes(job["base"], quantization="4bit") == parameters / 2


def test_global_grows_with_sequences_draws_and_points(job):
    few, many = (
        estimate_collection(job["base"], [job["utility"], job["safety"]], "global", rows=rows, device="cpu")
        for rows in (10, 1000)
    )
    size = sum(prod(layer.core) for layer in read_layers([job["utility"], job["safety"]]).values())
    assert many.parts["Fishers"] - few.parts["Fishers"] == 990 * 4 * size
    assert points_of("path:utility:utility+safety:3") == 3
    assert points_of("utility") == points_of("path:a:b:99999999999") == 1


def test_what_cannot_fit_is_refused_with_its_parts_unless_the_user_insists():
    estimate = Estimate({"base model": 14e9, "Fishers": 3e9})
    with pytest.raises(InputError, match=r"needs about 17.0 GB .*base model 14.0 GB, Fishers 3.0 GB.*16.0 GB are free"):
        estimate.refuse_if_too_large(16e9)
    estimate.refuse_if_too_large(16e9, ignore=True)
    estimate.refuse_if_too_large(None)
    estimate.refuse_if_too_large(18e9)


def test_a_command_that_cannot_fit_ends_before_it_loads_anything(valid, tmp_path, monkeypatch):
    monkeypatch.setattr("sstmerge.pipeline.process_memory._meminfo_available", lambda: 100.0)
    gain, cost = valid.fishers["kfac"]
    arguments = ["merge", "--gain", gain, "--cost", cost, "--out", tmp_path / "merged"]
    arguments += ["--utility", valid.adapters["utility"], "--safety", valid.adapters["safety"]]
    code, err = run_command(*map(str, arguments))
    assert code == 2
    assert "--ignore-memory" in err
    assert not (tmp_path / "merged").exists()
    assert run_command(*map(str, arguments), "--ignore-memory")[0] == 0


def test_a_sign_of_equality_in_a_path_is_no_name(valid, tmp_path, monkeypatch):
    folder = tmp_path / "lr=1e-4"
    folder.mkdir()
    asked: list[str] = []
    monkeypatch.setattr(
        "sstmerge.pipeline.memory_estimate.estimate_solving", lambda _, adapters: asked.extend(adapters) or Estimate({})
    )
    gain, cost = valid.fishers["kfac"]
    adapters = [str(folder), f"expert={folder}"]
    check_memory(SimpleNamespace(params={"gain": gain, "cost": cost, "adapter": adapters}, meta={}))
    assert asked == [str(folder)] * 2


@pytest.mark.parametrize(
    ("command", "prompts"),
    [
        ("evaluate", ["--harmful", "harm.jsonl"]),
        ("check", ["--harm", "harm.jsonl", "--benign", "benign.jsonl"]),
        ("merge", ["--harm", "harm.jsonl", "--benign", "benign.jsonl", "--module-share", "0.5"]),
        ("sketch", ["--data", "harm.jsonl", "--labels", "data"]),
    ],
)
def test_a_model_that_cannot_fit_is_not_loaded(job, command, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("sstmerge.pipeline.process_memory._meminfo_available", lambda: 100.0)
    monkeypatch.setattr("sstmerge.pipeline.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    arguments = ["--base", job["base"], *(job.get(word, word) for word in prompts), "--out", str(tmp_path / "out")]
    if command in ("check", "merge"):
        arguments += ["--utility", job["utility"], "--safety", job["safety"]]
    code, err = run_command(command, *arguments)
    assert code == 2
    assert "base model" in err
    assert "--ignore-memory" in err
    assert not (tmp_path / "out").exists()


def test_this_process_can_be_measured():
    assert 10 * PAGES < resident_bytes() <= peak_bytes() * 1.1
    held = torch.ones(64 * PAGES // 4)
    before = resident_bytes()
    del held
    assert before > 64 * PAGES
    assert available_bytes() is None or available_bytes() > 0


def grown(pico_llama, batches: int, structure: str) -> float:
    """Return by how many bytes memory grows over the last nine tenths of a collection."""
    model = pico_llama()
    space = CoreSpace.of([random_adapter(model)])
    batch = random_batch([6, 7])
    sizes: dict[int, int] = {}

    def look(done: int, total: int) -> None:
        if done in (total // 10 // 2 * 2, total):
            gc.collect()
            sizes[done] = resident_bytes()

    collect_fisher(model, [batch] * batches, space, structure=structure, progress=look)
    assert len(sizes) == 2
    return max(sizes.values()) - min(sizes.values())


def test_memory_is_flat_over_batches(pico_llama):
    """200 batches: kept activations (more than 100 kB each) would show as 20 MB."""
    assert grown(pico_llama, 200, "kfac") < 8 * PAGES


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["kfac", "block", "diagonal"])
def test_memory_is_flat_over_ten_thousand_batches(pico_llama, structure):
    assert grown(pico_llama, 10_000, structure) < 16 * PAGES
