"""The extension itself, called with spoiled arguments: an exception in words, and no byte is written.

`sstmerge.ops` never passes such arguments; whoever calls `sstmerge._C` directly may.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sstmerge.ops import generalized_eigh
from sstmerge.ops.extension import load_extension

extension = load_extension()[0]
pytestmark = pytest.mark.skipif(extension is None, reason="the extension was not built")

N, BATCH, SIZE, UNTOUCHED = 3, 2, 5, -7.0
TOO_LARGE = [2**31, 2**63, 2**64, -(2**63) - 1]
NOT_A_NUMBER = [None, "3", 1.5, b"", [1]]
NOT_POSITIVE = [0, -1, -(2**31)]
NULL = [0]
DTYPES = ["float8", "", "Float32", 32, None]


def problems() -> dict[str, torch.Tensor]:
    identity = torch.eye(N).expand(BATCH, N, N).contiguous()
    return {
        "a": identity,
        "b": identity.clone(),
        "eigenvalues": torch.full((BATCH, N), UNTOUCHED),
        "eigenvectors": torch.full((BATCH, N, N), UNTOUCHED),
        "status": torch.full((BATCH,), int(UNTOUCHED), dtype=torch.int32),
    }


def eigen_arguments(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    strides = {f"{name}_{which}_stride": size for name in "ab" for which, size in (("batch", N * N), ("row", N))}
    return {name: t.data_ptr() for name, t in tensors.items()} | strides | {"batch": BATCH, "n": N, "num_threads": 1}


EIGEN_SPOILED = {
    **{name: [*NULL, *NOT_A_NUMBER, -1, 2**64] for name in ("a", "b", "eigenvalues", "eigenvectors", "status")},
    **{f"{name}_batch_stride": [-1, -N, *NOT_A_NUMBER, 2**63] for name in "ab"},
    **{f"{name}_row_stride": [0, N - 1, -N, *NOT_A_NUMBER, 2**63] for name in "ab"},
    "batch": [-1, -(2**63), *NOT_A_NUMBER, 2**63],
    "n": [-1, -(2**31), *NOT_A_NUMBER, *TOO_LARGE, 2**31 - 1],
    "num_threads": [*NOT_POSITIVE, *NOT_A_NUMBER, *TOO_LARGE],
}


def tensors_of(tasks: int) -> dict[str, torch.Tensor]:
    return {"values": torch.arange(float(tasks * SIZE)).view(tasks, SIZE), "outputs": torch.full((1, SIZE), UNTOUCHED)}


def list_arguments(tensors: dict[str, torch.Tensor], **more: Any) -> dict[str, Any]:
    addresses = {name: [row.data_ptr() for row in rows] for name, rows in tensors.items()}
    return {"dtype": "float32", **addresses, "sizes": [SIZE], "num_threads": 1, **more}


LIST_SPOILED = {
    "dtype": DTYPES,
    "values": [[], [0], [1, 2, 3], [None], None, [-1]],
    "outputs": [[], [0], [1, 2], [None], None, [-1]],
    "sizes": [[], [-1], [-(2**63)], [SIZE, SIZE], [None], None, [2**63]],
    "num_threads": [*NOT_POSITIVE, *NOT_A_NUMBER, *TOO_LARGE],
}
KEPT_SPOILED = {"kept": [[], [-1], [SIZE + 1], [1, 1], [None], None, [2**63]]}
DARE_MORE = {"seed": 1, "first_stream": 0, "keep_below": 2**31, "scale": 2.0}
DARE_SPOILED = {
    "seed": [-1, 2**64, None, "1"],
    "first_stream": [-1, 2**64, None],
    "keep_below": [0, -1, 2**32 + 1, 2**64, None],
    "scale": [None, "2", [1.0]],
}
TIES_MORE = {"kept": [2], "weights": [1.0, 0.5], "by_frequency": False}
TIES_SPOILED = {"weights": [[], [1.0], [1.0, 1.0, 1.0], [None], None], "by_frequency": ["yes"]}

# By function: how its tensors are made, its arguments from them, and what each argument may not be.
CALLS: dict[str, tuple[Callable, Callable, dict[str, list]]] = {
    "generalized_eigh_float32": (problems, eigen_arguments, EIGEN_SPOILED),
    "magnitude_prune": (
        lambda: tensors_of(1),
        lambda tensors: list_arguments(tensors, kept=[2]),
        LIST_SPOILED | KEPT_SPOILED,
    ),
    "dare": (
        lambda: tensors_of(1),
        lambda tensors: list_arguments(tensors, **DARE_MORE),
        LIST_SPOILED | DARE_SPOILED,
    ),
    "ties": (
        lambda: tensors_of(2),
        lambda tensors: list_arguments(tensors, **TIES_MORE),
        LIST_SPOILED | KEPT_SPOILED | TIES_SPOILED,
    ),
}
SPOILED = [(name, key, value) for name, (_, _, spoils) in CALLS.items() for key in spoils for value in spoils[key]]


def written(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs = [tensors[name] for name in ("eigenvalues", "eigenvectors", "status", "outputs") if name in tensors]
    return torch.cat([output.flatten().double() for output in outputs])


@pytest.fixture(autouse=True, scope="module")
def bound():
    generalized_eigh(torch.eye(2)[None], torch.eye(2)[None], backend="cpu_compiled")  # takes LAPACK over


@pytest.mark.parametrize("name", CALLS)
def test_unspoiled_arguments_are_taken(name):
    make, arguments, _ = CALLS[name]
    tensors = make()
    getattr(extension, name)(**arguments(tensors))
    assert not (written(tensors) == UNTOUCHED).any()


@pytest.mark.parametrize(("name", "key", "value"), SPOILED)
def test_a_spoiled_argument_is_refused(name, key, value):
    make, arguments, _ = CALLS[name]
    tensors = make()
    with pytest.raises((ValueError, TypeError)):
        getattr(extension, name)(**arguments(tensors) | {key: value})
    assert (written(tensors) == UNTOUCHED).all()


@given(data=st.data())
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_several_spoiled_arguments_are_refused(data):
    name = data.draw(st.sampled_from(sorted(CALLS)))
    make, arguments, spoils = CALLS[name]
    keys = data.draw(st.lists(st.sampled_from(sorted(spoils)), min_size=2, unique=True))
    tensors = make()
    with pytest.raises((ValueError, TypeError)):
        getattr(extension, name)(**arguments(tensors) | {key: data.draw(st.sampled_from(spoils[key])) for key in keys})
    assert (written(tensors) == UNTOUCHED).all()


@pytest.mark.parametrize("library", [-1, 99, 2**31, None])
def test_cusolver_refuses_a_library_that_was_not_opened(library):
    with pytest.raises((ValueError, TypeError)):
        extension.cusolver_path(library=library)


@pytest.mark.parametrize("kernel", ["", "nothing", "project", None])
def test_there_is_no_such_kernel(kernel):
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        extension.cuda_launch(kernel, (1, 1, 1), 32, 0, 0, 0, b"")


@pytest.mark.skipif(bool(extension and extension.cuda_build_reason()), reason="built without CUDA")
def test_a_kernel_is_not_launched_with_too_few_arguments():
    name = sorted(extension.cuda_kernel_names())[0]
    for arguments in (b"", b"\0" * 8, b"\0" * 4096):
        with pytest.raises(ValueError, match="arguments"):
            extension.cuda_launch(name, (1, 1, 1), 32, 0, 0, 0, arguments)
