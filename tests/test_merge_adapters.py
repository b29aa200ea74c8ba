"""`merge_adapters` from files to files: what it writes loads everywhere, and what fails leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from builders import adapter_deltas, collect_pair_files, linear_layers, random_adapter, relative_error
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sstmerge
from sstmerge import StatisticsFiles, merge_adapters
from sstmerge.adapters import Adapter, LoraFactors, load_adapter, save_adapter
from sstmerge.errors import AdapterError, FisherError, InputError, OutputError
from sstmerge.merging.methods import REGISTRY, runner
from sstmerge.merging.methods.task import plan

# PEFT's types on factors take adapters of one rank, which these are not.
DATA_FREE = [
    name for name, row in REGISTRY.methods.items() if set(row.needs) <= {"safety"} and not name.startswith("peft_")
]


def arguments(method: str) -> dict:
    return {"safety": "safety"} if REGISTRY.find(method).needs else {}


@pytest.mark.parametrize("method", DATA_FREE)
def test_what_is_written_loads_in_peft_and_merges_into_the_weights(job, tmp_path, method):
    out = tmp_path / "merged"
    merged = merge_adapters([job["utility"], job["safety"]], [1.0, 0.5], method, out=out, **arguments(method))
    read = load_adapter(out)
    for path, factors in merged.layers.items():
        assert torch.equal(read.layers[path].A, factors.A)
        assert torch.equal(read.layers[path].B, factors.B)
    base = AutoModelForCausalLM.from_pretrained(job["base"])
    expected = {path: base.get_submodule(path).weight.detach().clone() + f.delta() for path, f in merged.layers.items()}
    untouched = set(linear_layers(base, ("k_proj", "o_proj", "gate_proj"))) - set(merged.layers)
    kept = {path: base.get_submodule(path).weight.detach().clone() for path in untouched}
    model = PeftModel.from_pretrained(base, out).merge_and_unload()
    for path, weight in expected.items():
        torch.testing.assert_close(model.get_submodule(path).weight.double(), weight.double(), atol=2e-6, rtol=1e-5)
    assert untouched
    assert all(torch.equal(model.get_submodule(path).weight, weight) for path, weight in kept.items())
    report = json.loads((out / "sstmerge_report.json").read_text())["merge"]
    assert report["method"] == method
    assert [adapter["weight"] for adapter in report["adapters"]] == [1.0, 0.5]


def test_the_result_of_the_sum_is_the_sum(job):
    utility, safety = load_adapter(job["utility"]), load_adapter(job["safety"])
    merged = merge_adapters([utility, safety], [0.7, -0.2])
    ours, left, right = (adapter_deltas(adapter) for adapter in (merged, utility, safety))
    for path, delta in ours.items():
        expected = 0.7 * left.get(path, torch.zeros(())) - 0.2 * right.get(path, torch.zeros(()))
        assert relative_error(delta, expected) < 1e-5


@pytest.mark.parametrize("method", ["task_arithmetic", "cat", "ties", "knots_ties"])
@pytest.mark.parametrize(
    ("dtypes", "asked", "expected"),
    [
        (("bfloat16", "bfloat16"), None, torch.bfloat16),
        (("bfloat16", "float16"), None, torch.float32),
        (("float16", "float16"), None, torch.float16),
        (("bfloat16", "bfloat16"), "float32", torch.float32),
    ],
)
def test_the_dtype_is_kept(pico_llama, method, dtypes, asked, expected):
    adapters = [
        random_adapter(pico_llama(), name, seed=i, dtype=getattr(torch, dtype))
        for i, (name, dtype) in enumerate(zip(("one", "two"), dtypes, strict=True))
    ]
    merged = merge_adapters(adapters, None, method, dtype=asked)
    assert {t.dtype for f in merged.layers.values() for t in (f.A, f.B)} == {expected}
    exact = merge_adapters(adapters, None, method, dtype="float64")
    for path, factors in merged.layers.items():
        assert relative_error(factors.delta(), exact.layers[path].delta()) < 8 * torch.finfo(expected).eps


def test_sources_of_every_kind_and_names(job, pico_llama):
    live = PeftModel.from_pretrained(pico_llama(), job["safety"])
    mixed = merge_adapters({"utility": load_adapter(job["utility"]), "safety": live}, None, "core_dare", seed=4)
    files = merge_adapters([job["utility"], job["safety"]], None, "core_dare", seed=4)
    assert mixed.fingerprint == files.fingerprint
    with pytest.raises(AdapterError, match="distinct names"):
        merge_adapters([job["utility"], job["utility"]])
    with pytest.raises(InputError, match="put it in a list"):
        merge_adapters(job["utility"])


def test_rank_limits(job):
    for method in ("task_arithmetic", "dare", "knots_ties"):
        merged = merge_adapters([job["utility"], job["safety"]], None, method, rank=2)
        assert {factors.rank for factors in merged.layers.values()} == {2}
    exact = merge_adapters([job["utility"], job["safety"]])
    assert {factors.rank for factors in exact.layers.values()} == {5}
    assert {f.rank for f in merge_adapters([job["utility"], job["safety"]], None, "ties").layers.values()} == {3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"method": "tie"}, "Unknown method 'tie'; expected one of .*ties"),
        ({"method": "sst"}, "sstmerge.merge_from_fishers"),
        ({"weights": [1.0]}, r"one weight per adapter \(2\), but got 1"),
        ({"weights": [1.0, float("nan")]}, "must be finite"),
        ({"method": "ties", "options": {"density": 0.0}}, r"density must lie in \(0.0, 1.0\]"),
        ({"method": "ties", "options": {"drop": 0.5}}, "'ties' has no option 'drop'; it has density"),
        ({"rank": 0}, "give a rank from 1 to 5"),
        ({"rank": 6}, "has rank 5 at most"),
        ({"dtype": "int8"}, "Unknown dtype 'int8'"),
        ({"dtype": torch.int8}, "floating-point"),
        ({"seed": -1}, "seed must be an integer"),
        ({"method": "dare", "seed": 1, "options": {"seed": 2}}, "Two seeds were given, 1 and .*seed=2"),
        ({"weights": [0.0, 0.0]}, "changes nothing"),
        ({"weights": [1e300, 1e300]}, "NaN or Inf"),
        ({"safety": "safety"}, "knows no safety adapter"),
        ({"method": "rank_one"}, "needs to know which adapter"),
        ({"method": "fisher_full"}, "needs statistics of type FisherStatistics, but got none"),
        (
            {"method": "agl_merge", "safety": "safety", "statistics": StatisticsFiles(cost="c")},
            "needs gain .* no use of cost",
        ),
        ({"statistics": StatisticsFiles(gain="g")}, "makes no use of gain"),
        ({"statistics": object()}, "needs no statistics, but object was given"),
    ],
)
def test_a_wrong_call_is_a_sentence_and_leaves_nothing_behind(job, tmp_path, call, message):
    with pytest.raises(InputError, match=message):
        merge_adapters([job["utility"], job["safety"]], out=tmp_path / "merged", **call)
    assert not any(tmp_path.iterdir())


def test_a_failure_on_the_way_leaves_an_existing_result_as_it_was(job, tmp_path, monkeypatch):
    out = tmp_path / "merged"
    merge_adapters([job["utility"]], out=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OutputError, match="not empty"):
        merge_adapters([job["safety"]], out=out)

    def fail(*_: object) -> None:
        raise InputError("on the way")

    monkeypatch.setattr(runner, "_assemble", fail)
    with pytest.raises(InputError, match="on the way"):
        merge_adapters([job["safety"]], out=out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_layer_that_holds_nan_is_named_before_anything_is_merged(job, tmp_path):
    damaged = tmp_path / "damaged"
    save_adapter(merge_adapters([job["utility"]]), damaged)
    tensors = load_file(damaged / "adapter_model.safetensors")
    name = next(key for key in tensors if "down_proj.lora_A" in key)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, damaged / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"down_proj.lora_A.weight' of adapter 'damaged' holds NaN"):
        merge_adapters([damaged, job["safety"]], out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(job, tmp_path_factory):
    return collect_pair_files(job, tmp_path_factory.mktemp("pair"))


def test_methods_with_a_gain_and_a_cost_take_files_and_weights_follow_names(job, pair):
    adapters = {"utility": job["utility"], "safety": job["safety"]}
    files = StatisticsFiles(gain=pair["gain"], cost=pair["cost"])
    given = {"safety": "safety", "statistics": files}
    merged = merge_adapters(
        adapters, [2.0, 0.5], "fisher_ratio_mask", options={"mask": "top", "fraction": 1.0}, **given
    )
    # With all entries taken, (u) + (w s − w u) is what the row promises.
    reversed_ = dict(reversed(adapters.items()))
    again = merge_adapters(
        reversed_, [0.5, 2.0], "fisher_ratio_mask", options={"mask": "top", "fraction": 1.0}, **given
    )
    for path, factors in merged.layers.items():
        assert relative_error(again.layers[path].delta(), factors.delta()) < 1e-5
    gain = StatisticsFiles(gain=pair["gain"])
    for method, statistics, options in (("vila_pilot", files, {}), ("agl_merge", gain, {"directions": 4})):
        result = merge_adapters(adapters, None, method, safety="safety", statistics=statistics, options=options)
        assert result.layers.keys() == merged.layers.keys()


def test_a_fisher_of_other_adapters_is_refused(job, pair):
    twice = {"utility": job["utility"], "safety": job["utility"]}
    with pytest.raises((FisherError, AdapterError), match="missing or different"):
        merge_adapters(twice, None, "agl_merge", safety="safety", statistics=StatisticsFiles(gain=pair["gain"]))


def test_methods_with_an_aligned_pair_take_its_directories(job, pico_llama, tmp_path):
    pico_llama(seed=5).save_pretrained(tmp_path / "aligned")
    files = StatisticsFiles(aligned=tmp_path / "aligned", base=job["base"])
    adapters = [job["utility"], job["safety"]]
    merged = merge_adapters(adapters, None, "safe_merge", safety="safety", statistics=files, options={"threshold": 1.0})
    exact = merge_adapters(adapters, [0.8, 0.2])  # every cosine is below 1
    for path in load_adapter(job["utility"]).layers:
        assert relative_error(merged.layers[path].delta(), exact.layers[path].delta()) < 1e-5


# ---- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "knots_ties", "ties", "cat"])
def test_only_a_few_layers_are_in_memory_at_a_time(monkeypatch, method):
    monkeypatch.setattr(runner, "_BATCH_BYTES", 1)
    layers = {f"layers.{i}.q_proj": LoraFactors(torch.randn(2, 8), torch.randn(8, 2), 1.0) for i in range(12)}
    sizes = []
    task = plan(REGISTRY.find(method), [Adapter("one", layers), Adapter("two", dict(layers))])
    function = task.method.function

    def watched(batch: object, **options: object) -> object:
        sizes.append(len(getattr(batch, "names", ("one layer",))))
        return function(batch, **options)

    object.__setattr__(task, "method", type(task.method)(**{**vars(task.method), "function": watched}))
    steps = []
    runner.run(task, lambda what, done, total: steps.append((done, total)))
    assert sizes == [1] * 12
    assert steps[0] == (1, 12)
    assert steps[-1] == (12, 12)


SEVENTY_B = """
import resource, sys, torch, sstmerge
torch.set_num_threads(1)
sstmerge.merge_adapters([sys.argv[1], sys.argv[2]], None, sys.argv[3], out=sys.argv[4])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_adapters_of_a_70b_model_fit_in_a_few_gigabytes(tmp_path):
    shapes = {"q_proj": (8192, 8192), "k_proj": (1024, 8192), "v_proj": (1024, 8192), "o_proj": (8192, 8192)}
    shapes |= {"gate_proj": (28672, 8192), "up_proj": (28672, 8192), "down_proj": (8192, 28672)}
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        layers = {
            f"model.layers.{i}.{module}": LoraFactors(
                A=torch.randn(16, d_in, generator=generator).bfloat16(),
                B=torch.randn(d_out, 16, generator=generator).bfloat16(),
                scaling=1.0,
            )
            for i in range(80)
            for module, (d_out, d_in) in shapes.items()
        }
        save_adapter(Adapter(name, layers), tmp_path / name)
        del layers
    for method in ("task_arithmetic", "tsv_m"):
        command = [sys.executable, "-c", SEVENTY_B, tmp_path / "one", tmp_path / "two", method, tmp_path / method]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
        assert peak < 5e9, f"{method} took {peak / 1e9:.2f} GB"


def test_available_methods_names_them_all():
    methods = sstmerge.available_methods()
    assert {"task_arithmetic", "ties", "dare", "tsv_m", "iso_cts", "knots_ties", "fisher_full", "safe_lora"} <= set(
        methods
    )
    assert methods is not REGISTRY.methods
    for method in methods.values():
        assert method.formula
        assert method.paper.startswith("https://")
        assert method.resolve({}) == {option.name: option.default for option in method.options}
