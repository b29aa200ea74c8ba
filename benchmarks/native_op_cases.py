"""The problems of benchmarks/native_ops.py: every op, the best composition of torch's functions, and the usual naive one."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import scipy.linalg
import torch
from measuring import Call, Case
from torch import Tensor

from sstmerge import ops, reference

TOKENS_PER_SEQUENCE = 512


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def deviation_of(ours: Call, other: Call) -> Callable[[], float]:
    """Compare two results, tensors or tuples of them, relative to the largest element."""

    def compare() -> float:
        pairs = zip(_tensors(ours()), _tensors(other()), strict=True)
        return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)

    return compare


def _tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@cache
def _has_out_dtype(device_type: str) -> bool:
    """Whether torch multiplies half precision into float32 here."""
    try:
        one = torch.ones(16, 16, dtype=torch.bfloat16, device=device_type)
        torch.mm(one, one, out_dtype=torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def multiply(x: Tensor, basis: Tensor) -> Tensor:
    """Return x V in float32 as torch does it best: without rounding where it can."""
    if x.dtype == torch.float32:
        return x @ basis
    if _has_out_dtype(x.device.type):
        return torch.mm(x, basis, out_dtype=torch.float32)
    return (x @ basis).float()


def projection_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    tokens, depth = (32768, 4096) if device.type == "cuda" else (4096, 1024)
    tokens = tokens // 4 if quick else tokens
    for dtype in (torch.bfloat16, torch.float32):
        for rank, count in ((16, 1), (32, 1), (64, 1), (160, 1), (32, 3)):
            if quick and (rank, count) not in {(32, 1), (64, 1)}:
                continue
            yield _projection(tokens, depth, rank, count, dtype, device)


def _projection(tokens: int, depth: int, rank: int, count: int, dtype: torch.dtype, device: torch.device) -> Case:
    x = random(tokens, depth, dtype=dtype, device=device)
    bases = [random(depth, rank, dtype=dtype, device=device, seed=1 + i) / depth**0.5 for i in range(count)]

    def covariances() -> list[Tensor]:
        return [torch.zeros(rank, rank, dtype=torch.float64, device=device) for _ in bases]

    ours_sum, torch_sum, naive_sum = covariances(), covariances(), covariances()
    stacked = torch.cat(bases, dim=1)

    def ours(target: list[Tensor]) -> list[Tensor]:
        return ops.project_accumulate(x, bases, covariances=target)

    def best(target: list[Tensor]) -> list[Tensor]:
        projections = multiply(x, stacked).split(rank, dim=1)
        for sums, projected in zip(target, projections, strict=True):
            sums += projected.mT @ projected
        return list(projections)

    def naive(target: list[Tensor]) -> list[Tensor]:
        projections = [x.float() @ basis.float() for basis in bases]
        for sums, projected in zip(target, projections, strict=True):
            sums += projected.mT @ projected
        return projections

    def checked(run: Callable[[list[Tensor]], list[Tensor]]) -> Call:
        def call() -> list[Tensor]:
            target = covariances()
            run(target)
            return target

        return call

    def exact(target: list[Tensor]) -> None:
        for sums, basis in zip(target, bases, strict=True):
            projected = x.double() @ basis.double()
            sums += projected.mT @ projected

    size = x.element_size()
    return Case(
        op="project_accumulate",
        shape=f"{tokens} × {depth} on {count} × {rank}, {_name(dtype)}",
        bytes=size * depth * (tokens + count * rank) + 4 * tokens * rank * count,
        flops=count * (2 * tokens * depth * rank + 2 * tokens * rank * rank),
        variants={
            "sstmerge": lambda: ours(ours_sum),
            "torch": lambda: best(torch_sum),
            "naive": lambda: naive(naive_sum),
        },
        deviation=deviation_of(checked(ours), checked(exact)),
        tolerance=1e-4 if device.type == "cuda" or dtype == torch.float32 else 1e-2,
        facts={"tokens": tokens, "depth": depth, "rank": rank, "bases": count, "dtype": _name(dtype)},
    )


def score_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    sequences, depth = (64, 4096) if device.type == "cuda" else (8, 1024)
    sequences = sequences // 4 if quick else sequences
    for dtype in (torch.bfloat16, torch.float32):
        for rank in (32, 64) if quick else (16, 32, 64, 160):
            yield _scores(sequences, depth, rank, dtype, device)


def _scores(sequences: int, depth: int, rank: int, dtype: torch.dtype, device: torch.device) -> Case:
    tokens = sequences * TOKENS_PER_SEQUENCE
    x, gradient = (random(tokens, depth, dtype=dtype, device=device, seed=i) for i in range(2))
    V, U = (random(depth, rank, dtype=dtype, device=device, seed=2 + i) / depth**0.5 for i in range(2))
    first = torch.arange(sequences, device=device) * TOKENS_PER_SEQUENCE
    spans = torch.stack([first, first + TOKENS_PER_SEQUENCE], dim=1)

    def ours() -> list[Tensor]:
        found = ops.sequence_scores(x, gradient, V, U, spans, scores=False, squares=True, covariances=True)
        return [found.square_sum, found.input_covariance, found.output_covariance]

    def sums(inputs: Tensor, gradients: Tensor) -> list[Tensor]:
        batched = (sequences, TOKENS_PER_SEQUENCE, rank)
        scores = torch.bmm(gradients.reshape(batched).mT, inputs.reshape(batched))
        return [scores.square().sum(dim=0), inputs.mT @ inputs, gradients.mT @ gradients]

    def naive() -> list[Tensor]:
        """Materialise the gradient of the whole layer for every sequence, and project that."""
        squares = torch.zeros(rank, rank, device=device)
        for begin in range(0, tokens, TOKENS_PER_SEQUENCE):
            rows = slice(begin, begin + TOKENS_PER_SEQUENCE)
            weight_gradient = gradient[rows].mT @ x[rows]
            squares += (U.mT @ weight_gradient @ V).float().square()
        return [squares]

    def exact() -> list[Tensor]:
        return sums(x.double() @ V.double(), gradient.double() @ U.double())

    size = x.element_size()
    return Case(
        op="sequence_scores",
        shape=f"{sequences} × {TOKENS_PER_SEQUENCE} × {depth}, rank {rank}, {_name(dtype)}",
        bytes=2 * size * depth * (tokens + rank) + 3 * 8 * rank * rank,
        flops=2 * 2 * tokens * depth * rank + 3 * 2 * tokens * rank * rank,
        variants={
            "sstmerge": ours,
            "torch": lambda: sums(multiply(x, V), multiply(gradient, U)),
            "naive (.float())": lambda: sums(x.float() @ V.float(), gradient.float() @ U.float()),
            "naive (whole gradients)": naive,
        },
        deviation=deviation_of(ours, exact),
        tolerance=1e-4 if device.type == "cuda" or dtype == torch.float32 else 3e-2,
        facts={"sequences": sequences, "tokens": tokens, "depth": depth, "rank": rank, "dtype": _name(dtype)},
    )


def filter_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    layers = 224 if device.type == "cuda" else 64
    for rank in (32,) if quick else (16, 32, 64):
        for dtype in (torch.float32, torch.float64):
            matrices = [random(layers, rank, rank, dtype=dtype, device=device, seed=i) / rank**0.5 for i in range(6)]
            ours, best = (lambda m=matrices: ops.filter_cores(*m)), (lambda m=matrices: reference.filter_cores(*m))
            yield Case(
                op="filter_cores",
                shape=f"{layers} × {rank}², {_name(dtype)}",
                bytes=7 * layers * rank * rank * matrices[0].element_size(),
                flops=6 * 2 * layers * rank**3,
                variants={
                    "sstmerge": ours,
                    "torch": best,
                    "naive (loop)": lambda m=matrices: [reference.filter_cores(*one) for one in zip(*m, strict=True)],
                },
                deviation=deviation_of(ours, best),
                tolerance=1e4 * torch.finfo(dtype).eps,
                facts={"layers": layers, "rank": rank, "dtype": _name(dtype)},
            )


def eigen_problems(batch: int, n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw a of half rank and well-conditioned b, as Fishers of two adapters are; shapes (batch, n, n)."""
    gain = random(batch, n, max(n // 2, 1), dtype=torch.float64, device=device)
    cost = random(batch, n, 2 * n, dtype=torch.float64, device=device, seed=1)
    identity = torch.eye(n, dtype=torch.float64, device=device)
    return (gain @ gain.mT / n).to(dtype), (cost @ cost.mT / (2 * n) + 0.1 * identity).to(dtype)


def eigen_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    # What one call may cost at most: n³ times the batch.
    budget = 5e9 if device.type == "cuda" else 5e8
    shapes = [(batch, n) for n in (8, 32, 64, 128, 256, 512) for batch in (8, 64, 448, 4096)]
    if quick:
        shapes = [(448, 32), (448, 64), (64, 128)]
    for batch, n in shapes:
        for dtype in (torch.float64, torch.float32):
            if batch * n**3 <= budget:
                yield _eigen(batch, n, dtype, device)


def _eigen(batch: int, n: int, dtype: torch.dtype, device: torch.device) -> Case:
    a, b = eigen_problems(batch, n, dtype, device)
    variants: dict[str, Call] = {"sstmerge": lambda: ops.generalized_eigh(a, b)}
    if device.type == "cuda":
        backend = next((info.name for info in ops.backends() if info.available), "reference")
        for driver in ops.available_drivers(backend, n, dtype) if backend.startswith("cuda") else ():
            if driver != "sygvd" or batch <= 64:  # one problem after another: seconds for large batches
                variants[driver] = lambda driver=driver: ops.generalized_eigh(a, b, driver=driver)
    variants["torch"] = lambda: reference.generalized_eigh(a, b)
    host = [matrices.cpu().numpy() for matrices in (a, b)]
    if device.type == "cpu" or batch * n**3 <= 2e8:
        variants["scipy loop"] = lambda: _scipy_loop(*host)
    if device.type == "cuda" and importlib.util.find_spec("cupy") is not None:
        variants["cupy"] = _cupy_solver(a, b)

    def deviation() -> float:
        few = slice(0, min(batch, 8))
        exact = np.stack(
            [
                scipy.linalg.eigh(x, y, eigvals_only=True)
                for x, y in zip(*(m[few].astype(float) for m in host), strict=True)
            ]
        )
        found = ops.generalized_eigh(a, b)
        if found.status.any():
            return float("inf")
        return float(np.abs(found.eigenvalues[few].double().cpu().numpy() - exact).max() / exact.max())

    return Case(
        op="generalized_eigh",
        shape=f"{batch} × {n}², {_name(dtype)}",
        bytes=0,
        flops=0,
        variants=variants,
        deviation=deviation,
        tolerance=max(n, 10) * 10 * torch.finfo(dtype).eps,
        facts={"batch": batch, "n": n, "dtype": _name(dtype)},
    )


def _scipy_loop(a: np.ndarray, b: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    pairs = zip(a, b, strict=True)
    return [scipy.linalg.eigh(x, y, driver="gvd", check_finite=False) for x, y in pairs]


def _cupy_solver(a: Tensor, b: Tensor) -> Call:
    """Return what a user of cupy writes: Cholesky, an inverse, a batched eigensolver (it has no generalized one)."""
    import cupy

    gain, cost = cupy.from_dlpack(a), cupy.from_dlpack(b)

    def call() -> tuple[object, object]:
        inverse = cupy.linalg.inv(cupy.linalg.cholesky(cost))
        values, vectors = cupy.linalg.eigh(inverse @ gain @ inverse.swapaxes(-1, -2))
        return values, inverse.swapaxes(-1, -2) @ vectors

    return call


def sparsify_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    from peft.utils.merge_utils import dare_linear, magnitude_based_pruning
    from peft.utils.merge_utils import ties as peft_ties

    count = 448 if device.type == "cuda" else 32
    count = count // 8 if quick else count
    density = 0.2
    for dtype in (torch.bfloat16, torch.float32):
        tasks = [list(random(count, 16, 4096, dtype=dtype, device=device, seed=i).unbind()) for i in range(2)]
        values, size = tasks[0], count * 16 * 4096
        stacks, ones = [torch.stack(task) for task in tasks], torch.ones(2, device=device, dtype=dtype)
        facts = {"tensors": count, "dtype": _name(dtype), "density": density}
        shape = f"{count} × 16 × 4096, {_name(dtype)}"
        kept = round(density * 16 * 4096)

        def top(stack: Tensor, kept: int = kept) -> Tensor:
            flat = stack.flatten(1)
            chosen = flat.abs().topk(kept, dim=1).indices
            return torch.zeros_like(flat).scatter(1, chosen, flat.gather(1, chosen))

        def ties_of_stacks(stacks: list[Tensor] = stacks) -> Tensor:
            trimmed = torch.stack([top(stack) for stack in stacks])
            agrees = trimmed.sign() == trimmed.sum(dim=0).sign()
            return torch.where(agrees, trimmed, 0).sum(dim=0) / (agrees & (trimmed != 0)).sum(dim=0).clamp(min=1)

        prune = lambda values=values: ops.magnitude_prune(values, density)  # noqa: E731
        yield Case(
            op="magnitude_prune",
            shape=shape,
            bytes=2 * size * values[0].element_size(),
            flops=0,
            variants={
                "sstmerge": prune,
                "torch": lambda stack=stacks[0]: top(stack),
                "PEFT": lambda values=values: [magnitude_based_pruning(value, density) for value in values],
            },
            deviation=deviation_of(prune, lambda values=values: reference.magnitude_prune(values, density)),
            tolerance=0.0,
            facts=facts,
        )
        drop = lambda values=values: ops.dare(values, density, seed=0)  # noqa: E731
        yield Case(
            op="dare",
            shape=shape,
            bytes=2 * size * values[0].element_size(),
            flops=0,
            variants={
                "sstmerge": drop,
                "torch": lambda stack=stacks[0]: torch.where(torch.rand_like(stack) < density, stack / density, 0),
                "PEFT": lambda values=values, ones=ones[:1]: [dare_linear([value], ones, density) for value in values],
            },
            deviation=deviation_of(drop, lambda values=values: reference.dare(values, density, 0)),
            tolerance=0.0,
            facts=facts,
        )
        merge = lambda tasks=tasks: ops.ties(tasks, [1.0, 1.0], density)  # noqa: E731
        yield Case(
            op="ties",
            shape=f"2 × {shape}",
            bytes=3 * size * values[0].element_size(),
            flops=0,
            variants={
                "sstmerge": merge,
                "torch": ties_of_stacks,
                "PEFT": lambda tasks=tasks, ones=ones: [
                    peft_ties(list(pair), ones, density) for pair in zip(*tasks, strict=True)
                ],
            },
            deviation=deviation_of(merge, lambda tasks=tasks: reference.ties(tasks, [1.0, 1.0], density)),
            tolerance=1e-6,
            facts=facts,
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES: dict[str, Callable[[torch.device, bool], Iterator[Case]]] = {
    "project_accumulate": projection_cases,
    "sequence_scores": score_cases,
    "filter_cores": filter_cases,
    "generalized_eigh": eigen_cases,
    "sparsify": sparsify_cases,
}

# PEFT and torch say much about their arguments; a benchmark prints numbers.
warnings.filterwarnings("ignore", category=UserWarning)
