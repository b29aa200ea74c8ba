"""A Fisher whose projections the kernels make is the Fisher that torch's products give."""

from __future__ import annotations

import pytest
import torch
from builders import LLAMA_TARGETS, dense_fisher, random_adapter, random_batch, relative_error

from sstmerge.adapters import CoreSpace
from sstmerge.fisher import collect_fisher

BATCH = random_batch([8, 5, 7], response=[3, 2, 4], weight=[1.0, 4.0, 0.25])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_collection(emulated, pico_llama, dtype, tolerance):
    model = pico_llama().to(dtype)
    space = CoreSpace.of([random_adapter(model, "a", targets=LLAMA_TARGETS, seed=1)])
    options = {"structure": "kfac", "labels": "data", "reference": "a"}

    fisher = collect_fisher(model, [BATCH], space, backend="emulated", **options)

    assert len([kernel for kernel in emulated.launched if "project" in kernel]) >= 12  # six layers, both directions
    exact = collect_fisher(pico_llama().double(), [BATCH], space, **options)
    assert relative_error(dense_fisher(fisher), dense_fisher(exact)) < tolerance
