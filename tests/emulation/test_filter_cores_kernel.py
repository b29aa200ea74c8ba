"""The filter_cores kernel against its reference, in every order of threads and under the sanitizers."""

from __future__ import annotations

import pytest
import torch

from sstmerge import ops, reference
from sstmerge.errors import BackendError

SHAPES = [(1, 1, 1), (3, 4, 4), (2, 5, 9), (2, 16, 3), (1, 33, 17)]


def problem(batch, rows, columns, dtype):
    generator = torch.Generator().manual_seed(rows * 100 + columns)

    def matrices(*shape):
        return torch.randn(batch, *shape, dtype=torch.float64, generator=generator).to(dtype)

    return (
        matrices(rows, columns),
        matrices(rows, rows),
        matrices(rows, rows),
        matrices(columns, columns),
        matrices(columns, columns),
        matrices(rows, columns),
    )


def assert_close(found, arguments):
    exact = reference.filter_cores(*(argument.double() for argument in arguments))
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert float(error) < 200 * torch.finfo(found.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(emulated, shape, dtype):
    arguments = problem(*shape, dtype)

    assert_close(ops.filter_cores(*arguments, backend="emulated"), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_touches_nothing_else(sanitized, dtype):
    arguments = problem(2, 5, 9, dtype)

    assert_close(ops.filter_cores(*arguments, backend="sanitized"), arguments)


def test_strided_arguments(emulated):
    arguments = tuple(argument.mT.contiguous().mT for argument in problem(2, 5, 9, torch.float64))

    assert_close(ops.filter_cores(*arguments, backend="emulated"), arguments)


def test_too_large_a_core_is_refused_with_words(emulated):
    arguments = problem(1, 128, 128, torch.float64)

    with pytest.raises(BackendError, match=r"128 x 128 cores in torch.float64 needs 262144 bytes of shared memory"):
        ops.filter_cores(*arguments, backend="emulated")


def test_empty_batch(emulated):
    assert ops.filter_cores(*problem(0, 3, 4, torch.float32), backend="emulated").shape == (0, 3, 4)


BUGS = {
    "missing barrier": (
        "        out[element] = sum;\n    }\n    __syncthreads();",
        "        out[element] = sum;\n    }",
    ),
    "missing barrier after the weights": ("+ element];\n    }\n    __syncthreads();", "+ element];\n    }"),
    "last element left out": (
        "element < rows * columns; element += blockDim.x",
        "element < rows * columns - 1; element += blockDim.x",
    ),
    "wrong transpose": ("multiply(second, Q, 1, rows,", "multiply(second, Q, rows, 1,"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_caught(is_caught, bug):
    arguments = problem(2, 9, 12, torch.float64)

    assert is_caught(
        "filter_cores",
        *BUGS[bug],
        lambda backend: assert_close(ops.filter_cores(*arguments, backend=backend), arguments),
    )


def test_a_step_beyond_shared_memory_is_caught(is_caught):
    arguments = problem(1, 5, 9, torch.float64)

    assert is_caught(
        "filter_cores",
        "Scalar* second = first + size;",
        "Scalar* second = first + size + 1;",
        lambda backend: assert_close(ops.filter_cores(*arguments, backend=backend), arguments),
        sanitized=True,
    )
