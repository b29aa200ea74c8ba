"""The FusionBench algorithm on a pool of one pico model."""

from __future__ import annotations

import pytest
import torch
from builders import collect_pair_files
from transformers import AutoModelForCausalLM

from sstmerge.errors import AdapterError, InputError
from sstmerge.merging import Selection
from sstmerge.pipeline.merge import merge_from_fishers

pytest.importorskip("fusion_bench", reason="fusion-bench is not installed")
from fusion_bench.modelpool import BaseModelPool

from sstmerge.fusion_bench_plugin import SSTAlgorithm


@pytest.fixture(scope="module")
def fishers(job, tmp_path_factory):
    return collect_pair_files(job, tmp_path_factory.mktemp("fishers"))


def test_run_returns_the_base_with_the_merged_adapter(job, fishers):
    base = AutoModelForCausalLM.from_pretrained(job["base"])
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    algorithm = SSTAlgorithm(utility=[job["utility"]], safety=job["safety"], **fishers, scale=0.7, top=5)

    merged = algorithm.run(BaseModelPool({"_pretrained_": base})).state_dict()

    expected = merge_from_fishers(
        **fishers, utility=job["utility"], safety=job["safety"], scale=0.7, selection=Selection(top=5), stability=False
    ).adapter
    for name, tensor in weights.items():
        factors = expected.layers.get(name.removesuffix(".weight"))
        change = factors.delta().float() if factors is not None else torch.zeros_like(tensor)
        torch.testing.assert_close(merged[name], tensor + change, rtol=0, atol=1e-6)


def test_a_pool_without_the_base_is_refused(job, fishers, pico_gpt2):
    algorithm = SSTAlgorithm(utility=job["utility"], safety=job["safety"], **fishers)

    with pytest.raises(InputError, match="needs a model pool with a '_pretrained_' model"):
        algorithm.run(BaseModelPool({"other": pico_gpt2()}))
    with pytest.raises(AdapterError, match="adapted layers are not in the pool's pretrained model"):
        algorithm.run(BaseModelPool({"_pretrained_": pico_gpt2()}))
