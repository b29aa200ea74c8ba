"""Whole merges: gauges, predicted against measured KL, many experts, stability of the split halves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import (
    BENIGN,
    HARM,
    SAFETY,
    UTILITY,
    adapter_deltas,
    dense_deltas,
    enumerated_labels,
    gain_and_cost,
    random_batch,
    regauged,
    relative_error,
    rows,
    utility_and_safety,
)

from sstmerge.adapters import CoreSpace
from sstmerge.errors import InputError
from sstmerge.fisher import Fisher, collect_fisher, installed_taps
from sstmerge.fisher.batch import Batch
from sstmerge.gevp import solve
from sstmerge.merging import Rule, Selection, merge_cores, merge_experts
from sstmerge.merging.stability import split_half_stability
from sstmerge.pipeline.evaluate import measured_kl
from sstmerge.pipeline.merge import finish
from sstmerge.pipeline.roles import roles_in

STRUCTURES = ("diagonal", "kfac", "ekfac", "block", "global")


@pytest.fixture(scope="module")
def model(pico_gpt2):
    return pico_gpt2().double()


@pytest.fixture(scope="module")
def space(model):
    return CoreSpace.of(utility_and_safety(model))


@pytest.fixture(scope="module")
def spectra(model, space):
    return {structure: solve(*gain_and_cost(model, space, structure)) for structure in STRUCTURES}


def points(spectrum):
    return spectrum.space.core(UTILITY), spectrum.space.core(SAFETY)


# ---- invariance of the whole merge ------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_merge_depends_neither_on_the_gauge_nor_on_the_order(model, space, spectra, structure):
    def merged(adapters):
        own = CoreSpace.of(adapters)
        spectrum = solve(*gain_and_cost(model, own, structure))
        return dense_deltas(
            own, merge_cores(spectrum, *points(spectrum), rule=Rule.PROJECT, selection=Selection(top=4)).core
        )

    adapters = utility_and_safety(model)
    expected = merged(adapters)
    other = merged([regauged(a, 1e3, seed=i) for i, a in enumerate(adapters)][::-1])
    assert set(other) == set(expected)
    for path, delta in expected.items():
        assert float((other[path] - delta).norm()) < 1e-5 * max(float(delta.norm()), 1e-3)


# ---- predicted against measured KL -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact_cost(model, space):
    """F_cost with the exact expectation over labels, and the benign batch it belongs to."""
    batch = random_batch([5, 7, 6], response=1, seed=5)
    prompts = [batch.input_ids[i, : int(batch.attention_mask[i].sum()) - 1] for i in range(3)]
    labelled = enumerated_labels(model, space, space.core(UTILITY), prompts)
    return batch, {
        s: collect_fisher(model, labelled, space, structure=s, reference=UTILITY) for s in ("global", "block")
    }


def measure(model, space, batch, change):
    """Return the measured KL, averaged over both signs of the change: the cubic term of the KL cancels."""
    utility = space.core(UTILITY)

    def at(core):
        return lambda: installed_taps(model, space, core)

    return sum(measured_kl(model, [batch], at(utility), at(utility + s * change)) for s in (1, -1)) / 2


@pytest.mark.parametrize("structure", ["global", "block"])
def test_predicted_kl_is_the_measured_kl_of_small_changes(model, space, exact_cost, structure):
    batch, fishers = exact_cost
    change = space.core(SAFETY)
    if structure == "block":  # terms between layers are not in it, so change one layer
        layer = torch.zeros_like(change)
        layer[: space.groups[0].core_shape[1] * space.groups[0].core_shape[2]] = 1.0
        change = change * layer
    deviations = []
    for target in (1e-1, 1e-2, 1e-3):  # nats; measured_kl works in float32
        scale = (target / (0.5 * fishers[structure].quadratic(change))) ** 0.5
        deviations.append(abs(measure(model, space, batch, scale * change) / target - 1))
    assert deviations[2] < 0.01
    assert deviations[2] < deviations[1] / 3 < deviations[0] / 6


@pytest.mark.parametrize(("rule", "choice"), [(Rule.PROJECT, {"top": 8}), (Rule.WIENER, {}), (Rule.JOINT, {})])
def test_a_budget_is_what_the_model_then_shows(model, space, exact_cost, rule, choice):
    batch, fishers = exact_cost
    spectrum = solve(collect_fisher(model, [HARM], space, structure="global", reference=UTILITY), fishers["global"])
    errors = []
    for budget in (1e-4, 1e-5):
        selection = Selection(budget=budget, **choice)
        merged = merge_cores(spectrum, *points(spectrum), rule=rule, selection=selection)
        measured = measure(model, space, batch, merged.core - space.core(UTILITY))
        errors.append(abs(measured / merged.report.predicted_kl - 1))
        assert merged.report.predicted_kl == pytest.approx(budget, rel=1e-5)
    assert errors[1] < 0.1
    assert errors[1] < errors[0]


# ---- many experts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Rule.PROJECT, Rule.WIENER])
@pytest.mark.parametrize("structure", ["kfac", "global"])
def test_two_experts_are_two_filters(spectra, rule, structure):
    first, second = spectra[structure].gain, spectra[structure].gain.half(0)
    utility, safety = points(spectra[structure])
    selection = Selection(top=5) if rule is Rule.PROJECT else Selection(mu=0.3)
    merged, reports = merge_experts(
        {"x": first, "y": second}, {"x": utility, "y": safety}, rule=rule, selection=selection, scales={"y": 0.5}
    )
    expected = torch.zeros_like(merged)
    for gain, cost, core, scale in ((first, second, utility, 1.0), (second, first, safety, 0.5)):
        spectrum = solve(gain, cost)
        if rule is Rule.PROJECT:
            order = spectrum.eigenvalues.argsort(descending=True, stable=True)[:5]
            weights = torch.zeros_like(spectrum.eigenvalues).index_fill(0, order, 1.0)
        else:
            weights = spectrum.eigenvalues / (spectrum.eigenvalues + 0.3)
        expected += scale * spectrum.combine(weights * spectrum.coordinates(core))
    assert relative_error(merged, expected) < 1e-10
    assert reports["y"].scale == 0.5


@pytest.mark.parametrize("names", ["xyz", "vwxyz"])
def test_experts_cost_the_mean_of_the_others(model, space, spectra, names):
    utility, safety = points(spectra["block"])
    rows_each = 39 // len(names)
    parts = {n: rows(HARM, slice(i * rows_each, (i + 1) * rows_each)) for i, n in enumerate(names)}
    fishers = {n: collect_fisher(model, [part], space, structure="block") for n, part in parts.items()}
    experts = {n: utility - i * safety for i, n in enumerate(names)}
    merged, _ = merge_experts(fishers, experts, rule=Rule.WIENER, selection=Selection(mu=1.0))
    expected = torch.zeros_like(merged)
    for name, core in experts.items():
        others = [part for n, part in parts.items() if n != name]
        cost = collect_fisher(model, others, space, structure="block")
        spectrum = solve(fishers[name], cost)
        expected += spectrum.apply_filter(core, spectrum.eigenvalues / (spectrum.eigenvalues + 1.0))
    assert relative_error(merged, expected) < 1e-4
    # An expert of longer responses, or of more of them, costs the others no more.
    longer, _ = merge_experts(
        fishers | {"x": fishers["x"].weighted(20.0)}, experts, rule=Rule.WIENER, selection=Selection(mu=1.0)
    )
    assert relative_error(longer, merged) < 1e-5


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_weighted_fisher_is_the_same_and_counts_more(spectra, space, structure):
    one, other = spectra[structure].gain, spectra[structure].cost
    other = replace(other, metadata=one.metadata)
    heavier, change = one.weighted(9.0), space.core(SAFETY)
    assert heavier.quadratic(change) == pytest.approx(one.quadratic(change), rel=1e-6)
    assert heavier.effective_sequences == pytest.approx(one.effective_sequences)
    total = heavier + other
    assert total.tokens == pytest.approx(9 * one.tokens + other.tokens)
    if structure not in ("kfac", "ekfac"):  # factors are added one by one
        expected = (9 * one.tokens * one.quadratic(change) + other.tokens * other.quadratic(change)) / total.tokens
        assert total.quadratic(change) == pytest.approx(expected, rel=1e-5)


def test_two_experts_with_fishers_at_their_own_are_merged_as_by_fisher_merging(model, space, spectra):
    utility, safety = points(spectra["diagonal"])
    parts = {UTILITY: rows(HARM, slice(0, 13)), SAFETY: rows(HARM, slice(13, 26))}
    own = {n: collect_fisher(model, [part], space, structure="diagonal", reference=n) for n, part in parts.items()}
    merged, _ = merge_experts(own, {UTILITY: utility, SAFETY: safety}, damping=1e-14)
    first, second = (own[name].diagonal() for name in parts)
    fisher_merging = (first * utility + second * safety) / (first + second)
    assert relative_error(merged, fisher_merging) < 1e-6
    swapped = {UTILITY: own[SAFETY], SAFETY: own[UTILITY]}
    with pytest.raises(InputError, match=f"that of '{UTILITY}' at '{SAFETY}'"):
        merge_experts(swapped, {UTILITY: utility, SAFETY: safety})
    renamed, _ = merge_experts({"x": own[UTILITY], "y": own[SAFETY]}, {"x": utility, "y": safety}, damping=1e-14)
    assert torch.equal(renamed, merged)


def test_experts_that_do_not_match(spectra):
    fisher = spectra["kfac"].gain
    utility, safety = points(spectra["kfac"])
    with pytest.raises(InputError, match="not by 'joint'"):
        merge_experts({"x": fisher, "y": fisher}, {"x": utility, "y": safety}, rule=Rule.JOINT)
    with pytest.raises(InputError, match=r"Fishers for \['x'\] and experts \['x', 'y'\]"):
        merge_experts({"x": fisher}, {"x": utility, "y": safety})
    with pytest.raises(InputError, match=r"\['z'\], which are no experts"):
        merge_experts({"x": fisher, "y": fisher}, {"x": utility, "y": safety}, scales={"z": 1.0})


# ---- stability -------------------------------------------------------------------------------------------------------


def twice(batch):
    """Return every sequence with an even and an odd index."""
    both = rows(batch, [i for i in range(len(batch.index)) for _ in (0, 1)])
    return Batch(both.input_ids, both.attention_mask, both.loss_mask, torch.arange(len(both.index)), both.weight)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "block", "global"])
def test_equal_halves_are_perfectly_stable(model, space, structure):
    gain, cost = (collect_fisher(model, [twice(b)], space, structure=structure) for b in (HARM, BENIGN))
    stability = split_half_stability(solve(gain, cost), space.core(SAFETY), kept=4)
    assert stability.directions == 4
    assert stability.subspace_overlap == pytest.approx(1.0, abs=1e-6)
    assert stability.held_out_gain == pytest.approx(stability.in_sample_gain, rel=1e-6)
    assert stability.held_out_kl == pytest.approx(stability.in_sample_kl, rel=1e-6)
    assert stability.chance_overlap == pytest.approx(4 / space.size)
    assert stability.to_dict()["directions"] == 4


@pytest.mark.parametrize("structure", ["block", "global"])
def test_random_scores_are_as_unstable_as_chance(space, spectra, structure):
    generator = torch.Generator().manual_seed(0)

    def noise(fisher, count):
        scores = torch.randn(2, count, space.size, generator=generator, dtype=torch.float64)
        statistics = dict(fisher.statistics)
        if structure == "global":
            statistics["scores"] = scores.flatten(0, 1).float()
            statistics["score_half"] = torch.arange(2).repeat_interleave(count).to(torch.int8)
        else:
            parts = space.split(scores)
            for i, part in enumerate(parts):
                flat = part.flatten(-2)
                statistics[f"outer_sum.{i}"] = torch.einsum("hnla,hnlb->hlab", flat, flat).float()
        return Fisher(fisher.structure, space, statistics, fisher.counts, fisher.metadata)

    found = []
    for _ in range(6):
        gain, cost = noise(spectra[structure].gain, 12), noise(spectra[structure].cost, 400)
        found.append(split_half_stability(solve(gain, cost), space.core(SAFETY), kept=4))
    overlap = sum(stability.subspace_overlap for stability in found) / len(found)
    assert 0.3 < overlap / found[0].chance_overlap < 3.0
    assert all(stability.held_out_gain < stability.in_sample_gain for stability in found)


@pytest.mark.parametrize("structure", ["kfac", "block"])
def test_a_filter_is_judged_by_the_steps_of_its_halves(spectra, space, structure):
    whole, safety = spectra[structure], space.core(SAFETY)
    selection = Selection(mu=3.0 * float(whole.eigenvalues.max()), exponent=2.0)
    stability = split_half_stability(whole, safety, kept=space.size, mu=selection.mu, exponent=2.0, scale=7.0)
    weights = (whole.eigenvalues / (whole.eigenvalues + selection.mu)).square()
    assert stability.directions == min(64, int((weights > 0.5 * weights.max()).sum()))
    held_out_kl, held_out_gain = [], []
    for h in (0, 1):
        half = solve(whole.gain.half(h), whole.cost.half(h), damping=whole.damping)
        merged = merge_cores(half, space.zero(), safety, rule=Rule.WIENER, scale=7.0, selection=selection)
        held_out_kl.append(0.5 * whole.cost.half(1 - h).quadratic(merged.core))
        gain = whole.gain.half(1 - h)
        held_out_gain.append(gain.quadratic(merged.core) / 49 / gain.quadratic(safety))
    assert stability.held_out_kl == pytest.approx(sum(held_out_kl) / 2, rel=1e-9)
    assert stability.held_out_gain == pytest.approx(sum(held_out_gain) / 2, rel=1e-9)


@pytest.mark.parametrize("rule", [Rule.PROJECT, Rule.JOINT])
def test_halves_are_judged_by_the_whole_step_of_the_merge(spectra, space, rule, monkeypatch):
    """With more directions than are compared as subspaces, and at the merge's scale: what each half alone would merge."""
    whole, roles = spectra["kfac"], roles_in(space, [UTILITY], SAFETY, None)
    selection = Selection(fraction=0.6, mu=None if rule is Rule.PROJECT else 2.0)
    options = {"rule": rule, "scale": 3.0, "selection": selection}
    merged = merge_cores(whole, roles.utility, roles.safety, **options)
    monkeypatch.setattr("sstmerge.merging.stability._COMPARED", 8)
    stability = finish(roles, merged, whole).stability
    on_the_other, on_its_own = [], []
    for h in (0, 1):
        half = solve(whole.gain.half(h), whole.cost.half(h), damping=whole.damping)
        step = merge_cores(half, roles.utility, roles.safety, **options).core - roles.utility
        on_the_other.append(0.5 * whole.cost.half(1 - h).quadratic(step))
        on_its_own.append(0.5 * whole.cost.half(h).quadratic(step))
    assert stability.directions <= 8 < merged.kept.count_nonzero()
    assert stability.held_out_kl == pytest.approx(sum(on_the_other) / 2, rel=1e-9)
    assert stability.in_sample_kl == pytest.approx(sum(on_its_own) / 2, rel=1e-9)


def test_the_kl_of_a_half_s_step_is_measured_on_the_other(spectra, space):
    """By hand, for one direction: the step is v (vᵀ F_cost φ) of one half, its KL ½ stepᵀ F step of the other."""
    whole = spectra["block"]
    stability = split_half_stability(whole, space.core(SAFETY), kept=1)
    own, other = [], []
    for h in (0, 1):
        half = solve(whole.gain.half(h), whole.cost.half(h), damping=whole.damping)
        best = torch.zeros_like(half.eigenvalues)
        best[int(half.eigenvalues.argmax())] = 1.0
        step = half.combine(best * half.coordinates(space.core(SAFETY)))
        own.append(0.5 * whole.cost.half(h).quadratic(step))
        other.append(0.5 * whole.cost.half(1 - h).quadratic(step))
    assert stability.in_sample_kl == pytest.approx(sum(own) / 2, rel=1e-9)
    assert stability.held_out_kl == pytest.approx(sum(other) / 2, rel=1e-9)
    assert stability.held_out_kl > stability.in_sample_kl


def test_halves_of_refit_are_judged_by_the_projection_that_it_starts_from(spectra, space):
    whole, roles = spectra["kfac"], roles_in(space, [UTILITY], SAFETY, None)
    projected = merge_cores(whole, roles.utility, roles.safety)
    refitted = replace(projected, report=replace(projected.report, rule=Rule.REFIT.value, mu=1.0))
    assert finish(roles, refitted, whole).stability == finish(roles, projected, whole).stability


def test_a_rank_limit_says_what_it_cuts_off(spectra, space):
    whole, roles = spectra["kfac"], roles_in(space, [UTILITY], SAFETY, None)
    merged = merge_cores(whole, roles.utility, roles.safety)
    limited, free = (finish(roles, merged, whole, rank=rank) for rank in (2, None))
    written, kept = (adapter_deltas(result.adapter) for result in (limited, free))
    lost = sum(float((kept[path] - written[path]).square().sum()) for path in kept) ** 0.5
    share = lost / float(merged.core.norm())
    (sentence,) = set(limited.merge.report.warnings) - set(free.merge.report.warnings)
    assert f"cuts off {share:.1%} of the merged adapter's norm" in sentence


def test_halves_are_damped_as_the_whole_is(spectra, space):
    pair = spectra["global"].gain, spectra["global"].cost
    plain, kronecker = (solve(*pair, damping_metric=metric) for metric in ("identity", "kronecker"))
    stability = split_half_stability(kronecker, space.core(SAFETY), kept=4)
    own = []
    for h in (0, 1):
        half = solve(*(fisher.half(h) for fisher in pair), damping=kronecker.damping, damping_metric="kronecker")
        step = merge_cores(half, space.zero(), space.core(SAFETY), selection=Selection(top=4)).core
        own.append(0.5 * pair[1].half(h).quadratic(step))
    assert stability.in_sample_kl == pytest.approx(sum(own) / 2, rel=1e-9)
    assert stability != split_half_stability(plain, space.core(SAFETY), kept=4)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "block", "global"])
def test_a_gain_of_zero_is_reported_and_breaks_nothing(spectra, space, structure):
    gain, roles = spectra[structure].gain, roles_in(space, [UTILITY], SAFETY, None)
    nothing = {n: t if n == "score_half" or "count" in n else 0 * t for n, t in gain.statistics.items()}
    spectrum = solve(replace(gain, statistics=nothing), spectra[structure].cost)
    merged = merge_cores(spectrum, roles.utility, roles.safety, rule=Rule.WIENER, selection=Selection(mu=1.0))
    result = finish(roles, merged, spectrum)
    assert any("gain is zero in every direction" in sentence for sentence in result.merge.report.warnings)
    assert (result.stability is None) if structure == "global" else (result.stability.held_out_kl == 0.0)
