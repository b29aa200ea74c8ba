"""The kernels of project_accumulate against exact products, in every order of threads and under the sanitizers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from projection_problems import assert_right, mask_and_weights, problem

from sstmerge import ops
from sstmerge.ops import device, project_kernels

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
# Columns of bases that share a pass: 1 to 160 in all.
SIZES = [(1,), (16,), (3, 21), (32,), (17, 31), (40, 24), (49, 31), (160,)]
NARROW = [(128, 16), (128, 32), (128, 64), (64, 16), (64, 32), (64, 64)]
WIDE = [(128, 96), (128, 128), (64, 96), (64, 128)]
KERNELS = [(dtype, *tile) for dtype in DTYPES for tile in (NARROW if dtype == torch.float32 else [*NARROW, *WIDE])]


def kernel(dtype, rows, columns):
    return f"project_{str(dtype).removeprefix('torch.')}_{rows}x{columns}"


@pytest.fixture
def multiprocessors(monkeypatch):
    """A function that sets their number, which decides the tiles and the grid."""

    def change(number, **limits):
        limits = dataclasses.replace(device.EMULATED, multiprocessors=number, **limits)
        monkeypatch.setattr(device, "EMULATED", limits)

    return change


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bases(emulated, dtype, sizes):
    """Weights, rows of NaN, an odd depth and unaligned rows, and a last tile that is not full."""
    x, bases = problem(70, 75, sizes, dtype)
    weights, x = mask_and_weights(x)

    assert_right("emulated", x, bases, weights, symmetric=sum(sizes) <= 64 and dtype != torch.float32)


@pytest.mark.parametrize(("dtype", "rows", "columns"), KERNELS)
def test_every_kernel(emulated, multiprocessors, dtype, rows, columns):
    """Aligned rows, and enough of them and of columns for every stage to be used again."""
    multiprocessors(1 if rows == 128 else 8)
    depth = (8 if columns == 16 else 7) * 128 // dtype.itemsize + 8
    x, bases = problem(rows - 9, depth, (columns // 2, columns // 2 - 3), dtype)

    assert_right("emulated", x, bases, symmetric=False)
    assert emulated.launched[0] == kernel(dtype, rows, columns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_that_take_several_tiles(emulated, multiprocessors, dtype):
    multiprocessors(1)
    x, bases = problem(5 * 128 - 3, 40, (3, 7), dtype)
    weights, x = mask_and_weights(x)

    assert_right("emulated", x, bases, weights, symmetric=dtype != torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("depth", "stride", "start"),
    [(75, 80, 0), (75, 77, 0), (72, 80, 1), (1, 8, 0), (5, 5, 0), (63, 64, 3)],
)
def test_strides(emulated, dtype, depth, stride, start):
    """What lies between the rows is NaN, and may not be touched."""
    x, bases = problem(37, depth + start, (5,), dtype, stride=stride + start)
    bases = [basis[start:] for basis in bases]

    assert_right("emulated", x[:, start:], bases, symmetric=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_and_broadcast_rows(emulated, dtype):
    x, bases = problem(1, 40, (2, 3), dtype)

    assert_right("emulated", x, bases, symmetric=False)
    assert_right("emulated", x.expand(9, 40), bases, symmetric=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bases_are_read_at_any_strides_and_alignment(emulated, dtype):
    x, (basis,) = problem(20, 40, (33,), dtype)
    expected = ops.project_accumulate(x, basis[:, 1:17].clone(), backend="emulated")

    for same in (basis[:, 1:17], basis.mT.contiguous().mT[:, 1:17], basis[:, 1:17].flatten().repeat(2)[640:]):
        given = same.view(40, 16) if same.ndim == 1 else same
        assert torch.equal(ops.project_accumulate(x, given, backend="emulated"), expected)


@pytest.mark.parametrize(("rows", "depth", "size"), [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)])
def test_nothing_to_sum(emulated, rows, depth, size):
    x, bases = torch.zeros(rows, depth), [torch.zeros(depth, size)]

    assert_right("emulated", x, bases)
    assert emulated.launched == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_what_is_asked_for(emulated, dtype):
    x, bases = problem(30, 40, (4, 6, 0, 5), dtype)
    projections, covariances = assert_right("emulated", x, bases, symmetric=False)
    emulated.launched.clear()
    wanted = torch.full((6, 6), 0.25, dtype=torch.float64)
    alone = ops.project_accumulate(x, bases, backend="emulated")
    with_one = ops.project_accumulate(x, bases, covariances=[None, wanted, None, None], backend="emulated")

    assert emulated.launched.count("add_gram_partials") == (dtype != torch.float32)
    assert torch.equal(wanted, covariances[1])
    for found in (alone, with_one):
        assert all(torch.equal(a, b) for a, b in zip(found, projections, strict=True))


@pytest.mark.parametrize("sizes", [(5, 9), (70,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_order_of_threads_changes_no_bit(emulated, multiprocessors, dtype, sizes):
    multiprocessors(1)
    x, bases = problem(300, 40, sizes, dtype)
    found = assert_right("emulated", x, bases, symmetric=False)
    emulated.order = 0
    expected = assert_right("emulated", x, bases, symmetric=False)

    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_negative_weight_makes_the_covariance_nan(emulated, dtype):
    x, (basis,) = problem(20, 40, (4,), dtype)
    covariance, weights = torch.zeros(4, 4, dtype=torch.float64), torch.ones(20)
    weights[7] = -1
    found = project_kernels.launch_projection("emulated", x, [basis], [covariance], weights)

    assert covariance.isnan().all()
    assert torch.equal(found[0], ops.project_accumulate(x, basis, backend="emulated"))


def test_a_device_with_little_shared_memory_takes_small_tiles(emulated, multiprocessors):
    multiprocessors(1, block_shared_bytes=99 * 1024, shared_bytes=100 * 1024)
    x, bases = problem(130, 75, (40,), torch.bfloat16)

    assert_right("emulated", x, bases)
    assert emulated.launched[0] == "project_bfloat16_64x64"


@pytest.mark.parametrize(("dtype", "rows", "columns"), [case for case in KERNELS if case[0] != torch.float16])
def test_touches_nothing_else(sanitized, multiprocessors, dtype, rows, columns):
    multiprocessors(1 if rows == 128 else 8)
    x, bases = problem(rows - 9, 75, (columns - 3,), dtype)
    weights, x = mask_and_weights(x)

    assert_right("sanitized", x, bases, weights, symmetric=False)
    assert sanitized.launched[0] == kernel(dtype, rows, columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [72, 75])
def test_aligned_rows_touch_nothing_else(sanitized, dtype, depth):
    x, bases = problem(21, depth, (3, 9), dtype, stride=80)

    assert_right("sanitized", x, bases, symmetric=False)


# For a block of project_bfloat16_64x32 that takes three tiles, the last of them not full, of seven steps each.
BUGS = {
    "missing barrier before a stage is read": ("__syncthreads();  // everybody's copies", "// everybody's copies"),
    "missing barrier behind the last stage": ("__syncthreads();  // the pipeline's memory", "// the pipeline's memory"),
    "missing barrier before the planes are read": ("__syncthreads();  // the planes are", "// the planes are"),
    "missing barrier before the planes are overwritten": ("__syncthreads();  // the planes were", "// the planes were"),
    "wait one stage short": ("copy_async_wait<Shape::kStages - 2>()", "copy_async_wait<Shape::kStages - 1>()"),
    "stage overwritten too early": ("writing = Shape::kStages - 1;", "writing = Shape::kStages - 2;"),
    "wrong lane's row of x": (
        "x += (first_row + lane % 16) * Shape::kXPitch",
        "x += (first_row + lane % 8) * Shape::kXPitch",
    ),
    "wrong lane's columns of the basis": ("first_column + lane / 16 * 8;", "first_column + lane / 8 % 2 * 8;"),
    "wrong lane's block of the Gram": (
        "(lane % 8 + lane / 16 * 8) * Shape::kPlanePitch + lane / 8 % 2 * 8",
        "(lane % 16) * Shape::kPlanePitch + lane / 16 * 8",
    ),
    "low plane left out": (
        "multiply_16x8x16<Bfloat16>(gram[tile][half], left_low, right_high[b0], right_high[b1]);",
        "",
    ),
    "low plane rounded away": ("round_to<Bfloat16>(first - to_float(high_first))", "Bfloat16{0}"),
    "columns beyond x": ("left < 0 ? 0 : left < kChunk ? left : kChunk", "kChunk"),
    "rows beyond x": ("const int count = row < rows.count ? inside : 0;", "const int count = inside;"),
    "rows beyond x, element by element": ("source, row < rows.count ? inside : 0)", "source, inside)"),
    "columns beyond x, element by element": ("i < count ? global[i] : Element{}", "global[i]"),
    "projections beyond the last row": (
        "if (row < count) *reinterpret_cast<FloatPair*>",
        "*reinterpret_cast<FloatPair*>",
    ),
    "weights of the first tile": ("weights == nullptr ? nullptr : weights + first_row", "weights"),
    "weights beyond the last row": ("if (weights != nullptr && row < count)", "if (weights != nullptr)"),
    "weight of zero times NaN": ("first = weight == 0.0f ? 0.0f : first * root;", "first = first * root;"),
    "Gram of the last tile only": (
        "accumulate_gram<Shape>(gram, planes, planes);",
        "clear_gram<Shape>(gram); accumulate_gram<Shape>(gram, planes, planes);",
    ),
    "one step of x left out": ("(rows.depth + Shape::kDepth - 1) / Shape::kDepth", "rows.depth / Shape::kDepth"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_caught(is_caught, multiprocessors, bug):
    multiprocessors(1, block_shared_bytes=90_000, shared_bytes=99_000)
    by_element = "element by element" in bug
    x, (basis,) = problem(2 * 64 + 21, 420 if not by_element else 419, (20,), torch.bfloat16, stride=424)
    if by_element:
        x = x[:, 1:]
        basis = basis[1:]
    weights, x_masked = mask_and_weights(x)
    x.copy_(x_masked)  # keeps the strides

    assert is_caught(
        "project",
        *BUGS[bug],
        lambda backend: assert_right(backend, x, [basis], weights),
        sanitized="beyond" in bug,
        kernel="project_bfloat16_64x32",
    )


FLOAT_BUGS = {
    "sum starts anywhere": ("Chunk<float> sums[Shape::kRowSums] = {};", "static Chunk<float> sums[Shape::kRowSums];"),
    "projections beyond the last row": ("            if (row < rows.count) {", "            {"),
    "wrong thread's columns": ("threadIdx.x % Shape::kColumnThreads) * 4", "threadIdx.x / Shape::kRowThreads) * 4"),
    "a column too few": (
        "for (int inner = 0; inner < 4; ++inner) {\n#pragma",
        "for (int inner = 0; inner < 3; ++inner) {\n#pragma",
    ),
    "column tiles beyond the basis": (
        "tile % column_tiles) * Shape::kColumns",
        "tile / column_tiles) * Shape::kColumns",
    ),
}


@pytest.mark.parametrize("bug", FLOAT_BUGS)
def test_bugs_of_the_float_kernel_are_caught(is_caught, multiprocessors, bug):
    multiprocessors(9)
    x, (basis,) = problem(150, 75, (80,), torch.float32)

    assert is_caught(
        "project",
        *FLOAT_BUGS[bug],
        lambda backend: assert_right(backend, x, [basis], symmetric=False),
        sanitized="beyond" in bug,
        kernel="project_float32_64x64",
    )


PARTIAL_BUGS = {
    "missing barrier": ("sums[threadIdx.x] = sum;\n    __syncthreads();", "sums[threadIdx.x] = sum;"),
    "last slice left out": ("other < 8; ++other", "other < 7; ++other"),
    "one triangle": ("    if (i != j) covariance[", "    if (i > j) covariance["),
    "block of another basis": ("partials + static_cast<long long>(first + i)", "partials + static_cast<long long>(i)"),
    "sum instead of addition": ("* columns + j] += sum;", "* columns + j] = sum;"),
    "elements beyond the matrix": ("if (slice > 0 || i > j) return;", "if (slice > 0) return;"),
}


@pytest.mark.parametrize("bug", PARTIAL_BUGS)
def test_bugs_of_the_sums_are_caught(is_caught, multiprocessors, bug):
    multiprocessors(13)  # 12 blocks leave more partial sums than there are slices
    x, bases = problem(12 * 64, 8, (4, 7), torch.bfloat16)

    assert is_caught(
        "project_partials",
        *PARTIAL_BUGS[bug],
        lambda backend: assert_right(backend, x, bases),
        sanitized="beyond" in bug,
    )


def test_too_little_shared_memory_is_caught(is_caught):
    x, bases = problem(30, 500, (9,), torch.bfloat16)

    assert is_caught(
        "project",
        "kXPitch = kDepth + kChunk",
        "kXPitch = kDepth + 3 * kChunk",
        lambda backend: assert_right(backend, x, bases),
        sanitized=True,
        kernel="project_bfloat16_64x16",
    )
