"""The experiments of benchmarks/experiments on a model and data of a few kilobytes: stages, resuming, report."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from sstmerge import available_methods
from sstmerge.adapters import CoreSpace
from sstmerge.errors import DataError

EXPERIMENTS = Path(__file__).parents[1] / "benchmarks" / "experiments"


@pytest.fixture
def modules(monkeypatch):
    """The experiments' modules, which find each other beside themselves as scripts do."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    names = [path.stem for path in EXPERIMENTS.glob("*.py")]
    imported = {name: __import__(name) for name in names}
    yield imported
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def model(tmp_path, pico_llama, pico_tokenizer):
    pico_llama().save_pretrained(tmp_path / "model")
    pico_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()

    def table(name, columns, rows):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])

    def rows(name, content):
        (folder / name).write_text(json.dumps(content))

    table("strongreject.csv", ["category", "forbidden_prompt"], [["a", f"Do bad thing {i}"] for i in range(9)])
    table("xstest_prompts.csv", ["prompt", "label"], [[f"How do I kill process {i}?", "safe"] for i in range(9)])
    rows("refusal_direction_harmless_test.json", [{"instruction": f"Sing song {i}"} for i in range(9)])
    refusals = [{"instruction": f"Do evil {i}", "output": "I can't help with that."} for i in range(30)]
    rows("safety_only_data_Instructions.json", refusals)
    rows("alpaca_data.json", [{"instruction": f"Say {i}", "input": "", "output": f"Here: {i}"} for i in range(60)])
    for name in ("stsa.binary.train", "stsa.binary.test"):
        lines = [f"{i % 2} a film {'good' if i % 2 else 'bad'} of {name} {i}" for i in range(40)]
        (folder / name).write_text("\n".join(lines))
    return folder


@pytest.fixture
def sets(modules, data):
    return modules["prompts"].DataSets(data)


def tiny(modules):
    sizes = modules["prompts"].Sizes(safety=8, utility=8, calibration=4, test=4, task_test=6)
    return replace(
        modules["safety_tax"].QUICK,
        sizes=sizes,
        seeds=(0, 1),
        scales=(0.5, 1.5),
        methods=("task_arithmetic", "regmean", "fisher_ratio_mask"),
        structures=("global", "kfac"),
        rules=("project", "wiener", "joint", "refit"),
        training=modules["workbench"].Training(epochs=1, safety_epochs=1, learned_tokens=4),
        answer_tokens=4,
        resamples=20,
    )


def test_safety_tax_runs_through_and_resumes(modules, model, sets, tmp_path, monkeypatch):
    said = []
    config = tiny(modules)
    bench = modules["workbench"].Workbench(model, sets, tmp_path / "out", said.append)
    experiment = modules["safety_tax"].SafetyTax(bench, tmp_path / "out", config)
    assert experiment.estimate() > 0
    experiment.run()
    page = (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "trade_off.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    names = ["task_arithmetic", "regmean", "fisher_ratio_mask", "sst global project", "sst global wiener"]
    names += [
        "sst global joint",
        "sst kfac project",
        "sst kfac wiener",
        "sst kfac joint",
        "sst kfac refit",
        "sst kfac wiener, μ = 10",
        "sst kfac wiener, μ = 10, refusals as cost",
        "sst kfac wiener, μ = 30, refusals as cost",
        "sst kfac wiener, μ = 3, exponent 3, refusals as cost",
        "fisher_ratio_mask, refusals as cost",
        "sst global project, Kronecker damping",
        "control: random directions",
        "control: F_cost = I",
        "control: permuted labels",
    ]
    assert sorted(results["metrics"]) == sorted(names)
    assert all(f"| {name} |" in page for name in names)
    assert results["manifest"]["config"]["seeds"] == [0, 1]
    assert [point["scale"] for point in results["points"]["task_arithmetic"]] == [0.5, 1.5]
    assert [point["scale"] for point in results["points"]["regmean"]] == [1.0, 3.0]
    assert [p["scale"] for p in results["points"]["sst global project, Kronecker damping"]] == [1.0, 3.0]
    assert "Kronecker damping at [1.0, 3.0]" in page
    # Every stage once: 2 seeds × (2 adapters, 3 pairs of Fishers, 2 own Fishers and one of refusals, 3 models alone,
    # 19 methods at 2 scales).
    assert len(said) == len(results["manifest"]["stages"]) == 2 * (2 + 3 + 3 + 3 + 38)

    assert results["manifest"]["stages of other source code"] == []

    # Again, with every method there is and a changed source file: only the new ones are run, and what is kept is told.
    said.clear()
    monkeypatch.setattr(modules["stages"], "source_digest", lambda: "other")
    more = replace(config, methods=None, scales=(0.5,), seeds=(0,))
    bench = modules["workbench"].Workbench(model, sets, tmp_path / "out", said.append)
    again = modules["safety_tax"].SafetyTax(bench, tmp_path / "out", more)
    again.run()
    assert {c.settings.get("method") for c in again.listed} == {None, *available_methods()} - {"cat"}
    new = len(again.listed) - len(names)
    assert said[:-1] == ["point …"] * new
    assert said[-1].startswith(
        f"{len(bench.stages.records) - new} of {len(bench.stages.records)} stages were computed by other"
    )
    wider = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(names) < set(wider["metrics"]) == {candidate.name for candidate in again.listed}


def test_prompts_are_disjoint_and_seeds_draw_others(modules, sets):
    sizes = modules["prompts"].Sizes(safety=8, utility=8, calibration=4, test=4, task_test=6)
    first, second = (modules["prompts"].draw_prompts(sets, ["sst2"], sizes, seed) for seed in (0, 1))
    assert first.test == second.test
    assert first.tasks == second.tasks
    assert first.safety != second.safety
    used = [e.prompt for part in (first.safety, first.utility, first.gain, first.cost) for e in part]
    tested = [e.prompt for rows in (*first.test.values(), *first.tasks.values()) for e in rows]
    assert len(set(used) | set(tested)) == len(used) + len(tested)
    assert len(first.refusals) == 8


def test_metrics_of_a_made_up_experiment(modules):
    """One method refuses everything at no cost, the other pays one for one."""
    report = modules["report"]
    n = 40
    shares = np.array([[0.0, 0.5, 1.0], [0.0, 0.5, 1.0]])
    refused = np.arange(n) < (shares * n)[..., None]
    right = np.stack([np.ones((3, n)), np.arange(n) >= (shares[1] * n)[:, None]])
    samples = {
        "refused harmful": refused[:, :, None].astype(float),
        "refused borderline": np.stack([np.zeros((3, n)), refused[1]])[:, :, None].astype(float),
        "correct sst2": right[:, :, None].astype(float),
    }
    expert = {name: np.ones((1, n)) for name in samples}
    results = report.Results(
        ("sst free", "paying"),
        {"sst free": (0.5, 1.0, 1.5), "paying": (0.5, 1.0, 1.5)},
        samples,
        {"utility": expert, "safety": expert},
        ("sst2",),
        ("sst free",),
    )
    found = report.intervals(results, resamples=100, seed=0)
    assert found["sst free"]["hypervolume, safety × utility"]["estimate"] == 1
    assert found["paying"]["hypervolume, safety × utility"]["estimate"] == 0.25
    assert found["paying"]["sst free leads by, hypervolume, safety × utility"]["estimate"] == 0.75
    assert found["paying"]["sst free, over-refusal at matched safety over that of"]["estimate"] == 0
    table = report._table_of_leads("sst free", ["paying"], found)[-1]
    assert table.startswith("| paying | **0.75 [")
    assert table.count("**0 [0, 0]**") == 1
    assert found["sst free"]["safety at 95 % utility"]["estimate"] == 1
    assert found["paying"]["safety at 95 % utility"]["estimate"] == pytest.approx(0.05)
    assert found["paying"]["Safety Tax at matched safety"]["estimate"] == pytest.approx(0.8)
    assert found["paying"]["over-refusal at matched safety"]["estimate"] == pytest.approx(0.8)
    assert found["paying"]["pearson of safety and utility"] == pytest.approx(-1)
    assert found["sst free"]["pearson of safety and utility"] is None


def test_the_adapters_alone_are_drawn_anew_with_the_methods(modules):
    """A merge that answers as the adapters alone do pays nothing in any resample, however few prompts there are."""
    report, rng = modules["report"], np.random.default_rng(0)
    alone = {
        "refused harmful": (rng.random((2, 12)) < 0.9).astype(float),
        "refused borderline": (rng.random((2, 12)) < 0.3).astype(float),
        "correct sst2": (rng.random((2, 12)) < 0.6).astype(float),
    }
    twice = {name: np.stack([answers, answers])[None] for name, answers in alone.items()}
    results = report.Results(
        ("as alone",), {"as alone": (1.0, 2.0)}, twice, {"utility": alone, "safety": alone}, ("sst2",), ("as alone",)
    )
    found = report.intervals(results, resamples=50, seed=0)["as alone"]
    tax = found["Safety Tax at matched safety"]
    assert (tax["low"], tax["estimate"], tax["high"], tax["undefined"]) == (0, 0, 0, 0)
    assert found["safety at 99 % utility"]["undefined"] == 0
    assert found["over-refusal at matched safety"]["low"] < found["over-refusal at matched safety"]["high"]


def test_leads_are_given_seed_by_seed(modules):
    """One method refuses every harmful prompt in the first seed, the other in the second; they answer alike otherwise."""
    report = modules["report"]
    ones = np.ones((2, 1, 2, 4))
    refused = ones.copy()
    refused[0, :, 1] = refused[1, :, 0] = 0.5
    samples = {"refused harmful": refused, "refused borderline": 0 * ones, "correct sst2": ones}
    expert = dict.fromkeys(samples, ones[0, 0])
    names = ("first", "second")
    results = report.Results(
        names, dict.fromkeys(names, (1.0,)), samples, {"utility": expert, "safety": expert}, ("sst2",), ("first",)
    )
    found = report.intervals(results, resamples=20, seed=0)
    assert found["second"]["first leads by, hypervolume, safety × utility, by seed"] == [0.5, -0.5]
    assert "], 1 of 2 | " in report._table_of_leads("first", ["second"], found)[-1]


def test_a_share_of_resamples_without_a_value_is_shown(modules):
    interval = {"estimate": 0.5, "low": 0.4, "high": 0.6, "level": 0.95, "undefined": 30, "resamples": 100}
    assert modules["report"]._cell(interval) == "0.5 [0.4, 0.6] (30%)"
    assert modules["report"]._cell(interval | {"undefined": 0}) == "0.5 [0.4, 0.6]"
    assert modules["report"]._cell(None) == "–"


def test_outputs_that_cannot_all_be_written_replace_none(modules, tmp_path):
    names = ("numbers.json", "picture.png", "page.md")
    write = partial(modules["workbench"].write_outputs, tmp_path, names)
    write({"run": 1}, Figure(), ["first"])
    with pytest.raises(TypeError):
        write({"run": 2}, Figure(), [2])
    assert json.loads((tmp_path / "numbers.json").read_text()) == {"run": 1}
    assert (tmp_path / "page.md").read_text() == "first\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_the_picture_colours_the_strongest_rivals_and_task_arithmetic(modules):
    """Method i refuses i of 20 harmful prompts; all answer everything else and are right; task arithmetic refuses none."""
    report, n, rivals = modules["report"], 20, [f"rival {i:02d}" for i in range(1, 13)]
    names = ("task_arithmetic", *rivals, "sst kfac wiener", "sst global project", "control: random directions")
    refused = np.zeros((len(names), 1, 1, n))
    for i in range(1, 13):
        refused[i, ..., :i] = 1
    ones = np.ones_like(refused)
    expert = {"refused harmful": ones[0, 0], "refused borderline": ones[0, 0], "correct sst2": ones[0, 0]}
    results = report.Results(
        names,
        dict.fromkeys(names, (1.0,)),
        {"refused harmful": refused, "refused borderline": 1 - ones, "correct sst2": ones},
        {"utility": expert},
        ("sst2",),
        ("sst kfac wiener",),
    )
    labels = [text.get_text() for text in report.draw(results).legends[0].get_texts()]
    coloured = ["task_arithmetic", *rivals[-9:]]
    others = ["other methods", "sst, other structures and rules", "controls", "sst kfac wiener"]
    assert sorted(labels) == sorted([*coloured, *others])


def test_fidelity_runs_through_and_resumes(modules, model, sets, tmp_path):
    fidelity, said = modules["fidelity"], []
    config = replace(
        fidelity.QUICK,
        sizes=modules["prompts"].Sizes(safety=8, utility=8, calibration=8, test=4, task_test=4),
        samples=(2, 4),
        training=modules["workbench"].Training(epochs=1, safety_epochs=1),
        resamples=20,
    )
    for _ in range(2):
        bench = modules["workbench"].Workbench(model, sets, tmp_path / "out", said.append)
        experiment = fidelity.Fidelity(bench, tmp_path / "out", config)
        assert experiment.estimate() > 0
        experiment.run()
    # Once each: 2 adapters; for each of 2 references a held-out pair, 3 structures × 2 sizes of pairs, and their 6 KLs.
    assert len(said) == 2 + 2 * (1 + 6 + 6)
    rows = json.loads((tmp_path / "out" / "fidelity.json").read_text())["rows"]
    assert [(r["structure"], r["samples"]) for r in rows[:3]] == [("global", 4), ("global", 2), ("kfac", 4)]
    for row in rows:
        assert row["measured KL"] > 0
        assert row["held-out KL"] > 0
        ratio = row["measured / predicted KL"]
        assert ratio["estimate"] == pytest.approx(row["measured KL"] / row["predicted KL"])
        assert ratio["low"] <= ratio["estimate"] <= ratio["high"]
        halves = row["measured / split-half KL"]["estimate"]
        assert halves == pytest.approx(row["measured KL"] / row["split-half KL"])
        assert -1.001 <= row["agreement"] <= 1.001
    # The first case of every reference is what the others are compared with.
    assert [r["agreement"] for r in rows[:: len(rows) // 2]] == pytest.approx([1, 1])
    assert (tmp_path / "out" / "fidelity.png").stat().st_size > 10_000
    page = (tmp_path / "out" / "fidelity.md").read_text()
    assert page.count("| utility | ") == len(rows) // 2


class OtherBases:
    """Spaces with one basis turned round, as other code or another machine may find it."""

    @staticmethod
    def of(adapters):
        space = CoreSpace.of(adapters)
        tensors = {name: -t if name == "basis.output.0" else t for name, t in space.basis_tensors().items()}
        return CoreSpace.from_basis(adapters, space.basis_description(), tensors)


def test_many_experts_runs_through_and_resumes(modules, model, data, sets, tmp_path, monkeypatch):
    many, said = modules["many_experts"], []
    for name, words in (("TREC.train.all", "x"), ("TREC.test.all", "y")):
        (data / name).write_text("\n".join(f"{i % 6} What is {words} {i} ?" for i in range(30)))
    (data / "subj.all").write_text("\n".join(f"{i % 2} sentence {i}" for i in range(40)))
    config = replace(
        many.QUICK,
        tasks=("sst2", "trec", "subjectivity"),
        counts=(2, 3),
        train=8,
        test=20,
        test_in_all=33,
        methods=("task_arithmetic", "regmean"),
        epochs=1,
        resamples=20,
    )
    for _ in range(2):
        bench = modules["workbench"].Workbench(model, sets, tmp_path / "out", said.append)
        experiment = many.ManyExperts(bench, tmp_path / "out", config)
        assert experiment.estimate() > 0
        experiment.run()
    # Once each: 3 experts, and alone; for each T the Fisher of each expert, the base, one method at 2 scales, two at 4.
    assert len(said) == 3 + (2 + 3) + 2 + 3 + 2 * (2 + 4 + 4)
    rows = json.loads((tmp_path / "out" / "many_experts.json").read_text())["rows"]
    assert [(r["experts"], r["method"]) for r in rows[:4]] == [
        (2, "base"), (2, "task_arithmetic"), (2, "regmean"), (2, many.SST)
    ]  # fmt: skip
    for row in rows:
        for metric in (many.NORMALISED, many.PLAIN):
            assert row[metric]["estimate"] == pytest.approx(max(row[metric]["by scale"].values()))
            assert set(row["by task"][metric]) == set(config.tasks[: row["experts"]])
        assert row[many.PLAIN]["estimate"] == pytest.approx(np.mean([*row["by task"][many.PLAIN].values()]))
        answered = {2: 16, 3: 11}[row["experts"]]
        right = [answered * accuracy for accuracy in row["by task"][many.PLAIN].values()]
        assert right == pytest.approx(np.round(right))
        if row["method"] != many.SST:
            sst = next(r for r in rows if (r["experts"], r["method"]) == (row["experts"], many.SST))
            lead = row[many.LEAD][many.PLAIN]
            assert lead["estimate"] == pytest.approx(sst[many.PLAIN]["estimate"] - row[many.PLAIN]["estimate"])
            assert lead["low"] <= lead["estimate"] <= lead["high"]
    page = (tmp_path / "out" / "many_experts.md").read_text()
    assert page.count("| sst_experts | ") == 2
    assert page.count("| regmean | ") == 3
    # A merge by Fishers depends on them, one without does not.
    more = many.ManyExperts(bench, tmp_path / "out", replace(config, fisher_rows=4))
    said.clear()
    more.run()
    assert {line.split(" ")[0].split("-")[0] for line in said} == {"own", "experts"}
    assert len(said) == (2 + 3) + 2 * (4 + 4)
    fewer = many.ManyExperts(bench, tmp_path, replace(config, counts=(2,))).rows(0)
    assert fewer == {task: rows for task, rows in experiment.rows(0).items() if task in fewer}
    # Coordinates in other bases mean something else: such a Fisher once passed for the space's own.
    monkeypatch.setattr(many, "CoreSpace", OtherBases)
    with pytest.raises(DataError, match=r"own-fisher-sst2-.* delete that folder and run again"):
        experiment.run()
    with pytest.raises(modules["many_experts"].DataError, match="4 experts need as many tasks, but 3"):
        many.ManyExperts(bench, tmp_path, replace(config, counts=(4,)))


def test_second_test_has_nothing_in_common_with_anything_else(modules, sets, monkeypatch):
    prompts = modules["prompts"]
    sizes = prompts.Sizes(safety=8, utility=8, calibration=4, test=4, task_test=6)
    first = prompts.draw_prompts(sets, ["sst2"], sizes, 0)
    monkeypatch.setattr(prompts, "DEVELOPMENT", 2)
    second = prompts.with_second_test(first, sets, 3)
    assert (second.safety, second.gain, second.cost) == (first.safety, first.gain, first.cost)
    for kind, rows in second.test.items():
        fresh = {e.prompt for e in rows}
        assert len(fresh) == 3
        assert not fresh & {e.prompt for e in (*first.test[kind], *first.safety, *first.gain, *first.cost)}
    with pytest.raises(DataError, match="4 prompts are needed, but only 3"):
        prompts.with_second_test(first, sets, 4)  # nine, less four of the test and two of the development


def test_answers_of_several_tests_are_put_together_and_those_of_tasks_are_not(modules):
    first = {"refused harmful": np.array([1.0, 0.0]), "correct sst2": np.array([1.0])}
    second = {"refused harmful": np.array([1.0]), "correct sst2": np.array([1.0])}
    found = modules["measurement"].together([first, second])
    assert {name: array.tolist() for name, array in found.items()} == {
        "refused harmful": [1.0, 0.0, 1.0],
        "correct sst2": [1.0],
    }


def test_both_tests_are_one(modules, model, sets, tmp_path, monkeypatch):
    monkeypatch.setattr(modules["prompts"], "DEVELOPMENT", 2)
    config = replace(tiny(modules), candidates=("task_arithmetic",), structures=("kfac",), seeds=(0,))
    outcomes, titles = {}, {"first": "", "second": ", second test", "both": ", both tests"}
    for name, tests in (
        ("first", {}),
        ("second", {"second_test": 3}),
        ("both", {"second_test": 3, "both_tests": True}),
    ):
        said: list[str] = []
        bench = modules["workbench"].Workbench(model, sets, tmp_path / "out", said.append)
        experiment = modules["safety_tax"].SafetyTax(bench, tmp_path / "out", replace(config, **tests))
        assert experiment.estimate() > 0
        experiment.run()
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["manifest"]["experiment"] == "Experiment A: Safety Tax" + titles[name]
        outcomes[name] = results["points"]["task_arithmetic"]
    assert said == []  # nothing is measured anew
    for first, second, both in zip(*outcomes.values(), strict=True):
        for kind in ("harmful", "borderline", "ordinary"):
            refused = f"refused {kind}"
            assert both[refused] == pytest.approx((4 * first[refused] + 3 * second[refused]) / 7)
        assert both["correct sst2"] == first["correct sst2"] == second["correct sst2"]
    with pytest.raises(DataError, match="Both tests need the size of the second one"):
        modules["safety_tax"].SafetyTax(bench, tmp_path, replace(config, both_tests=True))


def test_candidates_are_chosen_by_name(modules, model, sets, tmp_path):
    bench = modules["workbench"].Workbench(model, sets, tmp_path / "out", lambda words: None)
    experiment = modules["safety_tax"].SafetyTax
    config = replace(tiny(modules), candidates=("task_arithmetic", "sst kfac wiener"))
    assert [candidate.name for candidate in experiment(bench, tmp_path, config).listed] == list(config.candidates)
    with pytest.raises(DataError, match=r"no candidates \['sst'\]"):
        experiment(bench, tmp_path, replace(config, candidates=("sst", "task_arithmetic")))
    with pytest.raises(DataError, match=r"no methods \['tie'\]; expected 'all' or some of .*'ties'"):
        experiment(bench, tmp_path, replace(config, methods=("task_arithmetic", "tie")))
    with pytest.raises(DataError, match=r"no methods \['agl_merge'\]"):  # it needs a safety adapter
        modules["many_experts"].ManyExperts(
            bench, tmp_path, replace(modules["many_experts"].QUICK, methods=("agl_merge",))
        )


def test_every_method_is_what_all_means(modules):
    every = modules["candidates"].candidates(None, ("kfac",), ("project",))
    assert every == modules["candidates"].candidates(("all",), ("kfac",), ("project",))
    config = replace(modules["many_experts"].QUICK, methods=("all",))
    without_roles = {name for name, method in available_methods().items() if {*method.needs} <= {"fishers"}} - {"cat"}
    assert {*modules["many_experts"].ManyExperts(None, Path(), config).names} == without_roles


def test_the_aligned_pair_differs_by_the_safety_adapter(modules, model, sets, tmp_path):
    bench = modules["workbench"].Workbench(model, sets, tmp_path / "out", lambda words: None)
    config = tiny(modules)
    adapters = bench.adapters(bench.train_roles(bench.prompts(("sst2",), config.sizes, 0), config.training, 0))
    with bench.aligned_pair(adapters) as pair:
        for layer, factors in adapters["safety"].layers.items():
            assert pair.difference(layer).double().numpy() == pytest.approx(factors.delta().numpy(), abs=1e-7)
        assert min(c.cosine for c in pair.comparisons("safety").values()) > 0.5  # SafeLoRA keeps it
    assert not Path(pair.base).exists()
