"""Collections that are killed, interrupted, refused or damaged: what was collected is kept, and the result is the same."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from contextlib import suppress
from itertools import count

import pytest
import torch
from builders import write_rows
from collection_cases import ADAPTERS, SPACE, collect_and_die, collect_into, collected, command_line, hold
from processes import start, start_together, together, wait_until
from safetensors.torch import load_file, save_file
from test_distributed import assert_same_bits

from sstmerge.errors import Interrupted, SSTMergeError
from sstmerge.fisher import Fisher
from sstmerge.fisher.fisher import Counts
from sstmerge.fisher.interruption import held_back, interruptible
from sstmerge.fisher.partial_sums import (
    MOST_LARGE_SUMS,
    MOST_LEAVES_OF_LARGE_SUMS,
    PairwiseSum,
    Part,
    leaf_length,
    most_leaves,
)
from sstmerge.fisher.structures import Structure
from sstmerge.pipeline import answers, run
from sstmerge.pipeline.run import opened_run


def checkpoint_files(out):
    return sorted((out.parent / f"{out.name}.checkpoint").rglob("start-*.safetensors"))


def savings(out):
    with suppress(FileNotFoundError):  # the run has just ended and removed them
        return {(path.name, path.stat().st_mtime_ns) for path in checkpoint_files(out)}
    return set()


def kill_at_random(processes, out, chance):
    """Kill after some savings, or after some time; also in the middle of one, before the first and after the last."""
    if chance.random() < 0.3:
        time.sleep(chance.uniform(0.0, 0.4))
    else:
        for _ in range(chance.randint(1, 4)):
            before = savings(out)
            wait_until(lambda before=before: savings(out) != before or not all(p.process.is_alive() for p in processes))
        time.sleep(chance.uniform(0.0, 0.01))
    for process in processes:
        process.kill(signal.SIGKILL)


def kill_again_and_again(tmp_path, structure, kills, seed):
    """Kill runs until there were so many kills; every run that comes to its end must have the bits of an unbroken one."""
    unbroken, chance, killed = collected(structure), random.Random(f"{structure} {seed}"), 0
    for number in count():
        out = tmp_path / f"{number}.safetensors"
        while True:
            process = start(tmp_path / "process", collect_into, structure, out, 1, 0.01)
            if killed < kills:
                kill_at_random([process], out, chance)
            outcome = process.join()
            if outcome["exit"] == 0:
                break
            assert outcome["exit"] == -9, outcome
            killed += 1
        assert_same_bits(unbroken, Fisher.load(out, ADAPTERS))
        assert not checkpoint_files(out)
        if killed >= kills:
            return


@pytest.mark.parametrize("structure", ["kfac", "block", "global"])
def test_killed_runs_end_with_the_same_bits(tmp_path, structure):
    kill_again_and_again(tmp_path, structure, kills=8, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "block", "global"])
def test_killed_runs_end_with_the_same_bits_many_times(tmp_path, structure):
    kill_again_and_again(tmp_path, structure, kills=100, seed=1)


@pytest.mark.parametrize("structure", ["kfac", "block", "global"])
def test_another_number_of_processes_goes_on(tmp_path, structure):
    out = tmp_path / "f.safetensors"
    for size in (3, 2):
        started, store = start_together(tmp_path, size, collect_into, structure, out, 1, 0.1)
        before = savings(out)
        # Killed at once: with eleven batches, a later kill may leave the next round too little to save twice.
        wait_until(lambda before=before: len(savings(out) - before) > 1)
        for process in started:
            process.kill(signal.SIGKILL)
        outcomes = [process.join() for process in started]
        del store
        assert any(outcome["exit"] == -9 for outcome in outcomes)
    assert start(tmp_path / "last", collect_into, structure, out).join()["value"]
    assert_same_bits(collected(structure), Fisher.load(out, ADAPTERS))


def test_the_others_keep_their_part_when_a_process_dies(tmp_path):
    out = tmp_path / "f.safetensors"
    together(tmp_path, 2, collect_and_die, "kfac", out, 1, 3)
    assert len(checkpoint_files(out)) == 2
    assert all(o["value"] for o in together(tmp_path, 2, collect_into, "kfac", out))
    assert_same_bits(collected("kfac"), Fisher.load(out, ADAPTERS))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def killed(tmp_path):
    """The output of a run that was killed after its first savings."""
    out = tmp_path / "f.safetensors"
    process = start(tmp_path / "first", collect_into, "kfac", out, 1, 0.05)
    wait_until(lambda: len(savings(out)) > 0)
    process.kill(signal.SIGKILL)
    assert process.join()["exit"] == -9
    return out


def test_a_checkpoint_of_other_settings_is_refused(killed, tmp_path):
    outcome = start(tmp_path / "second", collect_into, "kfac", killed, 1, 0.0, 7).join()
    assert outcome["error"] == "FisherError"
    assert "belongs to another collection: seed is 0, now 7." in outcome["message"]
    assert "--restart" in outcome["message"]
    outcome = start(tmp_path / "third", collect_into, "diagonal", killed).join()
    assert 'structure is "kfac", now "diagonal"' in outcome["message"]
    assert start(tmp_path / "fourth", collect_into, "kfac", killed).join()["value"]


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_damaged_checkpoint_is_named(killed, tmp_path, damage):
    (path,) = checkpoint_files(killed)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-20:]
    else:
        content[-20] ^= 1
    path.write_bytes(content)
    outcome = start(tmp_path / "second", collect_into, "kfac", killed).join()
    assert outcome["error"] == "FisherError"
    assert f"The checkpoint '{path}' is damaged" in outcome["message"]


def test_two_runs_on_one_output_refuse_each_other(tmp_path):
    out = tmp_path / "f.safetensors"
    holder = start(tmp_path / "holder", hold, out)
    wait_until((tmp_path / "held").exists)
    outcome = start(tmp_path / "second", collect_into, "kfac", out).join()
    assert outcome["error"] == "OutputError"
    assert f"Another run is writing '{out}': process {holder.process.pid} on " in outcome["message"]
    holder.kill(signal.SIGKILL)
    holder.join()
    assert start(tmp_path / "third", collect_into, "kfac", out).join()["value"]
    assert not out.with_name("f.safetensors.checkpoint").exists()


def test_an_altered_fisher_file_is_named(tmp_path):
    path = tmp_path / "f.safetensors"
    collected("diagonal").save(path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(Exception, match=r"f.safetensors' was altered or damaged: its contents do not match its hash"):
        Fisher.load(path, ADAPTERS)


def test_equal_fishers_are_equal_files(tmp_path):
    """The order of a file's texts is not left to a hash table."""
    for number in range(6):
        collected("diagonal").save(tmp_path / str(number))
    assert len({(tmp_path / str(number)).read_bytes() for number in range(6)}) == 1
    assert_same_bits(collected("diagonal"), Fisher.load(tmp_path / "0", ADAPTERS))


@pytest.mark.parametrize(("name", "change"), [("space-*", "cut"), ("space-*", "altered"), ("answers-*", "altered")])
def test_other_damaged_files_of_a_run_are_named(tmp_path, name, change):
    with opened_run(tmp_path / "f") as run:
        run.same_space(SPACE)
        answers._keep(run, "0" * 16, {0: ["a cake"]})
        (path,) = run.folder.glob(name)
        content = path.read_bytes()
        altered = content.replace(b"cake", b"lake") if b"cake" in content else content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes(content[:-8] if change == "cut" else altered)
        with pytest.raises(SSTMergeError, match=f"{path.name}' are damaged: .*--restart"):
            run.same_space(SPACE) if name == "space-*" else answers._kept(run, "0" * 16)


def test_fisher_files_without_a_hash_are_still_read(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "f.safetensors"
    fisher = collected("diagonal")
    fisher.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != "sha256"}
    save_file(load_file(path), path, metadata=metadata)
    assert_same_bits(fisher, Fisher.load(path, ADAPTERS))


# ---- interruptions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(job, tmp_path):
    """A collection on the command line that takes a while."""
    rows = [{"prompt": f"steal {i}", "response": f"I won't steal {i}, nor {i + 1}."} for i in range(40)]
    return [
        *("fisher", "--base", job["base"], "--data", str(write_rows(tmp_path / "rows.jsonl", rows))),
        *("--adapter", f"u={job['utility']}", "--adapter", f"s={job['safety']}", "--structure", "kfac"),
        *("--labels", "data", "--tokens-per-batch", "64", "--device", "cpu", "--checkpoint-minutes", "0"),
    ]


def output_of(folder):
    return " ".join((folder / "output.txt").read_text().split())


def interrupt(processes, out, number):
    wait_until(lambda: bool(savings(out)) or not processes[0].process.is_alive())
    for process in processes:
        process.kill(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_goes_on(arguments, tmp_path, number):
    unbroken, out = tmp_path / "unbroken.safetensors", tmp_path / "f.safetensors"
    assert start(tmp_path / "unbroken", command_line, *arguments, "--out", str(unbroken)).join()["exit"] == 0
    process = start(tmp_path / "first", command_line, *arguments, "--out", str(out))
    interrupt([process], out, number)
    assert process.join()["exit"] == 128 + number
    said = output_of(tmp_path / "first")
    assert (
        f"stopped by {number.name}. What was collected is kept in '{out}.checkpoint'; the same command goes on" in said
    )
    assert "Traceback" not in said
    assert start(tmp_path / "second", command_line, *arguments, "--out", str(out)).join()["exit"] == 0
    one, other = load_file(unbroken), load_file(out)
    assert set(one) == set(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert not list(tmp_path.glob("*.checkpoint"))


def test_interrupted_processes_say_it_once(arguments, tmp_path):
    out = tmp_path / "f.safetensors"
    processes, store = start_together(tmp_path, 2, command_line, *arguments, "--out", str(out))
    interrupt(processes, out, signal.SIGINT)
    exits = [process.join()["exit"] for process in processes]
    assert 130 in exits
    assert set(exits) <= {130, 2}  # 2 where the other one had stopped already
    said = " ".join(output_of(tmp_path / f"process{rank}") for rank in range(2))
    assert said.count("the same command goes on from there") == 1
    del store


def test_a_killed_merge_goes_on(job, tmp_path):
    """Answers, pilot, kfac pair and ekfac pair: a merge is many collections, and none is done twice."""
    rows = [{"prompt": f"tell {i}"} for i in range(3)]
    rows += [{"prompt": f"make {i}", "response": f"Take {i}, then {i + 1}."} for i in range(12)]
    benign, chance = write_rows(tmp_path / "benign.jsonl", rows), random.Random(0)

    def merge(name):
        arguments = [
            *(
                "merge",
                "--base",
                job["base"],
                "--utility",
                job["utility"],
                "--safety",
                job["safety"],
                "--device",
                "cpu",
            ),
            *("--harm", job["harm.jsonl"], "--benign", str(benign), "--completion-tokens", "4", "--pilot", "4"),
            *("--structure", "ekfac", "--module-share", "0.5", "--top", "3", "--tokens-per-batch", "64"),
            *("--checkpoint-batches", "1", "--out", str(tmp_path / name)),
        ]
        return start(tmp_path / f"process-{name}", command_line, *arguments)

    assert merge("unbroken").join()["exit"] == 0
    for kills in range(6):
        process = merge("merged")
        if kills < 5:
            kill_at_random([process], tmp_path / "merged", chance)
        exit_code = process.join()["exit"]
        if exit_code == 0:
            break
        assert exit_code == -9
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("unbroken", "merged"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    reports = [json.loads((tmp_path / n / "sstmerge_report.json").read_text()) for n in ("unbroken", "merged")]
    assert reports[0] == reports[1]


def test_signals_wait_for_the_end_of_a_batch():
    def work():
        with interruptible(), held_back() as signalled:
            assert signalled() is None
            signal.raise_signal(signal.SIGTERM)
            assert signalled() == signal.SIGTERM

    # A shell's background job starts with SIGINT ignored.
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as stopped:
        work()
    assert stopped.value.signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ---- the tree of additions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", [1, 2, 5, 8, 13])
def test_the_order_in_which_parts_come_changes_no_bit(leaves):
    generator = torch.Generator().manual_seed(leaves)
    values = torch.randn(leaves, 50, generator=generator, dtype=torch.float32) * 10 ** torch.arange(leaves)[:, None]

    def total(order):
        tree = PairwiseSum()
        for leaf in order:
            rows = [(torch.tensor([[float(leaf)]]), torch.tensor([leaf % 2], dtype=torch.int8))]
            tree.add((0, leaf), Part({"s": values[leaf].clone()}, Counts.zero(), rows))
        assert len(tree.nodes) == leaves.bit_count()
        return tree.total().statistics()

    chance, expected = random.Random(leaves), total(range(leaves))
    assert expected["scores"].flatten().tolist() == list(range(leaves))
    for _ in range(5):
        shuffled = total(chance.sample(range(leaves), leaves))
        assert all(torch.equal(tensor, shuffled[name]) for name, tensor in expected.items())


def test_leaves_are_few_where_sums_are_large():
    def lengths(most, *batches):
        return [leaf_length(most, n) for n in batches]

    assert lengths(most_leaves(Structure.BLOCK), 1, 8, 9, 1000) == [1, 1, 2, 125]
    assert lengths(most_leaves(Structure.KFAC), 1, 64, 65, 10_000) == [1, 1, 2, 157]
    assert lengths(most_leaves(Structure.GLOBAL), 1, 10_000) == [1, 1]


def test_large_sums_are_few_in_memory():
    tree, most = PairwiseSum(), 0
    for leaf in range(MOST_LEAVES_OF_LARGE_SUMS):
        most = max(most, len(tree.nodes) + 1)  # and the one that is being collected
        tree.add((0, leaf), Part({"s": torch.ones(1)}, Counts.zero()))
    assert most == MOST_LARGE_SUMS


def test_processes_that_end_at_once_may_clear_one_folder_together(tmp_path):
    folder, barrier, failures = tmp_path / "f.safetensors.checkpoint", threading.Barrier(2), []

    def clear(first: bool) -> None:
        for _ in range(100):
            if first:
                for number in range(5):
                    (folder / f"Fisher-{number}").mkdir(parents=True)
                    (folder / f"Fisher-{number}" / "start-0001-process-0000.safetensors").touch()
            barrier.wait()
            try:
                run._clear(folder)
            except OSError as error:
                failures.append(error)
            barrier.wait()

    threads = [threading.Thread(target=clear, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not folder.exists()
