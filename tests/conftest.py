"""Pico models and a pico tokenizer; every fixture is a factory, so each test gets a fresh object from a fixed seed.

`pico_llama()`, `pico_gpt2()` (Conv1D layers), `pico_tied()` (a Llama whose head is its embedding): float32, eval mode,
hidden size 32, two layers, vocabulary 100 and 512 positions. Weights have a standard deviation of 0.3, so that the
next-token distribution is far from uniform and a wrong number shows. `pico_tokenizer()`: one token per printable
character, with a chat template in the style of the real small models.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from builders import write_peft_adapter, write_rows
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from valid_files import ValidFiles, write_valid_files

SPECIAL_TOKENS = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>")
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
VOCABULARY_SIZE = len(SPECIAL_TOKENS) + len(CHARACTERS)
CONTEXT_LENGTH = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKEN_IDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}

# Problems here are tiny; OpenMP's barriers between threads would cost more than the work.
torch.set_num_threads(1)

ModelFactory = Callable[..., PreTrainedModel]


def draw_weights(model: PreTrainedModel, seed: int, std: float = 0.3) -> PreTrainedModel:
    """Fill matrices with N(0, std²) and add N(0, 0.1²) to norms and biases, from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.float().eval()


def build_llama(seed: int, tie_word_embeddings: bool) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=tie_word_embeddings,
        **TOKEN_IDS,
    )
    return draw_weights(LlamaForCausalLM(config), seed)


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

    def build(seed: int = 0) -> PreTrainedModel:
        config = GPT2Config(
            vocab_size=VOCABULARY_SIZE,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_inner=48,
            n_positions=CONTEXT_LENGTH,
            **TOKEN_IDS,
        )
        return draw_weights(GPT2LMHeadModel(config), seed)

    return build


@pytest.fixture(scope="session")
def pico_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`pico_tokenizer(chat_template=True)`: one token per character; `False` leaves the chat template out."""

    def build(chat_template: bool = True) -> PreTrainedTokenizerFast:
        vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",
            unk_token="<unk>",
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            model_max_length=CONTEXT_LENGTH,
        )
        if chat_template:
            tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer

    return build


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
