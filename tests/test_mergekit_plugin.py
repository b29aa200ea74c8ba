"""The method `sst` in mergekit's own command, from a YAML file to a model."""

from __future__ import annotations

import pytest
import torch
import yaml
from builders import collect_pair_files
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from sstmerge.errors import InputError
from sstmerge.pipeline.calibration import CollectionOptions
from sstmerge.pipeline.merge import merge_from_fishers

mergekit = pytest.importorskip("mergekit", reason="the extra `mergekit` is not installed")
from mergekit.scripts import run_yaml  # noqa: E402

from sstmerge import mergekit_plugin  # noqa: E402


@pytest.fixture(scope="module")
def fishers(job, tmp_path_factory):
    # A few directions of `global` change every layer.
    return collect_pair_files(job, tmp_path_factory.mktemp("fishers"), CollectionOptions(structure="global"))


def configuration(job, fishers, **changes):
    def model(role):
        return {"model": f"{job['base']}+{job[role]}", "parameters": {"role": role}}

    return {
        "merge_method": "sst",
        "base_model": job["base"],
        "models": [model("utility"), model("safety")],
        "parameters": {**fishers, "scale": 0.7, "top": 5},
        "dtype": "float32",
        **changes,
    }


def run(config, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    mergekit_plugin.register()
    arguments = [str(tmp_path / "config.yaml"), str(tmp_path / "merged"), "--lora-merge-cache", str(tmp_path / "cache")]
    return CliRunner().invoke(run_yaml.main, [*arguments, "--no-copy-tokenizer"])


def test_a_merged_model_is_the_base_with_the_merged_adapter(job, fishers, tmp_path):
    done = run(configuration(job, fishers), tmp_path)
    assert done.exit_code == 0, done.output

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    base = AutoModelForCausalLM.from_pretrained(job["base"]).state_dict()
    adapter = merge_from_fishers(
        **fishers,
        utility=job["utility"],
        safety=job["safety"],
        scale=0.7,
        selection=mergekit_plugin.Selection(top=5),
        stability=False,
    ).adapter
    assert set(merged) == set(base)
    for name, tensor in base.items():
        factors = adapter.layers.get(name.removesuffix(".weight"))
        change = factors.delta() if factors is not None else torch.zeros_like(tensor)
        torch.testing.assert_close(merged[name], tensor + change.float(), rtol=0, atol=1e-6)
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roles": ("utility", "utility")}, "Exactly one model has 'role: safety'; 0 of 2"),
        ({"roles": ("utility", "harmless")}, "The role of '.*' is 'harmless'; expected one of"),
        ({"adapter": ""}, "every model is written '.*ADAPTER'; '.*' is not"),
        ({"top": 0}, "top must be at least 1"),
    ],
)
def test_bad_configurations_are_refused_with_words(job, fishers, tmp_path, changes, message):
    config = configuration(job, fishers)
    for model, role in zip(config["models"], changes.get("roles", ("utility", "safety")), strict=True):
        model["parameters"]["role"] = role
    if "adapter" in changes:
        config["models"][0]["model"] = str(tmp_path / "another-model")
        AutoModelForCausalLM.from_pretrained(job["base"]).save_pretrained(tmp_path / "another-model")
    config["parameters"]["top"] = changes.get("top", 5)

    done = run(config, tmp_path)

    assert isinstance(done.exception, InputError)
    with pytest.raises(InputError, match=message):
        raise done.exception
