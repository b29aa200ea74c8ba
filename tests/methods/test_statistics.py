"""Statistics that do not fit a method, its adapters or each other are refused; those that do come from files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import HARM, SAFETY, UTILITY, gain_and_cost, random_batch, utility_and_safety
from fisher_cases import Data, adapters, batches, dense, fisher
from peft import PeftModel

import sstmerge
from sstmerge.adapters import CoreSpace, load_adapter, save_adapter
from sstmerge.errors import FisherError, InputError, SolverError
from sstmerge.fisher import Fisher, collect_fisher
from sstmerge.merging.methods import REGISTRY
from sstmerge.merging.methods.aligned_pair import AlignedPair
from sstmerge.merging.methods.statistics import FisherStatistics, GainAndCost
from sstmerge.pipeline.method_merge import StatisticsFiles

NAMES = ("math", "code", "safe")
WEIGHTS = (0.2, 1.0, 0.7)
DATA = {name: Data.random(i, size=1.0 + i) for i, name in enumerate(NAMES)}


def run(name, merged, statistics, **options):
    row = REGISTRY.find(name)
    return dense(row.function, merged, statistics, **row.resolve(options))


def fishers(space, structure, data=DATA):
    return FisherStatistics({name: fisher(space, data[name], structure) for name in data})


def ratio_pair(space):
    return GainAndCost(fisher(space, Data.random(20), "diagonal"), fisher(space, Data.random(21), "diagonal"))


def test_fishers_of_the_wrong_kind_are_refused():
    space = CoreSpace.of(adapters())
    merged = batches(space, WEIGHTS, "safe")
    with pytest.raises(FisherError, match="needs input covariances, which a 'diagonal' Fisher"):
        run("regmean", merged, fishers(space, "diagonal"))
    for structure in ("ekfac", "global"):
        with pytest.raises(FisherError, match=f"takes Fishers of one structure.*'math': '{structure}'"):
            run("fisher_full", merged, fishers(space, structure))
    mixed = FisherStatistics(
        {"math": fisher(space, DATA["math"], "kfac")}
        | {name: fisher(space, DATA[name], "block") for name in ("code", "safe")}
    )
    with pytest.raises(FisherError, match="takes Fishers of one structure"):
        run("fisher_full", merged, mixed)
    reduced = replace(fisher(space, DATA["math"], "kfac"), metadata={"model": "pico", "weight_sharing": "reduce"})
    with pytest.raises(FisherError, match="keeps covariances of mean inputs"):
        run("regmean", merged, FisherStatistics({**fishers(space, "kfac").fishers, "math": reduced}))


def test_missing_and_foreign_fishers_are_refused():
    members = adapters()
    space = CoreSpace.of(members)
    merged = batches(space, WEIGHTS, "safe")
    two = FisherStatistics({name: fisher(space, DATA[name], "kfac") for name in ("math", "code")})
    with pytest.raises(FisherError, match=r"one Fisher for each of the adapters \['math', 'code', 'safe'\], but got"):
        run("regmean", merged, two)
    with pytest.raises(FisherError, match="No Fisher was given"):
        FisherStatistics({})
    other = CoreSpace.of(members[:2])
    with pytest.raises(FisherError, match="different adapters or different layers"):
        FisherStatistics({"math": fisher(space, DATA["math"], "kfac"), "code": fisher(other, DATA["code"], "kfac")})
    with pytest.raises(FisherError, match="different base models"):
        GainAndCost(
            fisher(space, DATA["math"], "kfac"),
            replace(fisher(space, DATA["code"], "kfac"), metadata={"model": "another"}),
        )
    foreign = FisherStatistics({name: fisher(other, DATA["math"], "kfac") for name in NAMES})
    with pytest.raises(FisherError, match=r"another basis of layer|other layers"):
        run("regmean", merged, foreign)
    with pytest.raises(FisherError, match="needs a cost Fisher"):
        run("fisher_ratio_mask", merged, GainAndCost(fisher(space, DATA["math"], "kfac")))
    with pytest.raises(InputError, match="name which of"):
        run("fisher_ratio_mask", batches(space, WEIGHTS), ratio_pair(space))


def test_empty_and_zero_fishers_are_refused():
    space = CoreSpace.of(adapters())
    merged = batches(space, WEIGHTS, "safe")
    whole = fisher(space, DATA["math"], "kfac")
    nothing = replace(whole, counts=replace(whole.counts, tokens=torch.zeros(2, dtype=torch.float64)))
    with pytest.raises(FisherError, match="has seen no response token"):
        FisherStatistics({"math": nothing})
    zero = replace(
        whole, statistics={n: t if n.startswith("input_count") else 0 * t for n, t in whole.statistics.items()}
    )
    three = dict.fromkeys(NAMES, zero)
    for name in ("fisher_diagonal", "fisher_full"):
        with pytest.raises(FisherError, match="is zero everywhere"):
            run(name, merged, FisherStatistics(three))
    with pytest.raises(SolverError, match="are singular together"):
        run("regmean", merged, FisherStatistics(three))
    with pytest.raises(SolverError, match="are singular together"):
        run("fisher_full", merged, FisherStatistics(three), normalize=False)
    few = Data.random(0, sequences=2)
    with pytest.raises(SolverError, match="singular together with damping 0"):
        run("fisher_full", merged, fishers(space, "block", dict.fromkeys(NAMES, few)), damping=0.0)


def test_fishers_of_a_part_of_the_adapters_are_refused():
    space = CoreSpace.of(adapters())
    path = "model.layers.0.up"
    rows, columns = (torch.arange(size) for size in space.groups[1].core_shape[1:])
    for part in (space.restrict({path: rows}, {path: columns}), space.restrict({path: rows[:-1]}, {path: columns})):
        with pytest.raises(FisherError, match="covers only a part of adapter 'math'"):
            GainAndCost(fisher(part, DATA["math"], "diagonal"))


# ---- from files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(pico_gpt2, tmp_path_factory):
    """Adapters, Fishers of all kinds, an aligned and a base model, as a user has them on disk; GPT-2 is transposed."""
    folder = tmp_path_factory.mktemp("files")
    model = pico_gpt2().double()
    for adapter in utility_and_safety(model):
        members = {**adapter.config, "fan_in_fan_out": True}
        uniform = CoreSpace.of([adapter]).to_adapter(CoreSpace.of([adapter]).core(adapter.name), name=adapter.name)
        save_adapter(replace(uniform, config=members), folder / adapter.name)
    members = [load_adapter(folder / name, name=name) for name in (UTILITY, SAFETY)]
    space = CoreSpace.of(members)
    for structure in ("diagonal", "kfac", "block", "global"):
        for role, value in zip(("gain", "cost"), gain_and_cost(model, space, structure), strict=True):
            value.save(folder / f"{role}.{structure}")
        for name, seed in ((UTILITY, 5), (SAFETY, 6)):
            data = [HARM if name == SAFETY else random_batch([8] * 30, seed=seed)]
            options = {"structure": structure, "labels": "sampled", "reference": name}
            collect_fisher(model, data, space, **options).save(folder / f"{name}.{structure}")
    model.float().save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "aligned", max_shard_size="20KB")
    assert (folder / "aligned" / "model.safetensors.index.json").is_file()
    return folder


CASES = [
    ("fisher_diagonal", "global", {}),
    ("fisher_full", "kfac", {}),
    ("fisher_full", "block", {"damping": 0.1}),
    ("regmean", "kfac", {}),
    ("sst_experts", "kfac", {"mu": 0.5}),
    ("fisher_ratio_mask", "diagonal", {"mask": "sigmoid"}),
    ("vila_pilot", "global", {}),
    ("agl_merge", "global", {"directions": 5}),
    ("agl_merge", "kfac", {"directions": 5}),
    ("safe_lora", "", {"threshold": 0.8}),
    ("safe_merge", "", {"threshold": 0.8}),
    ("splora", "", {"number": 2}),
]


@pytest.mark.parametrize(("name", "structure", "options"), CASES)
@pytest.mark.parametrize("order", [(UTILITY, SAFETY), (SAFETY, UTILITY)])
def test_merging_files_is_running_the_method(files, pico_gpt2, tmp_path, name, structure, options, order):
    row = REGISTRY.find(name)
    given = {
        "fishers": {"fishers": {n: files / f"{n}.{structure}" for n in order}},
        "gain": {"gain": files / f"gain.{structure}"},
        "gain_and_cost": {"gain": files / f"gain.{structure}", "cost": files / f"cost.{structure}"},
        "aligned_pair": {"aligned": files / "aligned", "base": files / "base"},
    }
    (need,) = set(row.needs) - {"safety"}
    weight = {UTILITY: 1.0, SAFETY: 0.6}
    merged = sstmerge.merge_adapters(
        {n: files / n for n in order},
        [weight[n] for n in order],
        name,
        options=options,
        safety=SAFETY if "safety" in row.needs else None,
        statistics=StatisticsFiles(**given[need]),
        out=tmp_path / "merged",
    )
    members = [load_adapter(files / n, name=n) for n in (UTILITY, SAFETY)]
    loaded = [Fisher.load(path, members) for path in ([*given[need].get("fishers", {}).values()])]
    if need == "fishers":
        statistics = FisherStatistics(dict(zip(order, loaded, strict=True)))
    elif need == "aligned_pair":
        statistics = AlignedPair(files / "aligned", files / "base", members)
    else:
        statistics = GainAndCost(*(Fisher.load(path, members) for path in given[need].values()))
    space = getattr(statistics, "space", CoreSpace.of(members))
    expected = run(name, batches(space, [weight[a.name] for a in space.adapters], SAFETY), statistics, **options)
    assert set(merged.layers) == set(expected)
    for path, delta in expected.items():
        np.testing.assert_allclose(merged.layers[path].delta().numpy(), delta, atol=2e-5)
    report = json.loads((tmp_path / "merged" / "sstmerge_report.json").read_text())["merge"]
    assert report["method"] == name
    model = PeftModel.from_pretrained(pico_gpt2(), tmp_path / "merged").merge_and_unload()
    base = pico_gpt2()
    path = next(iter(expected))
    change = model.get_submodule(path).weight - base.get_submodule(path).weight
    np.testing.assert_allclose(change.detach().numpy().T, expected[path], atol=2e-5)


def test_files_of_other_adapters_are_refused_and_nothing_is_written(files, tmp_path):
    (lone,) = adapters(("math",))
    save_adapter(
        replace(CoreSpace.of([lone]).to_adapter(CoreSpace.of([lone]).core("math"), name="math")), tmp_path / "math"
    )
    with pytest.raises(InputError, match="The statistics were collected for the adapters"):
        sstmerge.merge_adapters(
            {UTILITY: files / UTILITY, "math": tmp_path / "math"},
            method="fisher_full",
            statistics=StatisticsFiles(fishers={UTILITY: files / "utility.kfac", "math": files / "safety.kfac"}),
            out=tmp_path / "merged",
        )
    for statistics, message in [
        (StatisticsFiles(fishers={UTILITY: files / "utility.kfac"}), "needs one Fisher for each of the adapters"),
        (StatisticsFiles(), "needs fishers"),
    ]:
        with pytest.raises(InputError, match=message):
            sstmerge.merge_adapters(
                {n: files / n for n in (UTILITY, SAFETY)},
                method="regmean",
                statistics=statistics,
                out=tmp_path / "merged",
            )
    assert not (tmp_path / "merged").exists()
