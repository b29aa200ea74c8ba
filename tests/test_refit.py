"""The rule `refit`: likelier refusals within the measured KL, from wherever it starts."""

from __future__ import annotations

import pytest
from builders import BENIGN, HARM, SAFETY, UTILITY, gain_and_cost, utility_and_safety

from sstmerge.adapters import CoreSpace
from sstmerge.fisher import installed_taps
from sstmerge.gevp import solve
from sstmerge.merging import Selection, merge_cores
from sstmerge.pipeline.evaluate import mean_log_likelihood, measured_kl
from sstmerge.pipeline.refit import RefitOptions, _Divergence, refit_cores


@pytest.fixture(scope="module", params=["kfac", "global"])
def job(request, pico_gpt2):
    """A model, the spectrum at its utility model, and what a point of the space costs and reaches there."""
    model = pico_gpt2().double()
    space = CoreSpace.of(utility_and_safety(model))
    utility, safety = space.core(UTILITY), space.core(SAFETY)

    def cost(core):
        return measured_kl(
            model, [BENIGN], lambda: installed_taps(model, space, utility), lambda: installed_taps(model, space, core)
        )

    def reached(core):
        with installed_taps(model, space, core):
            return mean_log_likelihood(model, [HARM])

    spectrum = solve(*gain_and_cost(model, space, request.param))

    def refit(scale, selection=Selection(), **options):  # noqa: B008 (frozen)
        return refit_cores(
            model,
            spectrum,
            utility,
            safety,
            [HARM],
            [BENIGN],
            scale=scale,
            selection=selection,
            options=RefitOptions(**options),
        )

    return spectrum, utility, safety, cost, reached, refit


# At a hundredth of the adapter the gradient asks for steps of many times its length.
@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0])
def test_refusals_become_likelier_at_the_same_measured_kl(job, scale):
    spectrum, utility, safety, cost, reached, refit = job
    start = merge_cores(spectrum, utility, safety, scale=scale).core
    merged = refit(scale)
    assert not any("No refit step" in warning for warning in merged.report.warnings)
    assert reached(merged.core) > reached(start)
    assert 0 < cost(merged.core) <= 1.0011 * cost(start)


def test_a_larger_limit_is_used(job):
    spectrum, utility, safety, cost, reached, refit = job
    start = merge_cores(spectrum, utility, safety, scale=0.1).core
    limit = 4 * cost(start)
    merged = refit(0.1, kl_limit=limit, steps=6)
    assert cost(start) < cost(merged.core) <= 1.0011 * limit
    assert reached(merged.core) > reached(refit(0.1, steps=6).core)


def test_only_the_selected_directions_change(job):
    """The coordinates of the start are zero elsewhere but for rounding, which is no choice."""
    spectrum, utility, safety, _, _, refit = job
    few = Selection(top=3)
    start = merge_cores(spectrum, utility, safety, scale=0.3, selection=few)
    merged = refit(0.3, few)
    before, after = (spectrum.coordinates(core - utility) for core in (start.core, merged.core))
    assert int(start.kept.count_nonzero()) == 3
    assert merged.kept.equal(start.kept)
    assert (after - before)[start.kept].norm() > 1e-3 * before.norm()
    assert after[~start.kept].abs().max() < 1e-9 * after.norm()


def test_the_divergence_of_kept_hidden_states_is_the_measured_kl(pico_gpt2):
    model = pico_gpt2().double()
    space = CoreSpace.of(utility_and_safety(model))
    utility, safety = space.core(UTILITY), space.core(SAFETY)
    divergence = _Divergence(model, space, utility, [BENIGN, HARM])
    for core in (utility, utility + safety, safety):
        expected = measured_kl(
            model,
            [BENIGN, HARM],
            lambda: installed_taps(model, space, utility),
            lambda core=core: installed_taps(model, space, core),
        )
        assert divergence(core) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_where_nothing_is_kept_nothing_is_learned(job):
    _, utility, _, _, _, refit = job
    merged = refit(0.0)
    assert any("No refit step" in warning for warning in merged.report.warnings)
    assert merged.core.equal(utility)
