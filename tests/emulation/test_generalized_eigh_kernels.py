"""generalized_eigh's GPU drivers on the CPU: its kernels emulated, cuSOLVER and cuBLAS faked (fake_cusolver.cpp)."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compiling
import pytest
import torch
from eigen_checks import FAILURES, Checks, errors, problems

from sstmerge import _C, ops
from sstmerge.errors import BackendError
from sstmerge.ops import SolveStatus, driver_table, eigen_cuda
from sstmerge.ops.cusolver import VARIABLE, open_cusolver

DTYPES = [torch.float32, torch.float64]
DRIVERS = ["jacobi", "batched", "sygvd"]
FAKE = Path(__file__).with_name("fake_cusolver.cpp")


def build_fake(cache: Path, *flags: str) -> Path:
    """Compile the fake libraries, unless they were compiled before."""
    digest = hashlib.sha256(FAKE.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    library = cache / f"fake_cusolver-{digest}.so"
    if not library.exists():
        options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *flags]
        subprocess.run([str(compiling.compiler()), *options, str(FAKE), "-o", str(library)], check=True)
    return library


@pytest.fixture
def fake_cusolver(emulation_cache, monkeypatch) -> ctypes.CDLL:
    """The fake libraries, where the drivers find them."""
    library = build_fake(emulation_cache)
    monkeypatch.setenv(VARIABLE, str(library))
    return ctypes.CDLL(str(library))


@pytest.fixture
def old_cusolver(emulation_cache, monkeypatch) -> None:
    """The fake libraries as before CUDA 12.6.2."""
    monkeypatch.setenv(VARIABLE, str(build_fake(emulation_cache, "-DOLD")))


def check_overflow(backend: str, driver: str) -> None:
    """A tiny pivot under a large a: the reduced matrix is no matrix of finite numbers."""
    a, b = torch.eye(3, dtype=torch.float64).repeat(2, 2, 1, 1)
    b[0, 1, 1] = 1e-310

    solution = ops.generalized_eigh(a, b, driver=driver, backend=backend)

    assert solution.status.tolist() == [SolveStatus.NOT_CONVERGED, SolveStatus.CONVERGED]
    assert solution.eigenvectors[0].isnan().all()


@pytest.mark.usefixtures("emulated", "fake_cusolver")
@pytest.mark.parametrize("driver", DRIVERS)
class TestDrivers:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("batch", "n"), [(3, 1), (2, 2), (3, 5), (1, 16), (2, 17)])
    def test_solves(self, driver, batch, n, dtype):
        Checks("emulated", driver).solves(*problems(batch, n, dtype))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_more_than_a_warp_is_wide(self, driver, dtype):
        Checks("emulated", driver).solves(*problems(1, 35, dtype))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_difficult_problems(self, driver, dtype):
        Checks("emulated", driver).solves_difficult_problems(dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_scale(self, driver, dtype):
        Checks("emulated", driver).keeps_its_accuracy_at_every_scale(dtype)

    @pytest.mark.parametrize("failure", FAILURES, ids=str)
    def test_failures(self, driver, failure):
        Checks("emulated", driver).flags_a_failure_and_leaves_its_neighbours_alone(*failure)

    def test_an_overflow_on_the_way(self, driver):
        check_overflow("emulated", driver)

    def test_strides(self, driver):
        Checks("emulated", driver).reads_lower_triangles_at_any_strides()

    @pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 4, 4), (3, 0, 0)])
    def test_nothing_to_solve(self, driver, shape):
        solution = ops.generalized_eigh(torch.ones(shape), torch.ones(shape), driver=driver, backend="emulated")

        assert solution.eigenvectors.shape == shape
        assert solution.status.tolist() == torch.zeros(shape[:-2]).tolist()


def test_the_same_bits_in_every_order(emulated):
    a, b = problems(2, 9, torch.float32)
    found = ops.generalized_eigh(a, b, driver="jacobi", backend="emulated")
    emulated.order = 0

    forwards = ops.generalized_eigh(a, b, driver="jacobi", backend="emulated")

    assert torch.equal(found.eigenvectors, forwards.eigenvectors)
    assert torch.equal(found.eigenvalues, forwards.eigenvalues)


class TestUnderSanitizers:
    @pytest.mark.parametrize(("n", "dtype"), [(1, torch.float32), (6, torch.float32), (9, torch.float64)])
    def test_jacobi(self, sanitized, n, dtype):
        Checks("sanitized", "jacobi").solves(*problems(2, n, dtype))

    def test_jacobi_on_failures(self, sanitized):
        for failure in (FAILURES[0], FAILURES[3], FAILURES[5]):
            Checks("sanitized", "jacobi").flags_a_failure_and_leaves_its_neighbours_alone(*failure)

    @pytest.mark.parametrize("n", [5, 34])
    def test_stages(self, sanitized, fake_cusolver, n):
        Checks("sanitized", "sygvd").solves(*problems(2, n, torch.float64))

    def test_replacements(self, sanitized):
        reduced, factor = torch.full((2, 2, 35, 35), torch.nan)
        outcome, info = torch.zeros(2, dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
        size = eigen_cuda.np.int32(35)
        device = reduced.device
        arguments = [reduced, factor, info, outcome, size]
        sanitized.launch("eigh_stages", "eigh_check_factor_float32", (2, 1, 1), 64, 0, device, arguments)
        assert outcome.tolist() == [SolveStatus.CONVERGED, SolveStatus.NOT_POSITIVE_DEFINITE]
        sanitized.launch(
            "eigh_stages", "eigh_check_reduced_float32", (2, 1, 1), 64, 0, device, [reduced, outcome, size]
        )
        assert outcome.tolist() == [SolveStatus.NOT_CONVERGED, SolveStatus.NOT_POSITIVE_DEFINITE]
        assert torch.equal(reduced, torch.eye(35).expand(2, 35, 35))
        assert factor[0].isnan().all()
        assert torch.equal(factor[1], torch.eye(35))


def test_jacobi_says_where_it_does_not_converge(emulated, monkeypatch):
    a, b = problems(2, 6, torch.float64)
    a[0] = b[0]  # nothing to rotate
    monkeypatch.setattr(eigen_cuda, "MAXIMAL_SWEEPS", 1)

    solution = ops.generalized_eigh(a, b, driver="jacobi", backend="emulated")

    assert solution.status.tolist() == [SolveStatus.CONVERGED, SolveStatus.NOT_CONVERGED]
    assert solution.eigenvectors[1].isnan().all()
    torch.testing.assert_close(solution.eigenvalues[0], torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 110), (torch.float64, 78)])
def test_jacobi_refuses_what_does_not_fit(emulated, dtype, limit):
    a = torch.eye(limit + 1, dtype=dtype)

    assert eigen_cuda.jacobi_limit(dtype) == limit
    with pytest.raises(BackendError, match=rf"'jacobi' solves sizes up to {limit} in {dtype}, .* not {limit + 1}"):
        ops.generalized_eigh(a, a, driver="jacobi", backend="emulated")


class TestLibraryCalls:
    @pytest.mark.parametrize(
        ("limit", "most", "chunks"), [("MOST_PROBLEMS", 2, 3), ("MOST_ELEMENTS", 3 * 16, 2), ("MOST_PROBLEMS", 5, 1)]
    )
    def test_chunks(self, emulated, fake_cusolver, monkeypatch, limit, most, chunks):
        a, b = problems(5, 4, torch.float64)
        b[3, 3, 3] = -1
        whole = ops.generalized_eigh(a, b, driver="batched", backend="emulated")
        monkeypatch.setattr(eigen_cuda, limit, most)
        before = fake_cusolver.fake_syev_batched_calls()

        solution = ops.generalized_eigh(a, b, driver="batched", backend="emulated")

        assert fake_cusolver.fake_syev_batched_calls() - before == chunks
        assert solution.status.tolist() == [0, 0, 0, SolveStatus.NOT_POSITIVE_DEFINITE, 0]
        assert torch.equal(solution.eigenvalues[[0, 1, 2, 4]], whole.eigenvalues[[0, 1, 2, 4]])
        assert torch.equal(solution.eigenvectors[[0, 1, 2, 4]], whole.eigenvectors[[0, 1, 2, 4]])

    def test_handles_are_kept_per_thread_and_passed_on(self, emulated, fake_cusolver):
        def solve(_) -> None:
            for driver in ("batched", "sygvd", "batched"):
                ops.generalized_eigh(*problems(1, 3, torch.float64), driver=driver, backend="emulated")

        # The emulation is not for several threads, but the library is.
        library = open_cusolver().library
        address = torch.zeros(1, dtype=torch.float64).data_ptr()

        def calls_in_a_thread() -> int:
            """Three calls in a new thread; returns how many handles were made for them."""
            before = fake_cusolver.fake_handles_created()
            with ThreadPoolExecutor(1) as pool:
                sizes = pool.map(
                    lambda n: _C.cusolver_sygvd_workspace(library, 0, 0, True, *[address] * 3, n), (1, 2, 3)
                )
                assert list(sizes) == [10, 13, 16]
            return fake_cusolver.fake_handles_created() - before

        solve(None)
        before = fake_cusolver.fake_handles_created()
        solve(None)
        assert fake_cusolver.fake_handles_created() == before
        # A thread passes its handles on when it ends, which is a little after Python has joined it.
        made = [calls_in_a_thread() for _ in range(30)]
        assert set(made) <= {0, 1}
        assert 0 in made
        before = fake_cusolver.fake_handles_created()
        _C.cusolver_sygvd_workspace(library, 7, 0, True, address, address, address, 3)  # another device
        assert fake_cusolver.fake_handles_created() <= before + 1

    def test_a_refused_call_has_words(self, emulated, fake_cusolver):
        fake_cusolver.fake_refuse_solver_handles(1)
        try:
            with (
                ThreadPoolExecutor(1) as pool,
                pytest.raises(RuntimeError, match="cusolverDnCreate failed: CUSOLVER_STATUS_NOT_INITIALIZED"),
            ):
                pool.submit(_C.cusolver_potrf_batched, open_cusolver().library, 3, 0, True, 0, 0, 1, 1).result()
        finally:
            fake_cusolver.fake_refuse_solver_handles(0)

    @pytest.mark.parametrize(("n", "batch"), [(0, 1), (1, 0), (-3, 2)])
    def test_sizes_that_make_no_sense_are_refused(self, fake_cusolver, n, batch):
        with pytest.raises(ValueError, match="must be at least one"):
            _C.cusolver_potrf_batched(open_cusolver().library, 0, 0, True, 0, 0, n, batch)

    def test_numbers_and_names_that_are_not_there_are_refused(self, fake_cusolver):
        for number in (-1, 10**6):
            with pytest.raises(ValueError, match=f"no open cuSOLVER with the number {number}"):
                _C.cusolver_potrf_batched(number, 0, 0, True, 0, 0, 1, 1)
        with pytest.raises(ValueError, match="no triangular solve 'sideways'"):
            _C.cusolver_trsm_batched(open_cusolver().library, 0, 0, True, "sideways", 0, 0, 1, 1)


class TestAuto:
    @pytest.mark.parametrize(
        ("dtype", "n", "batch", "kernel"),
        [
            (torch.float64, 8, 3, "jacobi_eigh_float64"),
            (torch.float32, 8, 1, "jacobi_eigh_float32"),
            (torch.float64, 79, 2, "eigh_check_factor_float64"),
        ],
    )
    def test_takes_what_the_table_says(self, emulated, fake_cusolver, dtype, n, batch, kernel):
        if n > 8 and emulated.order:
            return  # the order changes nothing in the choice, and it is a large problem
        ops.generalized_eigh(*problems(batch, n, dtype), backend="emulated")

        assert kernel in emulated.launched

    def test_takes_sygvd_for_one_large_problem(self, emulated, fake_cusolver):
        ops.generalized_eigh(torch.eye(79).double(), torch.eye(79).double(), backend="emulated")

        assert emulated.launched == ["eigh_prepare_float64", "eigh_finish_float64"]

    @pytest.mark.usefixtures("old_cusolver")
    def test_an_old_cusolver_has_no_batched_driver(self, emulated):
        a = torch.eye(79, dtype=torch.float64).expand(2, 79, 79)

        with pytest.raises(
            BackendError, match=r"'batched' needs cusolverDnXsyevBatched, as from CUDA 12.6.2, and .*so"
        ):
            ops.generalized_eigh(a, a, driver="batched", backend="emulated")
        ops.generalized_eigh(a, a, backend="emulated")

        assert emulated.launched == ["eigh_prepare_float64", "eigh_finish_float64"]
        assert ops.available_drivers("emulated") == ("jacobi", "sygvd")
        with pytest.raises(ValueError, match="has no cusolverDnXsyevBatched"):
            _C.cusolver_syev_batched_workspace(open_cusolver().library, 0, 0, True, 0, 0, 1, 1)

    def test_without_cusolver_small_problems_are_solved_and_others_refused_with_words(self, emulated, monkeypatch):
        monkeypatch.setenv(VARIABLE, "/nowhere/libcusolver.so")
        a = torch.eye(79, dtype=torch.float64)

        ops.generalized_eigh(a[:4, :4], a[:4, :4], backend="emulated")
        assert emulated.launched == ["jacobi_eigh_float64"]
        with pytest.raises(BackendError, match=r"solves sizes up to 78 .*/nowhere/libcusolver.so.*backend='reference'"):
            ops.generalized_eigh(a, a, backend="emulated")
        assert ops.available_drivers("emulated") == ("jacobi",)

    def test_sygvd_is_never_taken_for_several_problems(self):
        for dtype in ("float32", "float64"):
            for n in (1, 8, 32, 100, 300, 1024):
                for batch in (2, 8, 448, 4096):
                    order = driver_table.fastest_first("an unknown device", dtype, n, batch)
                    assert set(order) == set(DRIVERS)
                    assert order.index("sygvd") > 0 or batch < 12


def check_values(backend: str) -> None:
    a, b = problems(2, 11, torch.float64)
    Checks(backend, "jacobi").solves(a, b)


def check_several(backend: str) -> None:
    checks = Checks(backend, "jacobi")
    checks.solves_difficult_problems(torch.float64)
    checks.keeps_its_accuracy_at_every_scale(torch.float64)
    checks.reads_lower_triangles_at_any_strides()
    checks.flags_a_failure_and_leaves_its_neighbours_alone(*FAILURES[5])
    check_overflow(backend, "jacobi")


def barrier_after(text: str) -> tuple[str, str]:
    """A deliberate bug: the barrier that follows a text is missing."""
    indentation = " " * (len(text) - len(text.lstrip(" ")))
    stripped = text.lstrip(" ")
    return f"{stripped}\n{indentation}__syncthreads();", stripped


JACOBI_BUGS = {
    "no barrier between columns of the factor": (
        "-= triangles.factor(i, k) * multiplier;\n            }\n        }\n        __syncthreads();",
        "-= triangles.factor(i, k) * multiplier;\n            }\n        }",
    ),
    "no barrier before the factor is scaled": barrier_after(
        "    for (int k = threadIdx.x; k < n; k += blockDim.x) inverse_diagonal[k] = 1 / sqrt(triangles.factor(k, k));"
    ),
    "no barrier between rows of a solve": (
        "* square[k * row_stride + j * column_stride];\n            }\n        }\n        __syncthreads();",
        "* square[k * row_stride + j * column_stride];\n            }\n        }",
    ),
    "no barrier before the rotations are applied": barrier_after(
        "            rotated = find_rotations(problem, round) || rotated;"
    ),
    "no barrier after the rotations were applied": barrier_after("            rotate_eigenvectors(problem, round);"),
    "no barrier after loading": (
        "exponents.b) : padding;\n        }\n    }\n    __syncthreads();",
        "exponents.b) : padding;\n        }\n    }",
    ),
    "no barrier in the maximum": barrier_after(
        "    if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;"
    ),
    "wrong rotation": ("x -= sine * (y + half_tangent * x);", "x -= sine * (y - half_tangent * x);"),
    "wrong side of the angle": ("if (cotangent < 0) tangent = -tangent;", ""),
    "a pair of pairs is left out": ("count = pairs / 2 * width;", "count = pairs / 2 * width - 1;"),
    "unsorted": ("rank += other < unscaled || (other == unscaled && j < i);", "rank += j < i;"),
    "equal eigenvalues share a place": ("(other == unscaled && j < i)", "false"),
    "the wrong triangle": ("const int row = i > j ? i : j, column", "const int row = i > j ? j : i, column"),
    "the scale of a is forgotten": ("exponent + exponents.a - exponents.b", "exponent - exponents.b"),
    "the scale of b is odd": ("exponents.b += exponents.b & 1;", "exponents.b += 1 - (exponents.b & 1);"),
    "an overflow is a solution": ("finite = isfinite(value);", ""),
}


@pytest.mark.parametrize("bug", JACOBI_BUGS)
def test_bugs_of_the_jacobi_kernel_are_caught(is_caught, bug):
    def check(backend: str) -> None:
        check_values(backend)
        check_several(backend)

    assert is_caught("jacobi_eigh", *JACOBI_BUGS[bug], check, kernel="jacobi_eigh_float64")


def test_a_step_beyond_shared_memory_is_caught(is_caught):
    bug = ("memory + 2 * rectangle + 2 * even,", "memory + 2 * rectangle + 2 * even + 31,")

    assert is_caught("jacobi_eigh", *bug, check_values, sanitized=True, kernel="jacobi_eigh_float64")


def check_batched(backend: str) -> None:
    checks = Checks(backend, "batched")
    checks.solves(*problems(2, 35, torch.float64))
    check_overflow(backend, "batched")
    checks.keeps_its_accuracy_at_every_scale(torch.float64)
    for failure in (FAILURES[0], FAILURES[3], FAILURES[5]):
        checks.flags_a_failure_and_leaves_its_neighbours_alone(*failure)
    Checks(backend, "sygvd").flags_a_failure_and_leaves_its_neighbours_alone(*FAILURES[0])


STAGE_BUGS = {
    "no barrier before the tile is read": (
        "vectors[(first + start + j) * n + band + lane];\n            }\n        }\n        __syncthreads();",
        "vectors[(first + start + j) * n + band + lane];\n            }\n        }",
    ),
    "no barrier before the next tile": (
        "solved ? element : not_a_number<Scalar>();\n            }\n        }\n        __syncthreads();",
        "solved ? element : not_a_number<Scalar>();\n            }\n        }",
    ),
    "not transposed": ("ldexp(tile[lane * (kWarpSize + 1) + i]", "ldexp(tile[i * (kWarpSize + 1) + lane]"),
    "a failed factor stays": ("set_identity(workspace.factor + workspace.offset(problem), workspace.n);", ""),
    "a failed factor is forgotten": ("if (threadIdx.x == 0) outcome[problem] = kNotPositiveDefinite;", ""),
    "an overflow is forgotten": ("if (threadIdx.x == 0) outcome[problem] = kNotConverged;", ""),
    "bad input stays": ("outcome[problem] = found.finite ? kConverged : kNonFiniteInput;", "outcome[problem] = 0;"),
    "info of the generalized solver is misread": ("if (generalized && info > n)", "if (generalized && info > n + 9)"),
    "unscaled eigenvectors": ("-exponent_b / 2);", "0);"),
    "the wrong matrix": ("reduced_pointers[problem] = reduced;", "reduced_pointers[problem] = workspace.reduced;"),
}


@pytest.mark.parametrize("bug", STAGE_BUGS)
def test_bugs_of_the_stages_are_caught(is_caught, fake_cusolver, bug):
    assert is_caught("eigh_stages", *STAGE_BUGS[bug], check_batched)


def test_errors_are_errors():
    """The judge himself: a small deviation shows."""
    a, b = problems(1, 4, torch.float64)
    solution = ops.generalized_eigh(a, b)
    solution.eigenvectors[0, 0, 0] += 1e-6

    found = errors(a, b, solution)
    assert found["equation"] > 1e-8
    assert found["normalisation"] > 1e-8
    assert found["eigenvalues"] < 1e-12
