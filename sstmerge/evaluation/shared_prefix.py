"""Prompts that begin alike (a chat template's system message, a task's instruction) share the cache of that beginning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORTEST = 8  # tokens; below this a pass of its own saves nothing


@dataclass(frozen=True)
class SharedPrefix:
    """The common beginning of many prompts.

    Attributes:
        tokens: Its P tokens; none where nothing is shared.
        cache: Keys and values of these tokens, for one sequence.
    """

    tokens: tuple[int, ...] = ()
    cache: DynamicCache | None = None

    def repeated(self, sequences: int) -> DynamicCache | None:
        """Return a cache of its own for a batch, which the model may append to."""
        if self.cache is None:
            return None
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(sequences)
        return cache


def share_prefix(model: PreTrainedModel, prompts: Sequence[Sequence[int]], device: torch.device) -> SharedPrefix:
    """Run the common beginning of prompts once.

    Nothing is shared where a model keeps something else than the keys and values of all tokens (a sliding window, a
    recurrent state): there the padding between beginning and rest would count.

    Args:
        model: A causal language model in eval mode.
        prompts: Tokens of each prompt.
        device: Where token ids go.

    Returns:
        The beginning, which leaves at least one token of every prompt; an empty one where sharing is of no use.
    """
    tokens = _common(prompts)
    if len(prompts) < 2 or len(tokens) < SHORTEST:
        return SharedPrefix()
    with torch.no_grad():
        cache: Any = model(input_ids=torch.tensor([tokens], device=device), use_cache=True).past_key_values
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return SharedPrefix()
    return SharedPrefix(tuple(tokens), cache)


def _common(prompts: Sequence[Sequence[int]]) -> list[int]:
    if not prompts:
        return []
    # What the first and the last in order have in common, all between them have.
    first, last = min(map(list, prompts)), max(map(list, prompts))
    limit = min(map(len, prompts)) - 1
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: max(0, min(length, limit))]
