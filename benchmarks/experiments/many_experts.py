"""Experiment B, many experts: what is left of T experts in one model, by every method, swept over one common scale?

    python benchmarks/experiments/many_experts.py --model MODEL --data FOLDER --out FOLDER [--quick | --short]

Each expert is an adapter of one classification task. For every T the first T tasks are merged, and the merged model is
measured on all of their test examples. The numbers are the normalised average accuracy, the mean of accuracy(merged) /
accuracy(expert), and the plain average accuracy, which an expert that has learned nothing cannot distort. SST's many-expert
form (`sst_experts` with its defaults) takes the Fisher of each expert's data at that expert as its gain and the others' as
its cost; RegMean and Fisher merging are given the same Fishers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from workbench import (
    OWN_FISHER,
    SAME_AS_TASK_ARITHMETIC,
    Workbench,
    chosen_methods,
    common_arguments,
    data_sets,
    in_words,
    rows_key,
    stage_names,
    stopwatch,
    write_outputs,
)

from sstmerge import available_methods
from sstmerge.adapters import Adapter, CoreSpace
from sstmerge.errors import DataError
from sstmerge.evaluation.classification import classify
from sstmerge.evaluation.classification_tasks import CLASSIFICATION_TASKS
from sstmerge.evaluation.metrics import Interval, bootstrap, normalised_average_accuracy
from sstmerge.evaluation.overlap import refuse_overlaps, without
from sstmerge.fisher import Fisher
from sstmerge.merging.methods.statistics import FisherStatistics
from sstmerge.pipeline.evaluate import write_json
from sstmerge.pipeline.evaluate_job import adapter_state, core_state
from sstmerge.pipeline.method_merge import merge_adapters
from sstmerge.prompts import Example

STATISTICS = "kfac"
SST = "sst_experts"
# An average by Fishers is published without a scale, a common weight of all experts cancels in it, and it shrinks: its
# result is swept over these, as ours is.
AVERAGES = ("fisher_diagonal", "fisher_full", "regmean")
SCALES_OF_FILTERS = (1.0, 1.5, 2.0, 3.0)
NORMALISED, PLAIN = "normalised average accuracy", "average accuracy"
BASE, EXPERTS = "base", "experts"
LEAD = f"{SST} leads by"
LONGEST_PROMPT = 400  # characters
# No two of the first eight ask the same question of the same kind of text.
TASKS = (
    "sst2",
    "trec",
    "subjectivity",
    "cola",
    "tweets-emotion",
    "mrpc",
    "tweets-irony",
    "boolq",
    "openbookqa",
    "customer-reviews",
    "rte",
    "tweets-offensive",
    "winogrande",
    "hate-speech",
    "opinions",
    "sst5",
    "piqa",
    "social-i-qa",
    "tweets-hate",
    "rotten-tomatoes",
)


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        tasks: The tasks, in the order that they join in.
        counts: Numbers of experts.
        seeds: Seeds of training and its rows.
        train: Training examples of each task.
        fisher_rows: Training examples that an expert's Fishers see.
        test: Test examples of each task.
        test_in_all: Test examples of all tasks together at most: of more experts each answers fewer.
        scales: Weights that all experts are given by methods that do not shrink.
        methods: Methods of the registry; None or ("all",) for all that need no roles.
        epochs: Passes of the training.
        learning_rate: Peak learning rate.
        resamples: Bootstrap resamples.
    """

    tasks: tuple[str, ...] = TASKS
    counts: tuple[int, ...] = (8, 14, 20)
    seeds: tuple[int, ...] = (0, 1, 2)
    train: int = 320
    fisher_rows: int = 64
    test: int = 200
    test_in_all: int = 2000
    scales: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.2)
    methods: tuple[str, ...] | None = None
    epochs: int = 2
    learning_rate: float = 7e-4
    resamples: int = 2000

    def tested(self, count: int) -> int:
        """Return the number of test examples of each of so many tasks."""
        return min(self.test, self.test_in_all // count)


RIVALS = (
    "task_arithmetic",
    "ties",
    "dare",
    "tsv_m",
    "iso_c",
    "knots_ties",
    "subspace_boosting",
    "regmean",
    "fisher_full",
)
SHORT = Config(
    counts=(4, 8),
    seeds=(0,),
    fisher_rows=32,
    test=48,
    test_in_all=384,
    scales=(0.2, 0.4, 0.8, 1.2),
    methods=RIVALS,
    resamples=1000,
)
QUICK = Config(
    tasks=("sst2", "trec", "subjectivity", "cola"),
    counts=(2, 4),
    seeds=(0,),
    train=96,
    fisher_rows=24,
    test=32,
    scales=(0.4, 0.8),
    methods=RIVALS,
    resamples=300,
)


class ManyExperts:
    """One run of the experiment."""

    def __init__(self, bench: Workbench, out: Path, config: Config) -> None:
        if max(config.counts) > len(config.tasks):
            raise DataError(f"{max(config.counts)} experts need as many tasks, but {len(config.tasks)} are listed.")
        self.bench, self.out, self.config = bench, out, config
        without_roles = [
            name
            for name, method in available_methods().items()
            if set(method.needs) <= {"fishers"} and name not in SAME_AS_TASK_ARITHMETIC
        ]
        self.names = [*(name for name in chosen_methods(config.methods, without_roles) if name != SST), SST]

    def rows(self, seed: int) -> dict[str, tuple[list[Example], list[Example]]]:
        """Return training and test examples of each task; no training example of any task is a test example of any other.

        SST-2's sentences are among Rotten Tomatoes', for one: no task is tested on what an earlier one could learn. So the
        examples of a task are the same whatever tasks follow; and the test examples are the same for all seeds.
        """
        config = self.config
        tasks = config.tasks[: max(config.counts)]
        pools = {task: self._pools(task) for task in tasks}
        tests: dict[str, list[Example]] = {}
        for task in tasks:
            unseen = without(pools[task][1], *(pools[earlier][0] for earlier in tests))
            if len(unseen) < config.test:
                raise DataError(f"The task '{task}' has {len(unseen)} test examples, but needs {config.test}.")
            tests[task] = random.Random(0).sample(unseen, config.test)
        found = {}
        for task in tasks:
            left = without(pools[task][0], *tests.values())
            if len(left) < config.train:
                raise DataError(f"The task '{task}' has {len(left)} training examples left, but needs {config.train}.")
            found[task] = random.Random(seed).sample(left, config.train), tests[task]
        trained, tested = ([e for rows in found.values() for e in rows[part]] for part in (0, 1))
        refuse_overlaps({"training": trained, "test": tested})
        return found

    def _pools(self, task: str) -> tuple[list[Example], list[Example]]:
        data = self.bench.data
        splits = ("all", "all") if data.undivided(task) else ("train", "test")
        train, test = (_short(data.task(task, split)) for split in splits)
        return train, test

    def scales(self, name: str) -> tuple[float, ...]:
        """Return the scales that a method is swept over."""
        return SCALES_OF_FILTERS if name in (*AVERAGES, SST) else self.config.scales

    def estimate(self) -> float:
        """Return the seconds that everything will take from scratch, from a probe of this machine."""
        config = self.config
        per_row = self.bench.seconds_per_row(self.rows(0)[config.tasks[0]][0][:8])
        most = max(config.counts)
        fishers = sum(config.counts) * config.fisher_rows
        training = 4 * per_row * (most * config.epochs * config.train + fishers)
        merges = sum(len(self.scales(name)) for name in self.names)
        answers = sum(count * config.tested(count) * (merges + 1) for count in config.counts) + most * config.test
        return len(config.seeds) * (training + answers * per_row)

    def run(self) -> None:
        """Run every stage that is missing, and write the report."""
        config = self.config
        found = [self._seed(seed) for seed in config.seeds]
        # (T, method, scale) → task → (seeds, prompts)
        keys = found[0].keys()
        samples = {k: {t: np.stack([one[k][t] for one in found]) for t in found[0][k]} for k in keys}
        rows = [self._row(count, name, samples) for count in config.counts for name in (BASE, *self.names)]
        manifest = self.bench.manifest("Experiment B: many experts", self.config)
        names = ("many_experts.json", "many_experts.png", "many_experts.md")
        figure = _draw(rows, config.counts, [BASE, *self.names])
        write_outputs(self.out, names, {"manifest": manifest, "rows": rows}, figure, self._page(rows))

    def _seed(self, seed: int) -> dict[tuple[int, str, float], dict[str, Any]]:
        config, bench = self.config, self.bench
        tasks = config.tasks[: max(config.counts)]
        rows = self.rows(seed)
        folders = {
            task: bench.train(task, rows[task][0], seed, epochs=config.epochs, learning_rate=config.learning_rate)
            for task in tasks
        }
        tests = {task: rows[task][1] for task in tasks}
        found: dict[tuple[int, str, float], dict[str, Any]] = {}
        for count in config.counts:
            some = {task: folders[task] for task in tasks[:count]}
            adapters = bench.adapters(some)
            space = CoreSpace.of(list(adapters.values()))
            learned = {task: rows[task][0][: config.fisher_rows] for task in some}
            fishers = {t: bench.own_fisher(t, learned[t], STATISTICS, space, some, seed) for t in some}
            measured = {task: tests[task][: config.tested(count)] for task in some}
            found[count, BASE, 0.0] = self._point("base", space.zero, space, measured, {}, {})
            found[count, EXPERTS, 1.0] = {}
            for task in some:
                alone = self._point(
                    f"expert {task}", partial(space.core, task), space, {task: tests[task]}, {task: some[task]}, {}
                )
                found[count, EXPERTS, 1.0][task] = alone[task][: config.tested(count)]
            for name in self.names:
                merge = _Merging(name, seed, adapters, fishers)
                for scale in self.scales(name):
                    settings = {"method": name, "scale": scale, "seed": seed, "structure": STATISTICS}
                    if merge.needs_fishers:
                        settings["fishers"] = bench.fisher_stages(OWN_FISHER, some)
                    found[count, name, scale] = self._point(
                        name, partial(merge, scale), space, measured, some, settings
                    )
        return found

    def _point(
        self,
        name: str,
        merge: Callable[[], Tensor | Adapter],
        space: CoreSpace,
        tests: Mapping[str, list[Example]],
        folders: Mapping[str, Path],
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        """Return whether each test example of each task is answered rightly, (prompts,)."""
        bench = self.bench

        def compute(folder: Path) -> None:
            model, merged = bench.model, merge()
            state = adapter_state(model, merged) if isinstance(merged, Adapter) else core_state(model, space, merged)
            correct = {}
            with state():
                for task, rows in tests.items():
                    labels = CLASSIFICATION_TASKS[task].labels
                    answered = classify(model, bench.tokenizer, rows, labels, tokens_per_batch=4096)
                    correct[task] = [int(right) for right in answered.correct]
            write_json(correct, folder / "correct.json")

        inputs = {
            "name": name,
            "settings": settings,
            "model": bench.model_key,
            "adapters": stage_names(folders),
            "test": {task: rows_key(rows) for task, rows in tests.items()},
        }
        folder = bench.stages.run("experts-point", inputs, compute)
        return json.loads((folder / "correct.json").read_text(encoding="utf-8"))

    def _row(self, count: int, name: str, samples: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
        """Return a method's accuracies at its best scale, which is chosen for each number, and again in every resample."""
        stacked, scales = self._stacked(count, (name,), samples)
        if any(not values[0].any() for values in stacked.values()):
            raise DataError(f"An expert of {sorted(stacked)} is never right on its own task; train it longer.")
        found: dict[str, Any] = {"experts": count, "method": name, "by task": {}}
        for metric in (NORMALISED, PLAIN):
            interval = bootstrap(partial(_best, metric=metric), stacked, resamples=self.config.resamples)
            by_scale = _accuracies(stacked, metric)
            best = int(np.argmax(by_scale))
            found[metric] = {
                **interval.to_json(),
                "best scale": scales[best],
                "by scale": dict(zip(map(str, scales), by_scale, strict=True)),
            }
            found["by task"][metric] = {task: float(values[best + 1].mean()) for task, values in stacked.items()}
        found["accuracy of the experts"] = {task: float(values[0].mean()) for task, values in stacked.items()}
        if name != SST:
            found[LEAD] = self._leads(count, name, samples)
        return found

    def _stacked(
        self, count: int, names: Sequence[str], samples: Mapping[Any, Mapping[str, Any]]
    ) -> tuple[dict[str, Any], list[float]]:
        """Return answers by task, (1 + points, seeds, prompts): the expert's, and those of every method at its scales."""
        experts = samples[count, EXPERTS, 1.0]
        points = [(name, scale) for name in names for scale in ((0.0,) if name == BASE else self.scales(name))]
        stacked = {t: np.stack([experts[t], *(samples[count, *point][t] for point in points)]) for t in experts}
        return stacked, [scale for _, scale in points]

    def _leads(self, count: int, other: str, samples: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
        """Return how far SST is ahead of a method, each at its best scale, on the same examples and seeds."""
        stacked, _ = self._stacked(count, (SST, other), samples)
        own = len(self.scales(SST))

        def lead(arrays: Mapping[str, Any], metric: str) -> float | None:
            if not all(values[0].any() for values in arrays.values()):
                return None
            by_scale = _accuracies(arrays, metric)
            return round(max(by_scale[:own]) - max(by_scale[own:]), 12)  # level is 0, not what rounding leaves

        resamples = self.config.resamples
        return {
            metric: bootstrap(partial(lead, metric=metric), stacked, resamples=resamples).to_json()
            for metric in (NORMALISED, PLAIN)
        }

    def _page(self, rows: list[dict[str, Any]]) -> list[str]:
        seeds = len(self.config.seeds)
        over = "prompts only" if seeds == 1 else "prompts and seeds"
        lines = [
            "# Experiment B: many experts",
            "",
            f"Accuracy at each method's best scale, {seeds} {'seed' if seeds == 1 else 'seeds'}; 95 % intervals over "
            f"{over}. The scale, in parentheses, is chosen on the test examples themselves, for every method and number "
            "alike, so the level is a little too high.",
            "",
            "![Normalised average accuracy against the number of experts](many_experts.png)",
        ]
        for metric, words in ((NORMALISED, "Normalised average accuracy"), (PLAIN, "Average accuracy")):
            lines += ["", f"## {words}", ""]
            lines.append("| method | " + " | ".join(f"{count} experts" for count in self.config.counts) + " |")
            lines.append("|---|" + "---|" * len(self.config.counts))
            for name in (BASE, *self.names):
                found = [row[metric] for row in rows if row["method"] == name]
                cells = [_cell(values, with_scale=name != BASE) for values in found]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", f"## How far {SST} is ahead, average accuracy", ""]
        lines += ["On the same examples; bold where the interval excludes that they are level.", ""]
        lines.append("| against | " + " | ".join(f"{count} experts" for count in self.config.counts) + " |")
        lines.append("|---|" + "---|" * len(self.config.counts))
        for name in (BASE, *self.names):
            if name != SST:
                leads = [Interval(**row[LEAD][PLAIN]) for row in rows if row["method"] == name]
                cells = [f"**{lead}**" if lead.excludes_zero else str(lead) for lead in leads]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return lines


def _accuracies(arrays: Mapping[str, Any], metric: str) -> list[float]:
    """Return a number for every scale from arrays by task, (1 + scales, seeds, prompts), whose first are the expert's."""
    means = {task: values.mean(axis=(-2, -1)) for task, values in arrays.items()}
    count = len(next(iter(means.values()))) - 1
    if metric == PLAIN:
        return [float(np.mean([mean[i + 1] for mean in means.values()])) for i in range(count)]
    own = {task: float(mean[0]) for task, mean in means.items()}
    return [normalised_average_accuracy({t: float(m[i + 1]) for t, m in means.items()}, own) for i in range(count)]


def _best(arrays: Mapping[str, Any], *, metric: str) -> float | None:
    # An expert that is never right in a resample has no share to be taken of.
    return max(_accuracies(arrays, metric)) if all(values[0].any() for values in arrays.values()) else None


def _cell(values: Mapping[str, Any], *, with_scale: bool) -> str:
    interval = Interval(**{name: values[name] for name in Interval.__dataclass_fields__})
    return f"{interval} ({values['best scale']:g})" if with_scale else str(interval)


class _Merging:
    """A method's merges at several scales.

    Attributes:
        needs_fishers: Whether the method looks at the experts' Fishers.
    """

    def __init__(self, name: str, seed: int, adapters: Mapping[str, Adapter], fishers: Mapping[str, Fisher]) -> None:
        self._name, self._seed, self._adapters, self._fishers = name, seed, adapters, fishers
        self.needs_fishers = bool(available_methods()[name].needs)

    def __call__(self, scale: float) -> Adapter:
        """Return the merge at a scale: of all experts' weights, or for merges by Fishers of their result."""
        if self._name not in (*AVERAGES, SST):
            return self._at([scale] * len(self._adapters))
        whole = self._whole
        scaled = {path: replace(f, scaling=scale * f.scaling) for path, f in whole.layers.items()}
        return replace(whole, layers=scaled)

    @cached_property
    def _whole(self) -> Adapter:
        """The merge by Fishers at scale 1, solved once: that takes longer than the model's answers."""
        return self._at([1.0] * len(self._adapters))

    def _at(self, weights: list[float]) -> Adapter:
        return merge_adapters(
            list(self._adapters.values()),
            weights,
            self._name,
            statistics=FisherStatistics(self._fishers) if self.needs_fishers else None,
            dtype=torch.float32,
            seed=self._seed,
        )


def _short(examples: list[Example]) -> list[Example]:
    return [example for example in examples if len(example.prompt) <= LONGEST_PROMPT]


def _draw(rows: list[dict[str, Any]], counts: tuple[int, ...], names: list[str]) -> Figure:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    # The two that are no rivals keep out of the colours of the others, which are ten.
    own = {BASE: {"color": "black", "linestyle": ":"}, SST: {"color": "black", "linestyle": "-", "linewidth": 2.5}}
    for name in names:
        values = [row[NORMALISED]["estimate"] for row in rows if row["method"] == name]
        axis.plot(counts, values, marker="o", label=name, **own.get(name, {"linestyle": "--"}))
    axis.set(xlabel="experts merged", ylabel="normalised average accuracy", xticks=counts)
    axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure


def main() -> None:
    """Run the experiment from the command line."""
    parser = common_arguments(__doc__)
    parser.add_argument(
        "--counts", type=int, nargs="+", help="numbers of experts (default: those of the configuration)"
    )
    parser.add_argument(
        "--methods", nargs="+", help="methods of the registry beside sst_experts, or all (default: the configuration's)"
    )
    arguments = parser.parse_args()
    config = QUICK if arguments.quick else SHORT if arguments.short else Config()
    for name in ("seeds", "counts", "methods"):
        if getattr(arguments, name):
            config = replace(config, **{name: tuple(getattr(arguments, name))})
    say = stopwatch()

    def run() -> None:
        bench = Workbench(arguments.model, data_sets(arguments), arguments.out, say)
        experiment = ManyExperts(bench, arguments.out, config)
        say(f"From scratch this takes about {experiment.estimate() / 60:.0f} minutes on this machine.")
        if not arguments.estimate_only:
            experiment.run()
            say(f"Wrote {arguments.out / 'many_experts.md'}")

    in_words(run)


if __name__ == "__main__":
    main()
