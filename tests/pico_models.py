"""Pico models: float32, eval mode, hidden size 32, two layers, vocabulary 100 and 512 positions.

Weights have a standard deviation of 0.3, so that the next-token distribution is far from uniform and a wrong number shows.
A module of its own and not of conftest.py, whose name several folders use: tests that start processes import it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

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


def build_gpt2(seed: int = 0) -> PreTrainedModel:
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


def build_tokenizer(chat_template: bool = True) -> PreTrainedTokenizerFast:
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
