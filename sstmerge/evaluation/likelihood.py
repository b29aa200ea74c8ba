"""Log-likelihoods of continuations: classification by label, language-model judges, and perplexity."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sstmerge.errors import DataError, InputError
from sstmerge.evaluation.generate import evaluating, padded_after
from sstmerge.evaluation.shared_prefix import SharedPrefix, share_prefix
from sstmerge.fisher.placement import input_device
from sstmerge.prompts import Example, prompt_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Continuation = tuple[Sequence[int], Sequence[int]]


def continuation_log_likelihoods(
    model: PreTrainedModel,
    pairs: Sequence[Continuation],
    *,
    tokens_per_batch: int = 8192,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Return log p(continuation | context) of every pair, in nats.

    Continuations of one token share a single forward pass of their context, so labels of one token cost no more than
    one label, and what all contexts begin with is computed once. Positions are counted without the padding.

    Args:
        model: A causal language model, or a PEFT model around one.
        pairs: Context tokens and continuation tokens; neither may be empty.
        tokens_per_batch: Largest number of tokens in a batch, padding included.
        progress: Called with the number of forward passes of sequences just finished.

    Returns:
        One sum of log-probabilities for each pair.

    Raises:
        InputError: If `tokens_per_batch` is below 1, or a context or continuation is empty.
    """
    if tokens_per_batch < 1:
        raise InputError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}.")
    wanted: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise InputError(f"Pair {number} has an empty {'continuation' if context else 'context'}.")
        wanted.setdefault((*context, *continuation[:-1]), []).append(number)
    found = [0.0] * len(pairs)
    device = input_device(model)
    with evaluating(model):
        prefix = share_prefix(model, list({tuple(context) for context, _ in pairs}), device)
        for group in _groups(sorted(wanted, key=len, reverse=True), tokens_per_batch):
            longest = max(len(pairs[number][1]) for sequence in group for number in wanted[sequence])
            log_probability = _last_log_probabilities(model, group, prefix, longest, device)
            for row, sequence in enumerate(group):
                for number in wanted[sequence]:
                    labels = torch.tensor(list(pairs[number][1]), device=device)
                    rows = log_probability[row, longest - len(labels) :]
                    found[number] = float(rows.gather(1, labels[:, None]).double().sum())
            if progress is not None:
                progress(len(group))
    return found


def _groups(sequences: Sequence[tuple[int, ...]], tokens_per_batch: int) -> Iterator[list[tuple[int, ...]]]:
    """Cut sequences, the longest first, into groups whose padded size stays within the limit."""
    start = 0
    while start < len(sequences):
        size = max(1, tokens_per_batch // len(sequences[start]))
        yield list(sequences[start : start + size])
        start += size


def _last_log_probabilities(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], prefix: SharedPrefix, count: int, device: torch.device
) -> Tensor:
    """Return log-probabilities after each of the last `count` tokens, (B, count, vocabulary) float32."""
    input_ids, attention_mask = padded_after(prefix.tokens, sequences, 0, device)
    arguments: dict[str, Any] = {"use_cache": False}
    if prefix.cache is not None:
        arguments = {"use_cache": True, "past_key_values": prefix.repeated(len(sequences))}
    start = len(prefix.tokens)
    accepted = _forward_arguments(model)
    if "position_ids" in accepted:
        arguments["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)[:, start:]
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = count
    logits: Tensor = model(input_ids=input_ids[:, start:], attention_mask=attention_mask, **arguments).logits
    return logits[:, -count:].float().log_softmax(dim=-1)


def _forward_arguments(model: Any) -> set[str]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(base.forward).parameters)


def perplexities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    completions: Sequence[str],
    *,
    tokens_per_batch: int = 8192,
) -> list[float]:
    """Return the perplexity of every completion, given its prompt, under a model: the base, to find absurd text.

    Args:
        model: The base model, without adapters.
        tokenizer: Its tokenizer.
        examples: The prompts.
        completions: What another model answered to them.
        tokens_per_batch: Largest number of tokens in a batch, padding included.

    Returns:
        exp(−log p(y | x) / tokens of y) for each completion; NaN for an empty one.

    Raises:
        DataError: If there is not one completion for each prompt.
    """
    if len(examples) != len(completions):
        raise DataError(f"There are {len(completions)} completions for {len(examples)} prompts; give one for each.")
    tokens = [tokenizer.encode(completion, add_special_tokens=False) for completion in completions]
    kept = [position for position, answer in enumerate(tokens) if answer]
    pairs = [(prompt_tokens(examples[position], tokenizer), tokens[position]) for position in kept]
    found = [math.nan] * len(completions)
    scores = continuation_log_likelihoods(model, pairs, tokens_per_batch=tokens_per_batch)
    for position, score in zip(kept, scores, strict=True):
        found[position] = math.exp(min(-score / len(tokens[position]), 700.0))
    return found
