"""Anything thrown at an op gives the reference's result or a sentence: never another exception, never a crash.

Values that only a look at the device would show to be wrong give NaN where kernels run.
"""

from __future__ import annotations

import copy

import compiling
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from launchers import EmulatedLauncher
from op_arguments import OPS, OTHER_VALUES, SPOILED, tensors_of
from torch import Tensor

from sstmerge import ops
from sstmerge.errors import BackendError, InputError
from sstmerge.ops import launch


def test_every_op_is_here():
    assert set(OPS) >= {op for info in ops.backends() for op in info.ops}


@pytest.fixture(params=["auto", "reference", "emulated"])
def backend(request, monkeypatch) -> str:
    if request.param == "emulated":
        launcher = EmulatedLauncher(compiling.build(request.getfixturevalue("emulation_cache")))
        monkeypatch.setitem(launch.LAUNCHERS, "emulated", lambda: (launcher, "emulation"))
    return request.param


@pytest.mark.parametrize("op", OPS)
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(data=st.data())
def test_anything_gives_a_result_or_a_sentence(op, backend, data):
    subject = OPS[op]
    given_arguments = subject.arguments(data.draw(st.integers(1, 5), "size"), data.draw(st.integers(0, 9), "seed"))
    meant = copy.deepcopy(given_arguments)
    for name in data.draw(st.sets(st.sampled_from([*given_arguments]), min_size=1, max_size=2), "spoiled arguments"):
        value = given_arguments[name]
        if isinstance(value, Tensor):
            kind = data.draw(st.sampled_from([*SPOILED]), name)
            given_arguments[name], meant[name] = SPOILED[kind](value)
        else:
            given_arguments[name] = meant[name] = data.draw(st.sampled_from(OTHER_VALUES), name)

    try:
        found = getattr(ops, op)(**given_arguments, backend=backend)
    except (InputError, BackendError):
        return

    if any(tensor.is_meta for tensor in tensors_of(found)):
        return  # shapes without numbers: nothing to compare
    results = subject.results(found, given_arguments)
    try:
        expected = getattr(ops, op)(**meant, backend="reference")
    except InputError:
        # Kernels cannot refuse by values without waiting for the device; they make them seen.
        assert any(bool(tensor.isnan().any()) for tensor in tensors_of(results))
        return
    assert_alike(results, subject.results(expected, meant))


def assert_alike(found: object, expected: object) -> None:
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        finite = theirs[theirs.isfinite()]
        scale = float(finite.double().abs().max()) if finite.numel() else 1.0
        precision = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0.0
        tolerance = max(1e-4, 4 * precision) * scale
        # Where infinity went in, whether infinity or NaN comes out depends on the order of the sums.
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        torch.testing.assert_close(ours[ours.isfinite()], finite, rtol=0, atol=tolerance)


def test_an_output_that_overlaps_itself_is_refused():
    x, basis = torch.randn(6, 8), torch.randn(8, 3)
    shared = torch.zeros(3, dtype=torch.float64).expand(3, 3)

    with pytest.raises(InputError):
        ops.project_accumulate(x, basis, covariances=shared)
