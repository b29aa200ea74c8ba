"""The whole report by one command: every benchmark, its tables and pictures, and after how many merges a Fisher has paid.

    python benchmarks/report.py [--quick] [--base MODEL] [--device cpu] [--out FOLDER] [--only STAGE …] [--reuse]

Stages run one after the other, each a script of this folder that also runs alone; FOLDER gets the JSON, the printed tables
and the pictures of each, and `report.md` over all. `--reuse` takes results that FOLDER holds already. `--base` is the demo's
model (`sstmerge demo` converts it): with it the calibration of a real model is timed, and the sketch measured.

Break-even: calibration is paid once, every merge after it takes our merge time. Against a rival whose merge takes longer
than ours, the Fisher has paid after calibration / (rival − ours) merges; against a faster one, never. Times are processor
seconds on the same machine, for two adapters of r = 16 (calibration: the base's shapes, r = 8).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from sstmerge.atomic import atomic_file

HERE = Path(__file__).parent
# Tokens of a calibration for the break-even: 500 sequences of each kind, 100 tokens each, which is generous.
CALIBRATION_TOKENS = 100_000
# Width of the tables.
COLUMNS = 150
SLOPE_MODELS = ("Llama-3.2-1B", "Llama-2-70B")


@dataclass(frozen=True)
class Stage:
    """A benchmark of the report.

    Attributes:
        title: What it measures.
        minutes: About how long it takes on two quiet cores, quick and whole.
        command: Arguments of Python, from the output file and the options.
        needs_base: Whether it needs `--base`.
    """

    title: str
    minutes: tuple[float, float]
    command: Callable[[Path, argparse.Namespace], list[str]]
    needs_base: bool = False


def _kernels(out: Path, options: argparse.Namespace) -> list[str]:
    return ["native_ops.py", "--device", options.device, "--out", str(out), *(["--quick"] if options.quick else [])]


def _merges(out: Path, options: argparse.Namespace) -> list[str]:
    quick = ["--models", "SmolLM2-135M", *SLOPE_MODELS, "--ranks", "--counts", "--no-dense", "--no-files"]
    return ["merge_phase.py", "--device", options.device, "--output", str(out), *(quick if options.quick else [])]


def _collection(out: Path, options: argparse.Namespace) -> list[str]:
    return ["collection.py", "--out", str(out), *(["--repetitions", "2", "--no-memory"] if options.quick else [])]


def _collection_of_base(out: Path, options: argparse.Namespace) -> list[str]:
    return [*_collection(out, options), "--base", options.base]


def _scaling(out: Path, options: argparse.Namespace) -> list[str]:
    return ["scaling.py", "--out", str(out), *(["--points", "3", "--repetitions", "1"] if options.quick else [])]


def _stopping(out: Path, options: argparse.Namespace) -> list[str]:
    quick = ["--limit", "16", "--harmful-limit", "24", "--check-every", "8", "--test-limit", "4"]
    return ["early_stopping.py", "--base", options.base, "--out", str(out), *(quick if options.quick else [])]


def _profiles(out: Path, options: argparse.Namespace) -> list[str]:
    return ["profiles.py", "--out", str(out.parent / "profiles")]


def _drop_in(out: Path, options: argparse.Namespace) -> list[str]:
    types = ["linear", "ties", "dare_linear", "magnitude_prune", *([] if options.quick else ["svd", "dare_linear_svd"])]
    return ["add_weighted_adapter.py", "--output", str(out), "--setting", "small", "--adapters", "2", "--types", *types]


def _sketch(out: Path, options: argparse.Namespace) -> list[str]:
    return ["sketch.py", "--base", options.base, "--out", str(out), *(["--limit", "4"] if options.quick else [])]


STAGES = {
    "kernels": Stage("Native ops against torch, PEFT and scipy", (1, 3), _kernels),
    "merge-latency": Stage("The merge phase, Fishers at hand", (4, 10), _merges),
    "collection": Stage("Calibration against bare passes and peers", (2, 10), _collection),
    "collection-base": Stage("Calibration on a real model", (2, 8), _collection_of_base, needs_base=True),
    "scaling": Stage("How calibration and merge grow", (4, 15), _scaling),
    "add-weighted-adapter": Stage("PEFT's own function and the drop-in", (2, 3), _drop_in),
    "sketch": Stage("A sketch of the base model against exact factors", (6, 6), _sketch, needs_base=True),
    "profiles": Stage("Profiles of every phase", (1, 1), _profiles),
    "early-stopping": Stage("Stopping when converged, on a real model", (5, 25), _stopping, needs_base=True),
}


def run_stage(name: str, options: argparse.Namespace, console: Console) -> bool:
    """Run a benchmark; its tables go to `NAME.txt` beside its results, its progress, warnings and errors to `NAME.log`.

    Returns:
        Whether it ended well.
    """
    stage, out = STAGES[name], options.out / f"{name}.json"
    if options.reuse and out.exists():
        return True
    console.print(f"{stage.title}: about {stage.minutes[0 if options.quick else 1]:g} minutes …", highlight=False)
    start = time.perf_counter()
    script, *arguments = stage.command(out, options)
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env={**os.environ, "COLUMNS": str(COLUMNS)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    for suffix, words in ((".txt", done.stdout), (".log", done.stderr)):
        with atomic_file(out.with_suffix(suffix)) as unfinished:
            unfinished.write_text(words, encoding="utf-8")
    words = "done" if done.returncode == 0 else f"failed with exit code {done.returncode}: see {name}.log"
    console.print(f"{name}: {words}, {(time.perf_counter() - start) / 60:.1f} minutes", highlight=False)
    return done.returncode == 0


def calibration_seconds(collection: dict) -> dict[str, float]:
    """Return processor seconds per token of our rows, by name, from the first run."""
    rows = collection["runs"][0]["rows"]
    return {name: row["microseconds_per_token"] / 1e6 for name, row in rows.items() if name.startswith("sstmerge")}


def break_even(calibration: float, ours: float, rival: float) -> int | None:
    """Return the number of merges after which a Fisher has paid; None where it never does.

    Args:
        calibration: Seconds of the calibration.
        ours: Seconds of one of our merges.
        rival: Seconds of one of the rival's.
    """
    return math.ceil(calibration / (rival - ours)) if rival > ours else None


def break_even_table(merges: dict, collection: dict) -> list[str]:
    """Return the lines of the table for the model of `--base`'s shapes."""
    row = next((row for row in merges["results"] if row["model"] == "SmolLM2-135M"), None)
    per_token = calibration_seconds(collection)
    if row is None or not per_token:
        return []
    lines = [
        "## Break-even",
        "",
        f"Two calibrations of {CALIBRATION_TOKENS:,} tokens in all, on {Path(collection['runs'][0]['model']).name}:",
        "",
        "| rival | its merge, s | structure | ours, s | calibration, s | a Fisher has paid after |",
        "|---|---|---|---|---|---|",
    ]
    for name, method in row["methods"].items():
        if name.startswith("sst"):
            continue
        for structure in ("kfac", "global"):
            ours = row["methods"].get(f"sst {structure}")
            seconds = per_token.get(f"sstmerge {structure} at adapter")
            if ours is None or seconds is None:
                continue
            merges_needed = break_even(CALIBRATION_TOKENS * seconds, ours["cpu_s"], method["cpu_s"])
            after = "never: it is faster" if merges_needed is None else f"{merges_needed:,} merges"
            cells = f"{method['cpu_s']:.2f} | {structure} | {ours['cpu_s']:.2f} | {CALIBRATION_TOKENS * seconds:.0f}"
            lines.append(f"| {name} | {cells} | {after} |")
    return [*lines, ""]


def write_report(folder: Path) -> Path:
    """Put all results of a folder into one page.

    Args:
        folder: Where the stages wrote.

    Returns:
        The page.
    """
    found = {name: folder / f"{name}.json" for name in STAGES if (folder / f"{name}.json").exists()}
    contents = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items()}
    lines = ["# Benchmarks of sstmerge", ""]
    for name, content in contents.items():
        lines += [f"## {STAGES[name].title}", ""]
        words = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
        lines += [f"{words}. [All numbers]({name}.json).", ""]
        if (folder / f"{name}.png").exists():
            lines += [f"![{STAGES[name].title}]({name}.png)", ""]
        printed = folder / f"{name}.txt"
        if printed.exists():
            lines += ["```text", printed.read_text(encoding="utf-8").rstrip(), "```", ""]
    profiles = sorted((folder / "profiles").glob("*.txt"))
    if profiles:
        lines += ["## Profiles", "", "Operations by time, and traces for ui.perfetto.dev:", ""]
        lines += [f"* [{p.stem}](profiles/{p.name}), [trace](profiles/{p.stem}.json.gz)" for p in profiles] + [""]
    if "merge-latency" in contents and "collection-base" in contents:
        lines += break_even_table(contents["merge-latency"], contents["collection-base"])
    page = folder / "report.md"
    with atomic_file(page) as unfinished:
        unfinished.write_text("\n".join(lines), encoding="utf-8")
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer problems and repetitions")
    parser.add_argument("--base", help="directory or hub id of the demo's model")
    parser.add_argument("--device", default="cpu", help="of the kernels and the merges")
    parser.add_argument("--out", type=Path, default=Path("benchmark-report"))
    parser.add_argument("--only", nargs="+", choices=STAGES, help="these stages")
    parser.add_argument("--reuse", action="store_true", help="keep results that are there")
    options = parser.parse_args()
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in options.only or STAGES if options.base or not STAGES[name].needs_base]
    left_out = [name for name in options.only or STAGES if name not in chosen]
    if left_out:
        console.print(f"Left out, because they need --base: {', '.join(left_out)}", highlight=False)
    failed = [name for name in chosen if not run_stage(name, options, console)]
    console.print(f"The report is {write_report(options.out)}.", highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
