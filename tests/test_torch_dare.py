"""torch_dare: bit for bit what PEFT makes of torch.bernoulli, and the generator left in the same state."""

from __future__ import annotations

import importlib

import pytest
import torch
from peft.utils.merge_utils import random_pruning

from sstmerge import ops, reference
from sstmerge.errors import BackendError, InputError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = ["cpu_compiled", "reference"]
# The generator renews 624 words at a time.
SIZES = [1, 623, 624, 625, 3000]
module = importlib.import_module("sstmerge.ops.torch_dare")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.001, 0.3, 0.5, 0.999])
def test_it_is_pefts_dare_bit_for_bit(backend, dtype, density):
    values = [torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype) for size in SIZES]
    torch.manual_seed(11)
    torch.rand(5)  # so that a block of words is half used
    expected = [random_pruning(value, density, rescale=True) for value in values]
    state = torch.get_rng_state()
    torch.manual_seed(11)
    torch.rand(5)

    found = ops.torch_dare(values, density, backend=backend)

    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("draws", [0, 1, 622, 623, 624, 625, 1248])
def test_it_goes_on_wherever_the_generator_stands(draws):
    for size in (0, 1, 700):
        generators = [torch.Generator().manual_seed(3) for _ in BACKENDS]
        results = []
        for generator, backend in zip(generators, BACKENDS, strict=True):
            torch.rand(draws, generator=generator)
            results.append(ops.torch_dare([torch.ones(size)], 0.5, generator=generator, backend=backend)[0])
        assert torch.equal(*results)
        assert torch.equal(*(torch.rand(9, generator=generator) for generator in generators))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_tensors_are_drawn_in_row_major_order(backend):
    values = torch.randn(30, 50).mT
    torch.manual_seed(4)
    expected = random_pruning(values, 0.4, rescale=True)
    torch.manual_seed(4)

    found = ops.torch_dare([values], 0.4, backend=backend)[0]

    assert torch.equal(found, expected)
    assert found.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_are_not_finite_and_signs_of_zeros_are_pefts(backend):
    values = torch.tensor([float("nan"), float("inf"), -1.0, -0.0] * 20)
    torch.manual_seed(2)
    expected = random_pruning(values, 0.5, rescale=True)
    torch.manual_seed(2)

    found = ops.torch_dare([values], 0.5, backend=backend)[0]

    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit()[~found.isnan()], expected.signbit()[~found.isnan()])


def test_an_unknown_generator_is_drawn_through_torch_with_a_warning(monkeypatch):
    """A layout that later versions of torch may bring: the result stays right, and nothing of it is guessed."""
    monkeypatch.setattr(module, "_STATE_BYTES", 4096)
    module.generator_problem.cache_clear()
    values = [torch.randn(100)]
    try:
        with pytest.warns(UserWarning, match="the state of torch's CPU generator has 5056 bytes, not 4096"):
            found = ops.torch_dare(values, 0.5, generator=torch.Generator().manual_seed(1))
        with pytest.raises(BackendError, match="has no torch_dare here: the state of"):
            ops.torch_dare(values, 0.5, backend="cpu_compiled")
    finally:
        monkeypatch.undo()
        module.generator_problem.cache_clear()
    assert torch.equal(found[0], reference.torch_dare(values, 0.5, generator=torch.Generator().manual_seed(1))[0])


def test_a_generator_that_draws_other_numbers_is_noticed(monkeypatch):
    compiled = module._compiled
    monkeypatch.setattr(module, "_compiled", lambda *arguments: [tensor + 1 for tensor in compiled(*arguments)])
    module.generator_problem.cache_clear()
    try:
        assert "draws other numbers" in module.generator_problem()
    finally:
        module.generator_problem.cache_clear()


@pytest.mark.parametrize(
    ("values", "density", "options", "message"),
    [
        ([torch.ones(3, dtype=torch.int32)], 0.5, {}, r"values\[0\] must be float32"),
        ([torch.ones(3), torch.ones(3, device="meta")], 0.5, {}, r"values\[1\] \(on meta\) must be on the device"),
        ([[1.0]], 0.5, {}, r"values\[0\] must be a torch tensor"),
        (torch.tensor(1.0), 0.5, {}, "values must be a list of tensors"),
        ([torch.ones(3)], 0.0, {}, r"density must lie in \(0, 1\], not be 0.0"),
        ([torch.ones(3)], "half", {}, "density must lie in"),
        ([torch.ones(3)], 0.5, {"generator": 3}, "generator must be a torch.Generator"),
        ([torch.ones(3)], 0.5, {"backend": "gpu"}, "unknown backend 'gpu'"),
    ],
)
def test_bad_arguments_are_refused_and_draw_nothing(values, density, options, message):
    state = torch.get_rng_state()
    with pytest.raises(InputError, match=message):
        ops.torch_dare(values, density, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_extension_refuses_bytes_that_are_no_state():
    """They say which word is read next."""
    extension = importlib.import_module("sstmerge._C")
    values, output = torch.ones(9), torch.zeros(9)
    arguments = ("float32", values.data_ptr(), output.data_ptr(), 9, 0.5, 0.5)
    state = torch.Generator().manual_seed(1).get_state()
    for position, byte in ((12, 0), (8, 0), (11, 127), (28, 1)):
        spoiled = state.clone()
        spoiled[position] = byte
        with pytest.raises(ValueError, match="not the state of torch's CPU generator"):
            extension.torch_dare(*arguments, spoiled.data_ptr())
    half_used = torch.Generator().manual_seed(1)
    torch.rand(3, generator=half_used)
    spoiled = half_used.get_state()
    spoiled[17] = 255
    with pytest.raises(ValueError, match="not the state"):
        extension.torch_dare(*arguments, spoiled.data_ptr())
    assert not output.any()
