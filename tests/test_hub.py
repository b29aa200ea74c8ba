"""Hub ids: models, tokenizers and adapters that lie in the hub's cache load without a network, and others say why not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from builders import random_adapter

from sstmerge.adapters import load_adapter, save_adapter
from sstmerge.errors import AdapterError, InputError
from sstmerge.pipeline.models import load_model, load_tokenizer, parameter_count

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def publish(cache: Path, hub_id: str, files: Path) -> None:
    """Lay files out as the hub's cache does."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(files, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An offline hub with an empty cache; huggingface_hub reads its settings when it is imported."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for module in ("huggingface_hub.file_download", "transformers.utils.hub"):
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            monkeypatch.setattr(f"{module}.{name}", str(cache), raising=False)
    return cache


def test_model_and_tokenizer(hub, tmp_path, pico_llama, pico_tokenizer):
    model = pico_llama()
    model.save_pretrained(tmp_path / "model")
    pico_tokenizer().save_pretrained(tmp_path / "model")
    publish(hub, "someone/pico", tmp_path / "model")

    loaded = load_model("someone/pico", device="cpu")

    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert load_tokenizer("someone/pico").chat_template == pico_tokenizer().chat_template
    assert parameter_count("someone/pico") == sum(p.numel() for p in model.parameters())


def test_adapter(hub, tmp_path, pico_llama):
    adapter = random_adapter(pico_llama(), "a", scaling=1.0, seed=1)
    save_adapter(adapter, tmp_path / "adapter")
    publish(hub, "someone/pico-lora", tmp_path / "adapter")

    loaded = load_adapter("someone/pico-lora", revision="main")

    assert set(loaded.layers) == set(adapter.layers)
    for name, factors in adapter.layers.items():
        assert torch.equal(loaded.layers[name].A, factors.A)
        assert torch.equal(loaded.layers[name].B, factors.B)


@pytest.mark.usefixtures("hub")
def test_what_is_not_there_is_named():
    with pytest.raises(AdapterError, match="'someone/nothing' is not a local directory, and could not be fetched"):
        load_adapter("someone/nothing")
    with pytest.raises(InputError, match="The base model 'someone/nothing' cannot be loaded"):
        load_model("someone/nothing", device="cpu")
    with pytest.raises(InputError, match="The tokenizer of 'someone/nothing' cannot be loaded"):
        load_tokenizer("someone/nothing")
