"""Rules, selections and budgets, against dense algebra."""

from __future__ import annotations

import math

import pytest
import torch
from builders import (
    HARM,
    SAFETY,
    UTILITY,
    dense_deltas,
    dense_fisher,
    gain_and_cost,
    relative_error,
    rows,
    utility_and_safety,
)

from sstmerge.adapters import CoreSpace
from sstmerge.errors import InputError
from sstmerge.fisher import collect_fisher
from sstmerge.gevp import solve
from sstmerge.merging import Rule, Selection, merge_cores, parse_rule
from sstmerge.merging.selection import largest

STRUCTURES = ("diagonal", "kfac", "ekfac", "block", "global")
COMPLETE = STRUCTURES[:-1]


@pytest.fixture(scope="module")
def model(pico_gpt2):
    return pico_gpt2().double()


@pytest.fixture(scope="module")
def space(model):
    return CoreSpace.of(utility_and_safety(model))


@pytest.fixture(scope="module")
def spectra(model, space):
    return {structure: solve(*gain_and_cost(model, space, structure)) for structure in STRUCTURES}


@pytest.fixture(params=STRUCTURES)
def spectrum(request, spectra):
    return spectra[request.param]


@pytest.fixture(params=COMPLETE)
def complete(request, spectra):
    """A spectrum whose directions span the space."""
    return spectra[request.param]


def points(spectrum):
    return spectrum.space.core(UTILITY), spectrum.space.core(SAFETY)


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_one_adapter_with_all_directions_is_itself(complete):
    _, safety = points(complete)
    nothing = complete.space.zero()
    merged = merge_cores(complete, nothing, safety, rule=Rule.PROJECT, selection=Selection(fraction=1.0))
    assert relative_error(merged.core, safety) < 1e-9
    assert merged.report.directions == complete.space.size
    assert merged.report.gain_kept == pytest.approx(1.0)


def test_mu_zero_is_task_arithmetic_in_the_weights(spectrum):
    utility, safety = points(spectrum)
    merged = merge_cores(spectrum, utility, safety, rule=Rule.WIENER, scale=0.7, selection=Selection(mu=0.0))
    expected = dense_deltas(spectrum.space, utility + 0.7 * safety)
    for path, delta in dense_deltas(spectrum.space, merged.core).items():
        assert relative_error(delta, expected[path]) < 1e-12
    assert merged.report.predicted_kl == pytest.approx(merged.report.predicted_kl_task_arithmetic)


def test_small_mu_approaches_task_arithmetic(complete):
    utility, safety = points(complete)
    errors = []
    for mu in (1e-2, 1e-4, 1e-6):
        weakest = float(complete.eigenvalues[complete.eigenvalues > 0].min())
        if weakest < 1e-9 * float(complete.eigenvalues.max()):
            pytest.skip("F_gain is rank-deficient here")
        merged = merge_cores(complete, utility, safety, rule=Rule.WIENER, selection=Selection(mu=mu * weakest))
        errors.append(relative_error(merged.core, utility + safety))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_exponent_two_is_the_filter_applied_twice(spectrum):
    utility, safety = points(spectrum)
    mu = 0.7 * float(spectrum.eigenvalues.max())

    def filtered(adapter, exponent):
        selection = Selection(mu=mu, exponent=exponent)
        return merge_cores(spectrum, utility, adapter, rule=Rule.WIENER, scale=1.3, selection=selection)

    once = (filtered(safety, 1.0).core - utility) / 1.3
    twice = filtered(safety, 2.0)
    assert relative_error(twice.core, filtered(once, 1.0).core) < 1e-9
    assert twice.report.exponent == 2.0
    assert twice.report.length == pytest.approx(float((twice.core - utility).norm() / safety.norm()))
    assert twice.report.predicted_kl < filtered(safety, 1.0).report.predicted_kl
    half = filtered((filtered(safety, 0.5).core - utility) / 1.3, 0.5)
    assert relative_error(half.core, filtered(safety, 1.0).core) < 1e-9


@pytest.mark.parametrize("rule", [Rule.WIENER, Rule.JOINT])
def test_large_mu_leaves_the_utility_model(spectrum, rule):
    utility, safety = points(spectrum)
    mu = 1e12 * float(spectrum.eigenvalues.max())
    merged = merge_cores(spectrum, utility, safety, rule=rule, selection=Selection(mu=mu))
    assert relative_error(merged.core, utility) < 1e-9
    assert merged.report.directions == 0


def test_project_with_everything_is_task_arithmetic(complete):
    utility, safety = points(complete)
    for rule, selection in ((Rule.PROJECT, Selection(fraction=1.0)), (Rule.PROJECT, Selection(energy=1.0))):
        merged = merge_cores(complete, utility, safety, rule=rule, scale=1.3, selection=selection)
        if selection.fraction:
            assert relative_error(merged.core, utility + 1.3 * safety) < 1e-9
        assert merged.report.gain_kept == pytest.approx(1.0, rel=1e-6)


def test_projection_is_idempotent_and_orthogonal_in_the_cost(spectrum):
    utility, safety = points(spectrum)
    selection = Selection(top=5)
    once = merge_cores(spectrum, 0 * utility, safety, rule=Rule.PROJECT, selection=selection).core
    twice = merge_cores(spectrum, 0 * utility, once, rule=Rule.PROJECT, selection=selection).core
    assert relative_error(twice, once) < 1e-4
    # What was dropped has no coordinates along what was kept: vᵀ F_cost (φ − P φ) = 0.
    order = spectrum.eigenvalues.argsort(descending=True)
    kept, dropped = spectrum.coordinates(once), spectrum.coordinates(safety - once)
    scale = float(spectrum.coordinates(safety).abs().max())
    assert float(dropped[order[:5]].abs().max()) < 1e-4 * scale
    assert float(kept[order[5:]].abs().max()) < 1e-4 * scale
    assert float(once.norm()) > 0


def test_joint_minimises_the_two_quadratic_losses(complete):
    """(F_g + μ F_c)⁻¹ (F_g φ_s + μ F_c φ_u) with the damped F_c."""
    utility, safety = points(complete)
    V = torch.stack([complete.combine(row) for row in torch.eye(complete.space.size).double()], dim=1)
    dual = torch.linalg.inv(V)
    F_cost = dual.mT @ dual
    F_gain = dual.mT @ torch.diag(complete.eigenvalues) @ dual
    assert relative_error(F_gain, dense_fisher(complete.gain)) < 1e-6
    mu = float(complete.eigenvalues.median()) + 0.1
    merged = merge_cores(complete, utility, safety, rule=Rule.JOINT, selection=Selection(mu=mu))
    expected = torch.linalg.solve(F_gain + mu * F_cost, F_gain @ safety + mu * F_cost @ utility)
    assert relative_error(merged.core, expected) < 1e-6
    at_zero = merge_cores(complete, utility, safety, rule=Rule.JOINT, selection=Selection(mu=0.0))
    assert relative_error(at_zero.core, safety) < 1e-12


# ---- selection -------------------------------------------------------------------------------------------------------


def test_directions_are_counted_and_ordered(spectrum):
    utility, safety = points(spectrum)
    eigenvalues = spectrum.eigenvalues.sort(descending=True).values
    c2 = spectrum.coordinates(safety).square()
    energy = (spectrum.eigenvalues * c2)[spectrum.eigenvalues.argsort(descending=True, stable=True)]
    share = energy.cumsum(0) / energy.sum()

    def merged(**choice):
        return merge_cores(spectrum, utility, safety, rule=Rule.PROJECT, selection=Selection(**choice)).report

    assert merged(top=7).directions == 7
    assert merged(top=7).spectrum[:7] == pytest.approx(eigenvalues[:7].tolist())
    assert merged(top=7).gain_kept == pytest.approx(float(share[6]), rel=1e-4)
    dimension = spectrum.space.size
    assert merged(fraction=0.1).directions == min(len(eigenvalues), math.ceil(0.1 * dimension))
    for wanted in (0.5, 0.9):
        count = merged(energy=wanted).directions
        assert share[count - 1] >= wanted * (1 - 1e-9)
        assert count == 1 or share[count - 2] < wanted
    default = merge_cores(spectrum, utility, safety, rule=Rule.PROJECT)
    assert default.report.directions == merged(energy=0.99).directions
    if spectrum.complete:
        assert sum(merged(top=7).directions_per_layer.values()) == 7


def test_report_is_about_the_change(spectrum):
    utility, safety = points(spectrum)
    merged = merge_cores(spectrum, utility, safety, rule=Rule.PROJECT, scale=1.5, selection=Selection(top=6))
    change, report = merged.core - utility, merged.report
    F_cost, F_gain = dense_fisher(spectrum.cost), dense_fisher(spectrum.gain)
    assert report.predicted_kl == pytest.approx(0.5 * float(change @ F_cost @ change), rel=1e-4)
    assert report.predicted_kl_task_arithmetic == pytest.approx(0.5 * 2.25 * float(safety @ F_cost @ safety), rel=1e-4)
    assert report.gain_kept == pytest.approx(
        float(change @ F_gain @ change) / (2.25 * float(safety @ F_gain @ safety)), rel=1e-4
    )
    assert report.predicted_gain == pytest.approx(float(spectrum.gain.mean_score() @ change), rel=1e-6)
    assert report.norm == pytest.approx(float(change.norm()))
    assert report.norm_task_arithmetic == pytest.approx(1.5 * float(safety.norm()))
    norms = {path: float(delta.norm()) for path, delta in dense_deltas(spectrum.space, change).items()}
    assert report.norm_per_layer == pytest.approx(norms, rel=1e-5)
    assert (report.gain_sequences, report.cost_sequences) == (40, 48)
    assert not report.warnings


# ---- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [1e-3, 0.1, 0.7])
@pytest.mark.parametrize(
    ("rule", "choice"),
    [
        (Rule.PROJECT, {}),
        (Rule.WIENER, {}),
        (Rule.JOINT, {}),
        (Rule.PROJECT, {"top": 4}),
        (Rule.PROJECT, {"fraction": 0.2}),
        (Rule.WIENER, {"mu": 0.5}),
        (Rule.WIENER, {"mu": 0.5, "exponent": 2.0}),
        (Rule.WIENER, {"exponent": 0.5}),
    ],
)
def test_budget_is_spent_exactly(spectrum, rule, choice, part):
    choice = dict(choice)
    utility, safety = points(spectrum)
    source = safety - utility if rule is Rule.JOINT else safety
    rest = 0.0 if rule is Rule.PROJECT else 1.0
    everything = spectrum.apply_filter(source, torch.ones_like(spectrum.eigenvalues), rest)
    budget = part * 0.5 * spectrum.cost.quadratic(everything)
    merged = merge_cores(spectrum, utility, safety, rule=rule, selection=Selection(budget=budget, **choice))
    spent = 0.5 * spectrum.cost.quadratic(merged.core - utility)
    choice.pop("exponent", None)
    assert spent == pytest.approx(budget, rel=1e-5)
    assert merged.report.predicted_kl == pytest.approx(budget, rel=1e-5)
    # Any μ > 0 drops what lies in no direction of `global`: where the rest costs less than the budget, the scale spends it.
    in_directions = spectrum.apply_filter(source, torch.ones_like(spectrum.eigenvalues))
    if choice or 0.5 * spectrum.cost.quadratic(in_directions) < budget:
        assert merged.report.scale != 1.0
    else:
        assert merged.report.scale == 1.0


def test_budget_above_the_whole_adapter_sets_the_scale(spectrum):
    utility, safety = points(spectrum)
    for rule in (Rule.PROJECT, Rule.WIENER):
        rest = 0.0 if rule is Rule.PROJECT else 1.0
        whole = spectrum.apply_filter(safety, torch.ones_like(spectrum.eigenvalues), rest)
        budget = 4.0 * 0.5 * spectrum.cost.quadratic(whole)
        merged = merge_cores(spectrum, utility, safety, rule=rule, selection=Selection(budget=budget))
        assert merged.report.scale == pytest.approx(2.0, rel=1e-5)
        assert relative_error(merged.core, utility + 2.0 * whole) < 1e-5
        length = float(whole.norm() / safety.norm())
        told = f"{2 * length:.2f} times as long as the adapter as trained"
        assert any(told in sentence for sentence in merged.report.warnings) == (2 * length > 1.5)


def test_budget_above_the_selected_directions_sets_the_scale(spectrum):
    utility, safety = points(spectrum)
    selected = merge_cores(spectrum, utility, safety, rule=Rule.PROJECT, selection=Selection(top=4))
    budget = 4.0 * selected.report.predicted_kl
    merged = merge_cores(spectrum, utility, safety, rule=Rule.WIENER, selection=Selection(top=4, budget=budget))
    assert merged.report.predicted_kl == pytest.approx(budget, rel=1e-5)
    assert relative_error(merged.core, utility + 2.0 * (selected.core - utility)) < 1e-5
    cheaper = merge_cores(spectrum, utility, safety, rule=Rule.WIENER, selection=Selection(top=4, budget=budget / 8))
    assert cheaper.report.scale == 1.0
    assert cheaper.report.predicted_kl == pytest.approx(budget / 8, rel=1e-5)


def test_budget_keeps_the_most_efficient_directions(complete):
    utility, safety = points(complete)
    budget = 0.3 * 0.5 * complete.cost.quadratic(safety)
    merged = merge_cores(complete, utility, safety, rule=Rule.PROJECT, selection=Selection(budget=budget))
    weights = complete.coordinates(merged.core - utility) / complete.coordinates(safety)
    ordered = weights[complete.eigenvalues.argsort(descending=True, stable=True)]
    partial = ((ordered > 1e-6) & (ordered < 1 - 1e-6)).nonzero()[:, 0]
    assert len(partial) <= 1
    cut = int(partial[0]) if len(partial) else int(ordered.round().sum())
    assert torch.allclose(ordered[:cut], torch.ones(cut).double(), atol=1e-6)
    assert float(ordered[cut + 1 :].abs().max()) < 1e-6


# ---- contradictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"top": 3, "fraction": 0.1}, "one of top, fraction and energy; got top and fraction"),
        ({"top": 0}, "top must be at least 1"),
        ({"fraction": 1.5}, "fraction must lie in"),
        ({"energy": 0.0}, "energy must lie in"),
        ({"mu": -1.0}, "mu must be a finite number >= 0"),
        ({"mu": math.inf}, "mu must be a finite number >= 0"),
        ({"exponent": 0.0}, "exponent must be a positive finite number"),
        ({"exponent": math.nan}, "exponent must be a positive finite number"),
        ({"budget": 0.0}, "budget must be a positive"),
        ({"budget": math.nan}, "budget must be a positive"),
    ],
)
def test_selections_that_make_no_sense(choice, words):
    with pytest.raises(InputError, match=words):
        Selection(**choice)


@pytest.mark.parametrize(
    ("rule", "scale", "choice", "words"),
    [
        (Rule.PROJECT, None, {"mu": 1.0}, "mu belongs to the rules 'wiener' and 'joint'"),
        (Rule.PROJECT, None, {"exponent": 2.0}, "exponent belongs to the rule 'wiener'; 'project' has none"),
        (Rule.JOINT, None, {"mu": 1.0, "exponent": 2.0}, "exponent belongs to the rule 'wiener'; 'joint' has none"),
        (Rule.WIENER, None, {}, "'wiener' needs mu"),
        (Rule.JOINT, None, {"top": 3}, "'joint' needs mu"),
        (Rule.PROJECT, 1.0, {"top": 3, "budget": 0.1}, "either scale or budget"),
        (Rule.WIENER, 1.0, {"mu": 1.0, "budget": 0.1}, "either scale or budget"),
        (Rule.PROJECT, None, {"top": 10**6}, "top asks for 1000000 directions"),
        (Rule.REFIT, None, {"top": 3}, "'refit' evaluates the model"),
    ],
)
def test_options_that_contradict_each_other(spectra, rule, scale, choice, words):
    spectrum = spectra["block"]
    with pytest.raises(InputError, match=words):
        merge_cores(spectrum, *points(spectrum), rule=rule, scale=scale, selection=Selection(**choice))


@pytest.mark.parametrize("n", [3, 1023, 1024, 5000, 200_000])
@pytest.mark.parametrize("count", [1, 3, 64, 150])
def test_largest_of_many(n, count):
    values = torch.randint(0, 10**6, (n,), generator=torch.Generator().manual_seed(n)).double()
    values[-1] = 2e6  # where the rows of a table end
    found = largest(values, min(n, count))
    assert torch.equal(found, values.sort(descending=True).values[:count])


def test_unknown_rule():
    assert parse_rule("joint") is Rule.JOINT
    with pytest.raises(InputError, match=r"'average'.*project"):
        parse_rule("average")


def test_small_samples_and_other_references_are_warned_of(model, space, spectra):
    few = collect_fisher(model, [rows(HARM, [0, 1, 2])], space, structure="block", reference="path:base:utility:11")
    spectrum = solve(few, spectra["block"].cost)
    warnings = merge_cores(spectrum, *points(spectrum), rule=Rule.PROJECT).report.warnings
    assert any("Only 3 effective harm sequences" in sentence for sentence in warnings)
    assert any("taken at 'path:base:utility:11' but the cost at 'utility'" in sentence for sentence in warnings)


def test_joint_is_compared_with_the_safety_adapter(spectrum):
    utility, safety = points(spectrum)
    joint = merge_cores(spectrum, utility, safety, rule=Rule.JOINT, scale=2.0, selection=Selection(mu=1.0)).report
    assert joint.norm_task_arithmetic == pytest.approx(2 * float(safety.norm()))
    assert joint.predicted_kl_task_arithmetic == pytest.approx(2 * spectrum.cost.quadratic(safety))
