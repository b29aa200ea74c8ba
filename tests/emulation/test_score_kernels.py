"""The kernels of sequence_scores against exact sums, in every order of threads and under the sanitizers."""

from __future__ import annotations

import dataclasses

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
    deviation,
    exact_scores,
    score_case,
)

from sstmerge.ops import device, score_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUSED = [(16, 64), (16, 128), (32, 64), (32, 128), (64, 64), (64, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spans", SPANS)
def test_spans(emulated, spans, dtype):
    assert_exact(score_case(SPANS[spans], dtype=dtype, columns=(4, 7)), "emulated")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", COLUMNS)
def test_columns(emulated, columns, dtype):
    assert_exact(score_case([(3, 50), (50, 50), (60, 99)], dtype=dtype, columns=columns), "emulated")


@pytest.mark.parametrize(("columns", "rows"), FUSED)
def test_every_fused_kernel(emulated, columns, rows):
    spans = [(0, 90), (90, 260)] if rows == 128 else [(0, 90), (90, 150)]
    assert_exact(score_case(spans, dtype=torch.bfloat16, columns=(columns - 5, columns)), "emulated")

    assert emulated.launched[0] == f"fused_scores_bfloat16_{columns}x{rows}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_depths_and_strides(emulated, dtype):
    case = score_case([(1, 40), (41, 77)], dtype=dtype, depths=(37, 71), columns=(5, 9))
    strided = dataclasses.replace(
        case,
        x=torch.cat([case.x, case.x], dim=1)[:, :71],
        gradient=case.gradient.mT.contiguous().mT,
        V=case.V.mT.contiguous().mT,
        spans=torch.cat([case.spans, case.spans], dim=1)[:, :2],
        weights=torch.stack([case.weights, case.weights], dim=1)[:, 0],
        rotation=tuple(matrix.double().mT.contiguous().mT for matrix in case.rotation),
    )

    assert_exact(strided, "emulated")


@pytest.mark.parametrize("projected", ["x", "gradient", "x gradient"])
def test_projected_sides(emulated, projected):
    assert_exact(score_case(RAGGED, dtype=torch.bfloat16, projected=projected, columns=(5, 12)), "emulated")
    assert not any(kernel.startswith("fused") for kernel in emulated.launched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_threads_changes_no_bit(emulated, dtype):
    case = score_case(RAGGED, dtype=dtype, columns=(7, 18))
    found = case.run("emulated")
    emulated.order = 0

    assert_same_bits(found, case.run("emulated"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_and_padding_of_sequences_change_nothing(emulated, dtype):
    case = score_case(PACKED, dtype=dtype, tokens=130, columns=(5, 9))

    assert_permutation_changes_nothing(case, "emulated")
    assert_padding_changes_nothing(case, "emulated")


def test_only_what_is_asked_for(emulated):
    case = score_case(RAGGED, dtype=torch.bfloat16)
    nothing = {"scores": False, "squares": False, "rotation": None, "covariances": False, "projected_gradient": False}
    alone, everything = case.run("emulated", **nothing), case.run("emulated")

    assert torch.equal(alone.score_sum, everything.score_sum)
    missing = [name for name, value in vars(alone).items() if value is None]
    assert len(missing) == 6
    assert_same_bits(
        case.run("emulated", **nothing | {"squares": True}),
        dataclasses.replace(alone, square_sum=everything.square_sum),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_workspace_changes_only_rounding(emulated, monkeypatch, dtype):
    case = score_case(PACKED, dtype=dtype, columns=(5, 9))
    expected = case.run("emulated")
    emulated.launched.clear()
    monkeypatch.setattr(score_kernels, "WORKSPACE_BYTES", 1)
    found = case.run("emulated")

    assert emulated.launched.count("sum_chunks") == len(PACKED)
    assert torch.equal(found.scores, expected.scores)
    assert deviation(found, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_chunk_per_sequence(emulated, monkeypatch, dtype):
    monkeypatch.setattr(score_kernels, "WANTED_UNITS", 1)
    assert_exact(score_case(RAGGED, dtype=dtype, columns=(5, 9)), "emulated")

    assert "sum_chunks" not in emulated.launched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("span", [(-1, 5), (9, 8), (30, 44)])
def test_a_span_outside_the_tokens_gives_nan(emulated, span, dtype):
    case = score_case([(0, 20), (20, 20), (24, 43)], tokens=43, dtype=dtype)
    exact = exact_scores(case).scores
    case.spans[1] = torch.tensor(span)
    found = case.run("emulated", projected_gradient=False)

    assert found.scores[1].isnan().all()
    assert float((found.scores[[0, 2]] - exact[[0, 2]]).abs().max() / exact.abs().max()) < 5e-5
    assert all(value.isnan().all() for name, value in vars(found).items() if name != "scores" and value is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_sum(emulated, dtype):
    assert_exact(score_case([], tokens=6, dtype=dtype), "emulated")
    assert_exact(score_case([(0, 0)], tokens=0, dtype=dtype), "emulated")
    assert emulated.launched == []


def test_a_device_with_little_shared_memory_takes_small_tiles(emulated, monkeypatch):
    limits = dataclasses.replace(device.EMULATED, block_shared_bytes=99 * 1024)
    monkeypatch.setattr(device, "EMULATED", limits)
    assert_exact(score_case([(0, 260)], dtype=torch.bfloat16, columns=(64, 40)), "emulated")

    assert emulated.launched[0] == "fused_scores_bfloat16_64x64"
    assert all(score_kernels.fused_shared_bytes(columns, 64) <= 99 * 1024 for columns in score_kernels.FUSED_TILES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [(3, 16), (33, 64), (70, 5)])
def test_touches_nothing_else(sanitized, columns, dtype):
    assert_exact(score_case([(1, 40), (41, 171)], tokens=171, dtype=dtype, columns=columns), "sanitized")


@pytest.mark.parametrize(("columns", "rows"), FUSED)
def test_fused_kernels_touch_nothing_else(sanitized, columns, rows):
    tokens = 260 if rows == 128 else 141
    assert_exact(score_case([(0, tokens)], tokens=tokens, columns=(columns, 3), dtype=torch.float16), "sanitized")

    assert sanitized.launched[0] == f"fused_scores_float16_{columns}x{rows}"


FUSED_BUGS = {
    "missing barrier before the products": (
        "        __syncthreads();  // everybody's planes are there\n",
        "",
    ),
    "missing barrier before the staged sums are read": (
        "    store_gram<Shape>(staging, Shape::kColumns, gram);\n    __syncthreads();",
        "    store_gram<Shape>(staging, Shape::kColumns, gram);",
    ),
    "missing barrier after the staged sums are read": (
        "        out[element] = valid ? value : not_a_number();\n    }\n    __syncthreads();",
        "        out[element] = valid ? value : not_a_number();\n    }",
    ),
    "scores transposed": ("(score_sums, gradient_planes, x_planes)", "(score_sums, x_planes, gradient_planes)"),
    "tail rows beyond the sequence": ("left < Shape::kRows ? static_cast<int>(left) : Shape::kRows", "Shape::kRows"),
    "last row left out": ("(stop - start + chunks - 1) / chunks", "(stop - start) / chunks"),
    "chunks rounded down": ("(per_chunk + granule - 1) / granule", "per_chunk / granule"),
    "chunk one row late": ("start + unit % chunks * length", "start + unit % chunks * length + 1"),
    "columns written beyond R_o": ("column + 1 < columns) target[1]", "column < columns) target[1]"),
}


@pytest.mark.parametrize("bug", FUSED_BUGS)
def test_bugs_of_the_fused_kernel_are_caught(is_caught, monkeypatch, bug):
    monkeypatch.setattr(score_kernels, "WANTED_UNITS", 4)
    case = score_case([(3, 70), (70, 199)], tokens=230, dtype=torch.bfloat16, columns=(33, 40))

    assert is_caught(
        "fused_scores",
        *FUSED_BUGS[bug],
        lambda backend: assert_exact(case, backend),
        sanitized="beyond" in bug,
        kernel="fused_scores_bfloat16_64x64",
    )


GRAM_BUGS = {
    "missing barrier before the products": (
        "rows - first, j0);\n        __syncthreads();",
        "rows - first, j0);",
    ),
    "missing barrier after the products": (
        "a.value[y] * b.value[x];\n            }\n        }\n        __syncthreads();",
        "a.value[y] * b.value[x];\n            }\n        }",
    ),
    "tail rows beyond the sequence": ("inside && step + i < count ?", "inside ?"),
    "columns beyond the row": (
        "const bool inside = column + j < matrix.columns;",
        "const bool inside = true;",
    ),
    "tiles counted along the columns": (
        "const int i0 = tile / tiles * kGramTile, j0 = tile % tiles",
        "const int j0 = tile / tiles * kGramTile, i0 = tile % tiles",
    ),
    "sides exchanged": ("load_columns(left_tile, left, first,", "load_columns(left_tile, right, first,"),
}


@pytest.mark.parametrize("bug", GRAM_BUGS)
def test_bugs_of_the_product_kernels_are_caught(is_caught, bug):
    case = score_case([(3, 70), (70, 111)], tokens=130, projected="x gradient", columns=(66, 130))

    assert is_caught("gram", *GRAM_BUGS[bug], lambda backend: assert_exact(case, backend), sanitized="beyond" in bug)


EPILOGUE_BUGS = {
    "missing barrier before the slices are added": (
        "= value;\n    __syncthreads();\n    if (slice",
        "= value;\n    if (slice",
    ),
    "missing barrier after the slices are added": (
        "*total += sum;\n    }\n    __syncthreads();",
        "*total += sum;\n    }",
    ),
    "last slice left out": ("other < slices; ++other", "other < slices - 1; ++other"),
    "last chunk left out": ("chunk < chunks; ++chunk", "chunk < chunks - 1; ++chunk"),
    "weight of another sequence": ("weights[unit / per_weight]", "weights[unit % per_weight]"),
    "weight of zero times NaN": ("weight == 0 ? 0.0 : static_cast", "static_cast"),
    "weight squared with the scores": ("weight * value * value", "weight * weight * value * value"),
}


@pytest.mark.parametrize("bug", EPILOGUE_BUGS)
def test_bugs_of_the_sums_are_caught(is_caught, monkeypatch, bug):
    monkeypatch.setattr(score_kernels, "WANTED_UNITS", 64)
    case = score_case([(0, 33), (33, 70), *((i, i + 1) for i in range(70, 100))], projected="x gradient")
    case.x[0] = torch.nan  # in a sequence of weight 0

    def check(backend: str) -> None:
        found, exact = case.run(backend), exact_scores(case)
        sums = {"scores": found.scores[1:], "projected_gradient": found.projected_gradient}
        expected = {"scores": exact.scores[1:], "projected_gradient": exact.projected_gradient}
        assert deviation(dataclasses.replace(found, **sums), dataclasses.replace(exact, **expected)) < 1e-5

    assert is_caught("score_epilogues", *EPILOGUE_BUGS[bug], check)


def test_too_little_shared_memory_is_caught(is_caught):
    case = score_case([(0, 70)], dtype=torch.bfloat16, columns=(16, 16))

    assert is_caught(
        "fused_scores",
        "x_planes + 2 * Shape::kPlaneElements",
        "x_planes + 2 * Shape::kPlaneElements + 16",
        lambda backend: assert_exact(case, backend),
        sanitized=True,
        kernel="fused_scores_bfloat16_16x64",
    )
