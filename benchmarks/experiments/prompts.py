"""The prompts of an experiment: training, calibration and test, drawn once and disjoint."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sstmerge.demo.run import data_folder
from sstmerge.errors import DataError
from sstmerge.evaluation.classification_tasks import load_task, task_source
from sstmerge.evaluation.data_sets import load_prompts
from sstmerge.evaluation.overlap import refuse_overlaps, without
from sstmerge.evaluation.refusal import Verdict, judge_refusal
from sstmerge.prompts import Example, load_examples

LONGEST_PROMPT = 400  # characters, so that prompt and response fit into 256 tokens
# Prompts of each kind on which options of SST were chosen (dev/LOG.md), drawn with this seed from those outside the test.
DEVELOPMENT, DEVELOPMENT_SEED = 90, 1
TEST_SETS = {"harmful": "strongreject", "borderline": "xstest-safe", "ordinary": "refusal-direction-harmless"}


@dataclass(frozen=True)
class DataSets:
    """Where the data sets are read from.

    Attributes:
        folder: Folder with their files (docs/EVALUATION.md); None for the hub.
        missing_from_hub: Whether what the folder does not hold comes from the hub.
    """

    folder: Path | None
    missing_from_hub: bool = False

    def prompts(self, name: str, split: str = "test") -> list[Example]:
        """Read a prompt set."""
        return load_prompts(name, split, data=self.folder, missing_from_hub=self.missing_from_hub)

    def task(self, name: str, split: str = "test") -> list[Example]:
        """Read the examples of a classification task."""
        return load_task(name, split, data=self.folder, missing_from_hub=self.missing_from_hub)

    def undivided(self, task: str) -> bool:
        """Whether a classification task has one split, "all"."""
        return "all" in task_source(task, data=self.folder, missing_from_hub=self.missing_from_hub).splits


@dataclass(frozen=True)
class Sizes:
    """How many prompts of each kind.

    Attributes:
        safety: Harmful prompts with refusals, and as many ordinary ones with answers, that the safety adapter learns.
        utility: Examples of each task that the utility adapter learns; a sixth as many ordinary ones are mixed in.
        calibration: Harmful prompts, and of ordinary, borderline and task prompts together twice as many.
        test: Prompts of each kind that are measured.
        task_test: Examples of each task that are measured.
    """

    safety: int
    utility: int
    calibration: int
    test: int
    task_test: int


@dataclass(frozen=True)
class Prompts:
    """All prompts of one seed; test prompts are the same for every seed (but `with_second_test`).

    Attributes:
        safety: What the safety adapter learns.
        refusals: The part of it without ordinary prompts.
        utility: What the utility adapter learns.
        gain: Calibration prompts of F_gain.
        cost: Calibration prompts of F_cost.
        more_benign: Further ordinary and borderline prompts, whose refusals count as cost where that is asked for.
        test: Test prompts by kind: "harmful", "borderline", "ordinary".
        tasks: Test examples by task.
    """

    safety: list[Example]
    refusals: list[Example]
    utility: list[Example]
    gain: list[Example]
    cost: list[Example]
    more_benign: list[Example]
    test: dict[str, list[Example]]
    tasks: dict[str, list[Example]]


def draw_prompts(data: DataSets, tasks: Sequence[str], sizes: Sizes, seed: int) -> Prompts:
    """Draw the prompts of a seed.

    Args:
        data: The data sets.
        tasks: Classification tasks.
        sizes: How many.
        seed: Seed of the training and calibration prompts; test prompts do not depend on it.

    Returns:
        The prompts.

    Raises:
        DataError: If a set is too small, or two parts share a prompt.
    """
    test = {kind: _draw(data.prompts(name), sizes.test, 0) for kind, name in TEST_SETS.items()}
    task_tests = {task: _draw(data.task(task), sizes.task_test, 0) for task in tasks}
    tested = [*(e for s in test.values() for e in s), *(e for s in task_tests.values() for e in s)]
    refusals = [
        example
        for example in data.prompts("safety-tuned-llamas", "train")
        if example.response and judge_refusal(example.response) is Verdict.FULL_REFUSAL
    ]
    harmful = _draw(without(_short(refusals), tested), sizes.safety + sizes.calibration, seed)
    ordinary_rows = sizes.safety + len(tasks) * (sizes.utility // 6) + sizes.calibration
    alpaca = [e for e in data.prompts("alpaca", "train") if e.response]
    ordinary = _draw(without(_short(alpaca), tested, refusals), ordinary_rows, seed)
    task_rows = [
        _draw(without(_short(data.task(t, "train")), tested), sizes.utility + sizes.calibration, seed) for t in tasks
    ]
    per_task = max(1, sizes.calibration // (2 * len(tasks)))
    borderline = without(load_examples(str(data_folder() / "borderline.jsonl"), split="calibration"), tested)
    more = [
        *_draw(without(_short(alpaca), tested, refusals, ordinary), 2 * sizes.calibration, seed),
        *without(load_examples(str(data_folder() / "borderline.jsonl")), tested, borderline),
    ]
    learned, rest = ordinary[: sizes.safety], ordinary[sizes.safety :]
    found = Prompts(
        safety=harmful[: sizes.safety] + learned,
        refusals=harmful[: sizes.safety],
        utility=[e for rows in task_rows for e in rows[: sizes.utility]] + rest[sizes.calibration :],
        gain=harmful[sizes.safety :],
        cost=[
            *rest[: sizes.calibration],
            *borderline[: sizes.calibration // 2],
            *(e for rows in task_rows for e in rows[sizes.utility : sizes.utility + per_task]),
        ],
        more_benign=more,
        test=test,
        tasks=task_tests,
    )
    parts = {"safety training": found.safety, "utility training": found.utility, "test": tested}
    refuse_overlaps(parts | {"calibration": [*found.gain, *found.cost, *found.more_benign]})
    return found


def with_second_test(prompts: Prompts, data: DataSets, count: int) -> Prompts:
    """Return the same prompts with other test prompts, on which nothing was ever measured or chosen.

    What the seed is trained or calibrated on is left out before they are drawn, so that the ordinary ones, of whose set the
    seeds learn different prompts, differ between seeds; the harmful and borderline ones do not.

    Args:
        prompts: The prompts of a seed.
        data: The data sets.
        count: Test prompts of each kind.

    Returns:
        The prompts; what is trained and calibrated on is the same.

    Raises:
        DataError: If a set is too small.
    """
    used = [*prompts.safety, *prompts.utility, *prompts.gain, *prompts.cost, *prompts.more_benign]
    test = {}
    for kind, name in TEST_SETS.items():
        rest = without(_short(data.prompts(name)), used, prompts.test[kind])
        development = _draw(rest, DEVELOPMENT, DEVELOPMENT_SEED)
        test[kind] = _draw(without(rest, development), count, 0)
    return replace(prompts, test=test)


def _short(examples: Sequence[Example]) -> list[Example]:
    return [example for example in examples if len(example.prompt) <= LONGEST_PROMPT]


def _draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    if count > len(examples):
        source = f" (of {examples[0].source}, …)" if examples else ""
        raise DataError(f"{count} prompts are needed, but only {len(examples)} are there{source}.")
    return random.Random(seed).sample(list(examples), count)
