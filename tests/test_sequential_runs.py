"""Collecting until it is enough (`--tolerance`), killed, and in several processes: the bits of one unbroken process."""

from __future__ import annotations

import json
import random
import signal
import time

import pytest
import torch
from builders import write_rows
from collection_cases import command_line
from processes import start, start_together, together, wait_until
from safetensors import safe_open
from safetensors.torch import load_file

TOLERANCE = "0.9"  # reached after a few chunks, long before the data end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sequential")


@pytest.fixture(scope="module")
def rows(folder):
    rows = [{"prompt": f"steal {i}", "response": f"I won't steal {i}, nor {i + 1}."} for i in range(64)]
    return str(write_rows(folder / "rows.jsonl", rows))


@pytest.fixture(scope="module")
def fisher(job, rows):
    """A collection on the command line that stops by itself."""
    return [
        *("fisher", "--base", job["base"], "--data", rows, "--labels", "data", "--structure", "kfac"),
        *("--adapter", f"u={job['utility']}", "--adapter", f"s={job['safety']}", "--tokens-per-batch", "64"),
        *("--tolerance", TOLERANCE, "--check-every", "4", "--device", "cpu", "--checkpoint-batches", "1"),
    ]


@pytest.fixture(scope="module")
def merge(job, rows, folder):
    """A merge that collects both Fishers in turns until it is known."""
    benign = [{"prompt": f"make {i}", "response": f"Take {i}, then {i + 1}."} for i in range(20)]
    return [
        *("merge", "--base", job["base"], "--harm", rows, "--structure", "kfac", "--top", "3", "--device", "cpu"),
        *("--benign", str(write_rows(folder / "benign.jsonl", benign)), "--tokens-per-batch", "64"),
        *("--utility", job["utility"], "--safety", job["safety"], "--checkpoint-batches", "1"),
        *("--tolerance", TOLERANCE, "--check-every", "4", "--max-samples", "20"),
    ]


@pytest.fixture(scope="module")
def unbroken(fisher, folder):
    """What the collection gives in one process that nobody disturbs."""
    assert start(folder / "fisher", command_line, *fisher, "--out", str(folder / "f")).join()["exit"] == 0
    return folder / "f"


@pytest.fixture(scope="module")
def unbroken_merge(merge, folder):
    assert start(folder / "merge", command_line, *merge, "--out", str(folder / "merged")).join()["exit"] == 0
    return folder / "merged"


def looks(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["sstmerge_fisher"])["metadata"]["convergence"]


def savings(out):
    return len(list((out.parent / f"{out.name}.checkpoint").glob("*/start-*")))


def finish_in_spite_of_kills(tmp_path, arguments, out, kills):
    """Kill the command again and again, in the middle of chunks and looks, until it was killed often enough."""
    chance, killed = random.Random(0), 0
    while True:
        process = start(tmp_path / "process", command_line, *arguments, "--out", str(out))
        if killed < kills:
            before = savings(out)
            wait_until(lambda p=process, before=before: savings(out) > before or not p.process.is_alive())
            time.sleep(chance.uniform(0.0, 0.1))
            process.kill(signal.SIGKILL)
        exit_code = process.join()["exit"]
        if exit_code == 0:
            return killed
        assert exit_code == -9
        killed += 1


def test_a_killed_collection_that_stops_by_itself_ends_with_the_same_bits(fisher, unbroken, tmp_path):
    resumed, found = tmp_path / "resumed", looks(unbroken)
    assert found["converged"]
    assert 0 < found["sequences"] < found["sequences_available"] == 64
    assert finish_in_spite_of_kills(tmp_path, fisher, resumed, kills=2) == 2
    assert resumed.read_bytes() == unbroken.read_bytes()  # sums, and what every look saw
    assert not (tmp_path / "resumed.checkpoint").exists()


def test_several_processes_stop_where_one_does_also_after_a_kill(fisher, unbroken, tmp_path):
    shared = tmp_path / "shared"
    started, store = start_together(tmp_path, 2, command_line, *fisher, "--out", str(shared))
    wait_until(
        lambda: (tmp_path / "shared.checkpoint" / "Fisher-chunk-2").exists() or not started[0].process.is_alive()
    )
    for process in started:
        process.kill(signal.SIGKILL)
    assert [process.join()["exit"] for process in started] == [-9, -9]
    del store
    assert [o["exit"] for o in together(tmp_path, 2, command_line, *fisher, "--out", str(shared))] == [0, 0]
    assert shared.read_bytes() == unbroken.read_bytes()


def test_another_tolerance_goes_on_from_the_same_chunks(fisher, unbroken, tmp_path):
    """A chunk does not depend on when collecting stops, so a killed run may be given another tolerance."""
    out = tmp_path / "f"
    process = start(tmp_path / "p", command_line, *fisher, "--tolerance", "0.01", "--out", str(out))
    wait_until(lambda: savings(out) > 1 or not process.process.is_alive())
    process.kill(signal.SIGKILL)
    assert process.join()["exit"] == -9
    assert start(tmp_path / "q", command_line, *fisher, "--out", str(out)).join()["exit"] == 0
    assert out.read_bytes() == unbroken.read_bytes()


@pytest.mark.parametrize("size", [1, 2])
def test_a_merge_that_stops_by_itself_does_so_after_a_kill_and_in_several_processes(
    merge, unbroken_merge, tmp_path, size
):
    merged = tmp_path / "merged"
    if size == 1:
        assert finish_in_spite_of_kills(tmp_path, merge, merged, kills=1) == 1
    else:
        outcomes = together(tmp_path, size, command_line, *merge, "--out", str(merged))
        assert [outcome["exit"] for outcome in outcomes] == [0] * size
    one, other = (load_file(place / "adapter_model.safetensors") for place in (unbroken_merge, merged))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    reports = [json.loads((place / "sstmerge_report.json").read_text()) for place in (unbroken_merge, merged)]
    assert reports[0] == reports[1]
