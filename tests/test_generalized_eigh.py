"""The solver on every available backend against scipy, problem by problem."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import scipy.linalg.cython_lapack
import torch
from eigen_checks import errors, problems
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sstmerge import reference
from sstmerge.errors import InputError, SolverError
from sstmerge.ops import SolveStatus, backends, eigen, eigh, generalized_eigh, generalized_eigh_mixed

BACKENDS = [info.name for info in backends() if info.available]
DTYPES = [torch.float32, torch.float64]
SIZES = [1, 2, 7, 16, 33, 64, 130]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("batch", [0, 1, 5, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_solves_every_problem_of_the_batch(backend, batch, n, dtype):
    if batch == 70 and n > 64:
        batch = 3  # the larger sizes repeat what the smaller ones have shown
    a, b = problems(batch, n, dtype)
    before = a.clone(), b.clone()

    solution = generalized_eigh(a, b, backend=backend)

    assert solution.eigenvalues.shape == (batch, n)
    assert solution.eigenvectors.shape == (batch, n, n)
    assert solution.eigenvalues.dtype == solution.eigenvectors.dtype == dtype
    assert solution.status.dtype == torch.int32
    assert solution.status.tolist() == [SolveStatus.CONVERGED] * batch
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])
    assert (solution.eigenvalues.diff(dim=-1) >= 0).all()
    allowed = errors(a, b, reference.generalized_eigh(a, b))
    for name, error in errors(a, b, solution).items():
        assert error <= 2 * allowed[name] + 10 * n * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_a_problem_solved_by_hand(backend, dtype):
    # (a - λ b) = [[2 - 2λ, 1], [1, 2 - λ]] is singular where 2λ² - 6λ + 3 = 0.
    a = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=dtype)
    b = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=dtype)

    solution = generalized_eigh(a, b, backend=backend)

    expected = torch.tensor([(3 - 3**0.5) / 2, (3 + 3**0.5) / 2], dtype=dtype)
    torch.testing.assert_close(solution.eigenvalues, expected)
    assert solution.status.shape == ()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("matrix", "row", "column", "value", "status"),
    [
        ("b", 3, 3, -1.0, SolveStatus.NOT_POSITIVE_DEFINITE),
        ("b", 0, 0, 0.0, SolveStatus.NOT_POSITIVE_DEFINITE),
        ("a", 2, 1, float("nan"), SolveStatus.NON_FINITE_INPUT),
        ("b", 8, 8, float("inf"), SolveStatus.NON_FINITE_INPUT),
        ("a", 0, 0, 1e308, SolveStatus.NOT_CONVERGED),
    ],
)
def test_a_failing_problem_is_flagged_and_leaves_its_neighbours_alone(backend, matrix, row, column, value, status):
    a, b = problems(5, 9, torch.float64)
    if status == SolveStatus.NOT_CONVERGED:
        b *= 1e-3  # a / b overflows
    undisturbed = generalized_eigh(a, b, backend=backend)
    {"a": a, "b": b}[matrix][2, row, column] = value

    solution = generalized_eigh(a, b, backend=backend)

    assert solution.status.tolist() == [0, 0, status, 0, 0]
    assert solution.eigenvalues[2].isnan().all()
    assert solution.eigenvectors[2].isnan().all()
    neighbours = [0, 1, 3, 4]
    assert torch.equal(solution.eigenvalues[neighbours], undisturbed.eigenvalues[neighbours])
    assert torch.equal(solution.eigenvectors[neighbours], undisturbed.eigenvectors[neighbours])


def test_the_reference_finds_the_one_problem_that_torch_cannot_solve(monkeypatch):
    a, b = problems(3, 4, torch.float64)
    expected = reference.generalized_eigh(a, b)
    solve = torch.linalg.eigh
    unsolvable = reference.generalized_eigh(a[1], b[1]).eigenvalues.sum()

    def fail_on_problem_1(matrix: Tensor):
        if any(torch.isclose(trace, unsolvable) for trace in matrix.diagonal(dim1=-2, dim2=-1).sum(-1).reshape(-1)):
            raise torch.linalg.LinAlgError("no convergence")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fail_on_problem_1)
    solution = reference.generalized_eigh(a, b)

    assert solution.status.tolist() == [0, SolveStatus.NOT_CONVERGED, 0]
    assert solution.eigenvalues[1].isnan().all()
    torch.testing.assert_close(solution.eigenvalues[[0, 2]], expected.eigenvalues[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_lower_triangles_are_read(backend):
    a, b = problems(4, 6, torch.float64)
    expected = generalized_eigh(a, b, backend=backend)
    upper = torch.full((6, 6), torch.nan, dtype=torch.float64).triu(1)

    solution = generalized_eigh(a + upper, b + upper, backend=backend)

    assert torch.equal(solution.eigenvalues, expected.eigenvalues)
    assert torch.equal(solution.eigenvectors, expected.eigenvectors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]], id="wide rows"),
        pytest.param(lambda x: x.mT.contiguous().mT, id="transposed"),
        pytest.param(lambda x: x.repeat_interleave(2, dim=0)[::2], id="every second problem"),
        pytest.param(lambda x: x.repeat_interleave(2, dim=2)[..., ::2], id="every second column"),
        pytest.param(lambda x: x.clone().requires_grad_(), id="requires grad"),
    ],
)
def test_any_strides(backend, view):
    a, b = problems(6, 5, torch.float64)
    expected = generalized_eigh(a, b, backend=backend)

    solution = generalized_eigh(view(a), view(b), backend=backend)

    assert torch.equal(solution.eigenvalues, expected.eigenvalues)
    assert torch.equal(solution.eigenvectors, expected.eigenvectors)
    assert not solution.eigenvectors.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_matrix_b_can_be_expanded_over_the_batch(backend):
    a, b = problems(4, 5, torch.float64)

    solution = generalized_eigh(a, b[:1].expand(4, 5, 5), backend=backend)

    expected = generalized_eigh(a, b[:1].repeat(4, 1, 1), backend=backend)
    assert torch.equal(solution.eigenvalues, expected.eigenvalues)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_shape", [(), (2, 3), (2, 0), (1, 2, 3)])
def test_batches_of_any_number_of_dimensions(backend, batch_shape):
    count = torch.Size(batch_shape).numel()
    a, b = problems(count, 4, torch.float64)
    flat = generalized_eigh(a, b, backend=backend)

    solution = generalized_eigh(a.reshape(*batch_shape, 4, 4), b.reshape(*batch_shape, 4, 4), backend=backend)

    assert solution.eigenvalues.shape == (*batch_shape, 4)
    assert solution.status.shape == batch_shape
    assert torch.equal(solution.eigenvectors, flat.eigenvectors.reshape(*batch_shape, 4, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_matrices(backend):
    solution = generalized_eigh(torch.empty(3, 0, 0), torch.empty(3, 0, 0), backend=backend)

    assert solution.eigenvectors.shape == (3, 0, 0)
    assert solution.status.tolist() == [SolveStatus.CONVERGED] * 3


@pytest.mark.skipif("cpu_compiled" not in BACKENDS, reason="the compiled backend is not available")
class TestCompiled:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("n", [7, 64, 200])
    def test_bits_do_not_depend_on_threads_or_on_the_rest_of_the_batch(self, n, dtype):
        a, b = problems(9, n, dtype)
        one = generalized_eigh(a, b, backend="cpu_compiled", num_threads=1)
        two = generalized_eigh(a, b, backend="cpu_compiled", num_threads=2)
        alone = generalized_eigh(a[4], b[4], backend="cpu_compiled", num_threads=2)

        assert torch.equal(one.eigenvalues, two.eigenvalues)
        assert torch.equal(one.eigenvectors, two.eigenvectors)
        assert torch.equal(one.eigenvectors[4], alone.eigenvectors)

    def test_more_threads_than_problems_or_processors(self):
        a, b = problems(70, 5, torch.float64)

        many = generalized_eigh(a, b, backend="cpu_compiled", num_threads=1000)

        assert torch.equal(many.eigenvalues, generalized_eigh(a, b, backend="cpu_compiled").eigenvalues)

    def test_several_python_threads_at_once(self):
        inputs = [problems(20, n, torch.float64, seed=n) for n in (5, 12, 20, 31)] * 5
        expected = [generalized_eigh(a, b, backend="cpu_compiled", num_threads=1) for a, b in inputs]

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda pair: generalized_eigh(*pair, backend="cpu_compiled", num_threads=2), inputs))

        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.eigenvectors, other.eigenvectors)

    def test_scipy_gets_its_threads_back(self):
        # A search for a symbol in scipy's wrapper also visits the OpenBLAS that it was linked with.
        wrapper = ctypes.CDLL(scipy.linalg.cython_lapack.__file__)
        if not hasattr(wrapper, "scipy_openblas_get_num_threads"):
            pytest.skip("this scipy does not come with the OpenBLAS of scipy's wheels")
        before = wrapper.scipy_openblas_get_num_threads()
        wrapper.openblas_set_num_threads_local(2)
        try:
            a, b = problems(20, 16, torch.float64)
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(lambda _: generalized_eigh(a, b, backend="cpu_compiled"), range(9)))
            assert wrapper.scipy_openblas_get_num_threads() == 2
        finally:
            wrapper.openblas_set_num_threads_local(before)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 12), exponent=st.integers(-12, 12), seed=st.integers(0, 2**31 - 1))
def test_scaling_a_scales_the_eigenvalues_and_nothing_else(backend, n, exponent, seed):
    # By a power of two, so that no rounding differs.
    a, b = problems(2, n, torch.float64, seed)
    plain = generalized_eigh(a, b, backend=backend)
    scaled = generalized_eigh(a * 2.0**exponent, b, backend=backend)

    torch.testing.assert_close(
        scaled.eigenvalues, plain.eigenvalues * 2.0**exponent, rtol=1e-11, atol=2.0**exponent * 1e-12
    )
    torch.testing.assert_close(
        scaled.eigenvectors.mT @ b @ scaled.eigenvectors, torch.eye(n, dtype=torch.float64).expand(2, n, n)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_change_of_coordinates_changes_only_the_eigenvectors(backend):
    a, b = problems(3, 8, torch.float64)
    change = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    moved = generalized_eigh(change.T @ a @ change, change.T @ b @ change, backend=backend)

    torch.testing.assert_close(moved.eigenvalues, generalized_eigh(a, b, backend=backend).eigenvalues)
    torch.testing.assert_close(
        (change @ moved.eigenvectors).mT @ b @ (change @ moved.eigenvectors),
        torch.eye(8, dtype=torch.float64).expand(3, 8, 8),
    )


class TestMixedSizes:
    def test_returns_the_caller_s_order_and_shapes(self):
        shapes = [(3, 4), (5,), (2, 2, 4), (4,), (0, 5), (1, 0)]
        pairs = []
        for seed, (*batch, n) in enumerate(shapes):
            a, b = problems(torch.Size(batch).numel(), n, torch.float64, seed)
            pairs.append((a.reshape(*batch, n, n), b.reshape(*batch, n, n)))
        pairs.append(tuple(matrix.float() for matrix in pairs[0]))

        solutions = generalized_eigh_mixed(pairs)

        assert len(solutions) == len(pairs)
        for (a, b), solution in zip(pairs, solutions, strict=True):
            expected = generalized_eigh(a, b)
            assert solution.eigenvalues.dtype == a.dtype
            assert torch.equal(solution.eigenvalues, expected.eigenvalues)
            assert torch.equal(solution.eigenvectors, expected.eigenvectors)
            assert torch.equal(solution.status, expected.status)
            assert solution.status.shape == a.shape[:-2]

    def test_one_call_per_size(self, monkeypatch):
        calls = []
        solve = reference.generalized_eigh
        monkeypatch.setattr(reference, "generalized_eigh", lambda a, b: calls.append(tuple(a.shape)) or solve(a, b))

        generalized_eigh_mixed([problems(2, n, torch.float64) for n in (3, 5, 3, 5, 3)], backend="reference")

        assert sorted(calls) == [(4, 5, 5), (6, 3, 3)]

    def test_large_batches_are_solved_where_they_lie(self, monkeypatch):
        pairs = [problems(count, 4, torch.float64) for count in (3, 5, 2)]
        together = generalized_eigh_mixed(pairs)
        monkeypatch.setattr(eigen, "_LARGE_BATCH", 3 * 16)  # the first two
        calls = []
        solve = eigen.generalized_eigh
        monkeypatch.setattr(
            eigen, "generalized_eigh", lambda a, b, **options: calls.append(a) or solve(a, b, **options)
        )
        apart = generalized_eigh_mixed(pairs)
        assert [a.data_ptr() for a in calls] == [a.data_ptr() for a, _ in pairs]
        for one, other in zip(together, apart, strict=True):
            assert torch.equal(one.eigenvalues, other.eigenvalues)
            assert torch.equal(one.eigenvectors, other.eigenvectors)

    def test_nothing_to_solve(self):
        assert generalized_eigh_mixed([]) == []

    def test_a_bad_pair_is_named(self):
        with pytest.raises(InputError, match=r"problem 1: b must have the shape \(2, 4, 4\), not \(2, 3, 3\)"):
            generalized_eigh_mixed(
                [(torch.ones(1, 3, 3), torch.ones(1, 3, 3)), (torch.ones(2, 4, 4), torch.ones(2, 3, 3))]
            )


@pytest.mark.parametrize("shape", [(3, 5, 5), (2, 3, 40, 40), (0, 4, 4), (6, 6)])
def test_symmetric_problems(shape):
    root = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrices = root @ root.mT
    values, vectors = eigh(matrices)
    assert values.shape == shape[:-1]
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrices))
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(shape[-1], dtype=torch.float64).expand(shape))
    torch.testing.assert_close(vectors * values[..., None, :] @ vectors.mT, matrices)


def test_symmetric_problems_without_a_solution():
    matrices = torch.eye(3).repeat(4, 1, 1)
    matrices[2, 0, 0] = torch.nan
    with pytest.raises(SolverError, match="1 of 4 symmetric eigenproblems of size 3"):
        eigh(matrices)
    for shape in ((3,), (3, 4)):
        with pytest.raises(InputError, match=r"\(\.\.\., n, n\)"):
            eigh(torch.ones(shape))
