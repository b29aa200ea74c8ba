"""Everything that needs a GPU, in one command of under eight minutes: `make gpu`, or `python benchmarks/gpu.py --out DIR`.

Builds the extension in place, checks every op against its reference twin, runs the tests marked `gpu`, runs small problems
under compute-sanitizer (memcheck, racecheck), and times the kernels. A step that fails does not stop those behind it; the
exit code tells whether all passed. No network and no virtual environment: it takes what this Python has.

In DIR: gpu.json (the steps), gpu.log (all they printed), kernels-<device>.json (the benchmark).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 470.0  # seconds for everything
SANITIZER_FAILED = 99

DOCTOR = """
import sys
from rich.console import Console
from sstmerge.pipeline.doctor import diagnose, render
diagnosis = diagnose()
Console(width=160).print(render(diagnosis))
kernels = [check for check in diagnosis.checks if check.backend.startswith("cuda")]
sys.exit(0 if kernels and all(check.ok for check in kernels) else 1)
"""

COMPILED_ONLY = """
from sstmerge.ops import launch
launch.LAUNCHERS["cuda_cupy"] = lambda: (None, "left out under the sanitizer")
"""


@dataclass(frozen=True)
class Step:
    """A command with a time limit.

    Attributes:
        name: What the log and the summary call it.
        command: The command; empty where it cannot run, with the reason as `missing`.
        seconds: Its limit.
        may_end_early: Whether reaching the limit is no failure, as nothing wrong was found until then.
        missing: Why it cannot run.
    """

    name: str
    command: list[str]
    seconds: float
    may_end_early: bool = False
    missing: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a step: "passed", "failed", "time limit" or "left out", its seconds, and whether that is fine."""

    step: str
    outcome: str
    seconds: float
    ok: bool
    words: str = ""


def steps(out: Path, device: str) -> Iterator[Step]:
    python = sys.executable
    yield Step("build", [python, "setup.py", "build_ext", "--inplace"], 150)
    yield Step("doctor", [python, "-c", DOCTOR], 90)
    yield Step("tests", [python, "-m", "pytest", "-q", "-m", "gpu", "--durations=10", "tests/gpu"], 150)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    missing = "" if sanitizer else "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"
    # Without torch's cache every tensor is an allocation of its own, so that a step beyond its end is seen.
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", str(sanitizer), "--error-exitcode", str(SANITIZER_FAILED)]
    for tool in ("memcheck", "racecheck"):
        check = [*command, "--tool", tool]
        yield Step(tool, [*check, python, "-c", COMPILED_ONLY + DOCTOR], 80, missing=missing)
    results = out / f"kernels-{slug(device)}.json"
    kernels = [python, "benchmarks/native_ops.py", "--device", "cuda", "--seconds", "100", "--out", str(results)]
    yield Step("benchmark", kernels, 150)
    tests = [python, "-m", "pytest", "-q", "-x", "-m", "gpu", "-k", "cuda_compiled", "tests/gpu"]
    yield Step(
        "tests under memcheck", [*command, "--tool", "memcheck", *tests], 60, may_end_early=True, missing=missing
    )


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run(step: Step, seconds: float, log: TextIO, environment: dict[str, str]) -> Outcome:
    """Run a step for at most `seconds`; what it prints goes to the terminal and into the log."""
    say(f"\n== {step.name} (at most {seconds:.0f} s)\n", log)
    if step.missing or seconds < 5:
        words = step.missing or "no time was left"
        say(f"left out: {words}\n", log)
        return Outcome(step.name, "left out", 0.0, False, words)
    start = time.perf_counter()
    process = subprocess.Popen(
        ["timeout", "--kill-after=5", f"{seconds:.0f}", *step.command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    for line in process.stdout:
        say(line, log)
    code = process.wait()
    outcome = "passed" if code == 0 else "time limit" if code in {124, 137} else "failed"
    ok = code == 0 or (outcome == "time limit" and step.may_end_early)
    words = "" if code == 0 else f"exit code {code}"
    return Outcome(step.name, outcome, round(time.perf_counter() - start, 1), ok, words)


def say(text: str, log: TextIO) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
    log.write(text)
    log.flush()


def main() -> int:
    import torch
    from measuring import machine, write_results

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    out = parser.parse_args().out.resolve()
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no usable GPU: there is nothing to run", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "SSTMERGE_CUDA_ARCH": f"{major}{minor}",  # of this GPU alone: the build is the first of the eight minutes
    }
    about = machine(device)
    end = time.perf_counter() + LIMIT
    outcomes: list[Outcome] = []
    with (out / "gpu.log").open("w", encoding="utf-8") as log:
        say("".join(f"{name}: {value}\n" for name, value in about.items()), log)
        for step in steps(out, torch.cuda.get_device_name(device)):
            outcomes.append(run(step, min(step.seconds, end - time.perf_counter()), log, environment))
            content = {"machine": about, "steps": [asdict(outcome) for outcome in outcomes]}
            write_results(out / "gpu.json", content)
        say("\n" + "".join(f"{o.step}: {o.outcome}, {o.seconds} s {o.words}\n" for o in outcomes), log)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
