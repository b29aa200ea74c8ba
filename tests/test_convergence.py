"""Stopping when converged: intervals that hold under repeated looks, chunks that are samples, the pair and its metadata."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from builders import dense_fisher, random_adapter, random_batch, relative_error

from sstmerge.adapters import CoreSpace
from sstmerge.cli import main
from sstmerge.errors import InputError
from sstmerge.fisher import Fisher, collect_fisher
from sstmerge.fisher.batch import length_groups, regroup
from sstmerge.fisher.convergence import (
    Groups,
    convergence_sentence,
    half_sample_error,
    half_samples,
    random_chunks,
    ratio_interval,
    single_look,
    spent,
)
from sstmerge.fisher.fisher import Counts, read_header
from sstmerge.fisher.structures import Structure
from sstmerge.merging.convergence import adapters_sum, pair_look
from sstmerge.pipeline.calibration import CollectionOptions, collect_pair
from sstmerge.pipeline.sequential import StoppingRule, converge

LENGTHS = [5 + i % 7 for i in range(24)]


@pytest.fixture(scope="module")
def model(pico_llama):
    return pico_llama().double()


@pytest.fixture(scope="module")
def space(model):
    return CoreSpace.of([random_adapter(model, "utility", seed=1), random_adapter(model, "safety", seed=2)])


@pytest.fixture(scope="module")
def batches():
    return [random_batch(LENGTHS[:12], seed=1), random_batch(LENGTHS[12:], seed=2, first_index=12)]


def collector(model, space, structure="kfac", labels="data"):
    calls = []

    def collect(chunk, part):
        calls.append((part, sorted(int(i) for batch in chunk for i in batch.index)))
        return collect_fisher(model, chunk, space, structure=structure, labels=labels, reference="utility")

    return collect, calls


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_errors_that_looks_may_spend_add_up_to_five_per_cent():
    assert sum(spent(look) for look in range(1, 10_000)) == pytest.approx(0.05, rel=1e-3)


def test_interval_of_a_ratio_is_students_where_all_weights_are_equal():
    values = torch.tensor([1.0, 2.0, 4.0, 5.0])
    interval = ratio_interval(values.tolist(), [1.0] * 4, look=1)
    assert interval.estimate == pytest.approx(3.0)
    standard_error = float(values.std()) / 2
    assert interval.half_width == pytest.approx(4.1765 * standard_error, rel=1e-4)  # t with 3 degrees, 0.9875
    assert ratio_interval(values.tolist(), [1.0] * 4, look=2).half_width > interval.half_width
    assert ratio_interval([1.0, 2.0], [1.0, 1.0], look=1).half_width == math.inf


def test_interval_of_a_ratio_is_zero_where_all_groups_agree():
    assert ratio_interval([2.0, 4.0, 6.0, 1.0], [1.0, 2.0, 3.0, 0.5], look=1).half_width == pytest.approx(0, abs=1e-12)


def test_intervals_of_a_whole_run_hold_together():
    """Skewed data, 500 runs of ten looks: hardly more than 5 % may have any look whose interval misses the truth."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 15, (500, 8, 10, 16), generator=generator).double()  # runs, groups, chunks, sequences
    draws = torch.randn(tokens.shape, generator=generator).double()
    totals = (tokens * (0.7 * draws - 0.245).exp()).sum(dim=3).cumsum(dim=2)  # the ratio is 1
    tokens = tokens.sum(dim=3).cumsum(dim=2)
    wrong = 0
    for run in range(500):
        looks = [ratio_interval(totals[run, :, n].tolist(), tokens[run, :, n].tolist(), n + 1) for n in range(10)]
        wrong += any(abs(look.estimate - 1) > look.half_width for look in looks)
    assert wrong / 500 < 0.06


@pytest.mark.parametrize("groups", [3, 6, 8, 16])
def test_half_samples_give_the_standard_error_of_a_mean(space, groups):
    """Over many runs the squared error is that of the mean of all groups, whose variance is known."""
    generator = torch.Generator().manual_seed(0)
    identity = Fisher(
        Structure.DIAGONAL,
        space,
        {f"square_sum.{i}": torch.ones(2, *g.core_shape) for i, g in enumerate(space.groups)},
        Counts(*(torch.ones(2) for _ in range(4))),
    )
    assert identity.quadratic(space.core("utility")) == pytest.approx(float(space.core("utility").square().sum()))
    splits = half_samples(groups)
    squares = []
    for _ in range(30):
        data = 100 + torch.randn(groups, space.size, generator=generator, dtype=torch.float64)
        halves = [tuple(data[torch.tensor(split) == side].mean(dim=0) for side in (0, 1)) for split in splits]
        shares = [split.count(0) / groups for split in splits]
        squares.append(half_sample_error(halves, shares, identity) ** 2)
    assert sum(squares) / 30 == pytest.approx(1 / groups / 100**2, rel=0.05)


def test_half_samples_of_eight_groups_are_balanced():
    splits = torch.tensor(half_samples(8)) * 2 - 1
    assert torch.equal(splits @ splits.mT, 8 * torch.eye(4, dtype=torch.int64))
    assert torch.equal(splits.sum(dim=1), torch.zeros(4, dtype=torch.int64))
    assert [len(half_samples(count)) for count in (2, 3, 4, 5, 16)] == [2, 3, 3, 4, 4]


# ---- chunks ----------------------------------------------------------------------------------------------------------


def test_chunks_are_a_random_partition(batches):
    chunks = random_chunks(batches, 5, None, seed=3)
    assert [len(chunk) for chunk in chunks] == [5, 5, 5, 5, 4]
    assert sorted(i for chunk in chunks for i in chunk) == list(range(24))
    assert chunks == random_chunks(batches[::-1], 5, None, seed=3)
    assert chunks != random_chunks(batches, 5, None, seed=4)
    assert [len(chunk) for chunk in random_chunks(batches, 10, 21, seed=0)] == [10, 11]  # no chunk of one


def test_sequences_cut_anew_give_the_same_fisher(model, space, batches):
    options = {"structure": "kfac", "labels": "sampled", "reference": "safety"}
    again = regroup(batches, range(24), tokens_per_batch=20)
    assert max(batch.input_ids.numel() for batch in again) <= 20
    lengths = [int(length) for batch in again for length in batch.attention_mask.sum(dim=1)]
    assert lengths == sorted(lengths)
    assert all(batch.attention_mask.sum(dim=1).max() == batch.input_ids.shape[1] for batch in again)
    one, other = (collect_fisher(model, b, space, **options) for b in (batches, again))
    assert relative_error(dense_fisher(one), dense_fisher(other)) < 1e-6


def test_groups_of_similar_length_pad_little():
    lengths = [3, 50, 4, 48, 3, 52]
    assert length_groups(lengths, 104) == [[0, 4, 2], [3, 1], [5]]


# ---- one Fisher ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "block", "global"])
def test_groups_can_be_taken_apart(model, space, batches, structure):
    collect, _ = collector(model, space, structure)
    groups = Groups()
    chunks = random_chunks(batches, 1, None, seed=0)
    for chunk in chunks:
        groups.add(collect(regroup(batches, chunk, 64), ""), len(chunk))
    assert len(groups.parts) == 16
    assert groups.sequences == 24
    whole = collect(batches, "")
    assert relative_error(dense_fisher(groups.whole()), dense_fisher(whole)) < 1e-6
    # Chunks 1 and 17 are in group 1.
    split = [int(number == 1) for number in range(16)]
    rest = [i for number, chunk in enumerate(chunks) if number % 16 != 1 for i in chunk]
    expected = collect(regroup(batches, rest, 64), "")
    assert relative_error(dense_fisher(groups.half(split, 0)), dense_fisher(expected)) < 1e-6


def test_a_fisher_stops_at_its_tolerance_and_says_so(model, space, batches):
    collect, calls = collector(model, space)
    rule = StoppingRule(tolerance=1e-9, max_samples=None, check_every=4, tokens_per_batch=64, seed=0)
    everything = converge(batches, collect, rule)
    assert relative_error(dense_fisher(everything), dense_fisher(collect(batches, ""))) < 1e-6
    recorded = everything.metadata["convergence"]
    assert (recorded["converged"], recorded["sequences"], recorded["sequences_available"]) == (False, 24, 24)
    widths = [look["kl"]["half_width"] / look["kl"]["estimate"] for look in recorded["looks"]]
    assert len(widths) == 4  # from three groups on
    reached = 1 + next(i for i, width in enumerate(widths) if width <= 1.05 * min(widths))
    calls.clear()
    stopped = converge(batches, collect, replace(rule, tolerance=1.05 * min(widths)))
    assert len(calls) == reached + 2
    assert stopped.metadata["convergence"]["converged"]
    last = recorded["looks"][reached - 1] | {"converged": True}
    assert stopped.metadata["convergence"]["looks"] == [*recorded["looks"][: reached - 1], last]
    assert stopped.tokens == recorded["looks"][reached - 1]["tokens"][0]


def test_interval_of_one_fisher_is_that_of_its_adapters(model, space, batches):
    collect, _ = collector(model, space, "global")
    groups = Groups()
    for chunk in random_chunks(batches, 6, None, seed=0):
        groups.add(collect(regroup(batches, chunk, 64), ""), len(chunk))
    look = single_look(groups, 1, tolerance=1e3)
    values = [0.5 * groups.whole().quadratic(space.core(name)) for name in ("utility", "safety")]
    assert min(abs(look.kl.estimate / value - 1) for value in values) < 1e-5
    assert look.converged


@pytest.mark.parametrize(("labels", "measured"), [("data", "½φᵀFφ"), ("sampled", "predicted KL")])
def test_only_sampled_labels_give_a_kl(model, space, batches, labels, measured):
    rule = StoppingRule(tolerance=1e6, max_samples=None, check_every=4, tokens_per_batch=64, seed=0)
    fisher = converge(batches, collector(model, space, labels=labels)[0], rule)
    assert f"converged to 100000000% with 12 of 24 sequences: {measured} " in convergence_sentence(fisher.metadata)


# ---- a pair ----------------------------------------------------------------------------------------------------------


def test_pair_without_noise_has_converged(model, space):
    """Every group holds the same data under other indices: nothing varies, and the KL is that of the whole."""
    gain, cost = Groups(), Groups()
    for number in range(4):
        batch = random_batch([6, 7, 8, 9], seed=5, first_index=4 * number)
        for groups, labels in ((gain, "data"), (cost, "data")):
            groups.add(collector(model, space, "kfac", labels)[0]([batch], ""), 4)
    look = pair_look(gain, cost, adapters_sum, 1, tolerance=1e-6)
    assert look.converged
    assert look.step_error == pytest.approx(0, abs=1e-7)
    assert look.measured == "held-out KL"
    total = space.core("utility") + space.core("safety")
    assert look.kl.estimate == pytest.approx(0.5 * cost.whole().quadratic(total))


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "global"])
def test_pair_is_collected_in_turns_until_it_is_known(model, space, batches, structure):
    options = CollectionOptions(structure=structure, reference="utility", tolerance=1e6, check_every=3)
    gain, cost = collect_pair(model, space, batches, batches, options)
    assert (gain.counts.sequences.sum(), cost.counts.sequences.sum()) == (9, 9)
    assert gain.metadata["convergence"]["looks"] == cost.metadata["convergence"]["looks"]
    recorded = cost.metadata["convergence"]
    assert recorded["converged"]
    assert tuple(recorded["looks"][-1]["sequences"]) == (9, 9)
    chosen = sorted(i for chunk in random_chunks(batches, 3, None, seed=0)[:3] for i in chunk)
    how = {"labels": "sampled", "reference": "utility"}
    if structure == "ekfac":
        how["basis"] = cost.kronecker_basis()
    expected = collect_fisher(model, regroup(batches, chosen, 64), space, structure=structure, **how)
    assert relative_error(dense_fisher(cost), dense_fisher(expected)) < 1e-6


def test_most_samples_are_a_random_choice_of_the_data(model, space, batches):
    options = CollectionOptions(structure="kfac", reference="utility", max_samples=10)
    gain, _ = collect_pair(model, space, batches, batches, options)
    assert gain.counts.sequences.sum() == 10
    assert not gain.metadata["convergence"]["converged"]
    # One chunk cannot be held out from another, and nobody asked for a tolerance.
    words = convergence_sentence(gain.metadata)
    assert re.fullmatch(r"10 of 24 sequences: in-sample KL [-0-9.e]+ nats/token, too few groups for an interval", words)


def test_convergence_is_in_the_file(model, space, batches, tmp_path):
    collect, _ = collector(model, space)
    rule = StoppingRule(tolerance=1e6, max_samples=None, check_every=2, tokens_per_batch=64, seed=0)
    fisher = converge(batches, collect, rule)
    fisher.save(tmp_path / "fisher.safetensors")
    loaded = Fisher.load(tmp_path / "fisher.safetensors", space.adapters)
    assert loaded.metadata["convergence"]["looks"][0]["sequences"] == [6]


@pytest.mark.parametrize("option", [("--tolerance", "1e6"), ("--max-samples", "6")])
def test_merge_and_fisher_commands_stop_early(job, tmp_path, monkeypatch, option):
    common = ["--base", job["base"], "--completion-tokens", "4", "--structure", "kfac", "--check-every", "2", *option]
    roles = ["--utility", job["utility"], "--safety", job["safety"]]
    data = ["--harm", job["harm.jsonl"], "--benign", job["benign.jsonl"]]
    command(monkeypatch, "merge", *common, *roles, *data, "--top", "40", "--out", str(tmp_path / "merged"))
    report = json.loads((tmp_path / "merged" / "sstmerge_report.json").read_text())
    adapters = ["--adapter", f"u={job['utility']}", "--adapter", f"s={job['safety']}", "--labels", "data"]
    file = tmp_path / "f.safetensors"
    command(monkeypatch, "fisher", *common, *adapters, "--data", job["harm.jsonl"], "--out", str(file))
    for metadata in (report["gain"], report["cost"], read_header(file)["metadata"]):
        recorded = metadata["convergence"]
        assert recorded["sequences"] == 6
        assert recorded["converged"] == (option[0] == "--tolerance")
        assert recorded["looks"][-1]["kl"]["estimate"] > 0


def test_sentence_says_how_much_was_needed():
    look = {"kl": {"estimate": 0.02, "half_width": 0.003}, "step_error": 0.12, "measured": "held-out KL"}
    recorded = {"tolerance": 0.2, "converged": True, "sequences": 48, "sequences_available": 500, "looks": [look]}
    words = "converged to 20% with 48 of 500 sequences: held-out KL 0.02 ± 0.003 nats/token, step error 12%"
    assert convergence_sentence({"convergence": recorded}) == words
    del look["measured"]  # a file of before
    assert convergence_sentence({"convergence": recorded}) == words
    look["step_error"], recorded["converged"] = None, False
    words = "not converged to 20% with 48 of 500 sequences: estimate 0.02 ± 0.003 per token"
    assert convergence_sentence({"convergence": recorded}) == words
    look["kl"]["half_width"], recorded["tolerance"] = None, None
    words = "48 of 500 sequences: estimate 0.02 per token, too few groups for an interval"
    assert convergence_sentence({"convergence": recorded}) == words
    assert convergence_sentence({}) is None


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["sstmerge", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"tolerance": 0.0}, "tolerance"),
        ({"max_samples": 0}, "max_samples"),
        ({"tolerance": 0.1, "check_every": 0}, "check_every"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        CollectionOptions(**option)
