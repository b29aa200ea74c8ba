"""The doctor must find what is wrong, not only say that all is well."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
import torch
from rich.console import Console

from sstmerge import __version__, ops
from sstmerge.pipeline import doctor
from sstmerge.pipeline.doctor import diagnose, render


def rendered(diagnosis: doctor.Diagnosis) -> str:
    console = Console(width=320, file=io.StringIO())
    console.print(render(diagnosis))
    return console.file.getvalue()


def test_a_sound_installation_passes_every_check():
    diagnosis = diagnose()

    assert diagnosis.ok
    assert diagnosis.versions["sstmerge"] == __version__
    assert diagnosis.versions["torch"] == torch.__version__
    assert list(diagnosis.versions) == ["sstmerge", "python", "torch", "transformers", "peft", "scipy", "numpy"]
    expected = {(op, info.name) for info in ops.backends() for op in info.ops}
    assert {(check.op, check.backend) for check in diagnosis.checks} == expected
    assert len(diagnosis.checks) == 2 * len(expected)
    assert all(0 <= check.residual < check.tolerance < 1e-3 for check in diagnosis.checks)
    exact = {"dare", "magnitude_prune", "ties", "torch_dare"}  # bit for bit the reference
    assert all((check.residual == 0) == (check.op in exact) for check in diagnosis.checks)


def test_the_same_seed_gives_the_same_diagnosis():
    assert diagnose(seed=5) == diagnose(seed=5)
    assert diagnose(seed=5) != diagnose(seed=6)


def test_the_tables_hold_versions_reasons_and_residuals():
    diagnosis = diagnose()
    text = rendered(diagnosis)

    for info in diagnosis.backends:
        assert info.reason in text
    for check in diagnosis.checks:
        assert f"{check.residual:.1e}" in text
    assert diagnosis.versions["peft"] in text
    assert "Everything that is available works." in text


@pytest.mark.parametrize("field", ["eigenvalues", "eigenvectors"])
def test_a_solver_that_is_off_by_a_little_is_found(monkeypatch, field):
    solve = ops.generalized_eigh

    def slightly_wrong(a, b, **arguments):
        solution = solve(a, b, **arguments)
        return dataclasses.replace(solution, **{field: getattr(solution, field) * 1.001})

    monkeypatch.setattr(ops, "generalized_eigh", slightly_wrong)
    diagnosis = diagnose()

    assert not diagnosis.ok
    wrong = [check for check in diagnosis.checks if not check.ok]
    assert {check.op for check in wrong} == {"generalized_eigh"}
    assert all(check.residual > 5e-4 for check in wrong)
    assert "Wrong results: generalized_eigh on cpu_compiled (float32)" in rendered(diagnosis)


def test_every_driver_of_a_backend_with_several_is_checked(monkeypatch):
    monkeypatch.setattr(ops, "available_drivers", lambda backend, n: ("sygvd", "auto")[: 1 + (backend[0] == "c")])

    labels = [check.label for check in diagnose().checks if check.op == "generalized_eigh"]

    assert labels == [
        *["generalized_eigh by sygvd"] * 2,
        *["generalized_eigh by auto"] * 2,
        *["generalized_eigh"] * 2,
    ]


def test_a_solver_that_hides_a_failure_is_found(monkeypatch):
    solve = ops.generalized_eigh

    def optimistic(a, b, **arguments):
        solution = solve(a, b, **arguments)
        return dataclasses.replace(solution, status=torch.zeros_like(solution.status))

    monkeypatch.setattr(ops, "generalized_eigh", optimistic)

    assert all(check.residual == math.inf for check in diagnose().checks if check.op == "generalized_eigh")


def test_a_wrong_filter_is_found(monkeypatch):
    filter_cores = ops.filter_cores
    monkeypatch.setattr(ops, "filter_cores", lambda *cores, **options: filter_cores(*cores, **options) + 1e-3)

    assert [check.op for check in diagnose().checks if not check.ok] == ["filter_cores"] * 2


@pytest.mark.parametrize("op", ["dare", "magnitude_prune", "ties", "torch_dare"])
@pytest.mark.parametrize("change", [lambda t: t * 1.001, lambda t: t.roll(1)], ids=["values", "entries"])
def test_a_wrong_sparsifier_is_found(monkeypatch, op, change):
    right = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *values, **options: [change(t) for t in right(*values, **options)])

    assert {check.op for check in diagnose().checks if not check.ok} == {op}


def test_wrong_scores_are_found(monkeypatch):
    right = ops.sequence_scores

    def slightly_wrong(*arguments, **options):
        scores = right(*arguments, **options)
        return dataclasses.replace(scores, rotated_square_sum=scores.rotated_square_sum * 1.001)

    monkeypatch.setattr(ops, "sequence_scores", slightly_wrong)

    assert [check.op for check in diagnose().checks if not check.ok] == ["sequence_scores"] * 2


def test_nan_that_calls_itself_a_solution_is_found(monkeypatch):
    solve = ops.generalized_eigh

    def nan_after_the_first(a, b, **arguments):
        solution = solve(a, b, **arguments)
        eigenvectors = solution.eigenvectors.clone()
        eigenvectors[3] = torch.nan
        return dataclasses.replace(solution, eigenvectors=eigenvectors)

    monkeypatch.setattr(ops, "generalized_eigh", nan_after_the_first)

    assert not [check for check in diagnose().checks if check.op == "generalized_eigh" and check.ok]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "package-that-nobody-has"))
    diagnosis = diagnose()

    assert diagnosis.versions["package-that-nobody-has"] == "not installed"
    assert not diagnosis.ok
    assert "Missing packages: package-that-nobody-has" in rendered(diagnosis)
