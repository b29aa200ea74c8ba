"""Progress: tokens per second, remaining time, and JSON lines."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from builders import random_batch
from cli_runs import run_command
from rich.progress import Progress

from sstmerge.cli.reporting import JsonLog, RateColumn, printable
from sstmerge.pipeline.progress import in_tokens, token_progress


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def in_a_process(*arguments):
    """Run the command line in a process of its own, where no library has set up its bars yet."""
    command = [sys.executable, "-c", "from sstmerge.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_progress_in_sequences_becomes_progress_in_tokens():
    seen = []
    report = token_progress("harm Fisher", [random_batch([4, 5]), random_batch([7, 7, 9])], lambda *a: seen.append(a))
    for done in (2, 5, 7, 10):  # two passes of five sequences, 32 tokens each
        report(done, 10)
    assert seen == [("harm Fisher, tokens", tokens, 64) for tokens in (9, 32, 41, 64)]
    assert in_tokens("harm Fisher, tokens") == ("harm Fisher", True)


def test_json_lines_have_rates_and_the_time_that_is_left(capsys):
    now = [0.0]
    log = JsonLog(clock=lambda: now[0])
    for second, done in ((0.0, 100), (0.5, 150), (2.0, 300), (2.1, 310), (4.0, 900)):
        now[0] = second
        log.progress("benign Fisher (kfac), tokens", done, 900)
    first, middle, last = lines(capsys.readouterr().err)  # one line per second, the first and the last
    assert (first["done"], middle["done"], last["done"]) == (100, 300, 900)
    assert first["tokens_per_second"] is None
    # A resumed run begins at 100, which took no time now.
    assert middle["tokens_per_second"] == pytest.approx((300 - 100) / 2)
    assert middle["eta_seconds"] == pytest.approx((900 - 300) / 100)
    assert middle["phase"] == "benign Fisher (kfac)"
    assert middle["unit"] == "tokens"
    assert last["eta_seconds"] == 0
    assert middle["memory_bytes"] > 10**6
    assert middle["peak_memory_bytes"] >= middle["memory_bytes"] // 2


def test_work_that_is_not_counted_in_tokens_has_items_per_second(capsys):
    now = [0.0]
    log = JsonLog(clock=lambda: now[0])
    log.progress("answering prompts", 0, 8)
    now[0] = 2.0
    log.progress("answering prompts", 8, 8)
    assert [line["items_per_second"] for line in lines(capsys.readouterr().err)] == [None, 4.0]


def test_bars_show_tokens_per_second():
    times = iter(range(100))
    with Progress(RateColumn(), disable=True, get_time=lambda: float(next(times))) as bars:
        task = bars.add_task("harm Fisher, tokens", total=1000)
        for done in (100, 200, 300):
            bars.update(task, completed=done)
        assert str(RateColumn().render(bars.tasks[0])).endswith("tokens/s")


def test_log_json_leaves_nothing_else_on_stderr(job, tmp_path):
    out = tmp_path / "f.safetensors"
    arguments = ["fisher", "--base", job["base"], "--data", job["harm.jsonl"], "--labels", "data", "--out", str(out)]
    arguments += ["--adapter", f"u={job['utility']}", "--adapter", f"s={job['safety']}", "--log-json"]
    done = in_a_process(*arguments)
    assert done.returncode == 0, done.stderr
    events = lines(done.stderr)
    assert {"started", "progress", "wrote", "finished"} <= {line["event"] for line in events}
    collecting = [line for line in events if line["event"] == "progress" and line["unit"] == "tokens"]
    assert collecting[-1]["done"] == collecting[-1]["total"] > 8
    code, err = run_command(*arguments)
    assert code == 2
    (error,) = lines(err)
    assert error["event"] == "error"
    assert "exists already" in error["message"]


def test_names_from_files_cannot_steer_a_terminal():
    assert printable("a\x1b[31m\tb\nc\u202e") == "a\\x1b[31m b c\\u202e"
