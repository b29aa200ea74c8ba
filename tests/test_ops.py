"""Validation, choice of a backend, and filter_cores."""

from __future__ import annotations

import importlib

import pytest
import torch

from sstmerge import _C, ops, reference
from sstmerge.errors import BackendError, InputError, SolverError
from sstmerge.ops import SolveStatus, extension, launch

EYE = torch.eye(3)


@pytest.fixture
def without_extension(monkeypatch):
    """ops as it is where sstmerge._C was never built."""

    def import_module(name: str):
        if name == "sstmerge._C":
            raise ImportError("No module named 'sstmerge._C'")
        return importlib.__import__(name, fromlist=[""])

    monkeypatch.setattr(extension.importlib, "import_module", import_module)
    clear_caches()
    yield
    clear_caches()


def clear_caches() -> None:
    extension.load_extension.cache_clear()
    launch.compiled_launcher.cache_clear()


@pytest.mark.parametrize(
    ("a", "b", "arguments", "message"),
    [
        (torch.ones(3), EYE, {}, r"a must hold square matrices, shape \(\.\.\., n, n\), not \(3,\)"),
        (torch.ones(2, 3), EYE, {}, r"a must hold square matrices.*not \(2, 3\)"),
        (EYE, torch.eye(4), {}, r"b must have the shape \(3, 3\), not \(4, 4\)"),
        (EYE, EYE.expand(2, 3, 3), {}, r"b must have the shape \(3, 3\), not \(2, 3, 3\)"),
        (EYE.bfloat16(), EYE.bfloat16(), {}, "a must be float32 or float64, not torch.bfloat16"),
        (EYE.int(), EYE, {}, "a must be float32 or float64, not torch.int32"),
        (
            EYE,
            EYE.double(),
            {},
            r"b \(torch.float64 on cpu\) must have the dtype and device of a \(torch.float32 on cpu\)",
        ),
        (EYE, EYE.to("meta"), {}, "b .*on meta.* must have the dtype and device of a"),
        (EYE, EYE, {"num_threads": 0}, "num_threads must be at least 1, not 0"),
        (EYE, EYE, {"driver": "qr"}, "unknown driver 'qr': choose auto, sygvd, batched, jacobi, cholesky"),
        (EYE, EYE, {"backend": "gpu"}, "unknown backend 'gpu': choose auto, cuda_compiled, .*reference"),
    ],
)
def test_generalized_eigh_refuses_bad_arguments_with_words(a, b, arguments, message):
    with pytest.raises(InputError, match=message):
        ops.generalized_eigh(a, b, **arguments)


def test_auto_takes_the_compiled_backend_on_the_cpu(monkeypatch):
    monkeypatch.setattr(reference, "generalized_eigh", lambda a, b: pytest.fail("the reference was called"))

    assert ops.generalized_eigh(EYE, EYE).eigenvalues.tolist() == [1, 1, 1]


@pytest.mark.parametrize(("driver", "other"), [("sygvd", "reference"), ("cholesky", "cpu_compiled")])
def test_a_driver_is_found_by_name_and_belongs_to_one_backend(driver, other):
    assert ops.generalized_eigh(EYE, EYE, driver=driver).eigenvalues.tolist() == [1, 1, 1]
    with pytest.raises(BackendError, match=f"backend '{other}' has no driver '{driver}' for generalized_eigh: take"):
        ops.generalized_eigh(EYE, EYE, driver=driver, backend=other)


def test_every_backend_is_described():
    described = {info.name: info for info in ops.backends()}

    assert list(described) == ["cuda_compiled", "cuda_cupy", "cpu_compiled", "reference"]
    assert all(info.reason for info in described.values())
    assert described["cpu_compiled"].ops == ("generalized_eigh", "dare", "magnitude_prune", "ties", "torch_dare")
    assert set(described["reference"].ops) >= {*described["cpu_compiled"].ops, "filter_cores"}
    assert all(info.ops == () for info in described.values() if not info.available)


@pytest.mark.parametrize("backend", ["cuda_compiled", "cuda_cupy"])
def test_a_missing_backend_asked_for_by_name_is_refused_with_its_reason(backend):
    reason = next(info.reason for info in ops.backends() if info.name == backend)

    with pytest.raises(BackendError) as error:
        ops.generalized_eigh(EYE, EYE, backend=backend)

    assert str(error.value) == f"backend '{backend}' is not available: {reason}"


@pytest.mark.usefixtures("without_extension")
def test_without_the_extension_auto_is_the_reference_and_the_name_is_an_error_with_the_fix():
    assert ops.generalized_eigh(2 * EYE, EYE).eigenvalues.tolist() == [2, 2, 2]
    with pytest.raises(BackendError, match=r"'cpu_compiled' is not available: .*No module named.*pip install \."):
        ops.generalized_eigh(EYE, EYE, backend="cpu_compiled")
    assert "pip install" in next(info.reason for info in ops.backends() if info.name == "cuda_compiled")


def test_an_extension_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(extension, "__version__", "99.0")
    clear_caches()
    try:
        info = next(info for info in ops.backends() if info.name == "cpu_compiled")
        assert not info.available
        assert "of version 0.1.0 and sstmerge of 99.0" in info.reason
    finally:
        clear_caches()


def test_a_lapack_of_another_signature_is_refused():
    import scipy.linalg.cython_lapack

    capsules = scipy.linalg.cython_lapack.__pyx_capi__

    with pytest.raises(ValueError, match=r"sygvd has the signature 'void .* where 'void .* was expected"):
        _C.bind_lapack(capsules["dsygvd"], capsules["ssygvd"])
    with pytest.raises(ValueError, match="signature"):
        _C.bind_lapack(capsules["ssygv"], capsules["dsygvd"])


def test_raise_on_failure_names_problems_reasons_and_remedies():
    b = torch.stack([EYE, -EYE, EYE])
    a = torch.stack([EYE, EYE, EYE * torch.inf])
    solution = ops.generalized_eigh(a, b)

    with pytest.raises(SolverError) as error:
        solution.raise_on_failure(["layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"])

    message = str(error.value)
    assert message.startswith("2 of 3 generalized eigenproblems could not be solved.")
    assert "layers.0.q_proj" not in message
    assert "layers.0.k_proj: matrix b (the cost Fisher) is not positive definite" in message
    assert "layers.0.v_proj: matrix a or b holds NaN or infinity" in message
    assert "raise the damping" in message
    assert "more benign" in message


def test_raise_on_failure_is_silent_without_a_failure_and_counts_the_names():
    solution = ops.generalized_eigh(EYE.expand(2, 3, 3), EYE.expand(2, 3, 3))

    solution.raise_on_failure(["first", "second"])
    with pytest.raises(InputError, match="2 problems, 1 names"):
        solution.raise_on_failure(["first"])


def test_every_status_has_words():
    assert [status.name for status in SolveStatus if status.hint] == [
        "NOT_POSITIVE_DEFINITE",
        "NOT_CONVERGED",
        "NON_FINITE_INPUT",
    ]
    assert all(status.message for status in SolveStatus)


def kronecker_problem(layers: int, rows: int, columns: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Cores, the two cost factors with their generalized eigenvectors, and weights."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    arguments = {"cores": draw(layers, rows, columns)}
    for side, n in (("out", rows), ("in", columns)):
        gain, cost = draw(layers, n, n), draw(layers, n, 3 * n)
        metric = cost @ cost.mT / (3 * n)
        arguments[f"eigenvectors_{side}"] = reference.generalized_eigh(gain @ gain.mT, metric).eigenvectors
        arguments[f"metric_{side}"] = metric
    arguments["weights"] = draw(layers, rows, columns)
    return {name: tensor.to(dtype) for name, tensor in arguments.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 4), (7, 3), (2, 16)])
def test_filter_cores_keeps_what_its_weights_keep(rows, columns, dtype, tolerance):
    problem = kronecker_problem(3, rows, columns, dtype)
    q, p, w = problem["eigenvectors_out"], problem["eigenvectors_in"], problem["weights"]

    filtered = ops.filter_cores(**problem)

    # Σ_ij w_ij (q_iᵀ D C X p_j) q_i p_jᵀ, direction by direction.
    expected = torch.zeros(3, rows, columns, dtype=dtype)
    for i in range(rows):
        for j in range(columns):
            q_i, p_j = q[..., :, i], p[..., :, j]
            left = torch.einsum("lr,lrs->ls", q_i, problem["metric_out"])
            right = torch.einsum("lrs,ls->lr", problem["metric_in"], p_j)
            coordinate = torch.einsum("lr,lrs,ls->l", left, problem["cores"], right)
            expected += torch.einsum("l,lr,ls->lrs", w[:, i, j] * coordinate, q_i, p_j)
    scale = float(expected.abs().max())
    torch.testing.assert_close(filtered, expected, rtol=0, atol=tolerance * scale)


def test_filter_cores_with_weights_of_one_changes_nothing_and_of_zero_leaves_nothing():
    problem = kronecker_problem(2, 6, 5, torch.float64)
    ones = torch.ones_like(problem["weights"])

    torch.testing.assert_close(ops.filter_cores(**(problem | {"weights": ones})), problem["cores"])
    assert not ops.filter_cores(**(problem | {"weights": 0 * ones})).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cores": torch.ones(4)}, r"cores must have the shape \(\.\.\., R_o, R_i\), not \(4,\)"),
        ({"cores": torch.ones(2, 4, 3).half()}, "cores must be float32 or float64"),
        ({"weights": torch.ones(2, 3, 4)}, r"weights must have the shape \(2, 4, 3\), not \(2, 3, 4\)"),
        ({"metric_in": torch.ones(2, 4, 4)}, r"metric_in must have the shape \(2, 3, 3\), not \(2, 4, 4\)"),
        ({"metric_out": torch.ones(2, 4, 4).double()}, r"metric_out \(torch.float64 .* dtype and device of cores"),
        ({"backend": "fast"}, "unknown backend 'fast'"),
    ],
)
def test_filter_cores_refuses_bad_arguments_with_words(change, message):
    problem = kronecker_problem(2, 4, 3, torch.float32)

    with pytest.raises(InputError, match=message):
        ops.filter_cores(**(problem | change))


def test_filter_cores_has_no_compiled_backend_yet():
    problem = kronecker_problem(2, 4, 3, torch.float32)

    with pytest.raises(BackendError, match=r"'cpu_compiled' has no filter_cores, it has generalized_eigh, .*: take"):
        ops.filter_cores(**problem, backend="cpu_compiled")
