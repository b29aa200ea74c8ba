"""The kernels of magnitude_prune, dare and ties against the reference, in every order of threads and under sanitizers."""

from __future__ import annotations

import pytest
import torch
from sparsify_checks import (
    DTYPES,
    check_borders,
    check_dare,
    check_draw,
    check_not_finite,
    check_prune,
    check_rows,
    check_ties,
)

from sstmerge.ops import sparsify_kernels


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Tensors of several chunks that are small enough for the emulation."""
    monkeypatch.setattr(sparsify_kernels, "CHUNK", 64)
    monkeypatch.setattr(sparsify_kernels, "COUNT_THREADS", 64)
    monkeypatch.setattr(sparsify_kernels, "WRITE_THREADS", 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prune_equals_the_reference(emulated, dtype):
    check_prune("emulated", dtype, 0.3)


@pytest.mark.parametrize(("density", "rounding"), [(0.004, "down"), (0.004, "nearest"), (1.0, "nearest")])
def test_prune_to_nearly_nothing_or_not_at_all(emulated, density, rounding):
    check_prune("emulated", torch.bfloat16, density, rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dare_equals_the_reference(emulated, dtype):
    check_dare("emulated", dtype, 0.3)


def test_dare_with_the_largest_streams(emulated):
    check_dare("emulated", torch.float32, 1.0, stream=2**64 - 8)
    check_dare("emulated", torch.float32, 0.5, stream=2**33 - 1)


@pytest.mark.parametrize(("dtype", "method"), zip(DTYPES, ["total", "frequency"] * 2, strict=True), ids=str)
def test_ties_equals_the_reference(emulated, dtype, method):
    check_ties("emulated", dtype, 0.5, method)


@pytest.mark.parametrize("numel", [5, 100])
def test_rows_of_any_alignment(emulated, numel):
    check_rows("emulated", torch.bfloat16, numel)


def test_numbers_that_are_not_finite(emulated):
    check_not_finite("emulated", torch.float16)


def test_equal_magnitudes_are_kept_from_the_front(emulated):
    check_borders("emulated", torch.bfloat16)


def test_more_chunks_than_a_block_has_threads(emulated, monkeypatch):
    monkeypatch.setattr(sparsify_kernels, "CHUNK", 1)

    check_borders("emulated", torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_touches_nothing_else(sanitized, dtype):
    check_dare("sanitized", dtype, 0.3)
    check_ties("sanitized", dtype, 0.5, tasks=2)


def prune_and_ties(backend: str) -> None:
    check_prune(backend, torch.float32, 0.3)
    check_ties(backend, torch.float32, 0.5)


def dare(backend: str) -> None:
    check_dare(backend, torch.bfloat16, 0.3)


BUGS = {
    "counters written too early": (
        "    });\n    __syncthreads();\n    counts +=",
        "    });\n    counts +=",
        prune_and_ties,
    ),
    "higher digits ignored": ("if (bits >> (shift + width) == prefix)", "if (shift >= 0)", prune_and_ties),
    "running sum without its barrier": (
        "sums[thread - distance] : 0;\n        __syncthreads();",
        "sums[thread - distance] : 0;",
        prune_and_ties,
    ),
    "one equal entry too many": ("size == threshold && entry <= last", "size == threshold", prune_and_ties),
    "last chunk left out": (
        "chunk < table.chunk_offsets[tensor + 1]; ++chunk",
        "chunk + 1 < table.chunk_offsets[tensor + 1]; ++chunk",
        prune_and_ties,
    ),
    "tail left out": ("e = last + thread; e < chunk.end", "e = last + thread; e < chunk.end - 1", prune_and_ties),
    "tensor before the right one": (
        "chunk_offsets[middle] <= number",
        "chunk_offsets[middle] < number",
        prune_and_ties,
    ),
    "draw counts as negative": ("total >= 0;", "total > 0;", lambda backend: check_draw(backend, torch.float32)),
    "NaN lost": (
        "value >= 0 ? Real(0) : weighted;",
        "value < 0 ? weighted : Real(0);",
        lambda backend: check_not_finite(backend, torch.float32),
    ),
    "random words of the packet before": ("if (i == 0 || place == 0) random =", "if (i == 0) random =", dare),
    "all tensors on one stream": ("first_stream + chunk.tensor;", "first_stream;", dare),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_caught(is_caught, bug):
    old, new, check = BUGS[bug]

    assert is_caught("sparsify", old, new, check)


def test_a_packet_beyond_the_tensors_is_caught(is_caught):
    assert is_caught(
        "sparsify",
        "(chunk.offset + chunk.end) / kCount * kCount - chunk.offset",
        "chunk.end",
        lambda backend: check_dare(backend, torch.bfloat16, 0.3),
        sanitized=True,
    )
