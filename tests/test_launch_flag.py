"""`--launch N` as a user types it: real processes, one result, one voice; and what goes wrong with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from builders import write_rows
from collection_cases import command_line
from processes import together
from safetensors.torch import load_file

from sstmerge.cli import main
from sstmerge.errors import InputError
from sstmerge.pipeline.launch import launch_local


@pytest.fixture
def arguments(job):
    return [
        *("fisher", "--base", job["base"], "--data", job["benign.jsonl"], "--labels", "sampled", "--device", "cpu"),
        *("--adapter", f"u={job['utility']}", "--adapter", f"s={job['safety']}", "--structure", "kfac"),
        *("--reference", "u", "--completion-tokens", "4", "--tokens-per-batch", "64"),
    ]


def test_launched_processes_write_one_fisher(arguments, tmp_path, monkeypatch, capfd):
    for name, more in (("one", ()), ("two", ("--launch", "2"))):
        out = tmp_path / f"{name}.safetensors"
        monkeypatch.setattr("sys.argv", ["sstmerge", *arguments, "--out", str(out), *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        said = " ".join(capfd.readouterr().out.split())
        assert said.count("kfac Fisher of 9 sequences") == 1
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("one.safetensors", "one.safetensors.manifest.json", "two.safetensors", "two.safetensors.manifest.json")
    ]


def test_an_error_in_all_processes_is_told_once(arguments, tmp_path):
    broken = write_rows(tmp_path / "broken.jsonl", [{"prompt": "x"}])
    arguments[arguments.index("--data") + 1] = str(broken)
    arguments[arguments.index("sampled")] = "data"
    outcomes = together(tmp_path, 2, command_line, *arguments, "--out", str(tmp_path / "f"))
    assert [outcome["exit"] for outcome in outcomes] == [2, 2]
    said = " ".join((tmp_path / f"process{rank}" / "output.txt").read_text() for rank in range(2))
    assert " ".join(said.split()).count("labels='data' needs a response in every row") == 1
    assert "Traceback" not in said
    assert not list(tmp_path.glob("f*"))


def test_a_killed_process_ends_a_launched_run(arguments, tmp_path):
    """The launcher stops the others and says which one was killed."""
    command = [sys.executable, "-m", "sstmerge", *arguments, "--out", str(tmp_path / "f"), "--launch", "2"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    children: list[int] = []
    end = time.monotonic() + 120
    while len(children) < 2 and time.monotonic() < end:
        with open(f"/proc/{launcher.pid}/task/{launcher.pid}/children") as file:
            children = [int(pid) for pid in file.read().split()]
        time.sleep(0.05)
    os.kill(children[1], signal.SIGKILL)
    _, said = launcher.communicate(timeout=120)
    assert launcher.returncode == 2
    assert "Process 1 of 2 was killed by SIGKILL" in " ".join(said.split())
    assert "Traceback" not in said


def json_lines(text):
    """Return the events; every line must be one."""
    return [json.loads(line) for line in text.splitlines()]


def test_launched_processes_write_whole_json_lines_and_one_of_them_speaks(arguments, tmp_path):
    command = [
        sys.executable,
        "-m",
        "sstmerge",
        *arguments,
        "--out",
        str(tmp_path / "f"),
        "--launch",
        "2",
        "--log-json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    events = json_lines(done.stderr)
    assert [event["event"] for event in events[:1] + events[-2:]] == ["started", "wrote", "finished"]
    assert {event["process"] for event in events} == {0}
    last = [event for event in events if event["event"] == "progress" and "Fisher" in event["phase"]][-1]
    assert last["done"] == last["total"] > 0  # of all processes
    # The same command again: an error in both processes is one line.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (error,) = [event for event in json_lines(done.stderr) if event["event"] == "error"]
    assert "exists already" in error["message"]


def test_launching_twice_is_refused(monkeypatch):
    with pytest.raises(InputError, match="at least 1 process"):
        launch_local(0, [])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="leave it out under torchrun"):
        launch_local(2, [])
