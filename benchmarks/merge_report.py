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
    table = Table("method", "CPU", "wall", title="log-log slope over LoRA parameters, 1B to 70B shapes")
    for name, clocks in content["slopes_1B_to_70B"].items():
        table.add_row(name, f"{clocks['cpu_s']:.3f}", f"{clocks['wall_s']:.3f}")
    console.print(table)
    if "files" in content:
        files = content["files"]
        console.print(
            f"70B-shaped, r = 16, two adapters, from files to a file: {files['cpu_s']:.1f} s CPU, {files['wall_s']:.1f} s, "
            f"peak {files['peak_rss_gib']:.2f} GiB resident ({files['rss_after_imports_gib']:.2f} GiB after imports)",
            highlight=False,
        )


def plot(content: dict, path: Path) -> None:
    """Draw time over parameters of every method, and our steps."""
    rows = [row for row in content["results"] if (row["rank"], row["adapters"]) == (16, 2)]
    if not rows:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
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
