"""What `inspect` shows of Fishers and of merged adapters, and what it says of damaged ones."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from sstmerge.adapters import CoreSpace, load_adapter
from sstmerge.errors import FisherError, InputError
from sstmerge.fisher import Fisher
from sstmerge.pipeline.inspection import inspect
from sstmerge.pipeline.merge import REPORT_FILE, merge_from_fishers

LOOK = {"kl": {"estimate": 0.25, "half_width": 0.125}, "step_error": None, "measured": "predicted KL"}
STOPPED = {"looks": [LOOK], "tolerance": 0.5, "converged": True, "sequences": 8, "sequences_available": 9}


def shown(path) -> str:
    console = Console(width=200, file=StringIO())
    for table in inspect(path):
        console.print(table)
    return " ".join(console.file.getvalue().split())


def fisher_with(valid, folder, **metadata):
    adapters = [load_adapter(path, name=role) for role, path in valid.adapters.items()]
    fisher = Fisher.load(valid.fishers["kfac"][1], CoreSpace.of(adapters).adapters)
    file = folder / "[/b] cost.safetensors"
    replace(fisher, metadata={**fisher.metadata, **metadata}).save(file)
    return file


@pytest.fixture
def merged(valid, tmp_path):
    roles = {role: valid.adapters[role] for role in ("utility", "safety")}
    merge_from_fishers(*valid.fishers["kfac"], **roles, out=tmp_path / "merged")
    return tmp_path / "merged"


def test_a_merged_adapter_shows_its_warnings(merged):
    warnings = json.loads((merged / REPORT_FILE).read_text())["merge"]["warnings"]
    assert warnings
    words = shown(merged)
    assert all(sentence in words for sentence in warnings)


def test_a_fisher_shows_its_penalty_and_its_convergence(valid, tmp_path):
    words = shown(fisher_with(valid, tmp_path, penalty="refusals [/x]", convergence=STOPPED))
    assert "counts as cost, too: refusals [/x]" in words
    assert "8 of 9 sequences" in words
    plain = shown(valid.fishers["kfac"][1])
    assert "penalty" not in plain
    assert "convergence" not in plain


@pytest.mark.parametrize("convergence", [{}, {**STOPPED, "looks": []}, 3, {**STOPPED, "looks": [{**LOOK, "kl": "x"}]}])
def test_a_damaged_record_of_convergence_is_a_sentence(valid, tmp_path, convergence):
    with pytest.raises(FisherError, match="no readable record"):
        inspect(fisher_with(valid, tmp_path, convergence=convergence))


@pytest.mark.parametrize("text", ["{}", "[1", "[]", '{"merge": 1}', '{"merge": {}, "stability": [1]}', "\x00"])
def test_a_damaged_report_is_a_sentence(merged, text):
    (merged / REPORT_FILE).write_text(text)
    with pytest.raises(InputError, match="report"):
        inspect(merged)


def test_markup_in_a_report_is_text(merged):
    report = {"merge": {"rule[/b]": "[/red]", "warnings": ["see [/x]"]}, "stability": {"[/a]": "[/c]"}}
    (merged / REPORT_FILE).write_text(json.dumps(report))
    words = shown(merged)
    assert all(text in words for text in ("rule[/b]", "[/red]", "see [/x]", "split halves: [/a]", "[/c]"))
