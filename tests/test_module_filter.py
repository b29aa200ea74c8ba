"""Subspaces of the core space, and the module filter that chooses one on a pilot."""

from __future__ import annotations

import pytest
import torch
from builders import gain_and_cost, random_batch, utility_and_safety

from sstmerge.adapters import CoreSpace
from sstmerge.errors import FisherError, InputError
from sstmerge.fisher import collect_fisher
from sstmerge.merging import module_filter


@pytest.fixture
def pilot(pico_gpt2):
    model = pico_gpt2().double()
    space = CoreSpace.of(utility_and_safety(model))
    return model, space, gain_and_cost(model, space, "diagonal")


def all_columns(space):
    outputs = {n: torch.arange(g.core_shape[1]) for g in space.groups for n in g.names}
    inputs = {n: torch.arange(g.core_shape[2]) for g in space.groups for n in g.names}
    return outputs, inputs


def test_restricting_to_everything_changes_nothing(pilot):
    _, space, _ = pilot
    same = space.restrict(*all_columns(space))
    torch.testing.assert_close(same.core("safety"), space.core("safety"))
    torch.testing.assert_close(space.embed(same.core("safety"), same), space.core("safety"), atol=1e-6, rtol=1e-5)


def test_embedding_is_the_adjoint_of_projecting(pilot):
    _, space, pair = pilot
    part = module_filter(*pair, modules=0.5, dimensions=0.5).space
    assert part.size < space.size / 4
    inside, whole = torch.randn(part.size).double(), torch.randn(space.size).double()
    left = float(space.embed(inside, part) @ whole)
    right = float(inside @ part.embed(whole, space))
    assert left == pytest.approx(right, rel=1e-5)
    torch.testing.assert_close(part.embed(space.embed(inside, part), space), inside, atol=1e-5, rtol=1e-5)


def test_the_best_modules_by_trace_ratio_are_kept(pilot):
    _, space, (gain, cost) = pilot
    chosen = module_filter(gain, cost, modules=0.25)
    gains, costs = space.layer_sums(gain.diagonal()), space.layer_sums(cost.diagonal())
    ratio = gains / (costs + 0.01 * costs.mean())
    count = -(-len(ratio) // 4)
    expected = [space.layer_names[i] for i in ratio.argsort(descending=True)[:count].tolist()]
    assert list(chosen.layers) == expected
    assert set(chosen.space.layer_names) == set(expected)
    kept = sum(float(gains[space.layer_names.index(n)]) for n in expected)
    assert chosen.dropped_gain == pytest.approx(1 - kept / float(gains.sum()))
    assert 0 < chosen.dropped_lambda < 1
    assert f"kept {count} of {len(ratio)} modules" in chosen.sentence()


def test_keeping_all_drops_nothing(pilot):
    _, space, pair = pilot
    chosen = module_filter(*pair, modules=1.0)
    assert chosen.space.size == space.size
    assert chosen.dropped_gain == pytest.approx(0, abs=1e-12)
    assert chosen.dropped_lambda == pytest.approx(0, abs=1e-12)


def test_a_fisher_of_a_part_is_the_part_of_the_fisher(pilot):
    """With the reference in the whole space, the scores of a part are projections of the whole scores."""
    model, space, pair = pilot
    part = module_filter(*pair, modules=0.5, dimensions=0.5).space
    batches = [random_batch([9, 12, 7], seed=3)]
    whole = collect_fisher(model, batches, space, structure="global", reference="utility+safety")
    some = collect_fisher(model, batches, part, structure="global", reference="utility+safety", reference_space=space)
    projected = torch.stack([part.embed(row.double(), space) for row in whole.statistics["scores"]])
    torch.testing.assert_close(some.statistics["scores"].double(), projected, atol=1e-4, rtol=1e-4)


def test_bad_shares_and_structures_are_refused(pilot):
    model, space, (gain, cost) = pilot
    with pytest.raises(InputError, match="modules must lie in"):
        module_filter(gain, cost, modules=0.0)
    with pytest.raises(InputError, match="dimensions must lie in"):
        module_filter(gain, cost, modules=0.5, dimensions=1.5)
    with pytest.raises(FisherError, match="takes 'diagonal' pilots"):
        module_filter(*gain_and_cost(model, space, "kfac"), modules=0.5)
