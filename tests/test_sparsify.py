"""magnitude_prune, dare and ties: against PEFT's own functions, against each other on every backend, and on bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from sparsify_checks import (
    DTYPES,
    assert_same,
    check_borders,
    check_dare,
    check_draw,
    check_not_finite,
    check_prune,
    check_rows,
    check_ties,
    tensors,
)

from sstmerge import _C, ops
from sstmerge.errors import InputError
from sstmerge.reference.sparsify import philox

BACKENDS = ["cpu_compiled", "reference"]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_philox_gives_the_published_numbers(counter, key, expected):
    """The known answers that its authors publish with Random123."""
    assert philox(torch.tensor(counter)[:, None], *key)[:, 0].tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_dare_draws_the_published_numbers(backend):
    """An entry is kept just where the density is above its random word."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for entry, word in enumerate(words):
        kept = [ops.dare([torch.ones(4)], (word + more) / 2**32, 0, backend=backend)[0][entry] != 0 for more in (0, 1)]
        assert kept == [False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.004, 0.2, 0.5, 0.999, 1.0])
def test_compiled_equals_the_reference(dtype, density):
    check_prune("cpu_compiled", dtype, density)
    check_prune("cpu_compiled", dtype, density, "down")
    check_dare("cpu_compiled", dtype, density)
    check_dare("cpu_compiled", dtype, density, stream=2**64 - 8)
    check_ties("cpu_compiled", dtype, density)
    check_ties("cpu_compiled", dtype, density, "frequency", tasks=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_numbers_that_are_not_finite_and_equal_magnitudes(backend, dtype):
    for numel in (1, 8, 37):
        check_rows(backend, dtype, numel)
    check_not_finite(backend, dtype)
    check_borders(backend, dtype)
    check_draw(backend, dtype)


def test_every_half_precision_number_survives():
    """Through float and back, by a weight of one."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = numbers.view(dtype)
        found = ops.ties([[values]], [1.0], 1.0, backend="cpu_compiled")[0]
        # Minus one half is not the elected sign of itself alone only where it is zero.
        assert_same([found], [values + 0.0])
        halves = ops.dare([values], 1.0, 0, rescale=False, backend="cpu_compiled")
        assert_same(halves, [values])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once_and_to_even(dtype):
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(20000, generator=generator) * torch.logspace(-9, 5, 20000)
    values = values.to(dtype)
    weight = 1.0 + 2**-11

    found = ops.ties([[values]], [weight], 1.0, backend="cpu_compiled")[0]

    assert_same([found], [(values.float() * weight).to(dtype)])


def test_the_number_of_threads_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator).bfloat16() for n in (700_001, 40_000, 3)]
    other = [torch.randn(n, generator=generator).bfloat16() for n in (700_001, 40_000, 3)]
    for op in (
        lambda threads: ops.magnitude_prune(values, 0.3, num_threads=threads),
        lambda threads: ops.dare(values, 0.3, 5, num_threads=threads),
        lambda threads: ops.ties([values, other], [1.0, 0.5], 0.3, num_threads=threads),
    ):
        expected = op(1)
        for threads in (2, 3, 7):
            assert_same(op(threads), expected)


def test_a_large_tensor_equals_the_reference():
    """More entries than the threads share, with thousands of equal magnitudes at the border."""
    values = torch.randn(600_011, generator=torch.Generator().manual_seed(3)).bfloat16()

    assert_same(
        ops.magnitude_prune([values], 0.2, num_threads=2), ops.magnitude_prune([values], 0.2, backend="reference")
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
    st.floats(0.0, 1.0, exclude_min=True),
)
def test_pruning_keeps_exactly_the_largest(numbers, density):
    values = torch.tensor(numbers)
    count = min(len(numbers), max(1, round(density * len(numbers))))

    pruned = ops.magnitude_prune([values], density)[0]

    order = sorted(range(len(numbers)), key=lambda i: (-abs(numbers[i]), i))
    expected = [numbers[i] if i in order[:count] else 0.0 for i in range(len(numbers))]
    assert pruned.tolist() == torch.tensor(expected).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_prune_equals_peft(backend, dtype):
    values = torch.randn(33, 47, dtype=dtype, generator=torch.Generator().manual_seed(4))  # no equal magnitudes
    for density in (1e-4, 0.29, 0.5, 0.9999):
        found = ops.magnitude_prune([values], density, rounding="down", backend=backend)[0]
        assert_same([found], [merge_utils.magnitude_based_pruning(values, density)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_equals_peft(backend, method, dtype):
    generator = torch.Generator().manual_seed(5)
    # All magnitudes of a task are different, so that only one choice of the largest is right.
    tasks = [torch.randperm(1500, generator=generator).add(1).to(dtype).view(30, 50) / 128 for _ in range(4)]
    if dtype == torch.bfloat16:  # which has 8 bits for them
        tasks = [torch.randperm(250, generator=generator).add(1).to(dtype).view(10, 25) / 128 for _ in range(4)]
    tasks = [task * (2 * torch.randint(2, task.shape, generator=generator) - 1) for task in tasks]
    weights = torch.tensor([0.7, -1.3, 0.25, 2.0])

    found = ops.ties([[task] for task in tasks], weights, 0.4, majority_sign_method=method, rounding="down")[0]

    expected = merge_utils.ties(tasks, weights.to(torch.promote_types(dtype, torch.float32)), 0.4, method)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected.double(), rtol=4 * tolerance, atol=1e-6)
    assert (found == 0).sum() == (expected == 0).sum() > 0


def test_ties_by_hand():
    tasks = [
        [torch.tensor([3.0, 1.0, -2.0, 4.0])],
        [torch.tensor([-1.0, -1.0, -4.0, 0.0])],
        [torch.tensor([-1.5, 2, 1, 4])],
    ]

    found = ops.ties(tasks, [1.0, 10.0, 100.0], 1.0)[0]
    by_frequency = ops.ties(tasks, [1.0, 10.0, 100.0], 1.0, majority_sign_method="frequency")[0]

    # Sums .5, 2, -5, 8 elect +, +, -, +; by number the first is negative.
    assert found.tolist() == [3.0, (1 + 200) / 2, (-2 - 40) / 2, (4 + 400) / 2]
    assert by_frequency.tolist() == [(-10 - 150) / 2, (1 + 200) / 2, (-2 - 40) / 2, (4 + 400) / 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dare_leaves_the_mean_as_it_is_and_keeps_the_share_it_is_told(backend):
    values = torch.linspace(-1.0, 3.0, 2000, dtype=torch.float64)
    density, draws = 0.2, 400

    dropped = ops.dare(values.expand(draws, -1), density, 9, backend=backend)

    kept = dropped != 0
    standard_error = (density * (1 - density) / kept.numel()) ** 0.5
    assert abs(float(kept.double().mean()) - density) < 4 * standard_error
    # Each entry's mean over the draws has the variance values² (1 - density) / density / draws.
    error = (dropped.mean(0) - values) / (values.abs() * ((1 - density) / density / draws) ** 0.5 + 1e-12)
    assert abs(float(error.mean())) < 4 / len(values) ** 0.5
    assert 0.9 < float(error.square().mean()) < 1.1
    # Neighbouring entries and neighbouring streams are independent of one another.
    for first, second in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1])):
        both = float((first & second).double().mean())
        assert abs(both - density**2) < 5 * density / first.numel() ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_dare_does_not_depend_on_how_tensors_are_batched(backend):
    values = tensors(torch.float32)
    together = ops.dare(values, 0.5, 3, backend=backend)

    one_by_one = [ops.dare([v], 0.5, 3, first_stream=i, backend=backend)[0] for i, v in enumerate(values)]

    assert_same(one_by_one, together)
    assert not torch.equal(ops.dare(values, 0.5, 4, backend=backend)[-1], together[-1])
    kept = together[-1] != 0
    unscaled = ops.dare(values, 0.5, 3, rescale=False, backend=backend)[-1]
    assert torch.equal(unscaled, values[-1] * kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_density_one_changes_nothing(backend):
    values = tensors(torch.float32)

    assert_same(ops.magnitude_prune(values, 1.0, backend=backend), values)
    assert_same(ops.dare(values, 1.0, 8, backend=backend), values)
    assert_same(ops.ties([values], [1.0], 1.0, backend=backend), values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_gives_nothing(backend):
    assert ops.magnitude_prune([], 0.5, backend=backend) == []
    assert ops.dare([], 0.5, 0, backend=backend) == []
    assert ops.ties([[], []], [1.0, 1.0], 0.5, backend=backend) == []
    assert ops.magnitude_prune(torch.empty(0, 4), 0.5, backend=backend).shape == (0, 4)
    assert ops.dare(torch.empty(3, 0), 0.5, 0, backend=backend).shape == (3, 0)
    assert ops.ties(torch.empty(2, 3, 0), [1.0, 1.0], 0.5, backend=backend).shape == (3, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_anything_that_speaks_dlpack(backend):
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(6))
    expected = ops.magnitude_prune(values, 0.5, backend=backend)

    assert torch.equal(ops.magnitude_prune(values.T.contiguous().T, 0.5, backend=backend), expected)
    assert torch.equal(ops.magnitude_prune(values.requires_grad_(), 0.5, backend=backend), expected)
    assert torch.equal(ops.magnitude_prune(values.detach().numpy(), 0.5, backend=backend), expected)
    assert_same(ops.magnitude_prune([v.numpy() for v in values.detach()], 0.5, backend=backend), list(expected))


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.magnitude_prune([X], 0.0), r"density must lie in \(0, 1\], not be 0.0"),
        (lambda: ops.magnitude_prune([X], 1.01), r"density must lie in \(0, 1\], not be 1.01"),
        (lambda: ops.dare([X], float("nan"), 1), r"density must lie in \(0, 1\], not be nan"),
        (lambda: ops.ties([[X]], [1.0], "much"), r"density must lie in \(0, 1\], not be 'much'"),
        (lambda: ops.magnitude_prune(torch.ones(3), 0.5), r"a list of tensors .* not \(3,\): give .* as \[tensor\]"),
        (lambda: ops.magnitude_prune("text", 0.5), "values must be a tensor or a list of tensors, not str"),
        (
            lambda: ops.magnitude_prune([X, 3], 0.5),
            r"values\[1\] must be a torch tensor or an array with DLPack, not int",
        ),
        (lambda: ops.magnitude_prune([X.int()], 0.5), r"values\[0\] must be float32, .* not torch.int32"),
        (
            lambda: ops.magnitude_prune([X, X.double()], 0.5),
            r"values\[1\] \(torch.float64 .* dtype and device of values\[0\]",
        ),
        (lambda: ops.magnitude_prune([X], 0.5, rounding="up"), "unknown rounding 'up': choose nearest or down"),
        (lambda: ops.magnitude_prune([X], 0.5, backend="gpu"), "unknown backend 'gpu'"),
        (lambda: ops.magnitude_prune([X], 0.5, num_threads=0), "num_threads must be at least 1, not 0"),
        (lambda: ops.dare([X], 0.5, -1), r"seed must be an integer from 0 to 2\*\*64 - 1, not -1"),
        (lambda: ops.dare([X], 0.5, 1.5), "seed must be an integer .* not 1.5"),
        (lambda: ops.dare([X], 0.5, 1, first_stream=2**64 - 1), "first_stream plus the number of tensors must be"),
        (lambda: ops.ties([], [], 0.5), "values must hold at least one task"),
        (lambda: ops.ties(torch.ones(2, 3), [1.0, 1.0], 0.5), r"values must have the shape \(tasks, batch, \.\.\.\)"),
        (lambda: ops.ties([[X], [X]], [1.0], 0.5), r"one number per task, shape \(2,\), not \(1,\)"),
        (lambda: ops.ties([[X]], [float("inf")], 0.5), r"weights must be finite, not \[inf\]"),
        (lambda: ops.ties([[X]], ["a"], 0.5), "weights must be a list of numbers"),
        (
            lambda: ops.ties([[X]], torch.ones(1, device="meta"), 0.5),
            "weights must be numbers or a CPU tensor, not on meta",
        ),
        (
            lambda: ops.ties([[X], [X.T]], [1.0, 1.0], 0.5),
            r"values\[1\] .* tensor 0 has the shape \(3, 2\), not \(2, 3\)",
        ),
        (lambda: ops.ties([[X], [X, X]], [1.0, 1.0], 0.5), r"values\[1\] .* it has 2 tensors, not 1"),
        (lambda: ops.ties([[X], [X.half()]], [1.0, 1.0], 0.5), r"values\[1\] \(torch.float16 .* of values\[0\]"),
        (lambda: ops.ties([[X]], [1.0], 0.5, majority_sign_method="votes"), "choose total or frequency"),
    ],
)
def test_bad_arguments_are_refused_with_words(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_binding_refuses_lists_that_do_not_fit():
    values, outputs = torch.ones(4), torch.ones(4)
    pointers = [values.data_ptr()], [outputs.data_ptr()]

    with pytest.raises(ValueError, match="differ in length"):
        _C.magnitude_prune("float32", *pointers, [4, 4], [2], 1)
    with pytest.raises(ValueError, match="differ in length"):
        _C.ties("float32", *pointers, [4], [2], [1.0, 1.0], False, 1)
    with pytest.raises(ValueError, match="no code for tensors of dtype int8"):
        _C.dare("int8", *pointers, [4], 0, 0, 1, 1.0, 1)
