"""Error of a sketch of the base model against the exact projected K-FAC factors, for adapters it has never seen.

    python benchmarks/sketch.py --base MODEL [--out benchmarks/results/NAME.json]

The exact factors are those of `collect_fisher(structure="kfac", reference="base")` for the demo's adapters, on the demo's
calibration prompts (gain: harmful prompts with refusals, labels from the data; cost: benign prompts, sampled labels); the
model is in float32, so that the rounding of bfloat16 projections is not taken for an error of the sketch. The
sketches are collected once, without adapters, at the largest rank; those of smaller ranks are its first columns, since
test matrices are nested.

    covariances   relative Frobenius error of X and D per layer: median and 90 % quantile over the layers, with what the
                  low rank misses added back on the diagonal (as the package does), as a multiple of the identity, or not
    merge         the default merge (directions with 99 % of the gain energy) of both: overlap of the directions chosen,
                  error of λ, and what either merge costs and gains by the exact Fishers
    halves        the same differences between the exact Fishers of the two split halves: what sampling noise alone does
    algorithms    Nyström against Frequent Directions (Ghashami et al. 2015, https://arxiv.org/abs/1501.01711) of equal rank
                  on the activations and gradients of some layers, one split half
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from measuring import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sstmerge.adapters import CoreSpace
from sstmerge.demo.run import data_folder
from sstmerge.fisher import Batch, Fisher, Sketch, collect_fisher, collect_sketch
from sstmerge.fisher.head import Head
from sstmerge.fisher.sketch import score_cores
from sstmerge.fisher.sketch_collect import _SketchedBatch
from sstmerge.fisher.sketch_plan import plan_sketch
from sstmerge.fisher.sketch_sums import (
    MomentSums,
    RandomSigns,
    multiply,
    nystrom_factor,
    product_of,
    residual_of,
    row_squares,
    score_rank,
)
from sstmerge.fisher.sketch_taps import installed_sketch_taps
from sstmerge.fisher.taps import Taps, frozen
from sstmerge.gevp import Spectrum, solve
from sstmerge.merging import merge_cores
from sstmerge.merging.stability import split_half_stability
from sstmerge.pipeline.calibration import CollectionOptions, batches_of
from sstmerge.pipeline.evaluate import write_json
from sstmerge.pipeline.models import load_model, load_tokenizer
from sstmerge.pipeline.roles import Roles, load_roles
from sstmerge.prompts import load_examples

RANKS, DEFAULT_RANK = (64, 128, 256, 512), 256
OPTIONS = CollectionOptions(reference="base", response_tokens=6, draws=2)
COMPARED_DIRECTIONS = 64
PROBED_LAYERS = (0, 14, 29)
PROBED_MODULES = ("self_attn.q_proj", "mlp.down_proj")
ERRORS = ("gain X", "gain D", "cost X", "cost D")
MERGE_COLUMNS = {
    "overlap_of_best": "overlap of the best directions",
    "cosine_of_steps": "cosine of the steps",
    "gain_energy_over_that_of_exact_merge": "gain energy kept",
    "kl_over_kl_of_exact_merge": "KL / exact merge's",
    "predicted_kl_over_exact_kl_of_the_same_step": "KL predicted / exact",
}


# ---- data and sketches -----------------------------------------------------------------------------------------------


def calibration_batches(model, tokenizer, limit: int | None) -> dict[str, list[Batch]]:
    """Return the batches of gain and cost."""
    files = {"gain": ("harmful",), "cost": ("benign", "borderline", "utility")}
    batches = {}
    for what, names in files.items():
        paths = [str(data_folder() / f"{name}.jsonl") for name in names]
        examples = [e for path in paths for e in load_examples(path, split="calibration", limit=limit)]
        batches[what] = batches_of(model, tokenizer, examples, OPTIONS)
    return batches


def arguments_of(what: str) -> dict[str, object]:
    return {"labels": "data"} if what == "gain" else {"labels": "sampled", "draws": OPTIONS.draws}


def first_columns(sketch: Sketch, rank: int) -> Sketch:
    """Return the sketch of a smaller rank, from the same sums."""
    signs = RandomSigns(rank, sketch.signs.seed)
    tensors = {}
    for name, tensor in sketch.tensors.items():
        kind = name.split(".", 1)[0]
        if kind.endswith("_factor"):
            residual_name = name.replace("_factor.", "_residual.", 1)
            diagonal = sketch.tensors[residual_name] + row_squares(tensor)
            tensor = nystrom_factor(product_of(tensor, signs).to(tensor.dtype), signs)
            tensors[residual_name] = residual_of(tensor, diagonal)
        elif kind.endswith("_residual"):
            continue
        elif kind in ("score_left", "score_right"):
            layer = sketch.layers[name.split(".", 1)[1]]
            size, own = (layer.inputs, score_rank(rank)) if kind == "score_left" else (layer.outputs, rank)
            whole = tensor.shape[1] == size  # not sketched at the larger rank
            tensor = multiply(tensor, signs.matrix(tensor, own)) if whole else tensor[:, : min(own, size)].contiguous()
        tensors[name] = tensor
    tensors |= score_cores(tensors, signs)
    return replace(sketch, signs=signs, tensors=tensors)


def with_residual(sketch: Sketch, kind: str) -> Sketch:
    """Return the sketch with what it lacks on the diagonal spread evenly ("isotropic") or dropped ("none")."""
    tensors = dict(sketch.tensors)
    for name in sketch.tensors:
        if "_factor." in name:
            residual_name = name.replace("_factor.", "_residual.", 1)
            residual = tensors[residual_name]
            spread = residual.mean(dim=1, keepdim=True).expand_as(residual)
            tensors[residual_name] = spread if kind == "isotropic" else torch.zeros_like(residual)
    return replace(sketch, tensors=tensors)


# ---- errors ----------------------------------------------------------------------------------------------------------


def covariance_errors(found: Fisher, exact: Fisher) -> dict[str, dict[str, float]]:
    """Return the relative Frobenius errors of X and D over the layers."""
    errors: dict[str, list[float]] = {"X": [], "D": []}
    for mine, theirs in zip(found.kronecker_factors(), exact.kronecker_factors(), strict=True):
        for side, a, b in zip(("X", "D"), mine, theirs, strict=True):
            errors[side] += ((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).tolist()
    return {side: _quantiles(values) for side, values in errors.items()}


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "q90": ordered[int(0.9 * (len(ordered) - 1))], "largest": ordered[-1]}


def merge_difference(found: Spectrum, exact: Spectrum, roles: Roles) -> dict[str, float]:
    """Compare the default merges of two spectra of one space, both judged by the exact Fishers."""
    merges = {name: merge_cores(s, roles.utility, roles.safety) for name, s in (("found", found), ("exact", exact))}
    changes = {name: merged.core - roles.utility for name, merged in merges.items()}
    directions = merges["exact"].report.directions
    count = min(directions, COMPARED_DIRECTIONS)
    order = exact.eigenvalues.sort(descending=True).indices
    top_of_found = found.eigenvalues.sort(descending=True).values
    ratio = (top_of_found[:count] / exact.eigenvalues[order[:count]]).log().abs()
    predicted, true_cost = merges["found"].report.predicted_kl, 0.5 * exact.cost.quadratic(changes["found"])
    metric = _inner(exact.cost, changes["found"], changes["exact"])
    return {
        "directions": merges["found"].report.directions,
        "directions_exact": directions,
        "lambda_error": float(ratio.exp().median()) - 1.0,
        "overlap_of_best": subspace_overlap(found, exact, count),
        "predicted_kl_over_exact_kl_of_the_same_step": predicted / true_cost,
        "kl_over_kl_of_exact_merge": true_cost / merges["exact"].report.predicted_kl,
        "gain_energy_over_that_of_exact_merge": exact.gain.quadratic(changes["found"])
        / exact.gain.quadratic(changes["exact"]),
        "predicted_gain_over_exact": merges["found"].report.predicted_gain
        / float(exact.gain.mean_score() @ changes["found"]),
        "cosine_of_steps": metric,
    }


def _inner(cost: Fisher, a: Tensor, b: Tensor) -> float:
    """Return the cosine of two steps in the metric of a cost Fisher."""
    both, one, other = (cost.quadratic(v) for v in (a + b, a, b))
    return (both - one - other) / (2 * (one * other) ** 0.5)


def subspace_overlap(found: Spectrum, exact: Spectrum, count: int) -> float:
    """Return ‖V₀ᵀ F_cost V₁‖² / count of the two spectra's best directions, in the exact cost's metric."""
    bases = []
    for spectrum in (found, exact):
        rows = []
        for index in spectrum.eigenvalues.sort(descending=True).indices[:count].tolist():
            unit = torch.zeros(len(spectrum.eigenvalues), dtype=torch.float64)
            unit[index] = 1.0
            rows.append(exact.coordinates(spectrum.combine(unit)))
        bases.append(torch.linalg.qr(torch.stack(rows).mT).Q)
    return float((bases[0].mT @ bases[1]).square().sum()) / count


# ---- Frequent Directions ---------------------------------------------------------------------------------------------


class FrequentDirections:
    """Fast Frequent Directions: a buffer of 2 l rows, shrunk to l by its l-th squared singular value when it is full."""

    def __init__(self, size: int, rank: int) -> None:
        self.rank = rank
        self.buffer = torch.zeros(2 * rank, size)
        self.filled = 0

    def add(self, rows: Tensor) -> None:
        """Add rows (n, d)."""
        for part in rows.split(self.rank):
            if self.filled + len(part) > len(self.buffer):
                self._shrink()
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)

    def factor(self) -> Tensor:
        """Return F (d, l)."""
        self._shrink()
        return self.buffer[: self.rank].mT

    def _shrink(self) -> None:
        _, values, vectors = torch.linalg.svd(self.buffer[: self.filled], full_matrices=False)
        cut = float(values[self.rank - 1]) ** 2 if len(values) >= self.rank else 0.0
        kept = (values[: self.rank].square() - cut).clamp_min(0).sqrt()
        self.buffer.zero_()
        self.buffer[: len(kept)] = kept[:, None] * vectors[: self.rank]
        self.filled = len(kept)


def captured_rows(model, batches: list[Batch]) -> dict[str, Tensor]:
    """Return inputs and output gradients of the probed modules, rows of the even sequences."""
    names = [f"model.layers.{i}.{module}" for i in PROBED_LAYERS for module in PROBED_MODULES]
    rows: dict[str, list[Tensor]] = {}
    plan = plan_sketch(model, batches, rank=1)
    names = [name for name in names if name in plan.layers]
    head = Head(model)
    with frozen(model), installed_sketch_taps(model, plan) as taps:
        for tap in taps.taps.values():

            def keep(x: Tensor, gradient: Tensor, tap=tap) -> None:
                tap.calls += 1
                if tap.name in names:
                    for side, values in (("x", x), ("δ", gradient)):
                        rows.setdefault(f"{side} of {tap.name}", []).append(taps.rows.of_half(values, 0, tap.name)[0])

            tap.add = keep
        for batch in batches:
            _SketchedBatch(model, head, Taps([]), batch, 0).add_to(taps, "data", 1)
    return {name: torch.cat(parts) for name, parts in rows.items()}


def compare_algorithms(rows: dict[str, Tensor], space: CoreSpace) -> list[dict[str, object]]:
    """Return errors and processor time of both algorithms on every probed matrix and rank."""
    results: list[dict[str, object]] = []
    for name, data in rows.items():
        whole = data.double().mT @ data.double()
        side, module = name.split(" of ")
        group = next(g for g in space.groups if module in g.names)
        basis = (group.V if side == "x" else group.U)[group.names.index(module)].double()
        for rank in RANKS:
            if rank >= data.shape[1]:
                continue
            entry: dict[str, object] = {"matrix": name, "rows": len(data), "d": data.shape[1], "rank": rank}
            for algorithm, factor_of in (("nystrom", _nystrom), ("frequent_directions", _frequent_directions)):
                start = time.process_time()
                factor = factor_of(data, rank)
                seconds = time.process_time() - start
                low_rank = factor @ factor.mT
                corrected = low_rank + torch.diag((whole - low_rank).diagonal().clamp_min(0))
                entry[algorithm] = {
                    "frobenius": _relative(low_rank, whole),
                    "projected": _relative(basis.mT @ low_rank @ basis, basis.mT @ whole @ basis),
                    "projected_with_diagonal": _relative(basis.mT @ corrected @ basis, basis.mT @ whole @ basis),
                    "process_seconds": seconds,
                }
            results.append(entry)
    return results


def _nystrom(data: Tensor, rank: int) -> Tensor:
    signs = RandomSigns(rank, 0)
    signs.matrix(data)
    sums = MomentSums(data.shape[1], signs, torch.float32, data.device)
    for part in data.split(1024):
        sums.add(0, part)
    return nystrom_factor(sums.product[0], signs).double()


def _frequent_directions(data: Tensor, rank: int) -> Tensor:
    sketch = FrequentDirections(data.shape[1], rank)
    sketch.add(data)
    return sketch.factor().double()


def _relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


# ---- the report ------------------------------------------------------------------------------------------------------


def draw(results: dict) -> Figure:
    """Draw the errors against the rank."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    covariance, merge, algorithm = figure.subplots(1, 3)
    ranks = [entry["rank"] for entry in results["ranks"]]
    for what, style in (("gain", "-"), ("cost", "--")):
        for side, color in (("X", "C0"), ("D", "C1")):
            values = [entry["covariances"]["diagonal"][what][side]["median"] for entry in results["ranks"]]
            covariance.loglog(ranks, values, style, color=color, marker="o", label=f"{side}, {what}")
            covariance.axhline(results["halves"]["covariances"][what][side]["median"], ls=":", color=color, lw=0.8)
    covariance.set(xlabel="rank", ylabel="relative error, median over layers", title="X and D (dotted: split halves)")
    for key, label in (
        ("overlap_of_best", "overlap of the best directions"),
        ("cosine_of_steps", "cosine of the steps"),
        ("gain_energy_over_that_of_exact_merge", "gain energy kept"),
        ("predicted_kl_over_exact_kl_of_the_same_step", "KL predicted / exact"),
    ):
        merge.semilogx(ranks, [entry["merge"][key] for entry in results["ranks"]], marker="o", label=label)
    merge.axhline(results["halves"]["overlap_of_best"], ls=":", color="C0", lw=0.8)
    merge.set(xlabel="rank", title="merge (dotted: overlap of halves)")
    for name, label in (("nystrom", "Nyström"), ("frequent_directions", "Frequent Directions")):
        for key, style in (("projected", "--"), ("projected_with_diagonal", "-")):
            medians = {
                rank: statistics.median(e[name][key] for e in results["algorithms"] if e["rank"] == rank)
                for rank in sorted({e["rank"] for e in results["algorithms"]})
            }
            suffix = " + diagonal" if key.endswith("diagonal") else ""
            algorithm.loglog(list(medians), list(medians.values()), style, marker="o", label=label + suffix)
    algorithm.set(xlabel="rank", title="algorithms, projected error")
    for axis in (covariance, merge, algorithm):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3, which="both")
        axis.set_xticks(ranks, [str(rank) for rank in ranks])
        axis.minorticks_off()
    return figure


def tables(results: dict) -> list[Table]:
    """Return what a reader looks for first: errors and merges by rank beside those of split halves, and the times."""
    errors = Table(title="Relative error of the factors, median over layers (90 % quantile)")
    merges = Table(title="The default merge of a sketch against that of exact factors")
    for table, columns in ((errors, ERRORS), (merges, MERGE_COLUMNS.values())):
        table.add_column("rank")
        for column in columns:
            table.add_column(column, justify="right")
    rows = [(str(entry["rank"]), entry["covariances"]["diagonal"], entry["merge"]) for entry in results["ranks"]]
    halves = results["halves"]
    for name, covariances, merge in (*rows, ("exact halves", halves["covariances"], halves["merge"])):
        found = [covariances[what][side] for what, side in map(str.split, ERRORS)]
        errors.add_row(name, *(f"{error['median']:.3f} ({error['q90']:.3f})" for error in found))
        merges.add_row(name, *(f"{merge[key]:.3f}" for key in MERGE_COLUMNS))
    times = Table("step", "processor s", "clock s", title="Times")
    for name, taken in results["seconds"].items():
        times.add_row(name, f"{taken['process_seconds']:.3f}", f"{taken['seconds']:.3f}")
    return [errors, merges, times]


def timed(call: Callable[[], object]) -> tuple[object, dict[str, float]]:
    """Return a call's result with its wall and processor time."""
    wall, process = time.perf_counter(), time.process_time()
    result = call()
    return result, {"seconds": time.perf_counter() - wall, "process_seconds": time.process_time() - process}


def compare_pair(roles: Roles, exact: dict[str, Fisher], sketches: dict[int, dict[str, Sketch]]) -> dict:
    """Return all differences of one pair of adapters, rank by rank."""
    reference = solve(exact["gain"], exact["cost"])
    entries = []
    for rank, pair in sketches.items():
        projected = {what: sketch.project(roles.space) for what, sketch in pair.items()}
        covariances: dict[str, dict] = {"diagonal": {w: covariance_errors(projected[w], exact[w]) for w in exact}}
        for kind in ("isotropic", "none"):
            covariances[kind] = {
                what: covariance_errors(with_residual(pair[what], kind).project(roles.space), exact[what])
                for what in exact
            }
        merged = merge_difference(solve(projected["gain"], projected["cost"]), reference, roles)
        entries.append({"rank": rank, "covariances": covariances, "merge": merged})
    halves = {what: covariance_errors(fisher.half(0), fisher.half(1)) for what, fisher in exact.items()}
    first, second = (solve(exact["gain"].half(h), exact["cost"].half(h)) for h in (0, 1))
    count = min(merge_cores(reference, roles.utility, roles.safety).report.directions, COMPARED_DIRECTIONS)
    stability = split_half_stability(reference, roles.safety, kept=count)
    return {
        "core_dimension": roles.space.size,
        "ranks": entries,
        "halves": {
            "covariances": halves,
            "overlap_of_best": stability.subspace_overlap,
            "merge": merge_difference(first, second, roles),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--limit", type=int, help="Rows of every prompt file.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.base, dtype="float32"), load_tokenizer(arguments.base)
    batches = calibration_batches(model, tokenizer, arguments.limit)
    adapters = data_folder() / "adapters"
    demo = load_roles(adapters / "utility", adapters / "safety")
    seconds: dict[str, object] = {}
    first = batches["gain"][-1:]
    tokens_of_first = int(first[0].attention_mask.sum())
    for name, call in (
        ("kfac Fisher", lambda: collect_fisher(model, first, demo.space, structure="kfac")),
        (f"sketch of rank {DEFAULT_RANK}", lambda: collect_sketch(model, first, rank=DEFAULT_RANK)),
    ):
        seconds[f"collect {name} ({tokens_of_first} tokens, labels from the data)"] = timed(call)[1]
    exact: dict[str, Fisher] = {}
    sketches: dict[int, dict[str, Sketch]] = {rank: {} for rank in RANKS}
    for what, parts in batches.items():
        metadata = {"response_tokens": OPTIONS.response_tokens}
        exact[what] = collect_fisher(
            model, parts, demo.space, structure="kfac", metadata=metadata, **arguments_of(what)
        )
        largest = collect_sketch(model, parts, rank=max(RANKS), metadata=metadata, **arguments_of(what))
        for rank in RANKS:
            sketches[rank][what] = largest if rank == max(RANKS) else first_columns(largest, rank)
        project = sketches[DEFAULT_RANK][what].project
        seconds[f"project sketch of rank {DEFAULT_RANK} ({what})"] = timed(lambda p=project: p(demo.space))[1]
    projected = [sketches[DEFAULT_RANK][what].project(demo.space) for what in ("gain", "cost")]
    spectrum, seconds["solve"] = timed(lambda: solve(*projected))
    seconds["merge"] = timed(lambda: merge_cores(spectrum, demo.utility, demo.safety))[1]
    results = {
        "machine": machine(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "model": Path(arguments.base).name,
        "tokens": {what: sum(int(b.attention_mask.sum()) for b in parts) for what, parts in batches.items()},
        "options": {"response_tokens": OPTIONS.response_tokens, "draws_of_cost": OPTIONS.draws},
        "seconds": seconds,
        "bytes": {
            rank: {w: sum(t.numel() * t.element_size() for t in s.tensors.values()) for w, s in pair.items()}
            for rank, pair in sketches.items()
        },
        "algorithms": compare_algorithms(captured_rows(model, batches["gain"]), demo.space),
        **compare_pair(demo, exact, sketches),
    }
    if arguments.out:
        write_json(results, arguments.out)
        draw(results).savefig(arguments.out.with_suffix(".png"), dpi=150)
    console = Console()
    for table in tables(results):
        console.print(table)


if __name__ == "__main__":
    main()
