"""Hub ids over HTTP, from a hub on this machine: the way that a user with a network goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pytest
from hub_server import hub_server
from pyarrow import parquet

from sstmerge.evaluation.classification_tasks import CLASSIFICATION_TASKS
from sstmerge.evaluation.data_set_files import Source
from sstmerge.evaluation.data_sets import PROMPT_SETS

# Loads data sets of the tables in a process of its own, because the hub's address is read when its libraries are imported.
LOADS = """
import json, sys
from sstmerge.errors import SSTMergeError
from sstmerge.evaluation.classification_tasks import CLASSIFICATION_TASKS, load_task
from sstmerge.evaluation.data_sets import load_prompts

found = {}
for name, split in json.loads(sys.argv[1]):
    load = load_task if name in CLASSIFICATION_TASKS else load_prompts
    try:
        found[f"{name} {split}"] = [[e.messages[0]["content"], e.response] for e in load(name, split)]
    except SSTMergeError as error:
        found[f"{name} {split}"] = str(error)
print(json.dumps(found))
"""


@dataclass
class Hub:
    """A running hub.

    Attributes:
        root: Its folder.
        environment: What makes a process use it, with a cache of its own.
    """

    root: Path
    environment: dict[str, str]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command], env=self.environment, capture_output=True, text=True, check=False
        )

    def load(self, *wanted: tuple[str, str]) -> dict[str, list | str]:
        done = self.run("-c", LOADS, json.dumps(wanted))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    with hub_server(tmp_path / "hub") as address:
        offline = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE"}
        environment = {name: value for name, value in os.environ.items() if name not in offline}
        yield Hub(tmp_path / "hub", environment | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")})


def publish(root: Path, *sources: Source) -> None:
    """Lay out data sets as the hub's parquet sets are: a folder per configuration, whose splits the card names."""
    tables: dict[tuple[Path, str | None], dict[str, list]] = {}
    for source in sources:
        branch = "" if source.revision is None else "@" + source.revision.replace("/", "!")
        splits = tables.setdefault((root / "datasets" / f"{source.hub_id}{branch}", source.config), {})
        for number, split in enumerate(dict.fromkeys(source.splits.values())):
            row = {column: f" {split} {column} " for column in source.fields.values()} | dict(source.where)
            if source.labels:
                row[source.fields["label"]] = number % len(source.labels)
            splits.setdefault(split, []).extend([row, row | dict.fromkeys(source.where, "another")])
    cards: dict[Path, str] = {}
    for (repository, config), splits in tables.items():
        folder = repository / (config or "data")
        folder.mkdir(parents=True)
        for split, rows in splits.items():
            parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
        if config is not None:
            files = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
            card = cards.get(repository, "configs:\n")
            cards[repository] = f"{card}- config_name: {config}\n  data_files:\n{files}"
    for repository, card in cards.items():
        (repository / "README.md").write_text(f"---\n{card}---\n")


def test_a_merge_of_hub_ids(hub, job, tmp_path):
    models = hub.root / "models" / "someone"
    models.mkdir(parents=True)
    for name in ("base", "utility", "safety"):
        (models / name).symlink_to(job[name])
    for name in ("harm", "benign"):
        (hub.root / "datasets" / "someone" / name).mkdir(parents=True)
        (hub.root / "datasets" / "someone" / name / "train.jsonl").symlink_to(job[f"{name}.jsonl"])
    done = hub.run(
        "-m", "sstmerge", "merge", "--base", "someone/base", "--utility", "someone/utility", "--safety",
        "someone/safety", "--harm", "someone/harm", "--benign", "someone/benign", "--out", str(tmp_path / "merged"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == json.loads(
        (Path(job["utility"]) / "adapter_config.json").read_text()
    )["base_model_name_or_path"]  # fmt: skip


def test_every_data_set_that_is_on_the_hub(hub):
    sources = {name: row.hub for name, row in (PROMPT_SETS | CLASSIFICATION_TASKS).items() if row.hub is not None}
    publish(hub.root, *sources.values())
    found = hub.load(*((name, split) for name, source in sources.items() for split in source.splits))
    for name, source in sources.items():
        for number, split in enumerate(source.splits):
            rows = found[f"{name} {split}"]
            assert len(rows) == (1 if source.where else 2)
            content, response = rows[0]
            shown = [c for field, c in source.fields.items() if field not in ("label", "response")]
            assert all(f"{source.splits[split]} {column}" in content for column in shown)
            if source.labels:
                assert response == source.labels[str(number % len(source.labels))]


def test_what_the_hub_does_not_give_is_told(hub):
    publish(hub.root, PROMPT_SETS["xstest-safe"].hub)
    (hub.root / "datasets" / "walledai" / "XSTest" / "GATED").touch()
    (hub.root / "datasets" / "PKU-Alignment" / "BeaverTails-Evaluation").mkdir(parents=True)
    names = ("xstest-safe", "strongreject", "beavertails-evaluation", "safety-tuned-llamas")
    found = hub.load(*((name, "test") for name in names))
    assert "'xstest-safe' cannot be loaded as walledai/XSTest from the hub" in found["xstest-safe test"]
    assert "gated" in found["xstest-safe test"]
    assert "doesn't exist on the Hub or cannot be accessed" in found["strongreject test"]
    assert "cannot be loaded as PKU-Alignment/BeaverTails-Evaluation" in found["beavertails-evaluation test"]
    assert found["safety-tuned-llamas test"] == (
        "The data set 'safety-tuned-llamas' is not on the hub; give its file: it is in "
        "https://github.com/vinid/safety-tuned-llamas, docs/EVALUATION.md has all sources."
    )
