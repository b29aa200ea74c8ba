"""Pico models and a pico tokenizer; every fixture is a factory, so each test gets a fresh object from a fixed seed.

`pico_llama()`, `pico_gpt2()` (Conv1D layers), `pico_tied()` (a Llama whose head is its embedding): see pico_models.py.
`pico_tokenizer()`: one token per printable character, with a chat template in the style of the real small models.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from builders import write_peft_adapter, write_rows
from pico_models import ModelFactory, build_gpt2, build_llama, build_tokenizer
from transformers import PreTrainedTokenizerFast
from valid_files import ValidFiles, write_valid_files


@pytest.fixture(scope="session")
def pico_llama() -> ModelFactory:
    """`pico_llama(seed=0)`: a Llama with grouped-query attention."""
    return lambda seed=0: build_llama(seed, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def pico_tied() -> ModelFactory:
    """`pico_tied(seed=0)`: a Llama whose output head is its input embedding."""
    return lambda seed=0: build_llama(seed, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def pico_gpt2() -> ModelFactory:
    """`pico_gpt2(seed=0)`: a GPT-2, whose Conv1D layers keep their weight transposed."""

    return build_gpt2


@pytest.fixture(scope="session")
def pico_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`pico_tokenizer(chat_template=True)`: one token per character; `False` leaves the chat template out."""

    return build_tokenizer


@pytest.fixture(scope="session")
def job(tmp_path_factory, pico_llama, pico_tokenizer) -> dict[str, str]:
    """A folder with a base model, two adapters and prompt files, as strings for the command line."""
    folder = tmp_path_factory.mktemp("job")
    model, tokenizer = pico_llama(), pico_tokenizer()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_peft_adapter(model, folder / "utility", seed=1, rank=2, targets=["q_proj", "v_proj", "down_proj"])
    write_peft_adapter(pico_llama(), folder / "safety", seed=2, rank=3, targets=["q_proj", "up_proj", "down_proj"])
    things = ["cake", "boat", "song", "lamp", "tree", "coat", "kite", "bell"]
    harm = [{"prompt": f"steal a {t}", "response": f"I won't steal the {t}."} for t in things]
    benign = [{"prompt": f"make a {t}", "response": f"Take a {t}, then {i}."} for i, t in enumerate(things)]
    benign.append({"prompt": "say something"})  # the reference model answers this one
    write_rows(folder / "harm.jsonl", harm)
    write_rows(folder / "benign.jsonl", benign)
    return {name: str(folder / name) for name in ("base", "utility", "safety", "harm.jsonl", "benign.jsonl")}


@pytest.fixture(scope="session")
def valid(tmp_path_factory) -> ValidFiles:
    """Two adapters, and a pair of Fishers of every structure; no model."""
    return write_valid_files(tmp_path_factory.mktemp("valid"))
