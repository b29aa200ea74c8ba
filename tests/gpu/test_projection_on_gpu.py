"""project_accumulate's kernels on a real GPU: the checks of the emulation at real sizes, and what only a GPU has."""

from __future__ import annotations

import pytest
import torch
from projection_problems import assert_right, mask_and_weights, problem

from sstmerge import ops

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_right_on_gpu(backend, x, bases, weights=None):
    """Tensor cores round sums towards zero, so that long ones are further from exact than the emulation's."""
    return assert_right(backend, x, bases, weights, tolerance=2e-5, covariance_tolerance=5e-5, symmetric=False)


@pytest.mark.parametrize("sizes", [(1,), (16,), (3, 21), (32,), (48,), (64,), (80,), (128,), (160,)], ids=str)
@pytest.mark.parametrize("rows", [1, 130, 40000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel(gpu_backend, dtype, rows, sizes):
    """Few rows take the smaller tiles, many the larger ones, several per block."""
    x, bases = problem(rows, 200, sizes, dtype, device="cuda")
    weights, x = mask_and_weights(x)

    assert_right_on_gpu(gpu_backend, x, bases, weights)


@pytest.mark.parametrize("sizes", [(16,), (32,), (64,), (160,), (32, 32, 32), (1024,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes(gpu_backend, dtype, sizes):
    x, bases = problem(8192, 4096, sizes, dtype, device="cuda")

    assert_right_on_gpu(gpu_backend, x, bases)


@pytest.mark.parametrize(("depth", "stride", "start"), [(75, 80, 0), (75, 77, 0), (72, 80, 1), (1, 8, 0), (63, 64, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(gpu_backend, dtype, depth, stride, start):
    x, bases = problem(300, depth + start, (5, 70), dtype, device="cuda", stride=stride + start)
    bases = [basis[start:] for basis in bases]

    assert_right_on_gpu(gpu_backend, x[:, start:], bases[:1])
    assert_right_on_gpu(gpu_backend, x[:, start:], bases)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_elements_than_32_bits_count(gpu_backend, dtype):
    """Row 2**25 of 2**7 columns lies at element 2**32."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of memory on the GPU")
    rows, depth = 2**25 + 3, 128
    x = torch.zeros(rows, depth, dtype=dtype, device="cuda")
    x[-3:] = torch.randn(3, depth, device="cuda")
    basis = torch.randn(depth, 16, device="cuda").to(dtype)
    covariance = torch.zeros(16, 16, dtype=torch.float64, device="cuda")
    found = ops.project_accumulate(x, basis, covariances=covariance, backend=gpu_backend)
    exact = x[-3:].double() @ basis.double()

    assert not found[:-3].any()
    torch.testing.assert_close(found[-3:].double(), exact, rtol=0, atol=2e-5 * float(exact.abs().max()))
    torch.testing.assert_close(covariance, exact.mT @ exact, rtol=0, atol=5e-5 * float(covariance.abs().max()))


@pytest.mark.parametrize("sizes", [(64,), (160,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_input_same_bits(gpu_backend, dtype, sizes):
    x, bases = problem(8192, 512, sizes, dtype, device="cuda")
    first, second = (assert_right_on_gpu(gpu_backend, x, bases) for _ in range(2))

    assert torch.equal(first[0][0], second[0][0])
    assert torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_stream_of_its_own(gpu_backend, dtype):
    x, (basis,) = problem(5000, 512, (40,), dtype, device="cuda")
    expected = ops.project_accumulate(x, basis, backend=gpu_backend)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the default stream would be through before the input is there
        late = x.clone()
        found = ops.project_accumulate(late, basis, backend=gpu_backend)
    stream.synchronize()

    assert torch.equal(found, expected)


@pytest.mark.parametrize("sizes", [(40,), (160,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_does_not_wait_for_the_device(gpu_backend, dtype, sizes):
    x, (basis,) = problem(5000, 512, sizes, dtype, device="cuda")
    covariance = torch.zeros(sizes[0], sizes[0], dtype=torch.float64, device="cuda")
    weights = torch.ones(len(x), device="cuda")
    options = {"covariances": covariance, "weights": weights, "backend": gpu_backend}
    ops.project_accumulate(x, basis, **options)  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.project_accumulate(x, basis, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_agrees(gpu_backend, dtype):
    x, (basis,) = problem(3000, 512, (64,), dtype, device="cuda")
    found, expected = (ops.project_accumulate(x, basis, backend=name) for name in (gpu_backend, "reference"))

    # torch may multiply float32 in TF32 if it was told to.
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5 * float(expected.abs().max()))
