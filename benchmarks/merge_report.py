"""Tables and a picture of the merge-latency benchmark."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS = ("cores", "solve", "select", "write_back")
REFERENCE = "peft dare_linear"
AXES = {
    "parameters": "LoRA parameters, 1B to 70B shapes",
    "rank": "rank, two adapters, Llama-3.2-1B",
    "adapters": "number of adapters of r = 16, Llama-3.2-1B",
}


def print_tables(content: dict, console: Console) -> None:
    """Print one table per setting, the slopes, and the merge from files to a file."""
    for row in content["results"]:
        title = (
            f"{row['model']}, r = {row['rank']}, {row['adapters']} adapters, {row['parameters'] / 1e6:.1f} M parameters"
        )
        table = Table(
            "method", "CPU s", "wall s", "CPU / PEFT", "peak MiB", "steps, CPU ms", "extrapolated", title=title
        )
        reference = row["methods"][REFERENCE]["cpu_s"]
        for name, result in row["methods"].items():
            steps = result.get("steps", {})
            table.add_row(
                name,
                f"{result['cpu_s']:.3f}",
                f"{result['wall_s']:.3f}",
                f"{result['cpu_s'] / reference:.3g}",
                f"{result['peak_mib']:.0f}" if "peak_mib" in result else "",
                ", ".join(f"{step} {1e3 * time['cpu_s']:.0f}" for step, time in steps.items()),
                result.get("extrapolated", ""),
            )
        console.print(table)
    for axis, found in content["slopes"].items():
        if found:
            table = Table("method, step", "CPU", "wall", title=f"log-log slope over {AXES[axis]}")
            for name, clocks in found.items():
                table.add_row(name, f"{clocks['cpu_s']:.3f}", f"{clocks['wall_s']:.3f}")
            console.print(table)
    for sentence in target_sentences(content["slopes"]["parameters"]):
        console.print(sentence, highlight=False)
    if "files" in content:
        files = content["files"]
        console.print(
            f"70B-shaped, r = 16, two adapters, from files to a file: {files['cpu_s']:.1f} s CPU, {files['wall_s']:.1f} s, "
            f"peak {files['peak_rss_gib']:.2f} GiB resident ({files['rss_after_imports_gib']:.2f} GiB after imports)",
            highlight=False,
        )


def target_sentences(found: dict[str, dict[str, float]]) -> list[str]:
    """Say of our methods whether their slope over LoRA parameters is 1.0 ± 0.05, and on which side it misses."""
    sentences = []
    for name, clocks in found.items():
        if name.startswith("sst") and "," not in name:
            value = clocks["cpu_s"]
            verdict = "within the target" if abs(value - 1) <= 0.05 else "misses the target"
            side = "" if abs(value - 1) <= 0.05 else (": it grows slower" if value < 1 else ": it grows faster")
            sentences.append(f"{name}: slope {value:.2f} over LoRA parameters {verdict} of 1.0 ± 0.05{side}.")
    return sentences


def plot(content: dict, path: Path) -> None:
    """Draw time over parameters of every method, and our steps."""
    rows = [row for row in content["results"] if (row["rank"], row["adapters"]) == (16, 2)]
    if not rows:
        return
    figure, ((left, right), sweeps) = plt.subplots(2, 2, figsize=(13, 10), constrained_layout=True)
    model = "Llama-3.2-1B"
    sweep = [row for row in content["results"] if row["model"] == model]
    _draw_sweep(sweeps[0], [row for row in sweep if row["adapters"] == 2], "rank", f"{model}, two adapters")
    _draw_sweep(sweeps[1], [row for row in sweep if row["rank"] == 16], "adapters", f"{model}, r = 16")
    for name in dict.fromkeys(name for row in rows for name in row["methods"]):
        points = [(row["parameters"], row["methods"][name]) for row in rows if name in row["methods"]]
        dashed = any("extrapolated" in result for _, result in points)
        style = {
            "linestyle": ":" if dashed else "-",
            "linewidth": 2.5 if name.startswith("sst") else 1.2,
            "marker": "o",
        }
        left.plot([size for size, _ in points], [result["cpu_s"] for _, result in points], label=name, **style)
    left.set(
        ylim=(0.05, None),
        xscale="log",
        yscale="log",
        xlabel="parameters of one adapter",
        ylabel="processor seconds of a merge",
    )
    left.set_title(f"r = 16, two adapters, {content['threads']} threads (dotted: from one block)")
    left.grid(alpha=0.3)
    left.legend(fontsize=8, loc="upper left")
    bars = [(row, name) for row in rows for name in row["methods"] if name.startswith("sst")]
    base = [0.0] * len(bars)
    for step in STEPS:
        heights = [1e9 * row["methods"][n]["steps"][step]["cpu_s"] / row["parameters"] for row, n in bars]
        right.bar(range(len(bars)), heights, bottom=base, label=step)
        base = [below + height for below, height in zip(base, heights, strict=True)]
    for x, (row, _) in enumerate(bars):
        right.hlines(1e9 * row["methods"][REFERENCE]["cpu_s"] / row["parameters"], x - 0.45, x + 0.45, "black")
    right.set_xticks(range(len(bars)), [f"{row['model']}\n{n}" for row, n in bars], rotation=90, fontsize=8)
    right.set(ylabel="processor nanoseconds per parameter of an adapter", title="our steps (black: PEFT dare_linear)")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _draw_sweep(panel, rows: list[dict], size: str, title: str) -> None:
    rows = sorted(rows, key=lambda row: row[size])
    for name in dict.fromkeys(name for row in rows for name in row["methods"]):
        points = [
            (r[size], r["methods"][name]["cpu_s"])
            for r in rows
            if name in r["methods"] and "extrapolated" not in r["methods"][name]
        ]
        if len(points) > 1:
            panel.plot(
                *zip(*points, strict=True), marker="o", label=name, linewidth=2.5 if name.startswith("sst") else 1.2
            )
    panel.set(xscale="log", yscale="log", xlabel=size, ylabel="processor seconds of a merge", title=title)
    panel.grid(alpha=0.3)
    if panel.lines:
        panel.legend(fontsize=8)
