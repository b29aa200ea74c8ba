"""Fisher merging, RegMean and Fisher-ratio masks, against dense NumPy transcriptions of their formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fisher_cases import SHAPES, TOKENS, Data, adapters, assert_equal, batches, deltas_of, dense, fisher, regauged

from sstmerge.adapters import CoreSpace
from sstmerge.errors import InputError, SolverError
from sstmerge.fisher import Fisher, Structure
from sstmerge.gevp import solve
from sstmerge.gevp.spectrum import DEFAULT_DAMPING
from sstmerge.merging.methods import statistical
from sstmerge.merging.methods.kronecker_solve import KroneckerSum, solve_kronecker_sum
from sstmerge.merging.methods.registry import Method
from sstmerge.merging.methods.statistics import FisherStatistics, GainAndCost, as_diagonal, core_diagonal

ROWS: dict[str, Method] = {method.name: method for method in statistical.METHODS}
NAMES = ("math", "code", "safe")
WEIGHTS = (0.2, 1.0, 0.7)
DATA = {name: Data.random(i, size=1.0 + i) for i, name in enumerate(NAMES)}
STRUCTURES = ("diagonal", "kfac", "ekfac", "block", "global")


def run(name, merged, statistics, **options):
    row = ROWS[name]
    return dense(row.function, merged, statistics, **row.resolve(options))


def fishers(space, structure, data=DATA):
    return FisherStatistics({name: fisher(space, data[name], structure) for name in data})


def own_bases(members, path):
    """Orthonormal bases of the stacked weight changes, from NumPy's SVD, without looking at the core space."""
    deltas = [deltas_of(adapter)[path] for adapter in members]

    def columns(matrix):
        left, values, _ = np.linalg.svd(matrix, full_matrices=False)
        return left[:, values > 1e-9 * values[0]]

    return columns(np.hstack(deltas)), columns(np.vstack(deltas).T)


def damped(matrix, damping):
    return matrix + damping * np.trace(matrix) / len(matrix) * np.eye(len(matrix))


def layer_fisher(structure, data, path, U, V, damping):
    """The damped dense matrix of a layer in the bases U, V; vec is row-major."""
    if structure == "kfac":
        x, delta = data.x[path] @ V, data.delta[path] @ U
        X, D = x.T @ x / TOKENS, delta.T @ delta / TOKENS
        return np.kron(damped(D, damping**0.5), damped(X, damping**0.5))
    scores = np.stack([(U.T @ G @ V).ravel() for G in data.gradients(path)])
    block = scores.T @ scores / TOKENS
    return damped(np.diag(np.diag(block)) if structure == "diagonal" else block, damping)


def dense_fisher_average(members, structure, weights, damping):
    """(Σ λ F)⁻¹ Σ λ F c per layer in coordinates of own bases, as a full weight change."""
    merged = {}
    for path in SHAPES:
        U, V = own_bases(members, path)
        total, weighted = 0.0, 0.0
        for weight, adapter in zip(weights, members, strict=True):
            F = weight * layer_fisher(structure, DATA[adapter.name], path, U, V, damping)
            total = total + F
            weighted = weighted + F @ (U.T @ deltas_of(adapter)[path] @ V).ravel()
        merged[path] = U @ np.linalg.solve(total, weighted).reshape(U.shape[1], V.shape[1]) @ V.T
    return merged


@pytest.mark.parametrize("structure", ["kfac", "block"])
@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_full_fisher_merging_equals_a_dense_transcription(structure, damping):
    members = adapters(missing={"code": "model.layers.1.q"})
    space = CoreSpace.of(members)
    result = run("fisher_full", batches(space, WEIGHTS), fishers(space, structure), normalize=False, damping=damping)
    assert_equal(result, dense_fisher_average(members, structure, WEIGHTS, damping))


def test_full_fisher_merging_of_diagonals_is_the_ratio_of_sums():
    space = CoreSpace.of(adapters())
    statistics = fishers(space, "diagonal")
    result = run("fisher_full", batches(space, WEIGHTS), statistics, normalize=False, damping=0.0)
    total, weighted = 0.0, 0.0
    for name, weight in zip(NAMES, WEIGHTS, strict=True):
        F = np.concatenate(
            [
                np.square(g.U[j].double().numpy().T @ DATA[name].gradients(path) @ g.V[j].double().numpy())
                .sum(0)
                .ravel()
                for g in space.groups
                for j, path in enumerate(g.names)
            ]
        )
        total, weighted = total + weight * F, weighted + weight * F * space.core(name).numpy()
    expected = {}
    for group, part in zip(space.groups, space.split(torch.from_numpy(weighted / total)), strict=True):
        for j, path in enumerate(group.names):
            expected[path] = (group.U[j].double() @ part[j] @ group.V[j].double().mT).numpy()
    assert_equal(result, expected)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("normalize", [True, False])
def test_diagonal_fisher_merging_equals_a_dense_transcription(structure, normalize):
    """max(F / ‖F‖, floor · rms) ∘ C over the sum, with the diagonal of the dense core matrix."""
    space = CoreSpace.of(adapters())
    statistics = fishers(space, structure)
    result = run("fisher_diagonal", batches(space, WEIGHTS), statistics, normalize=normalize, floor=0.5)
    total, weighted = 0.0, 0.0
    for name, weight in zip(NAMES, WEIGHTS, strict=True):
        F = dense_diagonal(statistics.fishers[name])
        norm = np.sqrt((F**2).sum())
        F = np.maximum(F, 0.5 * norm / np.sqrt(len(F))) / (norm if normalize else 1.0)
        total, weighted = total + weight * F, weighted + weight * F * space.core(name).numpy()
    expected = {}
    for group, part in zip(space.groups, space.split(torch.from_numpy(weighted / total)), strict=True):
        for j, path in enumerate(group.names):
            expected[path] = (group.U[j].double() @ part[j] @ group.V[j].double().mT).numpy()
    assert_equal(result, expected)


def dense_diagonal(value: Fisher) -> np.ndarray:
    """Diagonal of the quadratic form vᵀFv, entry by entry, from `Fisher.quadratic`."""
    return np.array([value.quadratic(row) for row in torch.eye(value.space.size).double()])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_core_diagonal_is_that_of_the_quadratic_form(structure):
    value = fisher(CoreSpace.of(adapters()), DATA["math"], structure)
    expected = dense_diagonal(value)
    np.testing.assert_allclose(core_diagonal(value).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(as_diagonal(value).diagonal().numpy(), expected, rtol=1e-5)


def dense_regmean(members, weights, *, off_diagonal, bases):
    merged = {}
    for path in SHAPES:
        _, V = bases(path)
        gram, weighted = 0.0, 0.0
        for weight, adapter in zip(weights, members, strict=True):
            x = DATA[adapter.name].x[path] @ V
            X = x.T @ x / len(x)
            X = weight * (off_diagonal * X + (1 - off_diagonal) * np.diag(np.diag(X)))
            gram, weighted = gram + X, weighted + deltas_of(adapter)[path] @ V @ X
        merged[path] = weighted @ np.linalg.inv(gram) @ V.T
    return merged


def space_bases(space):
    index = {path: (g, j) for g in space.groups for j, path in enumerate(g.names)}
    return lambda path: tuple(getattr(index[path][0], side)[index[path][1]].double().numpy() for side in "UV")


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_regmean_equals_a_dense_transcription(structure):
    members = adapters()
    space = CoreSpace.of(members)
    statistics = fishers(space, structure)
    plain = run("regmean", batches(space, WEIGHTS), statistics, off_diagonal=1.0)
    assert_equal(plain, dense_regmean(members, WEIGHTS, off_diagonal=1.0, bases=lambda p: own_bases(members, p)))
    shrunk = run("regmean", batches(space, WEIGHTS), statistics)
    assert_equal(shrunk, dense_regmean(members, WEIGHTS, off_diagonal=0.9, bases=space_bases(space)))


def test_regmean_is_the_published_one_where_the_adapters_span_the_inputs():
    """Ranks 2 + 3 + 2 = 7 = d_in: V is all of the input space, and nothing is restricted."""
    members = adapters()
    space = CoreSpace.of(members)
    result = run("regmean", batches(space, WEIGHTS), fishers(space, "kfac"), off_diagonal=1.0)
    path = "model.layers.0.q"
    gram, weighted = 0.0, 0.0
    for weight, adapter in zip(WEIGHTS, members, strict=True):
        X = weight * DATA[adapter.name].x[path].T @ DATA[adapter.name].x[path]
        gram, weighted = gram + X, weighted + X @ deltas_of(adapter)[path].T
    np.testing.assert_allclose(result[path], np.linalg.solve(gram, weighted).T, atol=1e-5)


def test_regmean_minimises_its_objective_within_the_span():
    members = adapters()
    space = CoreSpace.of(members)
    result = run("regmean", batches(space, WEIGHTS), fishers(space, "kfac"), off_diagonal=1.0)
    path = "model.layers.0.up"

    def objective(delta):
        changes = [(delta - deltas_of(a)[path]) @ DATA[a.name].x[path].T for a in members]
        return sum(w * np.square(c).sum() for w, c in zip(WEIGHTS, changes, strict=True))

    U, V = own_bases(members, path)
    best = objective(result[path])
    for seed in range(5):
        step = U @ np.random.default_rng(seed).normal(size=(U.shape[1], V.shape[1])) @ V.T
        assert objective(result[path] + 0.01 * step) > best
        assert objective(result[path] - 0.01 * step) > best


def test_experts_are_filtered_by_what_they_cost_the_others():
    """Σ_t w_t (F_t + μ (mean F_s + ε · mean diagonal · I))⁻¹ F_t c_t, dense, per layer."""
    members = adapters()
    space = CoreSpace.of(members)
    result = run("sst_experts", batches(space, WEIGHTS), fishers(space, "block"), mu=2.0)
    expected = {}
    for path in SHAPES:
        U, V = own_bases(members, path)
        matrices = {n: layer_fisher("block", DATA[n], path, U, V, 0.0) for n in NAMES}
        expected[path] = 0.0
        for adapter, weight in zip(members, WEIGHTS, strict=True):
            own, others = matrices[adapter.name], [matrices[n] for n in NAMES if n != adapter.name]
            cost = damped(sum(others) / len(others), DEFAULT_DAMPING[Structure.BLOCK])
            kept = np.linalg.solve(own + 2.0 * cost, own @ (U.T @ deltas_of(adapter)[path] @ V).ravel())
            expected[path] = expected[path] + weight * (U @ kept.reshape(U.shape[1], V.shape[1]) @ V.T)
    assert_equal(result, expected)


def test_experts_with_no_cost_are_the_weighted_sum_and_one_expert_is_refused():
    members = adapters()
    space = CoreSpace.of(members)
    result = run("sst_experts", batches(space, WEIGHTS), fishers(space, "kfac"), mu=0.0)
    assert_equal(result, {p: sum(w * deltas_of(a)[p] for w, a in zip(WEIGHTS, members, strict=True)) for p in SHAPES})
    (alone,) = adapters(("code",))
    own = CoreSpace.of([alone])
    with pytest.raises(InputError, match="needs at least two"):
        run("sst_experts", batches(own, [1.0]), fishers(own, "kfac", {"code": DATA["code"]}))


@pytest.mark.parametrize("structure", ["kfac", "block", "global"])
def test_experts_do_not_depend_on_order_or_gauge(structure):
    members = adapters()
    space, other = CoreSpace.of(members), CoreSpace.of([regauged(a) for a in reversed(members)])
    first = run("sst_experts", batches(space, WEIGHTS), fishers(space, structure))
    second = run("sst_experts", batches(other, WEIGHTS[::-1]), fishers(other, structure))
    assert_equal(second, first, tolerance=2e-4)


AVERAGES = [("fisher_diagonal", "diagonal"), ("fisher_diagonal", "global")] + [
    ("fisher_full", s) for s in ("diagonal", "kfac", "block")
]
AVERAGES.append(("regmean", "kfac"))


@pytest.mark.parametrize(("name", "structure"), AVERAGES)
def test_equal_fishers_give_the_weighted_average(name, structure):
    members = adapters()
    space = CoreSpace.of(members)
    same = fishers(space, structure, dict.fromkeys(NAMES, DATA["math"]))
    result = run(name, batches(space, WEIGHTS), same)
    total = sum(WEIGHTS)
    average = {p: sum(w / total * deltas_of(a)[p] for w, a in zip(WEIGHTS, members, strict=True)) for p in SHAPES}
    assert_equal(result, average)


@pytest.mark.parametrize(("name", "structure"), AVERAGES)
def test_one_adapter_comes_back_unchanged(name, structure):
    (member,) = adapters(("code",))
    space = CoreSpace.of([member])
    result = run(name, batches(space, [1.0]), fishers(space, structure, {"code": DATA["code"]}))
    assert_equal(result, deltas_of(member))


@pytest.mark.parametrize(("name", "structure"), AVERAGES)
def test_the_order_of_adapters_and_their_gauge_change_nothing(name, structure):
    members = adapters()
    space, other = CoreSpace.of(members), CoreSpace.of([regauged(a) for a in reversed(members)])
    first = run(name, batches(space, WEIGHTS), fishers(space, structure))
    second = run(name, batches(other, WEIGHTS[::-1]), fishers(other, structure))
    assert_equal(second, first, tolerance=2e-5)


@pytest.mark.parametrize(("name", "structure"), AVERAGES)
def test_the_scale_of_the_weights_changes_nothing_and_zero_drops_an_adapter(name, structure):
    members = adapters()
    space = CoreSpace.of(members)
    statistics = fishers(space, structure)
    first = run(name, batches(space, WEIGHTS), statistics)
    assert_equal(run(name, batches(space, [3 * w for w in WEIGHTS]), statistics), first)
    alone = run(name, batches(space, [0.0, 2.0, 0.0]), statistics)
    assert_equal(alone, deltas_of(members[1]))
    for weights in ([1.0, -0.5, 1.0], [0.0, 0.0, 0.0]):
        with pytest.raises(InputError, match="weights must be >= 0 and not all zero"):
            run(name, batches(space, weights), statistics)


@pytest.mark.parametrize(("name", "structure"), AVERAGES)
def test_the_result_of_an_average_can_be_scaled(name, structure):
    space = CoreSpace.of(adapters())
    statistics = fishers(space, structure)
    published = run(name, batches(space, WEIGHTS), statistics)
    result = run(name, batches(space, WEIGHTS), statistics, scale=2.0)
    assert_equal(result, {path: 2.0 * delta for path, delta in published.items()})


def test_large_damping_leads_to_the_weighted_average():
    members = adapters()
    space = CoreSpace.of(members)
    average = {p: sum(deltas_of(a)[p] for a in members) / 3 for p in SHAPES}
    for structure in ("diagonal", "kfac", "block"):
        near = run(
            "fisher_full", batches(space, [1.0] * 3), fishers(space, structure, dict.fromkeys(NAMES, DATA["math"]))
        )
        assert_equal(near, average)
    # With different data the shares are those of the mean diagonals.
    statistics = fishers(space, "block")
    result = run("fisher_full", batches(space, [1.0] * 3), statistics, damping=1e6, normalize=False)
    for i, group in enumerate(space.groups):
        scale = np.array(
            [f.blocks()[i].diagonal(dim1=1, dim2=2).mean(dim=1).numpy() for f in statistics.fishers.values()]
        )
        for j, path in enumerate(group.names):
            shares = scale[:, j] / scale[:, j].sum()
            expected = sum(s * deltas_of(a)[path] for s, a in zip(shares, members, strict=True))
            np.testing.assert_allclose(result[path], expected, atol=1e-4)


def test_normalising_makes_the_scale_of_scores_irrelevant():
    space = CoreSpace.of(adapters())
    louder = {name: replace(data, delta={p: 7 * d for p, d in data.delta.items()}) for name, data in DATA.items()}
    louder["math"] = DATA["math"]
    for name, structure in [("fisher_diagonal", "diagonal"), ("fisher_full", "kfac"), ("fisher_full", "block")]:
        first = run(name, batches(space, WEIGHTS), fishers(space, structure))
        second = run(name, batches(space, WEIGHTS), fishers(space, structure, louder))
        assert_equal(second, first)
        unequal = run(name, batches(space, WEIGHTS), fishers(space, structure, louder), normalize=False)
        assert not np.allclose(unequal["model.layers.0.q"], first["model.layers.0.q"], atol=1e-3)


def test_conjugate_gradients_reach_the_dense_solution():
    generator = torch.Generator().manual_seed(0)

    def definite(size):
        root = torch.randn(3, 4, size, size, generator=generator, dtype=torch.float64)
        scale = torch.logspace(0, -3, size, dtype=torch.float64)
        return root @ torch.diag(scale) @ root.mT

    system, cores = KroneckerSum(definite(6), definite(5)), torch.randn(3, 4, 5, 6, generator=generator).double()
    result = solve_kronecker_sum(system, cores, "abcd")
    for layer in range(4):
        terms = [np.kron(system.D[t, layer].numpy(), system.X[t, layer].numpy()) for t in range(3)]
        right = sum(term @ cores[t, layer].numpy().ravel() for t, term in enumerate(terms))
        expected = np.linalg.solve(sum(terms), right).reshape(5, 6)
        np.testing.assert_allclose(result[layer].numpy(), expected, rtol=0, atol=1e-7 * np.abs(expected).max())
    with pytest.raises(SolverError, match="layer 'a' are singular together"):
        solve_kronecker_sum(KroneckerSum(0 * system.X, system.D), cores, "abcd")


# ---- masks -----------------------------------------------------------------------------------------------------------


def gain_and_cost(space, structure="diagonal"):
    return GainAndCost(fisher(space, Data.random(20), structure), fisher(space, Data.random(21), structure))


def dense_ratio(space, statistics):
    """F_gain / (F_cost + 0.01 · mean of the layer), flat."""
    gains, costs = (dense_diagonal(f) for f in (statistics.gain, statistics.cost))
    parts, offset = [], 0
    for group in space.groups:
        _, rows, columns = group.core_shape
        for _ in group.names:
            where = slice(offset, offset := offset + rows * columns)
            parts.append(gains[where] / (costs[where] + 0.01 * costs[where].mean()))
    return np.concatenate(parts)


MASKS = {
    "top": lambda ratio: ratio >= np.sort(ratio)[::-1][int(0.3 * len(ratio)) - 1],
    "sigmoid": lambda ratio: 1 / (1 + np.exp(-(np.log(ratio) - np.median(np.log(ratio))) / 0.5)),
    "percentile": lambda ratio: np.clip(
        (np.log(ratio) - np.percentile(np.log(ratio), 5))
        / (np.percentile(np.log(ratio), 95) - np.percentile(np.log(ratio), 5)),
        0,
        1,
    ),
}


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "global"])
@pytest.mark.parametrize("mask", list(MASKS))
def test_the_ratio_mask_equals_a_dense_transcription(mask, structure):
    """(1 − α m) u + α m s, as published."""
    space = CoreSpace.of(adapters())
    statistics = gain_and_cost(space, structure)
    result = run(
        "fisher_ratio_mask",
        batches(space, (0.2, 1.0, 0.7), "safe"),
        statistics,
        mask=mask,
        fraction=0.3,
        temperature=0.5,
    )
    m = MASKS[mask](dense_ratio(space, statistics))
    utility = 0.2 * space.core("math").numpy() + space.core("code").numpy()
    merged = (1 - 0.7 * m) * utility + 0.7 * m * space.core("safe").numpy()
    expected = {}
    for group, part in zip(space.groups, space.split(torch.from_numpy(merged)), strict=True):
        for j, path in enumerate(group.names):
            expected[path] = (group.U[j].double() @ part[j] @ group.V[j].double().mT).numpy()
    assert_equal(result, expected)


def test_the_ratio_is_the_spectrum_of_diagonal_fishers_and_its_extremes_are_the_adapters():
    members = adapters(("math", "safe"))
    space = CoreSpace.of(members)
    statistics = gain_and_cost(space)
    torch.testing.assert_close(
        statistics.diagonal_spectrum.eigenvalues, solve(statistics.gain, statistics.cost).eigenvalues
    )
    merged = batches(space, [1.0, 1.0], "safe")
    assert_equal(run("fisher_ratio_mask", merged, statistics, fraction=1.0), deltas_of(members[1]))
    nothing = batches(space, [1.0, 0.0], "safe")
    assert_equal(run("fisher_ratio_mask", nothing, statistics, mask="sigmoid"), deltas_of(members[0]))
    hot = run("fisher_ratio_mask", merged, statistics, mask="sigmoid", temperature=1e6)
    assert_equal(hot, {p: (deltas_of(members[0])[p] + deltas_of(members[1])[p]) / 2 for p in SHAPES})


@pytest.mark.parametrize("mask", list(MASKS))
def test_the_ratio_mask_does_not_depend_on_order_or_gauge(mask):
    members = adapters()
    space, other = CoreSpace.of(members), CoreSpace.of([regauged(a) for a in reversed(members)])
    first = run("fisher_ratio_mask", batches(space, WEIGHTS, "safe"), gain_and_cost(space), mask=mask)
    second = run("fisher_ratio_mask", batches(other, WEIGHTS[::-1], "safe"), gain_and_cost(other), mask=mask)
    assert_equal(second, first, tolerance=1e-4)


def test_every_row_is_complete():
    assert list(ROWS) == ["fisher_diagonal", "fisher_full", "regmean", "sst_experts", "fisher_ratio_mask"]
    for row in ROWS.values():
        assert row.paper.startswith("https://")
        assert row.formula
        assert row.note
        assert row.needs
    for name, option, value in [
        ("fisher_diagonal", "floor", 0.0),
        ("fisher_full", "damping", -1.0),
        ("regmean", "off_diagonal", 1.5),
        ("sst_experts", "mu", -1.0),
        ("fisher_ratio_mask", "fraction", 0.0),
        ("fisher_ratio_mask", "temperature", 0.0),
        ("fisher_ratio_mask", "mask", "hard"),
    ]:
        with pytest.raises(InputError, match=option):
            ROWS[name].resolve({option: value})
