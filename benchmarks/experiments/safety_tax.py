"""Experiment A, Safety Tax: what does refusing cost, by every method, swept over its own scale?

    python benchmarks/experiments/safety_tax.py --model MODEL --data FOLDER --out FOLDER [--quick | --short]

For every seed a safety adapter (refusals mixed with ordinary answers, or `--safety refusal-only`) and a utility adapter are
trained, Fishers collected, everything merged, and every merged model measured on prompts that nothing was trained or
calibrated on. Each stage is kept by the hash of its inputs in OUT/stages: call again after an interruption, or with more
seeds, and only what is missing is computed. The report is OUT/report.md with results.json and trade_off.png.

`--data` is a folder with the files of docs/EVALUATION.md (StrongREJECT, XSTest, Safety-Tuned LLaMAs, Alpaca, the harmless
instructions of refusal_direction, the tasks); without it, or where it lacks one and `--missing-from-hub` is given, they come
from the hub as far as they are there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from candidates import REFIT, REFUSAL_WEIGHT, REFUSALS, Candidate, Merger, candidates, primary
from measurement import OUTCOMES_FILE, as_arrays, measure, together
from prompts import Prompts, Sizes, with_second_test
from report import Results, stack, write_report
from torch import Tensor
from workbench import (
    FULL_TRAINING,
    OWN_FISHER,
    ROLES,
    SAME_AS_TASK_ARITHMETIC,
    SHORT_TRAINING,
    Training,
    Workbench,
    common_arguments,
    data_sets,
    in_words,
    rows_key,
    stage_names,
    stopwatch,
)

from sstmerge import available_methods
from sstmerge.adapters import Adapter, CoreSpace
from sstmerge.errors import DataError
from sstmerge.gevp import Spectrum, solve
from sstmerge.merging.methods.statistics import FisherStatistics
from sstmerge.pipeline.calibration import CollectionOptions, batches_of
from sstmerge.pipeline.evaluate_job import adapter_state, core_state
from sstmerge.pipeline.refit import refit_cores
from sstmerge.pipeline.roles import roles_in
from sstmerge.prompts import Example

STATISTICS = "kfac"  # what RegMean, Fisher merging and the Fisher-ratio mask are given
OWN_ROWS = 64  # training rows that an adapter's own Fisher sees
STRUCTURES = ("global", "kfac", "ekfac", "diagonal", "block")
RULES = ("project", "wiener", "joint")
ALL_RULES = (*RULES, REFIT)

FULL_SIZES = Sizes(safety=400, utility=320, calibration=96, test=120, task_test=200)


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        tasks: Classification tasks that the utility adapter learns, together.
        seeds: Seeds of training rows, training, calibration rows and labels.
        sizes: Numbers of prompts.
        scales: Factors of the safety adapter.
        methods: Methods of the registry; None or ("all",) for all.
        structures: Structures of SST.
        rules: Rules of SST.
        training: How the adapters are trained.
        reference: Where SST's Fishers are taken.
        response_tokens: Response tokens that they see.
        draws: Label draws of the cost Fisher.
        answer_tokens: Longest answer.
        resamples: Bootstrap resamples.
        candidates: Names of the candidates that are run; None for all that methods, structures and rules give.
        second_test: Number of test prompts of each kind that are measured instead of the test's: those on which nothing was
            ever measured or chosen; None for the test.
        both_tests: Whether the test is measured, too, and reported together with the second one.
    """

    tasks: tuple[str, ...] = ("sst2", "trec")
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = FULL_SIZES
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    methods: tuple[str, ...] | None = None
    structures: tuple[str, ...] = STRUCTURES
    rules: tuple[str, ...] = RULES
    training: Training = FULL_TRAINING
    reference: str = "path:utility:utility+safety:1"
    response_tokens: int = 6
    draws: int = 4
    answer_tokens: int = 16
    resamples: int = 2000
    candidates: tuple[str, ...] | None = None
    second_test: int | None = None
    both_tests: bool = False


SHORT = Config(
    tasks=("sst2",),
    sizes=Sizes(safety=160, utility=160, calibration=64, test=48, task_test=48),
    scales=(1.0, 1.5, 2.0, 3.0),
    methods=(
        "task_arithmetic",
        "rank_one",
        "ties",
        "dare",
        "tsv_m",
        "fisher_full",
        "regmean",
        "fisher_ratio_mask",
    ),
    structures=("global", "kfac"),
    rules=("project", "wiener"),
    training=SHORT_TRAINING,
    answer_tokens=10,
)
QUICK = Config(
    tasks=("sst2",),
    seeds=(0,),
    sizes=Sizes(safety=60, utility=60, calibration=24, test=16, task_test=16),
    scales=(1.0, 1.5),
    methods=("task_arithmetic", "dare", "tsv_m", "regmean"),
    structures=("kfac",),
    rules=("wiener",),
    training=SHORT_TRAINING,
    answer_tokens=10,
    resamples=300,
)


class SafetyTax:
    """One run of the experiment."""

    def __init__(self, bench: Workbench, out: Path, config: Config) -> None:
        self.bench, self.out, self.config = bench, out, config
        listed = candidates(config.methods, config.structures, config.rules)
        names = [candidate.name for candidate in listed]
        if config.both_tests and config.second_test is None:
            raise DataError("Both tests need the size of the second one (--second-test N).")
        unknown = sorted({*(config.candidates or ())} - {*names})
        if unknown:
            raise DataError(f"There are no candidates {unknown}; these methods, structures and rules give {names}.")
        self.listed = [c for c in listed if config.candidates is None or c.name in config.candidates]

    def estimate(self) -> float:
        """Return the seconds that everything will take from scratch, from a probe of this machine."""
        config, sizes = self.config, self.config.sizes
        prompts = self.bench.prompts(config.tasks, config.sizes, config.seeds[0])
        tests = self._tests(prompts)
        per_row = self.bench.seconds_per_row(prompts.safety[:8])
        probe = replace(prompts, test={k: v[:8] for k, v in prompts.test.items()}, tasks={})
        started = time.perf_counter()
        with TemporaryDirectory() as folder:
            self._measure(adapter_state(self.bench.model, None), probe, Path(folder))
        per_answer = (time.perf_counter() - started) / sum(map(len, probe.test.values()))
        points = len(self.listed) * len(config.scales) + 3
        # A backward pass takes two forward passes, and training its weights' gradients; sampled labels take a draw each.
        training = 4 * per_row * config.training.sequences(sizes, len(config.tasks))
        fishers = 4 * per_row * 2 * config.draws * sizes.calibration * (len({*config.structures, STATISTICS}) + 2)
        if self._with_refusals():
            fishers += 4 * per_row * (len(prompts.cost) + len(prompts.more_benign))
        if any(candidate.settings.get("rule") == REFIT for candidate in self.listed):
            # Four steps, each a gradient of the refusals and two or three trials: their likelihood and the measured KL.
            fishers += len(config.scales) * 4 * per_row * (6 * sizes.calibration + 2.5 * 2 * 2 * sizes.calibration)
        # Decoding a hundred prompts together takes about half as long for each as decoding two dozen.
        tested = sum(len(rows) for test in tests for rows in test.test.values())
        measuring = points * (tested * per_answer / 2 + len(tests) * len(config.tasks) * sizes.task_test * per_row)
        return len(config.seeds) * (training + fishers + measuring)

    def run(self) -> None:
        """Run every stage that is missing, and write the report."""
        experts: list[dict[str, Any]] = []
        swept: list[list[list[Any]]] = []
        for seed in self.config.seeds:
            prompts = self.bench.prompts(self.config.tasks, self.config.sizes, seed)
            tests = self._tests(prompts)
            folders = self.bench.train_roles(prompts, self.config.training, seed)
            merger = self._merger(prompts, folders, seed)
            zero = merger.roles.space.zero()
            alone = {"base": zero, "utility": merger.roles.utility, "safety": merger.roles.safety}
            experts.append({n: self._point(n, core, merger, tests, folders, seed) for n, core in alone.items()})
            swept.append(
                [[self._swept(c, a, merger, tests, folders, seed) for a in self.config.scales] for c in self.listed]
            )
        # From (seeds, methods, scales, prompts) to (methods, scales, seeds, prompts).
        samples = {
            key: np.moveaxis(np.array([[[p[key] for p in row] for row in one] for one in swept]), 0, 2)
            for key in swept[0][0][0]
        }
        results = Results(
            tuple(candidate.name for candidate in self.listed),
            {c.name: tuple(c.stretch * scale for scale in self.config.scales) for c in self.listed},
            samples,
            {name: stack([one[name] for one in experts]) for name in experts[0]},
            self.config.tasks,
            primary(self.listed),
        )
        manifest = self.bench.manifest(
            self._title(),
            self.config,
            not_run=f"{', '.join(SAME_AS_TASK_ARITHMETIC)}: task arithmetic, written in another way",
        )
        write_report(results, self.out, manifest, resamples=self.config.resamples, seed=0)

    def _title(self) -> str:
        parts = ["Experiment A: Safety Tax"]
        if self.config.training.safety == "refusal-only":
            parts.append("a safety adapter that learned refusals only")
        if self.config.second_test is not None:
            parts.append("both tests" if self.config.both_tests else "second test")
        return ", ".join(parts)

    def _tests(self, prompts: Prompts) -> list[Prompts]:
        """Return the prompts with each of the tests that are measured."""
        if self.config.second_test is None:
            return [prompts]
        second = with_second_test(prompts, self.bench.data, self.config.second_test)
        return [prompts, second] if self.config.both_tests else [second]

    # ---- stages ----------------------------------------------------------------------------------------------------

    def _merger(self, prompts: Prompts, folders: dict[str, Path], seed: int) -> Merger:
        config, bench = self.config, self.bench
        adapters = bench.adapters(folders)
        space = CoreSpace.of(list(adapters.values()))
        options = CollectionOptions(
            reference=config.reference, response_tokens=config.response_tokens, draws=config.draws, seed=seed
        )

        def spectrum(structure: str, gain: list[Example], cost: list[Example]) -> Spectrum:
            return solve(*bench.pair(gain, cost, replace(options, structure=structure), space, folders))

        structures = sorted({*config.structures, STATISTICS})
        spectra = {structure: spectrum(structure, prompts.gain, prompts.cost) for structure in structures}
        if any(candidate.settings.get("control") == "permuted" for candidate in self.listed):
            mixed = [*prompts.gain, *prompts.cost]
            mixed = [mixed[position] for position in np.random.default_rng(seed).permutation(len(mixed))]
            split = len(prompts.gain)
            spectra["permuted"] = spectrum(config.structures[0], mixed[:split], mixed[split:])
        if self._with_refusals():
            weighted = replace(options, structure=STATISTICS, refusal_weight=REFUSAL_WEIGHT)
            benign = [*prompts.cost, *prompts.more_benign]
            penalty = bench.refusal_fisher(prompts.gain, benign, weighted, space, folders)
            pair = spectra[STATISTICS]
            spectra[REFUSALS] = solve(pair.gain, pair.cost.with_penalty(penalty))
        own = {"utility": prompts.utility[:OWN_ROWS], "safety": prompts.safety[:OWN_ROWS]}
        fishers = {r: bench.own_fisher(r, own[r], STATISTICS, space, folders, seed) for r in ROLES}
        roles = roles_in(space, ["utility"], "safety", None)
        harm, benign = (
            batches_of(bench.model, bench.tokenizer, rows, options) for rows in (prompts.gain, prompts.cost)
        )

        def refit(spectrum: Spectrum, scale: float) -> Tensor:
            return refit_cores(bench.model, spectrum, roles.utility, roles.safety, harm, benign, scale=scale).core

        return Merger(
            adapters,
            roles,
            spectra,
            FisherStatistics(fishers),
            partial(bench.aligned_pair, adapters),
            seed,
            refit,
        )

    def _with_refusals(self) -> bool:
        return any(candidate.settings.get("spectrum") == REFUSALS for candidate in self.listed)

    def _swept(
        self,
        candidate: Candidate,
        scale: float,
        merger: Merger,
        tests: list[Prompts],
        folders: dict[str, Path],
        seed: int,
    ) -> dict[str, Any]:
        scale *= candidate.stretch
        name = f"{candidate.name} ×{scale:g}"
        settings = {**candidate.settings, "scale": scale}
        return self._point(name, lambda: merger.merge(candidate, scale), merger, tests, folders, seed, settings)

    def _point(
        self, name: str, merged: Any, merger: Merger, tests: list[Prompts], folders: dict[str, Path], seed: int,
        settings: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        return together([self._point_on(name, merged, merger, test, folders, seed, settings) for test in tests])

    def _point_on(
        self, name: str, merged: Any, merger: Merger, prompts: Prompts, folders: dict[str, Path], seed: int,
        settings: dict[str, Any] | None,
    ) -> dict[str, Any]:  # fmt: skip
        def compute(folder: Path) -> None:
            found = merged() if callable(merged) else merged
            model, space = self.bench.model, merger.roles.space
            is_adapter = isinstance(found, Adapter)
            state = adapter_state(model, found) if is_adapter else core_state(model, space, found)
            self._measure(state, prompts, folder)

        used = _statistics_of(settings or {})
        inputs = {
            "name": name,
            "settings": settings,
            "seed": seed,
            "adapters": stage_names(folders),
            "statistics": self.bench.fisher_stages(used, folders),
            "test": {kind: rows_key(rows) for kind, rows in (prompts.test | prompts.tasks).items()},
            "answer_tokens": self.config.answer_tokens,
        }
        folder = self.bench.stages.run("point", inputs, compute)
        return as_arrays(json.loads((folder / OUTCOMES_FILE).read_text(encoding="utf-8")))

    def _measure(self, state: Callable[[], Any], prompts: Prompts, folder: Path) -> None:
        bench = self.bench
        measure(bench.model, bench.tokenizer, state, prompts, folder, answer_tokens=self.config.answer_tokens)


def _statistics_of(settings: dict[str, Any]) -> tuple[str, ...]:
    """Return how the names of the stages begin that a merge depends on beside the adapters."""
    if settings.get("spectrum") == REFUSALS:
        return ("refusal-fisher-", f"fishers-{STATISTICS}-")
    if "structure" in settings:
        return (f"fishers-{settings['structure']}-",)
    if "method" in settings and available_methods()[settings["method"]].needs:
        return (f"fishers-{STATISTICS}-", OWN_FISHER)
    return ()


def main() -> None:
    """Run the experiment from the command line."""
    parser = common_arguments(__doc__)
    parser.add_argument(
        "--methods", nargs="+", help="methods of the registry, or all (default: those of the configuration)"
    )
    parser.add_argument(
        "--structures", nargs="+", choices=STRUCTURES, help="of SST (default: those of the configuration)"
    )
    parser.add_argument("--rules", nargs="+", choices=ALL_RULES, help="of SST (default: those of the configuration)")
    parser.add_argument("--candidates", nargs="+", help="only these of the table's rows, by name")
    parser.add_argument(
        "--second-test", type=int, metavar="N", help="N other prompts of each kind, on which nothing was ever chosen"
    )
    parser.add_argument("--both-tests", action="store_true", help="the test and the second test, reported together")
    parser.add_argument("--scales", type=float, nargs="+", help="scales (default: those of the configuration)")
    parser.add_argument("--safety", choices=("mixed", "refusal-only"), default="mixed")
    arguments = parser.parse_args()
    sized = QUICK if arguments.quick else SHORT if arguments.short else Config()
    config = replace(sized, training=replace(sized.training, safety=arguments.safety))
    for name in ("seeds", "methods", "structures", "rules", "scales", "candidates"):
        if getattr(arguments, name):
            config = replace(config, **{name: tuple(getattr(arguments, name))})
    config = replace(config, second_test=arguments.second_test, both_tests=arguments.both_tests)
    say = stopwatch()

    def run() -> None:
        bench = Workbench(arguments.model, data_sets(arguments), arguments.out, say)
        experiment = SafetyTax(bench, arguments.out, config)
        say(f"From scratch this takes about {experiment.estimate() / 60:.0f} minutes on this machine.")
        if not arguments.estimate_only:
            experiment.run()
            say(f"Wrote {arguments.out / 'report.md'}")

    in_words(run)


if __name__ == "__main__":
    main()
