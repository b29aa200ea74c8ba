"""Spectra against dense generalized eigenproblems solved by scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from builders import GPT2_TARGETS, dense_fisher, layer_slices, random_adapter, random_batch, relative_error

from sstmerge.adapters import CoreSpace
from sstmerge.errors import FisherError, InputError, SolverError
from sstmerge.fisher import Fisher, Structure, collect_fisher
from sstmerge.fisher.batch import Batch
from sstmerge.fisher.fisher import Counts
from sstmerge.gevp import DEFAULT_DAMPING, solve

STRUCTURES = ("diagonal", "kfac", "ekfac", "block", "global")
HARM, BENIGN = random_batch([7] * 10, seed=1), random_batch([6] * 12, seed=2)


@pytest.fixture(scope="module")
def model(pico_gpt2):
    return pico_gpt2().double()


@pytest.fixture(scope="module")
def space(model):
    a = random_adapter(model, "a", targets=GPT2_TARGETS, seed=1)
    return CoreSpace.of([a, random_adapter(model, "b", targets=("c_attn",), rank=1, seed=2)])


@pytest.fixture(scope="module")
def pairs(model, space):
    """Return F_gain and F_cost of every structure."""

    def collect(structure, **options):
        return (
            collect_fisher(model, [HARM], space, structure=structure, reference="a", **options),
            collect_fisher(model, [BENIGN], space, structure=structure, reference="a", labels="sampled", **options),
        )

    found = {s: collect(s) for s in STRUCTURES if s != "ekfac"}
    found["ekfac"] = collect("ekfac", basis=solve(*found["kfac"]).basis)
    return found


def damped_cost(cost: Fisher, damping: float, metric: str = "identity") -> torch.Tensor:
    """Return the dense F_cost with its damping, written from the definition."""
    space, dense = cost.space, dense_fisher(cost)
    if cost.structure == "global":
        K = kronecker_metric(cost) if metric == "kronecker" else torch.eye(space.size, dtype=torch.float64)
        return dense + damping * float(torch.linalg.solve(K, dense).trace()) / len(cost.scores()) * K
    for i, group in enumerate(space.groups):
        for j, path in enumerate(group.names):
            where = layer_slices(space)[path]
            if cost.structure == "kfac":
                X, D = (m[j] for m in cost.kronecker_factors()[i])
                shifted = [m + damping**0.5 * m.diagonal().mean() * torch.eye(len(m)) for m in (X, D)]
                dense[where, where] = torch.kron(shifted[1], shifted[0])
            elif cost.structure == "ekfac":
                basis = cost.kronecker_basis()
                measured = cost.diagonal()[where]
                inverse = torch.kron(torch.linalg.inv(basis.Q[i][j]), torch.linalg.inv(basis.P[i][j]))
                dense[where, where] = inverse.mT @ torch.diag(measured + damping * measured.mean()) @ inverse
            else:
                block = dense[where, where]
                dense[where, where] = block + damping * block.diagonal().mean() * torch.eye(len(block))
    return dense


def kronecker_metric(cost: Fisher) -> torch.Tensor:
    """Return the dense metric of the damping of `global`, written from its definition."""
    space = cost.space
    factors, means = {}, {}
    for path, where in layer_slices(space).items():
        shape = next(group.core_shape[1:] for group in space.groups if path in group.names)
        scores = cost.scores()[:, where].double().view(-1, *shape)
        left, right = torch.einsum("nij,nkj->ik", scores, scores), torch.einsum("nji,njk->ik", scores, scores)
        means[path] = float(left.trace()) / (shape[0] * shape[1])
        normalised = [m / m.diagonal().mean() for m in (left, right)]
        factors[path] = [(m + 0.1 * torch.eye(len(m))) / 1.1 for m in normalised]
    dense = torch.zeros(space.size, space.size, dtype=torch.float64)
    for path, where in layer_slices(space).items():
        mean = max(means[path], 0.01 * sum(means.values()) / len(means))
        dense[where, where] = mean * torch.kron(*factors[path])
    return dense


def vectors_of(spectrum):
    """Return all eigenvectors as columns, (D, m)."""
    unit = torch.eye(len(spectrum.eigenvalues), dtype=torch.float64)
    return torch.stack([spectrum.combine(row) for row in unit], dim=1)


CASES = [(s, d, "identity") for s in STRUCTURES for d in (1e-3, 0.3)] + [
    ("global", d, "kronecker") for d in (1e-3, 0.3)
]


@pytest.fixture(params=CASES, ids=lambda p: f"{p[0]}-{p[1]}-{p[2]}")
def solved(request, pairs):
    """Return (spectrum, dense F_gain, dense damped F_cost)."""
    structure, damping, metric = request.param
    gain, cost = pairs[structure]
    spectrum = solve(gain, cost, damping=damping, damping_metric=metric)
    return spectrum, dense_fisher(gain), damped_cost(cost, damping, metric)


def test_eigenvalues_are_those_of_scipy(solved):
    spectrum, F_gain, F_cost = solved
    expected = scipy.linalg.eigh(F_gain.numpy(), F_cost.numpy(), eigvals_only=True)
    mine = np.zeros_like(expected)
    mine[len(mine) - len(spectrum.eigenvalues) :] = spectrum.eigenvalues.sort().values.numpy()
    assert np.abs(mine - expected).max() < 1e-6 * expected.max()
    assert spectrum.complete == (spectrum.gain.structure != "global")


def test_residuals_and_normalisation(solved):
    spectrum, F_gain, F_cost = solved
    V = vectors_of(spectrum)
    assert relative_error(V.mT @ F_cost @ V, torch.eye(V.shape[1])) < 1e-5
    residual = F_gain @ V - F_cost @ V * spectrum.eigenvalues
    assert float(residual.abs().max()) < 1e-5 * float((F_gain @ V).abs().max())


def test_coordinates_combine_and_pull_back(solved):
    spectrum, _, F_cost = solved
    V = vectors_of(spectrum)
    vector, gradient = torch.randn(2, spectrum.space.size, generator=torch.Generator().manual_seed(0)).double()
    assert relative_error(spectrum.coordinates(vector), V.mT @ F_cost @ vector) < 1e-5
    assert relative_error(spectrum.pull_back(gradient), V.mT @ gradient) < 1e-6
    coordinates = torch.randn(V.shape[1], generator=torch.Generator().manual_seed(1)).double()
    assert relative_error(spectrum.coordinates(spectrum.combine(coordinates)), coordinates) < 1e-5
    if spectrum.complete:
        assert relative_error(spectrum.combine(spectrum.coordinates(vector)), vector) < 1e-7


def test_filter_is_the_dense_filter(solved):
    spectrum, _, F_cost = solved
    V = vectors_of(spectrum)
    phi = spectrum.space.core("b")
    weights = torch.rand(V.shape[1], generator=torch.Generator().manual_seed(2)).double()
    coordinates = V.mT @ F_cost @ phi
    assert relative_error(spectrum.apply_filter(phi, weights), V @ (weights * coordinates)) < 1e-5
    if not spectrum.complete:  # what lies in no direction is kept by rest
        expected = phi + V @ ((weights - 1) * coordinates)
        assert relative_error(spectrum.apply_filter(phi, weights, rest=1.0), expected) < 1e-5


def test_gain_and_cost_are_sums_over_coordinates(solved):
    spectrum, F_gain, F_cost = solved
    coordinates = spectrum.coordinates(spectrum.space.core("b"))
    change = spectrum.combine(coordinates)
    assert float(coordinates.square().sum()) == pytest.approx(float(change @ F_cost @ change), rel=1e-5)
    energy = float((spectrum.eigenvalues * coordinates.square()).sum())
    assert energy == pytest.approx(float(change @ F_gain @ change), rel=1e-4)
    assert energy == pytest.approx(spectrum.gain.quadratic(change), rel=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_quadratic_form_is_dense(pairs, structure):
    gain, _ = pairs[structure]
    vector = gain.space.core("a") - 2 * gain.space.core("b")
    assert gain.quadratic(vector) == pytest.approx(float(vector @ dense_fisher(gain) @ vector), rel=1e-5)


# ---- structure of its own --------------------------------------------------------------------------------------------


def kronecker_fisher(space, seed):
    """Return a K-FAC Fisher with random positive definite factors, one token and one position."""
    generator = torch.Generator().manual_seed(seed)
    statistics = {}
    for i, group in enumerate(space.groups):
        layers, r_out, r_in = group.core_shape
        for name, n in (("input_covariance", r_in), ("output_covariance", r_out)):
            root = torch.randn(layers, n, n + 2, generator=generator, dtype=torch.float64)
            statistics[f"{name}.{i}"] = torch.stack([root @ root.mT, torch.zeros(layers, n, n).double()])
        statistics[f"input_count.{i}"] = torch.tensor([1.0, 0.0]).double()[:, None].expand(2, layers).contiguous()
        statistics[f"score_sum.{i}"] = torch.zeros(2, *group.core_shape, dtype=torch.float64)
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return Fisher(Structure.KFAC, space, statistics, Counts(one, one, one, one), {})


def test_kronecker_pairs_are_solved_exactly(space):
    gain, cost = kronecker_fisher(space, 0), kronecker_fisher(space, 1)
    spectrum = solve(gain, cost, damping=0.0)
    F_gain, F_cost = dense_fisher(gain), dense_fisher(cost)
    for path, where in layer_slices(space).items():
        expected = scipy.linalg.eigh(F_gain[where, where], F_cost[where, where], eigvals_only=True)
        mine = spectrum.eigenvalues[where].sort().values
        np.testing.assert_allclose(mine, expected, rtol=1e-9, err_msg=path)
    V = vectors_of(spectrum)
    assert relative_error(V.mT @ F_cost @ V, torch.eye(space.size)) < 1e-10
    assert relative_error(V.mT @ F_gain @ V, torch.diag(spectrum.eigenvalues)) < 1e-10


@pytest.mark.parametrize("structure", STRUCTURES)
def test_equal_fishers_have_lambda_one_where_damping_is_small(pairs, structure):
    gain, _ = pairs[structure]
    eigenvalues = solve(gain, gain, damping=1e-6).eigenvalues
    assert float(eigenvalues.max()) == pytest.approx(1.0, abs=5e-3)
    assert float(eigenvalues.max()) <= 1.0


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "block", "global"])
def test_damping_is_relative(model, space, pairs, structure):
    """Weights of the data say how much each sequence counts; their common factor must not show."""
    gain, cost = pairs[structure]
    heavy = Batch(BENIGN.input_ids, BENIGN.attention_mask, BENIGN.loss_mask, BENIGN.index, 16 * BENIGN.weight)
    scaled = collect_fisher(model, [heavy], space, structure=structure, reference="a", labels="sampled")
    own = solve(gain, cost, damping=0.05).eigenvalues
    assert relative_error(solve(gain, scaled, damping=0.05).eigenvalues, own) < 1e-6
    statistics = {  # δ̃ three times as large, as if the loss were scaled
        n: t * (3.0 if n == "scores" else 1.0 if n.startswith(("input_", "score")) else 9.0)
        for n, t in cost.statistics.items()
    }
    larger = Fisher(cost.structure, cost.space, statistics, cost.counts, cost.metadata)
    assert relative_error(9 * solve(gain, larger, damping=0.05).eigenvalues, own) < 1e-6


@pytest.mark.parametrize("structure", STRUCTURES)
def test_default_damping_is_that_of_the_structure(pairs, structure):
    spectrum = solve(*pairs[structure])
    assert spectrum.damping == DEFAULT_DAMPING[spectrum.gain.structure]


def test_global_sees_layers_act_together(pairs):
    """The block spectrum is that of the block diagonal; the global one has terms between layers."""
    F_gain, F_cost = dense_fisher(pairs["global"][0]), dense_fisher(pairs["global"][1])
    slices = list(layer_slices(pairs["global"][0].space).values())
    assert float(F_cost[slices[0], slices[1]].abs().max()) > 1e-3 * float(F_cost.abs().max())
    block = dense_fisher(pairs["block"][0])
    for where in slices:
        assert relative_error(F_gain[where, where], block[where, where]) < 1e-5


# ---- what is refused -------------------------------------------------------------------------------------------------


def without_cost(cost, layer):
    """Return a Fisher whose benign data never reach one layer."""
    statistics = {name: tensor.clone() for name, tensor in cost.statistics.items()}
    for i, group in enumerate(cost.space.groups):
        for name, tensor in statistics.items():
            if name.endswith(f".{i}") and layer in group.names and not name.startswith(("kronecker", "input_count")):
                tensor[:, group.names.index(layer)] = 0.0
    return Fisher(cost.structure, cost.space, statistics, cost.counts, cost.metadata)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "block"])
def test_layer_without_cost_is_named(pairs, structure):
    gain, cost = pairs[structure]
    layer = "transformer.h.1.mlp.c_fc"
    with pytest.raises(SolverError, match=layer):
        solve(gain, without_cost(cost, layer))


@pytest.mark.parametrize("structure", ["kfac", "block"])
def test_singular_cost_without_damping_is_named(pairs, structure):
    gain, cost = pairs[structure]
    statistics = {name: tensor.clone() for name, tensor in cost.statistics.items()}
    name = "output_covariance.0" if structure == "kfac" else "outer_sum.0"
    statistics[name][:, 1, 0, :] = statistics[name][:, 1, :, 0] = 0.0
    singular = Fisher(cost.structure, cost.space, statistics, cost.counts, cost.metadata)
    layer = cost.space.groups[0].names[1]
    with pytest.raises(SolverError, match=f"(?s){layer}"):
        solve(gain, singular, damping=0.0)


def test_an_unknown_damping_metric(pairs):
    with pytest.raises(InputError, match="damping_metric must be one of"):
        solve(*pairs["global"], damping_metric="euclidean")
    with pytest.raises(InputError, match="is of 'global' alone, but the Fishers are 'kfac'"):
        solve(*pairs["kfac"], damping_metric="kronecker")


def test_layers_that_no_benign_score_reaches_are_not_free(pairs):
    gain, cost = pairs["global"]
    where = next(iter(layer_slices(cost.space).values()))
    scores = cost.statistics["scores"].clone()
    scores[:, where] = 0
    silent = Fisher(cost.structure, cost.space, dict(cost.statistics) | {"scores": scores}, cost.counts, cost.metadata)
    spectrum = solve(gain, silent, damping_metric="kronecker")
    assert bool(torch.isfinite(spectrum.eigenvalues).all())
    assert bool(torch.isfinite(vectors_of(spectrum)).all())


def test_global_without_damping_or_cost(pairs):
    gain, cost = pairs["global"]
    with pytest.raises(SolverError, match="damping > 0"):
        solve(gain, cost, damping=0.0)
    zero = dict(cost.statistics) | {"scores": 0 * cost.statistics["scores"]}
    with pytest.raises(SolverError, match="nonzero scores"):
        solve(gain, Fisher(cost.structure, cost.space, zero, cost.counts, cost.metadata))


def test_pairs_that_do_not_match(pairs, model):
    with pytest.raises(FisherError, match="'block' but the cost Fisher 'diagonal'"):
        solve(pairs["block"][0], pairs["diagonal"][1])
    other = CoreSpace.of([random_adapter(model, "a", targets=("c_fc",), seed=1)])
    with pytest.raises(FisherError, match="different adapters"):
        solve(pairs["diagonal"][0], collect_fisher(model, [BENIGN], other, structure="diagonal"))
    basis = solve(*reversed(pairs["kfac"])).basis
    elsewhere = collect_fisher(model, [BENIGN], pairs["kfac"][0].space, structure="ekfac", basis=basis)
    with pytest.raises(FisherError, match="different eigenbases"):
        solve(pairs["ekfac"][0], elsewhere)
    for damping in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="damping must be a finite number"):
            solve(*pairs["block"], damping=damping)
    gain, cost = pairs["block"]
    empty = Fisher(gain.structure, gain.space, gain.statistics, Counts.zero(), gain.metadata)
    with pytest.raises(FisherError, match="gain Fisher has seen no response token"):
        solve(empty, cost)
