"""`sstmerge doctor`: what is installed, which backends run here, why others do not, and whether every op is right."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sstmerge import __version__, ops, reference
from sstmerge.ops import BackendInfo, BackendName, DriverName, SolveStatus

_PACKAGES = ("torch", "transformers", "peft", "scipy", "numpy")
_MISSING = "not installed"

# Sizes of the random problems: the smallest, an odd one and those of one and two rank-32 adapters.
_SIZES = (1, 7, 32, 64)

# Dtypes of the problems of an op that does not take float64.
_ACTIVATION_DTYPES = dict.fromkeys(("project_accumulate", "sequence_scores"), (torch.float32, torch.float16))

# A check passes up to this many rounding errors for each row of the largest problem.
_ROUNDING_ERRORS = 10


@dataclass(frozen=True)
class OpCheck:
    """How far an op on one backend is from its reference twin.

    Attributes:
        op: Name of the op.
        backend: Name of the backend.
        dtype: Dtype of the problems, without "torch.".
        residual: Largest relative deviation over all problems; infinity where a status is wrong.
        tolerance: Largest residual that passes.
        driver: Name of the driver, where the backend has several for the op.
    """

    op: str
    backend: str
    dtype: str
    residual: float
    tolerance: float
    driver: str = ""

    @property
    def label(self) -> str:
        """The op, with the driver where there are several."""
        return f"{self.op} by {self.driver}" if self.driver else self.op

    @property
    def ok(self) -> bool:
        """Whether the residual is within the tolerance."""
        return self.residual <= self.tolerance


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        versions: Version of every package that matters, "not installed" where it is missing.
        backends: Every backend, available or with the reason why not.
        checks: One entry per op, available backend and dtype.
    """

    versions: dict[str, str]
    backends: tuple[BackendInfo, ...]
    checks: tuple[OpCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether all packages are there and every check passed; a missing backend is no fault."""
        return _MISSING not in self.versions.values() and all(check.ok for check in self.checks)


def diagnose(seed: int = 0) -> Diagnosis:
    """Look at the installation and run every op on every available backend against its reference twin.

    Args:
        seed: Seed of the random problems.

    Returns:
        Versions, backends and checks; takes well under a second after the imports.
    """
    check_by_op = {
        "generalized_eigh": _check_generalized_eigh,
        "filter_cores": _check_filter_cores,
        "dare": _check_dare,
        "magnitude_prune": _check_magnitude_prune,
        "ties": _check_ties,
        "torch_dare": _check_torch_dare,
        "project_accumulate": _check_project_accumulate,
        "sequence_scores": _check_sequence_scores,
    }
    backends = ops.backends()
    checks = [
        OpCheck(
            op,
            backend.name,
            str(dtype).removeprefix("torch."),
            check(backend.name, dtype, seed),
            # All results are kept in float32 at least.
            tolerance=_ROUNDING_ERRORS * max(_SIZES) * torch.finfo(torch.promote_types(dtype, torch.float32)).eps,
            driver=driver,
        )
        for backend in backends
        for op in backend.ops
        for driver, check in _by_driver(op, backend.name, check_by_op[op]).items()
        for dtype in _ACTIVATION_DTYPES.get(op, (torch.float32, torch.float64))
    ]
    return Diagnosis(_versions(), backends, tuple(checks))


def _by_driver(op: str, backend: BackendName, check: Callable[..., float]) -> dict[str, Callable[..., float]]:
    """Return the check of an op by driver; for a backend that has no choice of them, as it is."""
    drivers = ops.available_drivers(backend, max(_SIZES)) if op == "generalized_eigh" else ()
    return {driver: partial(check, driver=driver) for driver in drivers} if len(drivers) > 1 else {"": check}


def render(diagnosis: Diagnosis) -> Group:
    """Lay out a diagnosis for the terminal.

    Args:
        diagnosis: What `diagnose` found.

    Returns:
        Three tables and a verdict, for `rich.console.Console.print`.
    """
    versions = Table("package", "version", title="Versions", title_justify="left")
    for package, version in diagnosis.versions.items():
        versions.add_row(package, Text(version, style="red" if version == _MISSING else ""))
    backends = Table("backend", "", "what it is, or why it is missing", "ops", title="Backends", title_justify="left")
    for backend in diagnosis.backends:
        words = Text("available", style="green") if backend.available else Text("missing", style="yellow")
        backends.add_row(backend.name, words, Text(backend.reason), ", ".join(backend.ops))
    columns = ("op", "backend", "dtype", "residual", "allowed", "")
    checks = Table(*columns, title="Every op against its reference twin in float64", title_justify="left")
    for check in diagnosis.checks:
        words = Text("ok", style="green") if check.ok else Text("WRONG", style="bold red")
        checks.add_row(
            check.label, check.backend, check.dtype, f"{check.residual:.1e}", f"{check.tolerance:.1e}", words
        )
    return Group(versions, backends, checks, _verdict(diagnosis))


def _verdict(diagnosis: Diagnosis) -> Text:
    missing = [package for package, version in diagnosis.versions.items() if version == _MISSING]
    wrong = [f"{check.label} on {check.backend} ({check.dtype})" for check in diagnosis.checks if not check.ok]
    if missing:
        return Text(f"Missing packages: {', '.join(missing)}. Install sstmerge with pip to get them.", style="red")
    if wrong:
        return Text(f"Wrong results: {', '.join(wrong)}. Use another backend and report this table.", style="red")
    return Text("Everything that is available works.", style="green")


def _versions() -> dict[str, str]:
    versions = {"sstmerge": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = _MISSING
    return versions


def _random_problems(batch: int, n: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return symmetric a of low rank and well-conditioned b, as Fishers are; shapes (batch, n, n)."""
    gain = torch.randn(batch, n, max(1, n // 2), dtype=torch.float64, generator=generator)
    cost = torch.randn(batch, n, 4 * n, dtype=torch.float64, generator=generator)
    identity = torch.eye(n, dtype=torch.float64)
    return (gain @ gain.mT / n).to(dtype), (cost @ cost.mT / (4 * n) + 0.1 * identity).to(dtype)


def _check_generalized_eigh(backend: BackendName, dtype: torch.dtype, seed: int, driver: DriverName = "auto") -> float:
    """Return the largest relative deviation in eigenvalues, residual and orthogonality; infinity for a wrong status."""
    generator = torch.Generator().manual_seed(seed)
    deviations = []
    for n in _SIZES:
        a, b = _random_problems(4, n, dtype, generator)
        b[1, n - 1, n - 1] = -1.0
        a[2, n - 1, 0] = torch.nan
        expected = [
            SolveStatus.CONVERGED,
            SolveStatus.NOT_POSITIVE_DEFINITE,
            SolveStatus.NON_FINITE_INPUT,
            SolveStatus.CONVERGED,
        ]
        found = ops.generalized_eigh(_moved(a, backend), _moved(b, backend), driver=driver, backend=backend)
        if found.status.tolist() != expected:
            return math.inf
        values, vectors = found.eigenvalues.cpu(), found.eigenvectors.cpu()
        deviations += [_deviation(a[i], b[i], values[i], vectors[i]) for i in (0, 3)]
    return _largest(*deviations)


def _moved(tensor: Tensor, backend: BackendName) -> Tensor:
    """Return a tensor on the device whose tensors a backend takes."""
    return tensor.cuda() if backend.startswith("cuda") else tensor


def _deviation(a: Tensor, b: Tensor, eigenvalues: Tensor, eigenvectors: Tensor) -> float:
    """Return the relative distance of a solution (n,), (n, n) of one problem from an exact one."""
    a, b, eigenvalues, eigenvectors = a.double(), b.double(), eigenvalues.double(), eigenvectors.double()
    exact = reference.generalized_eigh(a, b).eigenvalues
    scale = exact.abs().max()
    equation = a @ eigenvectors - b @ eigenvectors * eigenvalues
    identity = torch.eye(len(eigenvalues), dtype=torch.float64)
    return _largest(
        float((eigenvalues - exact).abs().max() / scale),
        float(equation.abs().max() / scale / (b @ eigenvectors).abs().max()),
        float((eigenvectors.mT @ b @ eigenvectors - identity).abs().max()),
    )


def _largest(*deviations: float) -> float:
    """Return the maximum, or NaN if any of them is NaN; the builtin `max` may pass over it."""
    return float(torch.tensor(deviations, dtype=torch.float64).max())


def _check_filter_cores(backend: BackendName, dtype: torch.dtype, seed: int) -> float:
    """Return the largest relative deviation from the reference, and with weights of one from the cores themselves."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = _SIZES[-2:]
    bases = [*_random_basis(3, rows, dtype, generator), *_random_basis(3, columns, dtype, generator)]
    cores, weights = torch.randn(2, 3, rows, columns, dtype=torch.float64, generator=generator).to(dtype)
    exact = reference.filter_cores(*(tensor.double() for tensor in (cores, *bases, weights)))
    deviations = []
    for factors, expected in ((weights, exact), (torch.ones_like(weights), cores)):
        arguments = [_moved(tensor, backend) for tensor in (cores, *bases, factors)]
        found = ops.filter_cores(*arguments, backend=backend).double().cpu()
        deviations.append(float((found - expected).abs().max() / expected.abs().max()))
    return _largest(*deviations)


def _random_basis(batch: int, n: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return generalized eigenvectors and the metric in which they are orthonormal, both (batch, n, n)."""
    a, b = _random_problems(batch, n, dtype, generator)
    return reference.generalized_eigh(a, b).eigenvectors, b


def _check_magnitude_prune(backend: BackendName, dtype: torch.dtype, seed: int) -> float:
    """Return the largest deviation from the reference; infinity where other entries are kept."""
    values = _random_tensors(backend, dtype, seed)
    return _sparse_deviation(
        ops.magnitude_prune(values, 0.3, backend=backend), reference.magnitude_prune(values, density=0.3)
    )


def _check_dare(backend: BackendName, dtype: torch.dtype, seed: int) -> float:
    """Return the largest deviation from the reference; infinity where other entries are kept."""
    values = _random_tensors(backend, dtype, seed)
    return _sparse_deviation(ops.dare(values, 0.3, seed, backend=backend), reference.dare(values, 0.3, seed))


def _check_torch_dare(backend: BackendName, dtype: torch.dtype, seed: int) -> float:
    """Return the largest deviation from the reference; infinity where other entries are kept."""
    values = _random_tensors(backend, dtype, seed)
    one, other = (torch.Generator().manual_seed(seed) for _ in range(2))
    found = ops.torch_dare(values, 0.3, generator=one, backend=backend)
    return _sparse_deviation(found, reference.torch_dare(values, 0.3, generator=other))


def _check_ties(backend: BackendName, dtype: torch.dtype, seed: int) -> float:
    """Return the largest deviation from the reference; infinity where other entries are kept."""
    values, weights = [_random_tensors(backend, dtype, seed + task) for task in range(3)], [0.5, -1.0, 2.0]
    return _sparse_deviation(ops.ties(values, weights, 0.3, backend=backend), reference.ties(values, weights, 0.3))


def _random_tensors(backend: BackendName, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Return tensors of several sizes on the device of a backend, with magnitudes that occur more than once."""
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if backend.startswith("cuda") else "cpu"
    drawn = [torch.randn(n, 33, generator=generator) for n in _SIZES]
    return [(16 * tensor).round().div(16).to(device, dtype) for tensor in drawn]


def _sparse_deviation(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if any(not torch.equal(a == 0, b == 0) for a, b in zip(found, expected, strict=True)):
        return math.inf
    pairs = zip(found, expected, strict=True)
    return _largest(*(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs))


def _check_project_accumulate(backend: BackendName, dtype: torch.dtype, seed: int) -> float:
    """Return the largest relative deviation of projections and covariances, for few and for many columns."""
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if backend.startswith("cuda") else "cpu"
    rows = torch.randn(200, 99, generator=generator).to(device, dtype)
    weights = torch.rand(200, generator=generator).to(device)
    deviations = []
    for sizes in (_SIZES[:3], _SIZES):
        bases = [torch.randn(99, size, generator=generator).to(device, dtype) for size in sizes]
        found, exact = ([torch.zeros(n, n, dtype=torch.float64, device=device) for n in sizes] for _ in range(2))
        projected = ops.project_accumulate(rows, bases, covariances=found, weights=weights, backend=backend)
        exact_bases = [basis.double() for basis in bases]
        expected = reference.project_accumulate(rows.double(), exact_bases, covariances=exact, weights=weights)
        pairs = zip((*projected, *found), (*expected, *exact), strict=True)
        deviations += [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    return _largest(*deviations)


def _check_sequence_scores(backend: BackendName, dtype: torch.dtype, seed: int) -> float:
    """Return the largest relative deviation of any of the sums."""
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if backend.startswith("cuda") else "cpu"

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    rows, columns = _SIZES[-2:]
    x, gradient = draw(200, 2 * columns).to(dtype), draw(200, 2 * rows).to(dtype)
    V, U = draw(2 * columns, columns).to(dtype), draw(2 * rows, rows).to(dtype)
    spans = torch.tensor([[0, 150], [199, 200], [160, 160], [160, 199]], device=device)
    weights, rotation = draw(4).abs(), (draw(rows, rows), draw(columns, columns))
    found = ops.sequence_scores(
        x,
        gradient,
        V,
        U,
        spans,
        weights=weights,
        squares=True,
        rotation=rotation,
        covariances=True,
        projected_gradient=True,
        backend=backend,
    )
    exact = reference.sequence_scores(
        x.double(),
        gradient.double(),
        V.double(),
        U.double(),
        spans,
        weights=weights,
        squares=True,
        rotation=rotation,
        covariances=True,
        projected_gradient=True,
    )
    pairs = [(getattr(found, name), value) for name, value in vars(exact).items()]
    return _largest(*(float((a.double() - b.double()).abs().max() / b.abs().max()) for a, b in pairs))
