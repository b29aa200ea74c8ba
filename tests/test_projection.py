"""project_accumulate on the CPU: the reference, the validation, and the choice of kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from projection_problems import assert_right, mask_and_weights, problem

from sstmerge import ops
from sstmerge.errors import BackendError, InputError
from sstmerge.ops import device
from sstmerge.ops.device import device_limits
from sstmerge.ops.project_kernels import FLOAT_TILES, HALF_TILES, WIDE_HALF_TILES, choose_tile, pack_bases
from sstmerge.reference import projection

HALF, FLOAT, DOUBLE = torch.bfloat16, torch.float32, torch.float64
X, BASIS = torch.randn(6, 4), torch.randn(4, 3)
HOPPER = dataclasses.replace(device.EMULATED, multiprocessors=132)
SMALL = dataclasses.replace(HOPPER, block_shared_bytes=99 * 1024, shared_bytes=100 * 1024)


# On a CPU bfloat16 is multiplied as it is, and rounds every projection.
@pytest.mark.parametrize(("dtype", "tolerance"), [(FLOAT, 2e-6), (torch.float16, 2e-6), (HALF, 2**-8)])
@pytest.mark.parametrize("sizes", [(1,), (7, 30), (80,)])
def test_reference(dtype, tolerance, sizes):
    x, bases = problem(50, 65, sizes, dtype, stride=70)
    assert_right("reference", x, bases, tolerance=tolerance, covariance_tolerance=2 * tolerance, symmetric=False)
    weights, x = mask_and_weights(x)

    assert_right("auto", x, bases, weights, tolerance=tolerance, covariance_tolerance=2 * tolerance, symmetric=False)


@pytest.mark.parametrize("depth", [31, 32, 63, 64, 65, 68, 96, 100, 160])
@pytest.mark.parametrize("dtype", [HALF, torch.float16, FLOAT])
def test_a_row_of_nan_stays_alone(dtype, depth):
    x, (basis,) = problem(40, depth, (9,), dtype)
    x[7] = torch.nan

    assert ops.project_accumulate(x, basis).isnan().any(dim=1).nonzero().tolist() == [[7]]


def test_float16_does_not_overflow():
    x, basis = torch.full((2, 64), 300.0, dtype=torch.float16), torch.full((64, 1), 10.0, dtype=torch.float16)

    assert ops.project_accumulate(x, basis).tolist() == [[192000.0]] * 2


def test_chunks_of_rows_give_the_same_covariance(monkeypatch):
    x, (basis,) = problem(50, 20, (5,), FLOAT)
    weights, x = mask_and_weights(x)
    whole, parts = torch.zeros(2, 5, 5, dtype=DOUBLE)
    ops.project_accumulate(x, basis, covariances=whole, weights=weights)
    monkeypatch.setattr(projection, "_ROWS", 7)
    ops.project_accumulate(x, basis, covariances=parts, weights=weights)

    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


def test_one_basis_gives_a_tensor_and_several_a_list():
    first, second = torch.zeros(3, 3, dtype=DOUBLE), torch.zeros(2, 2, dtype=DOUBLE)
    alone = ops.project_accumulate(X, BASIS, covariances=first)
    both = ops.project_accumulate(X, (BASIS, BASIS[:, :2]), covariances=(None, second))

    torch.testing.assert_close(alone, X @ BASIS)
    assert isinstance(both, list)
    torch.testing.assert_close(both[1], alone[:, :2])
    torch.testing.assert_close(second, first[:2, :2])


@given(seed=st.integers(0, 99), cut=st.integers(0, 12), count=st.integers(1, 3))
def test_sums_add_up(seed, cut, count):
    """Two calls on parts of the rows are one call on all, and a weight is a number of repetitions."""
    generator = torch.Generator().manual_seed(seed)
    x, basis = torch.randn(12, 5, generator=generator), torch.randn(5, 3, generator=generator)
    whole, parts, repeated, weighted = torch.zeros(4, 3, 3, dtype=DOUBLE)
    ops.project_accumulate(x, basis, covariances=whole)
    for part in (x[:cut], x[cut:]):
        ops.project_accumulate(part, basis, covariances=parts)
    ops.project_accumulate(x[:cut].repeat(count, 1), basis, covariances=repeated)
    weights = torch.where(torch.arange(12) < cut, float(count), 0)
    ops.project_accumulate(x, basis, covariances=weighted, weights=weights)

    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weighted, repeated, rtol=1e-5, atol=1e-5)


def test_results_have_no_gradient():
    x, basis = X.clone().requires_grad_(), BASIS.clone().requires_grad_()

    assert not ops.project_accumulate(x, basis).requires_grad


def test_arrays_of_other_libraries():
    covariance = torch.zeros(3, 3, dtype=DOUBLE)
    found = ops.project_accumulate(X.numpy(), BASIS.numpy(), covariances=covariance.numpy())

    torch.testing.assert_close(found, X @ BASIS)
    assert float(covariance.trace()) == pytest.approx(float(found.square().sum()), rel=1e-5)


SQUARE = torch.zeros(3, 3, dtype=DOUBLE)


@pytest.mark.parametrize(
    ("x", "bases", "options", "message"),
    [
        ([1.0], BASIS, {}, "x must be a torch tensor or an array with DLPack, not list"),
        (X[None], BASIS, {}, r"x must have the shape \(N, d\), not \(1, 6, 4\): flatten it"),
        (X.double(), BASIS.double(), {}, "x must be float32, bfloat16 or float16, not torch.float64"),
        (X.mT.contiguous().mT, BASIS, {}, r"x must have unit stride in its last dimension, not 6: call \.contiguous"),
        (X, [], {}, "bases is empty: give at least one basis"),
        (X, "basis", {}, "bases must be a torch tensor or an array with DLPack, not str"),
        (X, [BASIS, BASIS[1:]], {}, r"bases\[1\] must have the shape \(4, R\), not \(3, 3\)"),
        (X, BASIS[0], {}, r"bases must have the shape \(4, R\), not \(3,\)"),
        (X, BASIS.half(), {}, "bases must have the dtype of x, torch.float32, not torch.float16: round the basis once"),
        (X, BASIS.to("meta"), {}, "bases is on meta, but x is on cpu: move one of them"),
        (X, BASIS, {"covariances": [SQUARE]}, "covariances must be a torch tensor .*, not list"),
        (X, BASIS, {"covariances": SQUARE[:2]}, r"covariances must have the shape \(3, 3\), not \(2, 3\)"),
        (X, BASIS, {"covariances": SQUARE.float()}, "covariances must be float64, not torch.float32: sums of many"),
        (X, BASIS, {"covariances": SQUARE[:1].expand(3, 3)}, r"covariances must be contiguous, but has the strides \("),
        (X, [BASIS], {"covariances": SQUARE}, "covariances must be a list of 1 tensors or Nones, .*, not Tensor"),
        (X, [BASIS], {"covariances": [None] * 2}, "covariances must be a list of 1 tensors or Nones, .*, not 2"),
        (X, [BASIS], {"covariances": [3.0]}, r"covariances\[0\] must be a torch tensor .*, not float"),
        (X, BASIS, {"covariances": SQUARE.to("meta")}, "covariances is on meta, but x is on cpu"),
        (X, BASIS, {"weights": torch.ones(5)}, r"weights must have the shape \(6,\), one per row of x, not \(5,\)"),
        (X, BASIS, {"weights": torch.ones(6).bool()}, r"weights must be float32, not torch.bool: .* with \.float"),
        (
            X,
            BASIS,
            {"weights": torch.tensor([1.0, 2, -3, 0, 1, 1])},
            "weights must be at least 0, but the smallest is -3",
        ),
        (X, BASIS, {"backend": "gpu"}, "unknown backend 'gpu'"),
    ],
)
def test_bad_arguments_are_refused_with_words(x, bases, options, message):
    with pytest.raises(InputError, match=message):
        ops.project_accumulate(x, bases, **options)


def test_there_is_no_compiled_projection_on_a_cpu():
    with pytest.raises(BackendError, match=r"backend 'cpu_compiled' (has no project_accumulate|is not available)"):
        ops.project_accumulate(X, BASIS, backend="cpu_compiled")


@pytest.mark.parametrize("limits", [HOPPER, SMALL], ids=["hopper", "small"])
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_every_choice_fits_the_device_and_the_columns(dtype, limits):
    for columns in range(1, 400):
        for rows in (1, 64, 8192, 10**6):
            tile = choose_tile(dtype, columns, rows, limits)
            assert tile.shared_bytes(dtype.itemsize) <= limits.block_shared_bytes
            widths = [16, 32, 64] if columns <= 64 else [64] if dtype == FLOAT else [96, 128]
            padded = -(-columns // tile.columns) * tile.columns
            assert padded == min(-(-columns // width) * width for width in widths if columns > 64 or width >= columns)


@pytest.mark.parametrize(
    ("dtype", "columns", "rows", "expected"),
    [
        (HALF, 16, 132 * 128, (128, 16)),
        (HALF, 16, 131 * 128, (64, 16)),
        (HALF, 48, 100_000, (128, 64)),
        (HALF, 65, 100_000, (128, 96)),
        (HALF, 160, 100_000, (128, 96)),
        (HALF, 256, 66 * 128, (128, 128)),
        (HALF, 384, 100_000, (128, 128)),
        (FLOAT, 17, 100_000, (128, 32)),
        (FLOAT, 200, 64, (64, 64)),
    ],
)
def test_choice_of_kernels(dtype, columns, rows, expected):
    tile = choose_tile(dtype, columns, rows, HOPPER)

    assert (tile.rows, tile.columns) == expected


def test_two_blocks_fit_a_hopper_multiprocessor_and_the_smaller_tiles_every_gpu():
    for tiles, size in ((HALF_TILES, 2), (WIDE_HALF_TILES, 2), (FLOAT_TILES, 4)):
        for large, small in tiles.values():
            assert 2 * (large.shared_bytes(size) + 1024) <= HOPPER.shared_bytes
            assert 2 * (small.shared_bytes(size) + 1024) <= HOPPER.shared_bytes
            assert small.shared_bytes(size) <= SMALL.block_shared_bytes


def test_a_basis_that_fits_is_not_copied():
    basis = torch.randn(5, 16)

    assert pack_bases([basis], 16) is basis
    assert torch.equal(pack_bases([basis, basis[:, :3]], 32)[:, 16:], torch.cat([basis[:, :3], torch.zeros(5, 13)], 1))


def test_limits_of_a_gpu_are_read_from_it(monkeypatch):
    properties = dataclasses.make_dataclass(
        "Properties", ["multi_processor_count", "shared_memory_per_block_optin", "shared_memory_per_multiprocessor"]
    )(108, 166912, 167936)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda found: properties)

    assert device_limits(torch.device("cuda:0")) == device.DeviceLimits(108, 166912, 167936)
    assert device_limits(torch.device("cpu")) == device.EMULATED
