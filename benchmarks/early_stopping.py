"""How many tokens "stop when converged" saves, at what difference to the merge of all samples; every look of every run.

    python benchmarks/early_stopping.py --base MODEL [--out benchmarks/results/NAME.json] [--structures kfac …]

The demo's adapters and prompts (all splits but `test`), library defaults: reference `utility`, one draw of labels, whole
responses, `project` with 99 % of the gain energy. For every structure the package's own sequential collection runs over
all data with a look after every chunk; the tolerances only decide which of the looks is the last one, so one run serves
all of them. Per look:

    KL, step error   what the criterion sees: held-out KL with its interval, half-sample error of the step
    cosine           of the step to that of all samples, in the metric of F_cost of all samples
    KL, gain         of the step by the Fishers of all samples, over those of the step of all samples

At the looks where a run would stop, and for all samples, the merged model is measured on the `test` split: KL from the
utility model on benign prompts, mean log-likelihood of the refusals of harmful ones. `half the samples` shows what
sampling noise does to a merge that nobody stopped early.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from measuring import machine, write_results
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sstmerge.adapters import CoreSpace
from sstmerge.demo.run import data_folder
from sstmerge.fisher import Batch, Fisher, collect_fisher
from sstmerge.gevp import Spectrum, solve
from sstmerge.merging import merge_cores
from sstmerge.pipeline.calibration import CollectionOptions, batches_of
from sstmerge.pipeline.evaluate import mean_log_likelihood, measured_kl
from sstmerge.pipeline.evaluate_job import core_state
from sstmerge.pipeline.models import load_model, load_tokenizer
from sstmerge.pipeline.roles import Roles, load_roles
from sstmerge.pipeline.sequential import StoppingRule, converge_pair
from sstmerge.prompts import load_examples

STRUCTURES = ("kfac", "diagonal", "global")
TOLERANCES = (0.5, 0.3, 0.2, 0.1)
SPLITS = ("calibration", "train", "tune")
BENIGN_FILES = ("benign", "borderline", "utility")
# No interval is this narrow: the run looks after every chunk and never stops.
NEVER = 1e-9


@dataclass
class Recorded:
    """Collects the Fisher of a chunk, and keeps it.

    Attributes:
        collect: Collects a chunk.
        space: The space.
        files: Where chunks are kept and found again, as this and a number; None keeps them in memory only.
        chunks: The Fishers, with the tokens (prompts included) that they took.
        seconds: Processor time of all chunks that were collected now.
    """

    collect: Callable[[Sequence[Batch]], Fisher]
    space: CoreSpace
    files: Path | None = None
    chunks: list[tuple[int, Fisher]] = field(default_factory=list)
    seconds: float = 0.0

    def __call__(self, batches: Sequence[Batch], _: str) -> Fisher:
        """Collect a chunk."""
        start = time.process_time()
        file = None if self.files is None else Path(f"{self.files}-{len(self.chunks)}.safetensors")
        if file is not None and file.exists():
            fisher = Fisher.load(file, self.space.adapters).in_space(self.space)
            if fisher.tokens != sum(int(batch.loss_mask.sum()) for batch in batches):
                raise SystemExit(f"{file} holds other prompts; give another --chunks.")
        else:
            fisher = self.collect(batches)
            self.seconds += time.process_time() - start
            if file is not None:
                fisher.save(file)
        self.chunks.append((sum(int(batch.attention_mask.sum()) for batch in batches), fisher))
        return fisher

    def first(self, count: int) -> Fisher:
        """Return the Fisher of the first chunks, of all where there are fewer."""
        return functools.reduce(operator.add, [fisher for _, fisher in self.chunks[:count]])

    def tokens(self, count: int) -> int:
        """Return the tokens of the first chunks."""
        return sum(tokens for tokens, _ in self.chunks[:count])


class Comparison:
    """The merge of some samples against the merge of all of them."""

    def __init__(self, roles: Roles, gain: Fisher, cost: Fisher) -> None:
        self._roles, self._gain, self._cost = roles, gain, cost
        self.whole = step(roles, solve(gain, cost))

    def of(self, change: Tensor) -> dict[str, float]:
        """Return cosine, KL and gain of a step against those of all samples, by the Fishers of all samples."""
        quadratic = self._cost.quadratic
        # 4 aᵀFb = (a + b)ᵀF(a + b) − (a − b)ᵀF(a − b).
        inner = (quadratic(change + self.whole) - quadratic(change - self.whole)) / 4
        own, whole = quadratic(change), quadratic(self.whole)
        return {
            "cosine": inner / (own * whole) ** 0.5,
            "kl_over_all": own / whole,
            "gain_over_all": self._gain.quadratic(change) / self._gain.quadratic(self.whole),
        }


def step(roles: Roles, spectrum: Spectrum) -> Tensor:
    """Return the change of the utility model by the default merge, shape (D,)."""
    return merge_cores(spectrum, roles.utility, roles.safety).core - roles.utility


def prompts(files: Sequence[str], splits: Sequence[str], limit: int | None) -> list:
    folder = data_folder()
    found = [
        [example for split in splits for example in load_examples(str(folder / f"{name}.jsonl"), split=split)]
        for name in files
    ]
    return [example for examples in found for example in examples[:limit]]


def run_structure(
    model: Any,
    roles: Roles,
    batches: tuple[list[Batch], list[Batch]],
    structure: str,
    check_every: int,
    chunks_at: Path | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Collect everything with a look after every chunk.

    Returns:
        The looks, what every tolerance saves, and the steps to be measured by name.
    """
    options = CollectionOptions(structure=structure)

    def collect(chunk: Sequence[Batch], labels: str) -> Fisher:
        return collect_fisher(
            model, chunk, roles.space, structure=structure, labels=labels, reference=options.reference, seed=0
        )

    if chunks_at is not None:
        chunks_at.mkdir(parents=True, exist_ok=True)
    gain, cost = (
        Recorded(partial(collect, labels=labels), roles.space, None if chunks_at is None else chunks_at / what)
        for what, labels in (("gain", "data"), ("cost", "sampled"))
    )
    rule = StoppingRule(NEVER, None, check_every, options.tokens_per_batch, 0)
    start = time.process_time()
    (whole_gain, whole_cost), _ = converge_pair(*batches, (gain, cost), partial(step, roles), rule)
    looking = time.process_time() - start - gain.seconds - cost.seconds
    comparison = Comparison(roles, whole_gain, whole_cost)
    most = max(len(gain.chunks), len(cost.chunks))
    recorded = whole_cost.metadata["convergence"]["looks"]
    looks, steps = [], {}
    for chunks, look in zip(range(most - len(recorded) + 1, most + 1), recorded, strict=True):
        change = step(roles, solve(gain.first(chunks), cost.first(chunks)))
        tokens = gain.tokens(chunks) + cost.tokens(chunks)
        looks.append({**look, "model_tokens": tokens, "against_all": comparison.of(change)})
        steps[chunks] = change
    all_tokens = gain.tokens(most) + cost.tokens(most)
    stops: dict[str, dict[str, Any] | None] = {}
    measured = {"all samples": comparison.whole}
    for tolerance in TOLERANCES:
        hit = next((i for i, look in enumerate(looks) if within(look, tolerance)), None)
        if hit is None:
            stops[f"{tolerance:g}"] = None
            continue
        look = looks[hit]
        stops[f"{tolerance:g}"] = {
            "look": hit + 1,
            "sequences": look["sequences"],
            "model_tokens": look["model_tokens"],
            "tokens_saved": 1 - look["model_tokens"] / all_tokens,
            "against_all": look["against_all"],
        }
        measured[f"look {hit + 1}"] = steps[most - len(looks) + hit + 1]
    halves = [step(roles, solve(whole_gain.half(i), whole_cost.half(i))) for i in (0, 1)]
    content = {
        "sequences": [sum(len(batch.index) for batch in one) for one in batches],
        "model_tokens": all_tokens,
        "check_every": check_every,
        "collecting_cpu_s": (gain.seconds + cost.seconds) or None,  # None: all chunks were kept from an earlier run
        "looking_cpu_s": looking,  # reading chunks that were kept included
        "looks": looks,
        "stops": stops,
        "halves_of_the_samples": [comparison.of(half) for half in halves],
    }
    return content, {**measured, "half the samples": halves[0]}


def within(look: dict[str, Any], tolerance: float) -> bool:
    """Say whether a run with this tolerance would have stopped here, as `pair_look` decides."""
    width, error = look["kl"]["half_width"], look["step_error"]
    if width is None or error is None or not look["kl"]["estimate"]:
        return False
    return width / abs(look["kl"]["estimate"]) <= tolerance and error <= tolerance


def measure(model: Any, tokenizer: Any, roles: Roles, steps: dict[str, Tensor], limit: int) -> dict[str, dict]:
    """Run the merged models on the test split."""
    options = CollectionOptions()
    benign = batches_of(model, tokenizer, prompts(BENIGN_FILES[:2], ["test"], limit), options)
    harmful = batches_of(model, tokenizer, prompts(["harmful"], ["test"], limit), options)
    reference = core_state(model, roles.space, roles.utility)
    found = {}
    for name, change in {"utility": torch.zeros_like(roles.utility), **steps}.items():
        state = core_state(model, roles.space, roles.utility + change)
        with state():
            likelihood = mean_log_likelihood(model, harmful)
        found[name] = {"kl": measured_kl(model, benign, reference, state), "refusal_log_likelihood": likelihood}
    return found


# ---- output ----------------------------------------------------------------------------------------------------------


def print_structure(name: str, found: dict, console: Console) -> None:
    """Print the looks of a structure, and what stopping saves."""
    columns = ("look", "sequences", "held-out KL", "±", "step error", "cosine to all", "KL / all", "gain / all")
    table = Table(
        *columns, title=f"{name}: {found['sequences'][0]} harmful and {found['sequences'][1]} benign sequences"
    )
    for look in found["looks"]:
        width, error, against = look["kl"]["half_width"], look["step_error"], look["against_all"]
        table.add_row(
            str(look["number"]),
            " + ".join(map(str, look["sequences"])),
            f"{look['kl']['estimate']:.4f}",
            "" if width is None else f"{width / abs(look['kl']['estimate']):.0%}",
            "" if error is None else f"{error:.1%}",
            *(f"{against[key]:.4f}" for key in ("cosine", "kl_over_all", "gain_over_all")),
        )
    console.print(table)
    table = Table("tolerance", "stops at", "tokens saved", "cosine to all", "KL measured", "log p(refusal)")
    rows = {"all samples": ("", None), "half the samples": ("", found["halves_of_the_samples"][0])}
    for tolerance, stop in found["stops"].items():
        if stop is None:
            table.add_row(tolerance, "never: takes all samples", "0 %", "1", "", "")
            continue
        _add(table, found, f"look {stop['look']}", tolerance, f"{stop['tokens_saved']:.0%}", stop["against_all"])
    for key, (saved, against) in rows.items():
        _add(table, found, key, "", saved, against)
    console.print(table)


def _add(table: Table, found: dict, key: str, tolerance: str, saved: str, against: dict | None) -> None:
    measured = found["measured"].get(key)
    cosine = "1" if against is None else f"{against['cosine']:.4f}"
    model = ("", "") if measured is None else (f"{measured['kl']:.4f}", f"{measured['refusal_log_likelihood']:.3f}")
    table.add_row(tolerance, key, saved, cosine, *model)


def draw(structures: dict[str, dict]) -> Figure:
    """Draw what the criterion sees, and what it cannot see, over the tokens."""
    figure = Figure(figsize=(13, 4), constrained_layout=True)
    panels = figure.subplots(1, 3)
    for name, found in structures.items():
        tokens = [look["model_tokens"] for look in found["looks"]]
        widths = [look["kl"]["half_width"] for look in found["looks"]]
        relative = [
            float("nan") if width is None else width / abs(look["kl"]["estimate"])
            for width, look in zip(widths, found["looks"], strict=True)
        ]
        panels[0].plot(tokens, relative, marker="o", label=name)
        errors = [look["step_error"] for look in found["looks"]]
        panels[1].plot(tokens, [float("nan") if e is None else e for e in errors], marker="o")
        panels[2].plot(tokens, [1 - look["against_all"]["cosine"] for look in found["looks"]], marker="o")
    titles = ("relative half width of the held-out KL", "error of the step", "1 − cosine to the step of all samples")
    for panel, title in zip(panels, titles, strict=True):
        panel.set(title=title, xlabel="tokens through the model", yscale="log")
        panel.grid(alpha=0.3)
    for panel in panels[:2]:
        for tolerance in TOLERANCES:
            panel.axhline(tolerance, color="grey", linewidth=0.8, linestyle=":")
    panels[0].legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="directory or hub id of the demo's model")
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument(
        "--limit", type=int, default=100, help="prompts of each benign file; harmful ones are all taken"
    )
    parser.add_argument("--harmful-limit", type=int, help="harmful prompts")
    parser.add_argument("--test-limit", type=int, default=16, help="test prompts of each kind; 0 measures nothing")
    parser.add_argument(
        "--chunks", type=Path, help="folder that keeps the Fishers of chunks, for a run that is cut off"
    )
    parser.add_argument("--check-every", type=int, default=16)
    parser.add_argument("--out", type=Path, help="JSON; what it holds of other structures stays")
    arguments = parser.parse_args()
    console = Console(width=150)
    model, tokenizer = load_model(arguments.base), load_tokenizer(arguments.base)
    roles = load_roles(data_folder() / "adapters" / "utility", data_folder() / "adapters" / "safety")
    harm = prompts(["harmful"], arguments.splits, arguments.harmful_limit)
    benign = prompts(BENIGN_FILES, arguments.splits, arguments.limit)
    options = CollectionOptions()
    batches = batches_of(model, tokenizer, harm, options), batches_of(model, tokenizer, benign, options)
    content: dict[str, Any] = {"machine": machine(torch.device("cpu")), "model": Path(arguments.base).name}
    kept = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out and arguments.out.exists() else {}
    content["structures"] = kept.get("structures", {})
    for structure in arguments.structures:
        console.print(f"{structure}: {len(harm)} harmful and {len(benign)} benign prompts …", highlight=False)
        found, steps = run_structure(
            model, roles, batches, structure, arguments.check_every, arguments.chunks and arguments.chunks / structure
        )
        found["measured"] = (
            measure(model, tokenizer, roles, steps, arguments.test_limit) if arguments.test_limit else {}
        )
        content["structures"][structure] = found
        print_structure(structure, found, console)
        if arguments.out:
            write_results(arguments.out, content)
    if arguments.out:
        draw(content["structures"]).savefig(arguments.out.with_suffix(".png"), dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
