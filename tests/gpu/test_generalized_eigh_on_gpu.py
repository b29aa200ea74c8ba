"""generalized_eigh's drivers on a real GPU: the checks of the emulation, and what only a GPU has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from eigen_checks import FAILURES, Checks, errors, problems

from sstmerge import ops, reference
from sstmerge.ops import SolveStatus, eigen_cuda

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float64]
DRIVERS = ["jacobi", "batched", "sygvd"]


@pytest.fixture(params=DRIVERS)
def checks(request, gpu_backend) -> Checks:
    """The checks of one driver; skipped with the reason where it is not available."""
    reason = eigen_cuda.why_not(request.param, 1, torch.float64)
    if reason:
        pytest.skip(reason)
    return Checks(gpu_backend, request.param, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (5, 2), (7, 9), (448, 32), (9, 33), (16, 64), (3, 78)])
def test_solves(checks, batch, n, dtype):
    checks.solves(*problems(batch, n, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "n"), [(3, 160), (2, 320), (1, 1024)])
def test_solves_large_problems(checks, batch, n, dtype):
    if checks.driver == "jacobi":
        pytest.skip(eigen_cuda.why_not("jacobi", n, dtype))
    checks.solves(*problems(batch, n, dtype))


def test_the_largest_problem_in_shared_memory(gpu_backend):
    for dtype in DTYPES:
        Checks(gpu_backend, "jacobi", "cuda").solves(*problems(3, eigen_cuda.jacobi_limit(dtype), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_difficult_problems(checks, dtype):
    checks.solves_difficult_problems(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_scale(checks, dtype):
    checks.keeps_its_accuracy_at_every_scale(dtype)


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_failures(checks, failure):
    checks.flags_a_failure_and_leaves_its_neighbours_alone(*failure)


def test_strides(checks):
    checks.reads_lower_triangles_at_any_strides()


def test_chunks(gpu_backend, monkeypatch):
    a, b = problems(5, 12, torch.float64)
    monkeypatch.setattr(eigen_cuda, "MOST_PROBLEMS", 2)

    Checks(gpu_backend, "batched", "cuda").solves(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_agrees_with_torch(gpu_backend, dtype):
    for batch, n in ((1, 8), (6, 40), (4, 200), (1, 200)):
        a, b = problems(batch, n, dtype)
        solution = ops.generalized_eigh(a.cuda(), b.cuda(), backend=gpu_backend)
        expected = reference.generalized_eigh(a.cuda(), b.cuda())

        assert solution.status.tolist() == [SolveStatus.CONVERGED] * batch
        tolerance = 100 * n * torch.finfo(dtype).eps
        torch.testing.assert_close(solution.eigenvalues, expected.eigenvalues, rtol=0, atol=tolerance)


def test_on_a_stream_of_its_own(checks):
    a, b = (matrix.cuda() for matrix in problems(16, 20, torch.float64))
    expected = ops.generalized_eigh(a, b, driver=checks.driver, backend=checks.backend)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the default stream would be through before the inputs are there
        late_a, late_b = a.clone(), b.clone()
        solution = ops.generalized_eigh(late_a, late_b, driver=checks.driver, backend=checks.backend)
    stream.synchronize()

    assert torch.equal(solution.eigenvalues, expected.eigenvalues)
    assert torch.equal(solution.eigenvectors, expected.eigenvectors)


def test_does_not_wait_for_the_device(gpu_backend):
    for driver, size in (("jacobi", 16), ("batched", 16)):
        a, b = (matrix.cuda() for matrix in problems(16, size, torch.float64))
        ops.generalized_eigh(a, b, driver=driver, backend=gpu_backend)  # handles are made, kernels are loaded
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.generalized_eigh(a, b, driver=driver, backend=gpu_backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_jacobi_in_a_graph(gpu_backend):
    inputs = [problems(16, 20, torch.float32, seed) for seed in (0, 1)]
    a, b = (matrix.cuda() for matrix in inputs[0])
    ops.generalized_eigh(a, b, driver="jacobi", backend=gpu_backend)  # the kernel is loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        solution = ops.generalized_eigh(a, b, driver="jacobi", backend=gpu_backend)
    for pair in inputs:
        a.copy_(pair[0])
        b.copy_(pair[1])
        graph.replay()
        torch.cuda.synchronize()
        assert not solution.status.any()
        assert max(errors(*pair, solution).values()) < 1e-4


def test_several_python_threads_at_once(checks):
    inputs = [problems(20, n, torch.float64, seed=n) for n in (5, 12, 20, 31)] * 3
    inputs = [(a.cuda(), b.cuda()) for a, b in inputs]

    def solve(pair):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            solution = ops.generalized_eigh(*pair, driver=checks.driver, backend=checks.backend)
        stream.synchronize()
        return solution

    expected = [ops.generalized_eigh(*pair, driver=checks.driver, backend=checks.backend) for pair in inputs]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(solve, inputs))

    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.eigenvectors, other.eigenvectors)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one(checks):
    a, b = (matrix.to("cuda:1") for matrix in problems(5, 20, torch.float64))

    solution = ops.generalized_eigh(a, b, driver=checks.driver, backend=checks.backend)

    assert solution.eigenvalues.device == a.device
    assert torch.cuda.current_device() == 0
    assert max(errors(a, b, solution).values()) < 1e-10
