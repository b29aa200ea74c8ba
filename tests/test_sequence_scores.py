"""sequence_scores on the CPU: exact sums, what padding must not change, and bad arguments."""

from __future__ import annotations

import dataclasses

import numpy as np
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

from sstmerge import ops
from sstmerge.errors import BackendError, InputError
from sstmerge.ops.device import DeviceLimits
from sstmerge.ops.score_kernels import ScoreProblem, count_chunks, fused_tile

HOPPER = DeviceLimits(multiprocessors=132, block_shared_bytes=227 * 1024, shared_bytes=228 * 1024)


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("weighted", [True, False])
def test_spans(spans, weighted):
    assert_exact(score_case(SPANS[spans], columns=(4, 7), weighted=weighted), "auto")


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("projected", ["", "x", "gradient", "x gradient"])
def test_columns_and_projected_sides(columns, projected):
    assert_exact(score_case(RAGGED, columns=columns, projected=projected), "auto")


def test_half_precision():
    assert_exact(score_case(RAGGED, dtype=torch.float16), "auto")
    # On a CPU bfloat16 projections are rounded to 8 bits.
    case = score_case(RAGGED, dtype=torch.bfloat16)
    assert deviation(case.run("auto"), exact_scores(case)) < 2e-2


def test_order_and_padding_of_sequences_change_nothing():
    case = score_case(PACKED, tokens=130, columns=(5, 9))

    assert_permutation_changes_nothing(case, "auto")
    assert_padding_changes_nothing(case, "auto")


def test_only_what_is_asked_for():
    case = score_case(RAGGED)
    alone = ops.sequence_scores(case.x, case.gradient, case.V, case.U, case.spans, scores=False)

    assert [name for name, value in vars(alone).items() if value is not None] == ["score_sum"]
    assert ops.sequence_scores(case.x, case.gradient, case.V, case.U, case.spans).scores.shape == (5, 4, 4)


def test_the_same_arguments_give_the_same_bits_and_are_left_alone():
    case = score_case(RAGGED)
    before = case.x.clone()

    assert_same_bits(case.run("auto"), case.run("reference"))
    assert torch.equal(before.nan_to_num(), case.x.nan_to_num())


def test_nothing_to_sum():
    assert_exact(score_case([], tokens=6), "auto")
    assert_exact(score_case([(0, 0)], tokens=0), "auto")


def test_arrays_through_dlpack():
    case = score_case([(0, 5)], tokens=5)
    arrays = [np.asarray(getattr(case, name)) for name in ("x", "gradient", "V", "U", "spans")]
    found = ops.sequence_scores(*arrays)

    assert torch.equal(found.scores, case.run("auto").scores)


CASE = score_case([(0, 4), (4, 9)], tokens=9, columns=(3, 5))
BAD = [
    ({"x": CASE.x[0]}, r"x must have the shape \(tokens, features\), not \(40,\)"),
    ({"x": CASE.x.double()}, "x must be float32, bfloat16 or float16, not torch.float64"),
    ({"x": CASE.x.half(), "V": None}, "x counts as projected already, because V is None, .* not torch.float16: give V"),
    ({"x": [1.0]}, "x must be a torch tensor or an array with DLPack, not list"),
    ({"x": CASE.x[:8]}, "x and gradient must have a row per token, but have 8 and 9 rows"),
    ({"x": CASE.x.half(), "V": CASE.V.half()}, r"gradient \(torch.float32 on cpu\) must be torch.float16 on cpu"),
    ({"gradient": CASE.gradient[:, :0], "U": None}, r"gradient must have the shape \(tokens, features\), not \(9, 0\)"),
    ({"gradient": CASE.gradient.to("meta"), "U": None}, "gradient .*on meta.* must be torch.float32 on cpu"),
    ({"V": CASE.V.half()}, r"V \(torch.float16 on cpu\) must be torch.float32 on cpu, the device of x"),
    ({"V": CASE.V[:7]}, r"V must have the shape \(40, columns\), one row per feature of x, not \(7, 5\)"),
    ({"U": CASE.U[:, :0]}, r"U must have the shape \(24, columns\), one row per feature of gradient, not \(24, 0\)"),
    ({"spans": CASE.spans.int()}, r"spans \(torch.int32 on cpu\) must be torch.int64"),
    ({"spans": torch.tensor(3)}, r"spans must have the shape \(0, 2\), not \(\)"),
    ({"spans": CASE.spans[:, :1]}, r"spans must have the shape \(2, 2\), not \(2, 1\)"),
    ({"spans": CASE.spans - 1}, r"spans\[0\] is \[-1, 3\], which is no span \[first, behind last\) of 9 rows"),
    ({"spans": CASE.spans + 1}, r"spans\[1\] is \[5, 10\], which is no span"),
    ({"spans": CASE.spans.flip(1)}, r"spans\[0\] is \[4, 0\], which is no span"),
    ({"spans": torch.tensor([[4, 9], [0, 5]])}, r"the spans \[0, 5\] and \[4, 9\] overlap: a token has one sequence"),
    ({"weights": torch.ones(3)}, r"weights must have the shape \(2,\), not \(3,\)"),
    ({"weights": torch.ones(2, dtype=torch.float64)}, r"weights \(torch.float64 on cpu\) must be torch.float32 on cpu"),
    ({"rotation": (torch.eye(5), torch.eye(5))}, r"rotation's Q must have the shape \(3, 3\), not \(5, 5\)"),
    ({"rotation": (torch.eye(3), torch.eye(5).half())}, "rotation's P must be float32 or float64, not torch.float16"),
    ({"backend": "gpu"}, "unknown backend 'gpu'"),
]


@pytest.mark.parametrize(("changed", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_arguments_are_refused_with_words(changed, message):
    arguments = {name: getattr(CASE, name) for name in ("x", "gradient", "V", "U", "spans")}

    with pytest.raises(InputError, match=message):
        ops.sequence_scores(**arguments | changed)


def test_a_backend_without_the_op_is_refused():
    with pytest.raises(BackendError, match="backend 'cpu_compiled' has no sequence_scores"):
        CASE.run("cpu_compiled")


@pytest.mark.parametrize(
    ("sequences", "tokens", "granule", "chunks"),
    [
        (1, 10**6, 128, 512),
        (1, 1000, 128, 8),
        (16, 8192, 128, 32),
        (512, 262144, 128, 1),
        (600, 600, 32, 1),
        (3, 5, 64, 1),
    ],
)
def test_few_long_sequences_are_cut_into_chunks(sequences, tokens, granule, chunks):
    assert count_chunks(sequences, tokens, granule) == chunks


@pytest.mark.parametrize(
    ("columns", "dtype", "tokens", "limits", "tile"),
    [
        ((64, 64), torch.bfloat16, 65536, HOPPER, (64, 128, 256)),
        ((16, 17), torch.float16, 65536, HOPPER, (32, 128, 256)),
        ((1, 16), torch.float16, 65536, HOPPER, (16, 128, 256)),
        ((64, 64), torch.bfloat16, 4096, HOPPER, (64, 64, 256)),
        (
            (64, 64),
            torch.bfloat16,
            65536,
            dataclasses.replace(HOPPER, block_shared_bytes=99 * 1024),
            (64, 64, 256),
        ),
        ((65, 16), torch.bfloat16, 65536, HOPPER, None),
        ((16, 16), torch.float32, 65536, HOPPER, None),
    ],
)
def test_the_fused_kernel_for_a_problem(columns, dtype, tokens, limits, tile):
    x, V, U = (torch.empty(shape, dtype=dtype) for shape in ((tokens, 8), (8, columns[1]), (8, columns[0])))
    problem = ScoreProblem(x, x, V, U, torch.zeros(1, 2), None, None, True, False, False, False)

    assert fused_tile(problem, limits) == tile
    assert fused_tile(dataclasses.replace(problem, V=None), limits) is None
