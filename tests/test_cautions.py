"""Every sentence about a merge whose numbers mean less than they seem to is said when it is true, and only then."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import SAFETY, gain_and_cost, utility_and_safety

from sstmerge.adapters import CoreSpace
from sstmerge.gevp import solve
from sstmerge.merging import Selection, merge_cores
from sstmerge.merging.cautions import cautions

ENOUGH = (100.0, 100.0)


@pytest.fixture(scope="module")
def pair(pico_gpt2):
    model = pico_gpt2()
    gain, cost = gain_and_cost(model, CoreSpace.of(utility_and_safety(model)), "diagonal")
    return gain, replace(cost, metadata={**cost.metadata, "data": "other prompts"})


def said(pair, *, length=1.0, predicted_kl=0.1, effective=ENOUGH, filtered=False, **metadata):
    gain, cost = pair
    spectrum = solve(gain, replace(cost, metadata={**cost.metadata, **metadata}))
    return cautions(spectrum, length, predicted_kl, effective, filtered=filtered)


def test_nothing_stands_out(pair):
    assert said(pair) == []
    assert said(pair, length=0.09) == []
    assert said(pair, filtered=True) == []


@pytest.mark.parametrize(
    ("words", "case"),
    [
        ("The change is 1.60 times as long as the adapter", {"length": 1.6}),
        ("The filter leaves 9.0% of the adapter's length", {"length": 0.09, "filtered": True}),
        ("The predicted benign KL is 1.1 nats", {"predicted_kl": 1.1}),
        ("Only 31 effective harm sequences", {"effective": (31.0, 100.0)}),
        ("Only 31 effective benign sequences", {"effective": (100.0, 31.0)}),
        ("but the cost at 'elsewhere'", {"reference": "elsewhere"}),
        ("is no KL", {"labels": "data"}),
        ("Refusals of benign prompts count as cost here", {"penalty": "some prompts"}),
    ],
)
def test_one_thing_stands_out(pair, words, case):
    (sentence,) = said(pair, **case)
    assert words in sentence


@pytest.mark.parametrize(
    ("structure", "words"), [("diagonal", "that layers act together"), ("global", "that of the split halves")]
)
def test_a_budget_is_spent_in_nats_that_leave_something_out(pico_gpt2, structure, words):
    model = pico_gpt2()
    space = CoreSpace.of(utility_and_safety(model))
    spectrum = solve(*gain_and_cost(model, space, structure))
    safety = space.core(SAFETY)
    plain = merge_cores(spectrum, space.zero(), safety).report
    bound = merge_cores(spectrum, space.zero(), safety, selection=Selection(budget=plain.predicted_kl / 2)).report
    (sentence,) = set(bound.warnings) - set(plain.warnings)
    assert words in sentence


def test_equal_data(pair):
    (sentence,) = said(pair, data=pair[0].metadata["data"])
    assert "come from the same data" in sentence


def test_spectra_that_prefer_nothing(pair):
    gain, cost = pair
    nothing = replace(gain, statistics={name: 0 * tensor for name, tensor in gain.statistics.items()})
    (sentence,) = cautions(solve(nothing, cost), 1.0, 0.1, ENOUGH)
    assert "The gain is zero in every direction" in sentence
    alike = replace(gain, statistics=cost.statistics)
    assert any("nearly equal" in sentence for sentence in cautions(solve(alike, cost, damping=0.0), 1.0, 0.1, ENOUGH))
