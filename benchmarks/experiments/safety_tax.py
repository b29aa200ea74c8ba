"""Experiment A, Safety Tax: what does refusing cost, by every method, swept over its own scale?

    python benchmarks/experiments/safety_tax.py --model MODEL --data FOLDER --out FOLDER [--quick]

For every seed a safety adapter (refusals mixed with ordinary answers, or `--safety refusal-only`) and a utility adapter are
trained, Fishers collected, everything merged, and every merged model measured on prompts that nothing was trained or
calibrated on. Each stage is kept by the hash of its inputs in OUT/stages: call again after an interruption, or with more
seeds, and only what is missing is computed. The report is OUT/report.md with results.json and trade_off.png.

`--data` is a folder with the files of docs/EVALUATION.md (StrongREJECT, XSTest, Safety-Tuned LLaMAs, Alpaca, the harmless
instructions of refusal_direction, the tasks); without it they come from the hub as far as they are there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from candidates import Candidate, Merger, candidates
from measurement import OUTCOMES_FILE, as_arrays, measure
from prompts import Prompts, Sizes, draw_prompts
from report import Results, stack, write_report
from stages import Stages, digest, file_digest, versions

from sstmerge import available_methods
from sstmerge.adapters import Adapter, CoreSpace, load_adapter
from sstmerge.demo.train_adapters import ALL_LINEAR, Recipe, fit_adapter
from sstmerge.errors import SSTMergeError
from sstmerge.fisher import Fisher, collect_fisher
from sstmerge.gevp import solve
from sstmerge.merging.methods.statistics import FisherStatistics
from sstmerge.pipeline.calibration import CollectionOptions, batches_of, collect_pair
from sstmerge.pipeline.evaluate_job import adapter_state, core_state
from sstmerge.pipeline.models import load_model, load_tokenizer
from sstmerge.pipeline.roles import Roles, roles_in
from sstmerge.prompts import Example, encode

STATISTICS = "kfac"  # what RegMean, Fisher merging and the Fisher-ratio mask are given
ROLES = ("utility", "safety")
LONGEST = 256  # tokens of a training sequence
OWN_ROWS = 64  # training rows that an adapter's own Fisher sees


FULL_SIZES = Sizes(safety=400, utility=320, calibration=96, test=120, task_test=200)


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        tasks: Classification tasks that the utility adapter learns, together.
        seeds: Seeds of training rows, training, calibration rows and labels.
        sizes: Numbers of prompts.
        scales: Factors of the safety adapter.
        methods: Methods of the registry; None for all.
        structures: Structures of SST.
        rules: Rules of SST.
        safety: "mixed" or "refusal-only".
        epochs: Passes of the adapters' training.
        learning_rate: Peak learning rate of both.
        reference: Where SST's Fishers are taken.
        response_tokens: Response tokens that they see.
        answer_tokens: Longest answer.
        resamples: Bootstrap resamples.
    """

    tasks: tuple[str, ...] = ("sst2", "trec")
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = FULL_SIZES
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    methods: tuple[str, ...] | None = None
    structures: tuple[str, ...] = ("global", "kfac", "ekfac", "diagonal")
    rules: tuple[str, ...] = ("project", "wiener", "joint")
    safety: str = "mixed"
    epochs: int = 2
    learning_rate: float = 7e-4
    reference: str = "path:utility:utility+safety:1"
    response_tokens: int = 6
    answer_tokens: int = 16
    resamples: int = 2000


QUICK = Config(
    tasks=("sst2",),
    seeds=(0,),
    sizes=Sizes(safety=120, utility=120, calibration=32, test=24, task_test=48),
    scales=(0.5, 1.0, 1.5),
    methods=(
        "task_arithmetic",
        "ties",
        "dare",
        "tsv_m",
        "iso_c",
        "knots_ties",
        "fisher_full",
        "regmean",
        "fisher_ratio_mask",
    ),
    structures=("global",),
    rules=("project",),
    resamples=300,
)


class SafetyTax:
    """One run of the experiment."""

    def __init__(self, model: str, data: Path | None, out: Path, config: Config, say: Callable[[str], None]) -> None:
        self.config, self.data, self.out, self._say = config, data, out, say
        self.stages = Stages(out / "stages", say)
        self.tokenizer = load_tokenizer(model)
        self.model_name, self.model = model, load_model(model)
        weights = sorted(Path(model).glob("*.safetensors"))
        self.model_key = {"files": {path.name: file_digest(path) for path in weights}} if weights else {"hub": model}
        self.listed = candidates(config.methods, config.structures, config.rules)

    def estimate(self) -> float:
        """Return the seconds that everything will take from scratch, from a probe of this machine."""
        prompts = self._prompts(self.config.seeds[0])
        started = time.perf_counter()
        probe = replace(prompts, test={k: v[:4] for k, v in prompts.test.items()}, tasks={})
        batches = batches_of(self.model, self.tokenizer, prompts.safety[:8], CollectionOptions())
        with torch.no_grad():
            for batch in batches:  # forward passes of the training's length
                self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        per_row = (time.perf_counter() - started) / 8
        started = time.perf_counter()
        self.stages.folder.mkdir(parents=True, exist_ok=True)
        self._answers_only(probe)
        per_answer = (time.perf_counter() - started) / 12
        config, sizes = self.config, self.config.sizes
        learned = 2 * sizes.safety + len(config.tasks) * sizes.utility
        points = len(self.listed) * len(config.scales) + 3
        training = 4 * per_row * config.epochs * learned
        fishers = 4 * per_row * 3 * sizes.calibration * (len(set(config.structures) | {STATISTICS}) + 2)
        # Batches of a hundred answers cost about a third of a dozen's, each.
        measuring = points * (3 * sizes.test * per_answer / 3 + len(config.tasks) * sizes.task_test * per_row)
        return len(config.seeds) * (training + fishers + measuring)

    def run(self) -> None:
        """Run every stage that is missing, and write the report."""
        experts: list[dict[str, Any]] = []
        swept: list[list[list[Any]]] = []
        for seed in self.config.seeds:
            prompts = self._prompts(seed)
            folders = {role: self._train(role, prompts, seed) for role in ROLES}
            merger = self._merger(prompts, folders, seed)
            zero = merger.roles.space.zero()
            alone = {"base": zero, "utility": merger.roles.utility, "safety": merger.roles.safety}
            experts.append({n: self._point(n, core, merger, prompts, folders, seed) for n, core in alone.items()})
            swept.append(
                [[self._swept(c, a, merger, prompts, folders, seed) for a in self.config.scales] for c in self.listed]
            )
        # From (seeds, methods, scales, prompts) to (methods, scales, seeds, prompts).
        samples = {
            key: np.moveaxis(np.array([[[p[key] for p in row] for row in one] for one in swept]), 0, 2)
            for key in swept[0][0][0]
        }
        results = Results(
            tuple(candidate.name for candidate in self.listed),
            self.config.scales,
            samples,
            {name: stack([one[name] for one in experts]) for name in experts[0]},
            self.config.tasks,
        )
        manifest = {
            "experiment": "Experiment A: Safety Tax",
            "model": self.model_key,
            "config": asdict(self.config),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "not run": "methods that need an aligned full model beside its base (aligned_pair)",
            "stages": self.stages.records,
        }
        write_report(results, self.out, manifest, resamples=self.config.resamples, seed=0)

    # ---- stages ----------------------------------------------------------------------------------------------------

    def _prompts(self, seed: int) -> Prompts:
        return draw_prompts(self.data, self.config.tasks, self.config.sizes, seed)

    def _train(self, role: str, prompts: Prompts, seed: int) -> Path:
        config = self.config
        mixed = prompts.safety if config.safety == "mixed" else prompts.refusals
        rows = mixed if role == "safety" else prompts.utility
        recipe = Recipe(role, (), 8, 16, ALL_LINEAR, learning_rate=config.learning_rate, epochs=config.epochs)

        def compute(folder: Path) -> None:
            base = load_model(self.model_name)
            encoded = encode(rows, self.tokenizer, max_length=LONGEST)
            fit_adapter(
                base, encoded, recipe, folder, pad_token_id=self.tokenizer.pad_token_id, seed=seed, overwrite=True
            )

        inputs = {"model": self.model_key, "recipe": asdict(recipe), "rows": _key(rows), "seed": seed}
        return self.stages.run(f"adapter-{role}", inputs, compute)

    def _merger(self, prompts: Prompts, folders: dict[str, Path], seed: int) -> Merger:
        adapters = {role: load_adapter(folders[role] / role, name=role) for role in ROLES}
        space = CoreSpace.of(list(adapters.values()))
        roles = roles_in(space, ["utility"], "safety", None)
        swapped = [*prompts.gain, *prompts.cost]
        order = np.random.default_rng(seed).permutation(len(swapped))
        shuffled = [swapped[i] for i in order]
        structures = sorted({*self.config.structures, STATISTICS})
        spectra = {s: self._spectrum(s, prompts.gain, prompts.cost, roles, folders, seed) for s in structures}
        split = len(prompts.gain)
        first = self.config.structures[0]
        spectra["permuted"] = self._spectrum(first, shuffled[:split], shuffled[split:], roles, folders, seed)
        own = {"utility": prompts.utility, "safety": prompts.safety}
        fishers = {r: self._own_fisher(r, own[r][:OWN_ROWS], space, folders, seed) for r in ROLES}
        return Merger(adapters, roles, spectra, FisherStatistics(fishers), seed)

    def _spectrum(
        self,
        structure: str,
        gain: list[Example],
        cost: list[Example],
        roles: Roles,
        folders: dict[str, Path],
        seed: int,
    ) -> Any:
        config = self.config
        options = CollectionOptions(
            structure=structure, reference=config.reference, response_tokens=config.response_tokens, draws=2, seed=seed
        )

        def compute(folder: Path) -> None:
            batches = [batches_of(self.model, self.tokenizer, rows, options) for rows in (gain, cost)]
            for name, fisher in zip(
                ("gain", "cost"), collect_pair(self.model, roles.space, *batches, options), strict=True
            ):
                fisher.save(folder / f"{name}.safetensors")

        inputs = {"options": asdict(options), "gain": _key(gain), "cost": _key(cost), "adapters": _names(folders)}
        folder = self.stages.run(f"fishers-{structure}", inputs, compute)
        adapters = roles.space.adapters
        return solve(*(Fisher.load(folder / f"{name}.safetensors", adapters) for name in ("gain", "cost")))

    def _own_fisher(
        self, role: str, rows: list[Example], space: CoreSpace, folders: dict[str, Path], seed: int
    ) -> Fisher:
        def compute(folder: Path) -> None:
            batches = batches_of(self.model, self.tokenizer, rows, CollectionOptions(max_length=LONGEST))
            collect_fisher(
                self.model, batches, space, structure=STATISTICS, labels="sampled", reference=role, seed=seed
            ).save(folder / "own.safetensors")

        inputs = {"structure": STATISTICS, "rows": _key(rows), "adapters": _names(folders), "role": role, "seed": seed}
        folder = self.stages.run(f"own-fisher-{role}", inputs, compute)
        return Fisher.load(folder / "own.safetensors", space.adapters)

    def _swept(
        self, candidate: Candidate, scale: float, merger: Merger, prompts: Prompts, folders: dict[str, Path], seed: int
    ) -> dict[str, Any]:
        name = f"{candidate.name} ×{scale:g}"
        settings = {**candidate.settings, "scale": scale}
        return self._point(name, lambda: merger.merge(candidate, scale), merger, prompts, folders, seed, settings)

    def _point(
        self, name: str, merged: Any, merger: Merger, prompts: Prompts, folders: dict[str, Path], seed: int,
        settings: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        def compute(folder: Path) -> None:
            found = merged() if callable(merged) else merged
            state = (
                adapter_state(self.model, found)
                if isinstance(found, Adapter)
                else core_state(self.model, merger.roles.space, found)
            )
            measure(self.model, self.tokenizer, state, prompts, folder, answer_tokens=self.config.answer_tokens)

        used = _statistics_of(settings or {})
        inputs = {
            "name": name,
            "settings": settings,
            "seed": seed,
            "adapters": _names(folders),
            "statistics": [n for n in self.stages.records if n.startswith(used) and self._of_seed(n, folders)],
            "test": {kind: _key(rows) for kind, rows in (prompts.test | prompts.tasks).items()},
            "answer_tokens": self.config.answer_tokens,
        }
        folder = self.stages.run("point", inputs, compute)
        return as_arrays(json.loads((folder / OUTCOMES_FILE).read_text(encoding="utf-8")))

    def _of_seed(self, stage: str, folders: dict[str, Path]) -> bool:
        return self.stages.records[stage]["inputs"]["adapters"] == _names(folders)

    def _answers_only(self, prompts: Prompts) -> None:
        with TemporaryDirectory() as folder:
            nothing = adapter_state(self.model, None)
            measure(self.model, self.tokenizer, nothing, prompts, Path(folder), answer_tokens=self.config.answer_tokens)


def _statistics_of(settings: dict[str, Any]) -> tuple[str, ...]:
    """Return how the names of the stages begin that a merge depends on beside the adapters."""
    if "structure" in settings:
        return (f"fishers-{settings['structure']}-",)
    if "method" in settings and available_methods()[settings["method"]].needs:
        return (f"fishers-{STATISTICS}-", "own-fisher-")
    return ()


def _key(rows: list[Example]) -> str:
    return digest([[list(row.messages), row.response] for row in rows])


def _names(folders: dict[str, Path]) -> dict[str, str]:
    return {role: folder.name for role, folder in folders.items()}


def main() -> None:
    """Run the experiment from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="base model: directory or hub id")
    parser.add_argument("--data", type=Path, help="folder with the data sets' files (default: from the hub)")
    parser.add_argument("--out", type=Path, required=True, help="folder for stages and report")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, nine methods, few prompts: proves the way, no more"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (default: those of the configuration)")
    parser.add_argument("--methods", nargs="+", help="methods of the registry (default: those of the configuration)")
    parser.add_argument("--scales", type=float, nargs="+", help="scales (default: those of the configuration)")
    parser.add_argument("--safety", choices=("mixed", "refusal-only"), default="mixed")
    parser.add_argument("--estimate-only", action="store_true", help="say how long it would take, and stop")
    arguments = parser.parse_args()
    config = replace(QUICK if arguments.quick else Config(), safety=arguments.safety)
    for name in ("seeds", "methods", "scales"):
        if getattr(arguments, name):
            config = replace(config, **{name: tuple(getattr(arguments, name))})
    started = time.perf_counter()

    def say(words: str) -> None:
        print(f"{time.perf_counter() - started:7.0f} s  {words}", flush=True)

    try:
        experiment = SafetyTax(arguments.model, arguments.data, arguments.out, config, say)
        say(f"From scratch this takes about {experiment.estimate() / 60:.0f} minutes on this machine.")
        if not arguments.estimate_only:
            experiment.run()
            say(f"Wrote {arguments.out / 'report.md'}")
    except SSTMergeError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
