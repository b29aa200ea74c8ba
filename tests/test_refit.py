"""The rule `refit`: likelier refusals within the measured KL, from wherever it starts."""

from __future__ import annotations

import pytest
from builders import BENIGN, HARM, SAFETY, UTILITY, gain_and_cost, utility_and_safety

from sstmerge.adapters import CoreSpace
from sstmerge.fisher import installed_taps
from sstmerge.gevp import solve
from sstmerge.merging import merge_cores
from sstmerge.pipeline.evaluate import mean_log_likelihood, measured_kl
from sstmerge.pipeline.refit import RefitOptions, refit_cores


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

    def refit(scale, **options):
        return refit_cores(
            model, spectrum, utility, safety, [HARM], [BENIGN], scale=scale, options=RefitOptions(**options)
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


def test_where_nothing_is_kept_nothing_is_learned(job):
    _, utility, _, _, _, refit = job
    merged = refit(0.0)
    assert any("No refit step" in warning for warning in merged.report.warnings)
    assert merged.core.equal(utility)
