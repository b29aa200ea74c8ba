"""docs/EVALUATION.md names every data set, task and metric there is."""

from __future__ import annotations

import re
from pathlib import Path

from sstmerge.evaluation import metrics
from sstmerge.evaluation.classification_tasks import CLASSIFICATION_TASKS
from sstmerge.evaluation.data_sets import PROMPT_SETS

PAGE = (Path(__file__).parents[2] / "docs" / "EVALUATION.md").read_text(encoding="utf-8")


def test_every_data_set_has_its_row():
    rows = {line.split("|")[1].strip(): line for line in PAGE.splitlines() if line.startswith("| `")}
    for name, row in PROMPT_SETS.items():
        line = rows[f"`{name}`"]
        assert row.licence in line
        assert ("test only" in line) == row.test_only
        assert row.hub is None or f"`{row.hub.hub_id}`" in line
        assert f" of `{row.local.repository}`" in line if row.local.repository else " of the set on the hub" in line
    for name, task in CLASSIFICATION_TASKS.items():
        assert task.licence in rows[f"`{name}`"]
        assert f" of `{task.local.repository}`" in rows[f"`{name}`"]


def test_known_overlaps_are_those_of_the_data_sets():
    sentence = re.search(r"Known overlaps.*?\. ", PAGE.replace("\n", " ")).group().lower().replace("-", "")
    for row in PROMPT_SETS.values():
        for other, count in row.overlaps.items():
            assert re.search(rf"{count} (prompts )?with {other.replace('-', '')}", sentence)


def test_every_metric_is_explained():
    functions = [name for name in metrics.__all__ if name[0].islower() and name not in ("normalised", "pareto_front")]
    assert [name for name in functions if f"`{name}" not in PAGE] == []
