"""Greedy decoding of many prompts in left-padded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sstmerge.errors import DataError, InputError
from sstmerge.evaluation.shared_prefix import SharedPrefix, share_prefix
from sstmerge.fisher.placement import input_device
from sstmerge.prompts import Example, context_length, prompt_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Explicit, because a model's own generation_config may ask for sampling or penalties.
PLAIN_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Answer every prompt greedily.

    The model is put into eval mode for the time being, and the tokenizer is not changed (padding is done here). What all
    prompts begin with is computed once. In float32 the answers do not depend on `batch_size` nor on the other prompts; in
    half precision a near tie between two tokens may.

    Args:
        model: A causal language model, or a PEFT model around one.
        tokenizer: Its tokenizer.
        examples: Prompts; their responses are not looked at.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Number of prompts decoded together.
        progress: Called with the number of prompts just finished, after every batch.

    Returns:
        One answer for each prompt, in the order of `examples`, without special tokens and surrounding whitespace.

    Raises:
        InputError: If `max_new_tokens` or `batch_size` is below 1.
        DataError: If a prompt and its answer would not fit into the context.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}.")
    prompts = [prompt_tokens(example, tokenizer) for example in examples]
    limit = context_length(model.config, tokenizer)
    for example, prompt in zip(examples, prompts, strict=True):
        if len(prompt) + max_new_tokens > limit:
            raise DataError(
                f"{example.source}: the prompt has {len(prompt)} tokens, which with {max_new_tokens} new ones is more "
                f"than the context of {limit}; shorten it, or remove the row."
            )
    # Longest first: little padding, and a batch too large for the memory fails at once.
    order = sorted(range(len(prompts)), key=lambda position: -len(prompts[position]))
    answers = [""] * len(prompts)
    with evaluating(model):
        prefix = share_prefix(model, prompts, input_device(model))
        for start in range(0, len(order), batch_size):
            group = order[start : start + batch_size]
            decoded = _generate_batch(model, tokenizer, [prompts[i] for i in group], prefix, max_new_tokens)
            for position, answer in zip(group, decoded, strict=True):
                answers[position] = answer
            if progress is not None:
                progress(len(group))
    return answers


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch a model to eval mode and gradients off; on leaving, every module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    prefix: SharedPrefix,
    max_new_tokens: int,
) -> list[str]:
    end_tokens = _end_tokens(model, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(end_tokens, default=0)
    input_ids, attention_mask = padded_after(prefix.tokens, prompts, padding, input_device(model))
    cached = {} if prefix.cache is None else {"past_key_values": prefix.repeated(len(prompts))}
    sequences = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_tokens) or None,
        pad_token_id=padding,
        **PLAIN_GREEDY,
        **cached,
    )
    return [
        tokenizer.decode(_until(answer, end_tokens), skip_special_tokens=True).strip()
        for answer in sequences[:, input_ids.shape[1] :].tolist()
    ]


def padded_after(
    prefix: Sequence[int], prompts: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pad prompts between the tokens that they all begin with and the rest of each.

    Args:
        prefix: The P tokens that all prompts begin with; without any, the padding is on the left.
        prompts: Tokens of B prompts.
        padding: Token id of the padding.
        device: Device of the result.

    Returns:
        Token ids and attention mask, both (B, S) int64, S the length of the longest prompt.
    """
    width, start = max(len(prompt) for prompt in prompts), len(prefix)
    input_ids = torch.full((len(prompts), width), padding, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    input_ids[:, :start], attention_mask[:, :start] = torch.tensor(prefix, dtype=torch.int64), 1
    for row, prompt in enumerate(prompts):
        rest = width - len(prompt) + start
        input_ids[row, rest:] = torch.tensor(prompt[start:])
        attention_mask[row, rest:] = 1
    return input_ids.to(device), attention_mask.to(device)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Collect what ends an answer: chat models often have an end of turn besides the end of text."""
    of_model = model.generation_config.eos_token_id
    tokens = set(of_model) if isinstance(of_model, list) else {of_model}
    return {int(token) for token in tokens | {tokenizer.eos_token_id} if token is not None}


def _until(tokens: list[int], end_tokens: set[int]) -> list[int]:
    ends = (position for position, token in enumerate(tokens) if token in end_tokens)
    return tokens[: next(ends, len(tokens))]
