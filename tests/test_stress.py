"""Numbers at their limits: statistics of any size and rank, adapters that repeat or vanish, equal data, single sequences."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from builders import random_adapter, random_batch
from cli_runs import run_command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from valid_files import STRUCTURES, synthetic_adapter, synthetic_fisher

from sstmerge.adapters import Adapter, CoreSpace, LoraFactors
from sstmerge.errors import AdapterError, FisherError, SSTMergeError
from sstmerge.fisher import Fisher, collect_fisher
from sstmerge.gevp import solve
from sstmerge.merging import Rule, Selection, merge_cores
from sstmerge.pipeline.curve import draw_spectrum

few = settings(max_examples=8, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
structures = pytest.mark.parametrize("structure", STRUCTURES)
RULES = {
    Rule.PROJECT: Selection(top=3),
    Rule.WIENER: Selection(mu=0.5),
    Rule.JOINT: Selection(mu=0.5),
}


@pytest.fixture(scope="module")
def space():
    return CoreSpace.of([synthetic_adapter("utility", 0), synthetic_adapter("safety", 1)])


def pair(space, structure, gain_sequences=24, cost_sequences=24):
    return (
        synthetic_fisher(space, structure, "data", 0, gain_sequences),
        synthetic_fisher(space, structure, "sampled", 1, cost_sequences),
    )


# The power of the scores that a statistic is proportional to.
POWER = {"score_sum": 1, "scores": 1, "square_sum": 2, "rotated_square_sum": 2, "outer_sum": 2, "output_covariance": 2}


def scaled(fisher: Fisher, factor: float) -> Fisher:
    """Return the Fisher of scores that are √factor times as large: the Fisher matrix times a factor."""
    statistics = {
        name: tensor * factor ** (POWER.get(name.split(".")[0], 0) / 2) if tensor.is_floating_point() else tensor
        for name, tensor in fisher.statistics.items()
    }
    return replace(fisher, statistics=statistics)


def merged(gain, cost, rule=Rule.PROJECT, selection=None):
    space = gain.space
    return merge_cores(
        solve(gain, cost), space.core("utility"), space.core("safety"), rule=rule, selection=selection or RULES[rule]
    )


def close(a, b, tolerance=1e-6):
    return float((a - b).norm()) <= tolerance * float(b.norm())


# ---- invariances ---------------------------------------------------------------------------------------------------


@structures
@pytest.mark.parametrize("factor", [1e-30, 1e-8, 1e8, 1e30])
def test_one_scale_of_both_fishers_changes_nothing(space, structure, factor):
    """The statistics are in the units of the scores, which depend on nothing but the loss's own unit."""
    gain, cost = pair(space, structure)
    tolerance = 1e-4 if structure in ("global", "block") else 1e-6  # kept in float32
    for rule in RULES:
        one, other = merged(gain, cost, rule), merged(scaled(gain, factor), scaled(cost, factor), rule)
        assert close(other.core, one.core, tolerance)
        assert other.report.predicted_kl == pytest.approx(factor * one.report.predicted_kl, rel=1e-4)


@structures
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_scale_of_one_fisher_changes_lambda_and_no_direction(space, structure, factor):
    gain, cost = pair(space, structure)
    tolerance = 1e-4 if structure in ("global", "block") else 1e-6
    one = merged(gain, cost)
    louder, dearer = merged(scaled(gain, factor), cost), merged(gain, scaled(cost, factor))
    assert close(louder.core, one.core, tolerance)
    assert close(dearer.core, one.core, tolerance)
    assert louder.report.spectrum[0] == pytest.approx(factor * one.report.spectrum[0], rel=1e-4)
    assert dearer.report.spectrum[0] == pytest.approx(one.report.spectrum[0] / factor, rel=1e-4)


# ---- hostile statistics --------------------------------------------------------------------------------------------


@structures
@few
@given(
    log_gain=st.floats(-60, 60),
    log_cost=st.floats(-60, 60),
    rule=st.sampled_from(list(RULES)),
    sequences=st.sampled_from([1, 2, 24]),
    zeroed=st.sampled_from(["nothing", "gain", "cost"]),
)
def test_any_statistics_give_a_finite_merge_or_a_sentence(
    space, structure, log_gain, log_cost, rule, sequences, zeroed
):
    gain, cost = pair(space, structure, sequences, sequences)
    gain = scaled(gain, 0.0 if zeroed == "gain" else 10.0**log_gain)
    cost = scaled(cost, 0.0 if zeroed == "cost" else 10.0**log_cost)
    try:
        result = merged(gain, cost, rule)
    except SSTMergeError:
        return
    assert bool(torch.isfinite(result.core).all())
    assert all(math.isfinite(value) for value in result.report.spectrum)
    assert result.report.predicted_kl >= 0
    limit = float(space.core("utility").norm() + space.core("safety").norm())
    assert float(result.core.norm()) < 1e6 * limit


@structures
def test_a_single_sequence_is_said_to_be_too_few(space, structure):
    result = merged(*pair(space, structure, 1, 1), selection=Selection(top=1))
    sentences = " ".join(result.report.warnings)
    assert "Only 1 effective harm sequences" in sentences
    assert "Only 1 effective benign sequences" in sentences


def test_a_merge_from_a_single_sequence_has_no_halves_to_compare(job, tmp_path):
    arguments = ("--base", job["base"], "--harm", job["harm.jsonl"], "--benign", job["benign.jsonl"], "--limit", "1")
    adapters = ("--utility", job["utility"], "--safety", job["safety"], "--structure", "kfac", "--top", "1")
    code, said = run_command("merge", *arguments, *adapters, "--device", "cpu", "--out", str(tmp_path / "merged"))
    assert code == 0, said
    assert "Only 1 effective harm sequences" in " ".join(said.split())
    assert json.loads((tmp_path / "merged" / "sstmerge_report.json").read_text())["stability"] is None


@structures
def test_equal_data_are_said_to_tell_nothing_apart(space, structure):
    gain, cost = pair(space, structure)
    same = replace(gain, metadata={**cost.metadata})
    assert any("tell apart" in sentence for sentence in merged(gain, same).report.warnings)
    assert not any("tell apart" in sentence for sentence in merged(gain, cost).report.warnings)


@structures
def test_a_gain_of_zero_is_said(space, structure):
    gain, cost = pair(space, structure)
    try:
        warnings = merged(scaled(gain, 0.0), cost, selection=Selection(energy=0.9)).report.warnings
    except SSTMergeError as error:
        warnings = (str(error),)
    assert any("gain is zero" in sentence or "no gain energy" in sentence for sentence in warnings)


def test_a_curve_of_no_gain_is_drawn(space):
    gain, cost = pair(space, "global")
    spectrum = solve(scaled(gain, 0.0), cost)
    assert len(spectrum.eigenvalues) == 0
    assert draw_spectrum(spectrum, space.core("safety")).axes
    change = merged(scaled(gain, 0.0), cost, Rule.WIENER)
    assert close(change.core, space.core("utility"))
    assert any("gain is zero" in sentence for sentence in change.report.warnings)


# ---- adapters ------------------------------------------------------------------------------------------------------


def layers_scaled(adapter: Adapter, factor: float) -> Adapter:
    layers = {p: LoraFactors(f.A.double(), f.B.double() * factor, f.scaling) for p, f in adapter.layers.items()}
    return replace(adapter, layers=layers)


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e28])
def test_tiny_and_huge_adapters_keep_their_weight_changes(factor):
    adapters = [layers_scaled(synthetic_adapter("utility", 0), factor), synthetic_adapter("safety", 1)]
    space = CoreSpace.of(adapters)
    back = space.to_adapter(space.core("utility"), name="back", dtype=torch.float64)
    for path, factors in adapters[0].layers.items():
        assert close(back.layers[path].delta(), factors.delta(), 1e-5)


def test_numbers_beyond_reason_are_refused():
    adapter = layers_scaled(synthetic_adapter("utility", 0), 1e200)
    with pytest.raises(AdapterError, match=r"1e\+?30|beyond"):
        adapter.validate()


@structures
def test_the_same_adapter_twice(structure):
    utility = synthetic_adapter("utility", 0)
    space = CoreSpace.of([utility, replace(utility, name="safety")])
    assert all(group.core_shape[1:] == (2, 2) for group in space.groups)
    result = merged(*pair(space, structure), selection=Selection(fraction=1.0))
    assert bool(torch.isfinite(result.core).all())
    if structure != "global":  # whose directions lie in the span of the samples
        assert close(result.core, 2 * space.core("utility"), 1e-6)


def test_a_zero_adapter_is_refused_with_words():
    zero = layers_scaled(synthetic_adapter("utility", 0), 0.0)
    with pytest.raises(AdapterError, match="changes nothing"):
        zero.validate()


@structures
def test_the_order_of_adapters_and_layers_changes_nothing(structure):
    utility, safety = synthetic_adapter("utility", 0), synthetic_adapter("safety", 1)
    turned = [replace(a, layers=dict(reversed(a.layers.items()))) for a in (safety, utility)]
    one, other = CoreSpace.of([utility, safety]), CoreSpace.of(turned)
    results = [merged(*pair(space, structure)) for space in (one, other)]
    adapters = [s.to_adapter(r.core, name="m") for s, r in zip((one, other), results, strict=True)]
    for path in utility.layers:
        assert close(adapters[1].layers[path].delta(), adapters[0].layers[path].delta(), 1e-5)


# ---- gradients that overflow or underflow ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_that_overflow_are_named(pico_llama, dtype):
    model = pico_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e38 if dtype is torch.bfloat16 else 1e4)
        model.model.layers[1].mlp.down_proj.weight.mul_(1e3)
    space = CoreSpace.of([random_adapter(model)])
    with pytest.raises(FisherError, match=r"not finite|overflow"):
        collect_fisher(model.to(dtype), [random_batch([6, 7])], space, structure="kfac")


def test_small_gradients_survive_float16(pico_llama):
    """Scores of weights of size 1e-6 lie below float16's smallest number without the loss's scale."""
    batch, fishers = random_batch([6, 7, 8]), []
    for dtype in (torch.float32, torch.float16):
        model = pico_llama()
        space = CoreSpace.of([random_adapter(model)])
        with torch.no_grad():
            model.lm_head.weight.mul_(1e-3)
        fishers.append(collect_fisher(model.to(dtype), [batch], space, structure="diagonal").diagonal())
    assert close(fishers[1], fishers[0], 0.1)
