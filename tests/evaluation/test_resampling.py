"""Bootstrap intervals and paired tests."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from sstmerge.errors import DataError, InputError
from sstmerge.evaluation.metrics import bootstrap, mcnemar, paired_permutation
from sstmerge.evaluation.metrics.resampling import difference_of_means


def mean_of(name):
    return lambda arrays: float(arrays[name].mean())


def test_interval_of_a_mean_is_that_of_theory():
    outcomes = (np.arange(400) % 4 == 0)[None].astype(float)  # a share of .25 of 400
    interval = bootstrap(mean_of("harmful"), {"harmful": outcomes}, resamples=4000)
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert interval.estimate == 0.25
    assert (interval.low, interval.high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.006)
    assert interval.undefined == 0


def test_same_seed_same_interval():
    sample = {"x": np.random.default_rng(0).random((3, 50))}
    assert bootstrap(mean_of("x"), sample, seed=1) == bootstrap(mean_of("x"), sample, seed=1)
    assert bootstrap(mean_of("x"), sample, seed=1) != bootstrap(mean_of("x"), sample, seed=2)


def test_seeds_are_clusters():
    """Prompts of one seed that are all alike tell no more than one: the interval must not shrink with their number."""
    by_seed = np.repeat(np.array([[0.0], [1.0]]), 500, axis=1)
    interval = bootstrap(mean_of("x"), {"x": by_seed}, resamples=500)
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_prompts_are_clusters_over_seeds():
    """The same outcome for every seed: three seeds must not make the interval narrower than one does."""
    one = (np.random.default_rng(0).random((1, 60)) < 0.5).astype(float)
    three = np.repeat(one, 3, axis=0)
    widths = [i.high - i.low for i in (bootstrap(mean_of("x"), {"x": x}, resamples=3000) for x in (one, three))]
    assert widths[0] == pytest.approx(widths[1], rel=0.1)


def test_methods_are_paired():
    """A difference that is the same on every prompt has no interval, however much the prompts vary."""
    hard = np.random.default_rng(0).random((2, 40))
    outcomes = np.stack([hard, hard + 0.1])  # (methods, seeds, prompts)
    interval = bootstrap(lambda a: float((a["x"][1] - a["x"][0]).mean()), {"x": outcomes}, resamples=200)
    assert (interval.low, interval.high) == pytest.approx((0.1, 0.1))
    assert interval.excludes_zero
    assert difference_of_means(outcomes[1], outcomes[0], resamples=200).estimate == pytest.approx(0.1)


def test_undefined_resamples_are_counted_and_too_many_refused():
    sample = {"x": np.array([[1.0, 0.0, 0.0, 0.0]])}
    interval = bootstrap(lambda a: a["x"].sum() if a["x"].any() else None, sample, resamples=500)
    assert interval.undefined == pytest.approx(500 * 0.75**4, abs=50)
    with pytest.raises(DataError, match="an interval would mislead"):
        bootstrap(lambda a: 1.0 if a["x"][0, 0] == 1 else None, sample, resamples=200)
    with pytest.raises(DataError, match="no value on the data"):
        bootstrap(lambda _: None, sample)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ({}, "no samples"),
        ({"x": np.zeros(5)}, "shape"),
        ({"x": np.zeros((2, 0))}, "shape"),
        ({"x": np.array([[1.0, np.nan]])}, "not finite"),
        ({"x": np.zeros((2, 5)), "y": np.zeros((3, 5))}, "same seeds"),
    ],
)
def test_samples_that_are_none(samples, words):
    with pytest.raises(DataError, match=words):
        bootstrap(lambda a: 0.0, samples, resamples=10)


def test_bootstrap_arguments():
    with pytest.raises(InputError, match="resamples"):
        bootstrap(lambda a: 0.0, {"x": np.zeros((1, 5))}, resamples=0)


def test_mcnemar_by_hand():
    # Seven prompts only the first gets right, one only the second: 2 (C(8,0) + C(8,1)) / 2^8.
    first = [True] * 7 + [False] + [True] * 5
    second = [False] * 7 + [True] + [True] * 5
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (7, 1)
    assert found.p_value == pytest.approx(2 * (comb(8, 0) + comb(8, 1)) / 2**8)
    assert mcnemar(second, first).p_value == pytest.approx(found.p_value)
    assert mcnemar(first, first).p_value == 1.0
    with pytest.raises(DataError, match="same prompts"):
        mcnemar(first, second[1:])
    for value in (np.nan, 0.5):
        with pytest.raises(DataError, match=rf"is right .* or wrong .*, got {value}"):
            mcnemar([value], [0])


def test_permutation_by_hand():
    # All differences are 1: of 2^4 signs only all + and all − are as extreme.
    assert paired_permutation([1, 1, 1, 1], [0, 0, 0, 0]) == 2 / 16
    assert paired_permutation([1, 0], [0, 1]) == 1.0
    # Three seeds of a prompt are swapped together: two clusters, so no p-value below 1/2.
    assert paired_permutation([1] * 6, [0] * 6, clusters=["a", "b"] * 3) == 0.5


def test_random_permutations_come_near_the_exact_ones():
    rng = np.random.default_rng(3)
    first, second = rng.random(14), rng.random(14) - 0.15
    exact = paired_permutation(first, second)
    # Doubling every outcome as its own half keeps sums and clusters, but forces nothing; one empty cluster more does.
    sampled = paired_permutation([*first, 0.0], [*second, 0.0], seed=1)
    assert sampled == pytest.approx(exact, abs=0.02)
    assert paired_permutation([*first, 0.0], [*second, 0.0], seed=1) == sampled


@pytest.mark.parametrize("test", [mcnemar, paired_permutation])
def test_seeds_of_their_own_rows_are_refused(test):
    outcomes = np.zeros((3, 5))
    with pytest.raises(DataError, match=r"got the shapes \(3, 5\) and \(3, 5\); put several seeds into one row"):
        test(outcomes, outcomes)


def test_permutation_arguments():
    with pytest.raises(DataError, match="not finite"):
        paired_permutation([np.nan], [0.0])
    with pytest.raises(DataError, match="clusters"):
        paired_permutation([1.0], [0.0], clusters=["a", "b"])
    with pytest.raises(InputError, match="permutations"):
        paired_permutation([1.0], [0.0], permutations=0)
