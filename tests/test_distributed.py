"""Several processes collect one Fisher: the same bits, and no process that waits for a dead one."""

from __future__ import annotations

import pytest
import torch
from collection_cases import (
    ADAPTERS,
    BATCHES,
    STRUCTURES,
    collect_and_die,
    collect_and_fail,
    collect_other_work,
    collect_together,
    collected,
    solve_together,
    spectrum_numbers,
)
from processes import together

from sstmerge.errors import InputError
from sstmerge.fisher import Fisher
from sstmerge.fisher.distributed import ProcessGroup, Ranks


def assert_same_bits(one: Fisher, other: Fisher) -> None:
    assert one.metadata == other.metadata
    assert set(one.statistics) == set(other.statistics)
    for name, tensor in one.statistics.items():
        assert torch.equal(tensor, other.statistics[name]), name
    for name in one.counts.__dataclass_fields__:
        assert torch.equal(getattr(one.counts, name), getattr(other.counts, name)), name


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("size", [2, 3])
def test_the_number_of_processes_changes_no_bit(tmp_path, structure, size):
    assert [o.get("value") for o in together(tmp_path, size, collect_together, structure, 11, tmp_path)] == [
        True
    ] * size
    alone = collected(structure)
    for rank in range(size):
        assert_same_bits(alone, Fisher.load(tmp_path / f"{rank}.safetensors", ADAPTERS))


def test_processes_without_data_wait_for_the_others(tmp_path):
    # One batch at two points: two leaves for three processes.
    assert [o.get("value") for o in together(tmp_path, 3, collect_together, "kfac", 1, tmp_path)] == [True] * 3
    alone = collected("kfac", BATCHES[:1])
    for rank in range(3):
        assert_same_bits(alone, Fisher.load(tmp_path / f"{rank}.safetensors", ADAPTERS))


@pytest.mark.parametrize("structure", ["kfac", "block"])
def test_shared_eigenproblems_have_the_same_solutions(tmp_path, structure):
    expected = spectrum_numbers(structure, Ranks())
    for outcome in together(tmp_path, 3, solve_together, structure):
        assert outcome["value"] == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_stops_the_others_with_a_sentence(tmp_path, rank):
    outcomes = together(tmp_path, 2, collect_and_die, "kfac", tmp_path / "out", rank, 3)
    assert outcomes[rank]["exit"] == -9
    survivor = outcomes[1 - rank]
    assert survivor["error"] == "PeerError"
    assert not survivor["reported"]
    assert f"Process {rank} of 2 has given no sign of life for 3 s" in survivor["message"]
    assert "Start the same command again" in survivor["message"]


def test_an_error_in_one_process_stops_all_and_is_told_once(tmp_path):
    outcomes = together(tmp_path, 3, collect_and_fail, "kfac", 1)
    assert outcomes[1]["error"] == "FisherError"
    assert outcomes[1]["message"] == "These scores are no good."
    assert [o["error"] for o in (outcomes[0], outcomes[2])] == ["PeerError"] * 2
    assert [o["reported"] for o in outcomes] == [True, False, True]


def test_processes_with_different_work_refuse_it(tmp_path):
    outcomes = together(tmp_path, 2, collect_other_work, "diagonal")
    (told,) = (outcome for outcome in outcomes if not outcome["reported"])
    (other,) = (outcome for outcome in outcomes if outcome["reported"])
    words = "Process 1 was given other work than process 0: seed differ"
    assert words in told["message"]
    # The other one finds the same, unless it first hears that its neighbour has.
    assert words in other["message"] or other["message"] == "Another process failed."


def test_a_process_group_must_be_there():
    with pytest.raises(InputError, match="no process group"):
        ProcessGroup()
