"""sequence_scores on a GPU: the checks of the emulation, and shapes that a model has."""

from __future__ import annotations

import pytest
import torch
from score_cases import (
    COLUMNS,
    PACKED,
    RAGGED,
    SPANS,
    assert_exact,
    assert_padding_changes_nothing,
    assert_permutation_changes_nothing,
    assert_same_bits,
    score_case,
)

from sstmerge.ops import score_kernels

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spans", SPANS)
def test_spans(gpu_backend, spans, dtype):
    assert_exact(score_case(SPANS[spans], dtype=dtype, columns=(4, 7)).to("cuda"), gpu_backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_columns(gpu_backend, columns, dtype):
    assert_exact(score_case(RAGGED, dtype=dtype, columns=columns).to("cuda"), gpu_backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [(16, 16), (32, 32), (64, 64), (160, 160)])
@pytest.mark.parametrize("lengths", [[512] * 40, [20000], [1, 700, 0, 3000, 129] * 7])
def test_shapes_of_a_model(gpu_backend, lengths, columns, dtype):
    stops = torch.tensor(lengths).cumsum(0).tolist()
    spans = [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
    assert_exact(score_case(spans, dtype=dtype, columns=columns, depths=(1024, 2049)).to("cuda"), gpu_backend)


@pytest.mark.parametrize("projected", ["x", "gradient", "x gradient"])
def test_projected_sides(gpu_backend, projected):
    case = score_case(RAGGED, dtype=torch.bfloat16, projected=projected, columns=(5, 12))
    assert_exact(case.to("cuda"), gpu_backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_and_padding_of_sequences_change_nothing(gpu_backend, dtype):
    case = score_case(PACKED, dtype=dtype, tokens=130, columns=(5, 9)).to("cuda")

    assert_permutation_changes_nothing(case, gpu_backend)
    assert_padding_changes_nothing(case, gpu_backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_arguments_give_the_same_bits(gpu_backend, dtype):
    case = score_case([(0, 3000), (3000, 9000)], dtype=dtype, columns=(48, 64), depths=(512, 768)).to("cuda")
    first = case.run(gpu_backend)

    for _ in range(5):
        assert_same_bits(first, case.run(gpu_backend))


def test_a_small_workspace_changes_only_rounding(gpu_backend, monkeypatch):
    monkeypatch.setattr(score_kernels, "WORKSPACE_BYTES", 1)
    assert_exact(score_case(RAGGED, dtype=torch.bfloat16).to("cuda"), gpu_backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_span_outside_the_tokens_gives_nan(gpu_backend, dtype):
    case = score_case([(0, 20), (20, 20), (24, 43)], tokens=43, dtype=dtype).to("cuda")
    case.spans[1, 1] = 99
    scores = case.run(gpu_backend, projected_gradient=False).scores

    assert scores[1].isnan().all()
    assert scores[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_device(gpu_backend, dtype):
    case = score_case(RAGGED, dtype=dtype).to("cuda")
    case.run(gpu_backend)  # compiles and loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(gpu_backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream(gpu_backend):
    case = score_case(RAGGED, dtype=torch.bfloat16).to("cuda")
    expected = case.run(gpu_backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = case.run(gpu_backend)
    torch.cuda.current_stream().wait_stream(stream)

    assert_same_bits(found, expected)
