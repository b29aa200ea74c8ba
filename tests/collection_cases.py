"""What the processes of the tests of long and distributed runs do: one small model, one data set, all structures."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from builders import random_adapter, random_batch
from pico_models import build_llama

from sstmerge.adapters import CoreSpace
from sstmerge.cli import main
from sstmerge.errors import FisherError
from sstmerge.fisher import Batch, Fisher, Sketch, collect_fisher, collect_sketch, save_sketch
from sstmerge.fisher.distributed import Ranks
from sstmerge.gevp import solve
from sstmerge.pipeline.launch import joined_ranks
from sstmerge.pipeline.run import CheckpointOptions, opened_run

# What the commands import when they run; here, so that the server has it.
importlib.import_module("sstmerge.pipeline.fisher_job")
importlib.import_module("sstmerge.pipeline.merge")
importlib.import_module("sstmerge.pipeline.manifest")
importlib.import_module("transformers").AutoModelForCausalLM  # noqa: B018 (transformers imports late)

STRUCTURES = ("diagonal", "kfac", "ekfac", "block", "global")
MODEL = build_llama(seed=0, tie_word_embeddings=False)
ADAPTERS = [
    random_adapter(MODEL, "a", targets=("q_proj", "down_proj"), rank=1, seed=1, dtype=torch.float32),
    random_adapter(MODEL, "b", targets=("q_proj",), rank=1, seed=2, dtype=torch.float32),
]
SPACE = CoreSpace.of(ADAPTERS)
# Batches of uneven size and weight; 11 of them at two reference points are 22, more than the leaves of `block`.
BATCHES = [
    random_batch(
        [6 + i % 3, 5][: 1 + i % 2], response=2, seed=i, first_index=2 * i, weight=[0.5 + i % 4, 1.0][: 1 + i % 2]
    )
    for i in range(11)
]
REFERENCE = "path:a:a+b:2"


def collected(structure: str, batches: list[Batch] = BATCHES, **options: Any) -> Fisher:
    """Collect the case's Fisher."""
    basis = None
    if structure == "ekfac":
        ranks = options.get("ranks")
        kfac = [
            collect_fisher(MODEL, batches, SPACE, structure="kfac", reference=REFERENCE, labels=labels, ranks=ranks)
            for labels in ("data", "sampled")
        ]
        basis = solve(*kfac, ranks=ranks).basis
    return collect_fisher(
        MODEL, batches, SPACE, structure=structure, labels="sampled", reference=REFERENCE, basis=basis, **options
    )


def collect_together(structure: str, number_of_batches: int, out: Path) -> bool:
    """Collect in all processes; every one saves what it got."""
    with joined_ranks() as ranks:
        fisher = collected(structure, BATCHES[:number_of_batches], ranks=ranks)
        fisher.save(out / f"{ranks.rank}.safetensors")
    return True


def solve_together(structure: str) -> list[float]:
    """Solve a pair in all processes and return numbers that depend on values and vectors."""
    with joined_ranks() as ranks:
        return spectrum_numbers(structure, ranks)


def spectrum_numbers(structure: str, ranks: Ranks) -> list[float]:
    gain, cost = (collected(structure, batches) for batches in (BATCHES, BATCHES[::2]))
    spectrum = solve(gain, cost, ranks=ranks)
    return [*spectrum.eigenvalues.tolist(), *spectrum.coordinates(SPACE.core("a")).tolist()]


def collect_into(structure: str, out: Path, batches_between: int = 1, pause: float = 0.0, seed: int = 0) -> bool:
    """Collect with checkpoints, in one process or several, and save; a pause after every batch gives time to kill it."""
    with joined_ranks() as ranks, opened_run(out, ranks=ranks, options=_every(batches_between)) as run:
        fisher = collected(
            structure,
            ranks=ranks,
            checkpoint=run.checkpoint("Fisher"),
            progress=lambda done, total: time.sleep(pause),
            seed=seed,
        )
        if ranks.first:
            fisher.save(out)
    return True


def collect_and_die(structure: str, out: Path, rank_to_die: int, after: int) -> bool:
    """Let one process be killed by the kernel in the middle of its share."""
    with joined_ranks(silence=3.0) as ranks, opened_run(out, ranks=ranks, options=_every(1)) as run:

        def count(done: int, total: int) -> None:
            nonlocal after
            after -= 1
            if ranks.rank == rank_to_die and after <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

        collected(structure, ranks=ranks, checkpoint=run.checkpoint("Fisher"), progress=count)
    return True


def collect_and_fail(structure: str, rank_to_fail: int) -> bool:
    """Let one process find an error in the middle of its share."""
    with joined_ranks() as ranks:

        def fail(done: int, total: int) -> None:
            if ranks.rank == rank_to_fail:
                raise FisherError("These scores are no good.")

        collected(structure, ranks=ranks, progress=fail)
    return True


def collect_other_work(structure: str) -> bool:
    """Give every process another seed."""
    with joined_ranks() as ranks:
        collect_fisher(MODEL, BATCHES, SPACE, structure=structure, seed=ranks.rank, ranks=ranks)
    return True


def sketched(**options: Any) -> Sketch:
    """Collect the case's sketch: 11 batches, more than its leaves."""
    return collect_sketch(MODEL, BATCHES, rank=8, **options)


def sketch_into(out: Path, pause: float = 0.0) -> bool:
    """Sketch with checkpoints after every batch, in one process or several, and save."""
    with joined_ranks() as ranks, opened_run(out, ranks=ranks, options=_every(1)) as run:
        sketch = sketched(
            ranks=ranks, checkpoint=run.checkpoint("sketch"), progress=lambda done, total: time.sleep(pause)
        )
        if ranks.first:
            save_sketch(sketch, out)
    return True


def sketch_together(out: Path) -> bool:
    """Sketch in all processes; every one saves what it got."""
    with joined_ranks() as ranks:
        save_sketch(sketched(ranks=ranks), out / f"{ranks.rank}.safetensors")
    return True


def hold(out: Path) -> bool:
    """Hold the lock of an output until killed."""
    with opened_run(out):
        (out.parent / "held").touch()
        signal.pause()
    return True


def command_line(*arguments: str) -> None:
    """Be `sstmerge` with these arguments."""
    sys.argv = ["sstmerge", *arguments]
    main()


def _every(batches: int) -> CheckpointOptions:
    return CheckpointOptions(minutes=None, batches=batches)
