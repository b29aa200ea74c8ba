"""Experiment C, fidelity: does a merge do what its Fishers predict, and how many samples does that take?

    python benchmarks/experiments/fidelity.py --model MODEL --data FOLDER --out FOLDER [--quick | --short]

For every structure, reference and number of calibration prompts the same adapters are merged (`project`, default selection,
scale 1) and compared on held-out prompts:

    predicted KL    ½ Δᵀ F_cost Δ, of the change Δ from the utility model, on the calibration prompts
    split-half KL   what the merge's report has beside it: the same of a merge by half of these prompts, on the other half
    exact KL        the predicted one with the exact (`global`) Fisher of these prompts: what of the error is the structure
    held-out KL     the same with that of other prompts: what of it is the sample
    measured KL     KL(p_utility ‖ p_merged) of other prompts' responses: what of it is the quadratic model
    efficiency      Δᵀ F_gain Δ / Δᵀ F_cost Δ on calibration and on held-out prompts; their ratio is the optimism
    agreement       cosine of Δ and that of `global` with the most prompts, in the held-out F_cost's metric

No text is generated, so that all of it takes minutes. Stages are kept and shared with the other experiments, as there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from prompts import Sizes
from torch import Tensor
from workbench import (
    FULL_TRAINING,
    SHORT_TRAINING,
    Training,
    Workbench,
    common_arguments,
    data_sets,
    in_words,
    rows_key,
    stage_names,
    stopwatch,
    write_outputs,
)

from sstmerge.adapters import CoreSpace
from sstmerge.errors import DataError
from sstmerge.evaluation.metrics import Interval, bootstrap
from sstmerge.fisher import Fisher
from sstmerge.gevp import solve
from sstmerge.merging import merge_cores
from sstmerge.pipeline.calibration import CollectionOptions, batches_of
from sstmerge.pipeline.evaluate import measured_kl, write_json
from sstmerge.pipeline.evaluate_job import core_state
from sstmerge.pipeline.merge import finish
from sstmerge.pipeline.roles import Roles, roles_in

EXACT = "global"
HALF_WAY = "path:utility:utility+safety:1"
FULL_SIZES = Sizes(safety=400, utility=320, calibration=192, test=4, task_test=4)


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        tasks: Tasks of the utility adapter.
        seeds: Seeds of everything random.
        sizes: Numbers of prompts; half of the calibration prompts are held out.
        samples: Numbers of harmful calibration prompts; there are about twice as many benign ones.
        structures: Structures.
        references: Where the Fishers are taken.
        training: How the adapters are trained.
        response_tokens: Response tokens that count.
        resamples: Bootstrap resamples.
    """

    tasks: tuple[str, ...] = ("sst2", "trec")
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = FULL_SIZES
    samples: tuple[int, ...] = (12, 24, 48, 96)
    structures: tuple[str, ...] = (EXACT, "kfac", "ekfac", "diagonal")
    references: tuple[str, ...] = ("base", "utility", HALF_WAY)
    training: Training = FULL_TRAINING
    response_tokens: int = 6
    resamples: int = 2000


SHORT = Config(
    tasks=("sst2",),
    sizes=Sizes(safety=160, utility=160, calibration=64, test=48, task_test=48),  # as experiment A: the same adapters
    samples=(8, 32),
    structures=(EXACT, "kfac", "ekfac", "diagonal"),
    references=("utility", HALF_WAY),
    training=SHORT_TRAINING,
)
QUICK = Config(
    tasks=("sst2",),
    seeds=(0,),
    sizes=Sizes(safety=120, utility=120, calibration=32, test=4, task_test=4),
    samples=(8, 16),
    structures=(EXACT, "kfac", "diagonal"),
    references=("utility", HALF_WAY),
    training=SHORT_TRAINING,
    resamples=300,
)
PREDICTIONS = ("predicted KL", "split-half KL")
COLUMNS = (*PREDICTIONS, "exact KL", "held-out KL", "measured KL", "efficiency", "held-out efficiency", "agreement")


@dataclass(frozen=True)
class Case:
    """One way to take the Fishers."""

    structure: str
    reference: str
    samples: int


class Fidelity:
    """One run of the experiment."""

    def __init__(self, bench: Workbench, out: Path, config: Config) -> None:
        self.bench, self.out, self.config = bench, out, config
        self.cases = [
            Case(structure, reference, samples)
            for reference in config.references
            for structure in config.structures
            for samples in sorted(config.samples, reverse=True)
        ]

    def estimate(self) -> float:
        """Return the seconds that everything will take from scratch, from a probe of this machine."""
        config, sizes = self.config, self.config.sizes
        prompts = self.bench.prompts(config.tasks, sizes, config.seeds[0])
        per_row = self.bench.seconds_per_row(prompts.safety[:8])
        training = 4 * config.training.sequences(sizes, len(config.tasks))
        fishers = 4 * 4 * sum(case.samples for case in self.cases) + 4 * 2 * sizes.calibration * len(config.references)
        return len(config.seeds) * per_row * (training + fishers + 2 * sizes.calibration * len(self.cases))

    def run(self) -> None:
        """Run every stage that is missing, and write the report."""
        found = [self._seed(seed) for seed in self.config.seeds]
        rows = [self._row(case, [one[index] for one in found]) for index, case in enumerate(self.cases)]
        manifest = self.bench.manifest("Experiment C: fidelity", self.config)
        names = ("fidelity.json", "fidelity.png", "fidelity.md")
        write_outputs(self.out, names, {"manifest": manifest, "rows": rows}, _draw(rows), self._page(rows))

    def _seed(self, seed: int) -> list[dict[str, Any]]:
        config, bench = self.config, self.bench
        prompts = bench.prompts(config.tasks, config.sizes, seed)
        folders = bench.train_roles(prompts, config.training, seed)
        space = CoreSpace.of(list(bench.adapters(folders).values()))
        roles = roles_in(space, ["utility"], "safety", None)
        gain, cost = _halves(prompts.gain, seed), _halves(prompts.cost, seed)
        found: list[dict[str, Any]] = []
        changes: dict[str, Tensor] = {}
        for case in self.cases:
            options = CollectionOptions(
                structure=case.structure, reference=case.reference, response_tokens=config.response_tokens, seed=seed
            )
            held_out = bench.pair(gain[1], cost[1], replace(options, structure=EXACT), space, folders)
            share = case.samples / len(gain[0])
            chosen = gain[0][: case.samples], cost[0][: max(2, round(share * len(cost[0])))]
            fishers = bench.pair(*chosen, options, space, folders)
            exact_fishers = bench.pair(*chosen, replace(options, structure=EXACT), space, folders)
            spectrum = solve(*fishers)
            merged = merge_cores(spectrum, roles.utility, roles.safety)
            stability = finish(roles, merged, spectrum).stability
            if stability is None:
                raise DataError(f"{case.samples} calibration prompts have an empty half; take two at least.")
            change = merged.core - roles.utility
            exact = changes.setdefault(
                case.reference, change
            )  # the first case of a reference is `global`, most prompts
            kl = self._measured(merged.core, roles, cost[1], folders, case, seed)
            found.append(
                {
                    "directions": merged.report.directions,
                    "predicted KL": merged.report.predicted_kl,
                    "split-half KL": stability.held_out_kl,
                    "exact KL": 0.5 * exact_fishers[1].quadratic(change),
                    "held-out KL": 0.5 * held_out[1].quadratic(change),
                    "efficiency": _efficiency(fishers, change),
                    "held-out efficiency": _efficiency(held_out, change),
                    "agreement": _cosine(held_out[1], change, exact),
                    "kl": kl,
                }
            )
        return found

    def _measured(
        self, merged: Tensor, roles: Roles, rows: list[Any], folders: dict[str, Path], case: Case, seed: int
    ) -> list[list[float]]:
        """Return the KL of every held-out sequence, in nats, and its number of response tokens."""

        def compute(folder: Path) -> None:
            bench = self.bench
            options = CollectionOptions(response_tokens=self.config.response_tokens, tokens_per_batch=1)
            states = [core_state(bench.model, roles.space, core) for core in (roles.utility, merged)]
            found = []
            for batch in batches_of(bench.model, bench.tokenizer, rows, options):
                tokens = int(batch.loss_mask.sum())
                found.append([tokens * measured_kl(bench.model, [batch], *states), tokens])
            write_json(found, folder / "kl.json")

        inputs = {"case": asdict(case), "seed": seed, "rows": rows_key(rows), "adapters": stage_names(folders)}
        inputs["fishers"] = [n for n in self.bench.stages.records if n.startswith("fishers-")][-1]
        inputs["response_tokens"] = self.config.response_tokens
        folder = self.bench.stages.run("measured-kl", inputs, compute)
        return json.loads((folder / "kl.json").read_text(encoding="utf-8"))

    def _row(self, case: Case, seeds: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the means over seeds, and intervals of measured over predicted KL over seeds and prompts."""
        means = {
            name: float(np.mean([one[name] for one in seeds])) for name in ("directions", *COLUMNS) if name in seeds[0]
        }
        sums = np.array([one["kl"] for one in seeds])  # (seeds, prompts, KL and tokens)
        ratios = {f"measured / {name}": self._ratio(sums, [one[name] for one in seeds]) for name in PREDICTIONS}
        measured = float(sums[..., 0].sum() / sums[..., 1].sum())
        return asdict(case) | means | {"measured KL": measured} | ratios

    def _ratio(self, sums: Any, predicted: list[float]) -> dict[str, Any]:
        """Return measured KL, from (seeds, prompts, KL and tokens), over a prediction of each seed."""
        repeated = np.repeat(np.array(predicted)[:, None], sums.shape[1], axis=1)
        samples = {"kl": np.stack([sums[..., 0], sums[..., 1], repeated])}

        def ratio(arrays: Any) -> float | None:
            kl, tokens, expected = arrays["kl"]
            return float(kl.sum() / tokens.sum() / expected.mean()) if expected.mean() > 0 else None

        return bootstrap(ratio, samples, resamples=self.config.resamples).to_json()

    def _page(self, rows: list[dict[str, Any]]) -> list[str]:
        seeds = len(self.config.seeds)
        lines = [
            "# Experiment C: fidelity",
            "",
            f"Means over {seeds} {'seed' if seeds == 1 else 'seeds'}; KL in nats per response token; 95 % intervals over "
            f"{'prompts' if seeds == 1 else 'seeds and prompts'}. Optimism is efficiency over held-out efficiency.",
            "",
            "![Predictions of the KL against the measured one](fidelity.png)",
            "",
            "| reference | structure | prompts | directions | predicted | split halves | exact | held-out | measured | "
            "measured / predicted | measured / split halves | optimism | agreement |",
            "|" + "---|" * 13,
        ]
        for row in rows:
            cells = [row["reference"], row["structure"], row["samples"], f"{row['directions']:.0f}"]
            cells += [f"{row[name]:.3g}" for name in COLUMNS[:5]]
            cells += [str(Interval(**row[f"measured / {name}"])) for name in PREDICTIONS]
            cells += [f"{row['efficiency'] / row['held-out efficiency']:.2f}" if row["held-out efficiency"] else "–"]
            lines.append("| " + " | ".join(map(str, [*cells, f"{row['agreement']:.2f}"])) + " |")
        return lines


def _halves(rows: list[Any], seed: int) -> tuple[list[Any], list[Any]]:
    """Cut rows into those that are calibrated on and those that are held out, each a fair mixture of all kinds."""
    order = np.random.default_rng(seed).permutation(len(rows))
    mixed = [rows[position] for position in order]
    return mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]


def _efficiency(fishers: tuple[Fisher, Fisher], change: Tensor) -> float:
    cost = fishers[1].quadratic(change)
    return fishers[0].quadratic(change) / cost if cost > 0 else 0.0


def _cosine(fisher: Fisher, first: Tensor, second: Tensor) -> float:
    """Return the cosine of two changes in the metric of a Fisher, by polarisation."""
    one, other = fisher.quadratic(first), fisher.quadratic(second)
    if not (one > 0 and other > 0):
        return 0.0
    return float((fisher.quadratic(first + second) - one - other) / (2 * (one * other) ** 0.5))


def _draw(rows: list[dict[str, Any]]) -> Figure:
    """Draw the predictions of the KL against the measured one, a panel each, with the line where they agree."""
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    positive = [row[name] for row in rows for name in COLUMNS[:5] if row[name] > 0]
    limits = (min(positive) / 2, max(positive) * 2)
    structures = sorted({row["structure"] for row in rows})
    samples = sorted({row["samples"] for row in rows})
    for axis, name in zip(figure.subplots(1, 4, sharey=True), COLUMNS[:4], strict=True):
        for row in rows:
            size = 30 * (1 + samples.index(row["samples"]))
            color = f"C{structures.index(row['structure'])}"
            axis.scatter([row["measured KL"]], [row[name]], s=size, color=color, alpha=0.7)
        for index, structure in enumerate(structures):
            axis.scatter([], [], color=f"C{index}", label=structure)
        axis.plot(limits, limits, ":", color="grey")
        axis.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
        axis.set(xlabel="measured KL, nats per token", title=name)
        axis.grid(alpha=0.3)
    figure.axes[0].set(ylabel="nats per token")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", title="larger: more prompts")
    return figure


def main() -> None:
    """Run the experiment from the command line."""
    arguments = common_arguments(__doc__).parse_args()
    config = QUICK if arguments.quick else SHORT if arguments.short else Config()
    if arguments.seeds:
        config = replace(config, seeds=tuple(arguments.seeds))
    say = stopwatch()

    def run() -> None:
        experiment = Fidelity(
            Workbench(arguments.model, data_sets(arguments), arguments.out, say), arguments.out, config
        )
        say(f"From scratch this takes about {experiment.estimate() / 60:.0f} minutes on this machine.")
        if not arguments.estimate_only:
            experiment.run()
            say(f"Wrote {arguments.out / 'fidelity.md'}")

    in_words(run)


if __name__ == "__main__":
    main()
