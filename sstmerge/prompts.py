"""Prompt files: rows of a file or a hub data set → `Example` → `EncodedExample` → `Batch`.

A row is `{"prompt": …, "response": …}` or `{"messages": [{"role": …, "content": …}, …]}`, either with an optional
`"weight"`. The tokenizer is handed in, so that this module needs no transformers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError

from sstmerge.errors import DataError, InputError
from sstmerge.fisher.batch import Batch, length_groups
from sstmerge.prompt_files import Row, either, numbered_rows

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One prompt and, where it is known, the response to it.

    Attributes:
        messages: Everything before the response, as `{"role": …, "content": …}`; the last one is the user's.
        response: The assistant's answer, or None where the row has none.
        weight: Weight of the example, positive and finite.
        source: Where it came from, as "harm.jsonl, row 3" (rows count from 1).
    """

    messages: tuple[dict[str, str], ...]
    response: str | None
    weight: float
    source: str

    @property
    def prompt(self) -> str:
        """The last user message."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class EncodedExample:
    """The tokens of one prompt and its response.

    Attributes:
        input_ids: Prompt tokens, then response tokens.
        prompt_length: How many of them belong to the prompt; all others enter the loss.
        weight: Weight of the example.
        source: Where the example came from.
        shortened: Whether response tokens were cut off to stay within `max_length`.
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    weight: float
    source: str
    shortened: bool = False


def load_examples(
    path_or_hub_id: str | Path, *, split: str | None = None, limit: int | None = None, require_response: bool = False
) -> list[Example]:
    """Read a prompt file or a hub data set.

    Args:
        path_or_hub_id: A .jsonl, .json, .csv or .parquet file, or `owner/name` of a data set on the hub; `…::NAME` is
            short for `split="NAME"`.
        split: Of a file with a "split" column only the rows whose value is this; of a hub data set its split
            ("train" where none is given).
        limit: Keep only the first `limit` rows (after the split has been chosen).
        require_response: Refuse rows without a response.

    Returns:
        The examples in the order of the rows. Where a row has both "messages" and "prompt", "messages" counts.

    Raises:
        InputError: If `limit` is below 1, or a split is given twice.
        DataError: If there is nothing to read, or a row is not usable; the message names the file and the row.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}.")
    location, _, inline_split = str(path_or_hub_id).partition("::")
    if inline_split and split and inline_split != split:
        raise InputError(f"{path_or_hub_id} asks for split {inline_split!r}, but split={split!r} was given as well.")
    name, rows = numbered_rows(location, split or inline_split or None)
    examples = [
        _example(row, f"{name}, row {number}", require_response) for number, row in islice(rows, _at_most(limit))
    ]
    if not examples:
        raise DataError(f"{name} holds no rows; expected one prompt per row.")
    return examples


def _at_most(limit: int | None) -> int | None:
    return None if limit is None else min(limit, sys.maxsize)  # islice takes no larger number


# ---- rows to examples ----------------------------------------------------------------------------------------------


def _example(row: Row, source: str, require_response: bool) -> Example:
    if row.get("messages") is not None:
        messages, response = _conversation(row["messages"], source)
    elif "prompt" in row:
        messages = ({"role": "user", "content": _text(row["prompt"], "prompt", source)},)
        response = row.get("response")
    else:
        raise DataError(f'{source} has no "prompt" and no "messages"; its columns are {sorted(map(str, row))}.')
    if response is not None and not isinstance(response, str):
        raise DataError(f"{source}: the response must be text, got {type(response).__name__}.")
    if response is not None and not response.strip():
        response = None
    if require_response and response is None:
        raise DataError(f"{source} has no response (or an empty one), which is needed here; add one or remove the row.")
    return Example(messages, response, _weight(row.get("weight"), source), source)


def _conversation(messages: Any, source: str) -> tuple[tuple[dict[str, str], ...], str | None]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{source}: "messages" must be a list of {{"role": …, "content": …}}, got {messages!r:.60}.')
    turns = []
    for position, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise DataError(f"{source}: message {position} has the role {role!r}; expected {either(ROLES)}.")
        turns.append({"role": str(role), "content": message.get("content")})
    response = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
    if not turns or turns[-1]["role"] != "user":
        raise DataError(f"{source}: the last message before the response must be the user's.")
    for position, turn in enumerate(turns, start=1):
        turn["content"] = _text(turn["content"], f"content of message {position}", source)
    return tuple(turns), response


def _text(value: Any, what: str, source: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{source}: the {what} must be text, got {type(value).__name__}.")
    if not value.strip():
        raise DataError(f"{source}: the {what} is blank.")
    return value


def _weight(value: Any, source: str) -> float:
    if value is None:
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"{source}: the weight must be a positive finite number, got {value!r:.60}.")
    return weight


def completions_missing(examples: Sequence[Example]) -> list[int]:
    """Return the positions of the examples that have no response, in order."""
    return [position for position, example in enumerate(examples) if example.response is None]


def with_responses(examples: Sequence[Example], responses: Sequence[str]) -> list[Example]:
    """Fill in the responses that are missing.

    Args:
        examples: Examples, some of them without a response.
        responses: One response for each of `completions_missing(examples)`, in that order.

    Returns:
        All examples; those that had a response are unchanged.

    Raises:
        InputError: If the number of responses is not the number of examples without one.
    """
    missing = completions_missing(examples)
    if len(missing) != len(responses):
        raise InputError(f"{len(missing)} examples have no response, but {len(responses)} responses were given.")
    filled = list(examples)
    for position, response in zip(missing, responses, strict=True):
        filled[position] = replace(filled[position], response=response)
    return filled


# ---- examples to batches -------------------------------------------------------------------------------------------


def context_length(model_config: Any, tokenizer: Any) -> int:
    """Return the longest sequence that both a model and its tokenizer state, in tokens.

    Args:
        model_config: The `config` of a transformers model.
        tokenizer: Its tokenizer.

    Raises:
        InputError: If neither states a length.
    """
    config = getattr(model_config, "text_config", None) or model_config
    stated = [getattr(config, "max_position_embeddings", None), getattr(config, "n_positions", None)]
    # Tokenizers without a limit carry 10^30.
    stated.append(length if (length := getattr(tokenizer, "model_max_length", None) or 0) < 10**9 else None)
    known = [int(length) for length in stated if length]
    if not known:
        raise InputError("Neither the model nor its tokenizer states a context length; give a maximum length.")
    return min(known)


def prompt_tokens(example: Example, tokenizer: Any) -> list[int]:
    """Return the tokens of everything before the response, up to where the assistant begins to speak.

    With a chat template: the template with its generation prompt. Without one: the messages joined by newlines, and a
    newline.

    Args:
        example: The example.
        tokenizer: A transformers tokenizer.

    Raises:
        DataError: If the template does not accept the messages (some allow no system message).
    """
    if tokenizer.chat_template:
        return _apply_template(example, list(example.messages), tokenizer, generation_prompt=True)
    text = "".join(message["content"] + "\n" for message in example.messages)
    return list(tokenizer(text)["input_ids"])


def encode(
    examples: Sequence[Example], tokenizer: Any, *, max_length: int, response_tokens: int | None = None
) -> list[EncodedExample]:
    """Turn examples into tokens, with the exact boundary between prompt and response.

    The response includes the token that ends the assistant's turn. With a chat template the whole conversation is
    rendered by it; without one the sequence is prompt + newline + response + end-of-sequence token.

    Args:
        examples: Examples with responses.
        tokenizer: A transformers tokenizer.
        max_length: Longest sequence, in tokens (`context_length` gives the model's). Responses are shortened to fit
            and marked so; prompts never are.
        response_tokens: Keep only the first so many tokens of every response; None keeps all.

    Returns:
        One encoded example for each example, in order.

    Raises:
        InputError: If `max_length` or `response_tokens` is below 1.
        DataError: If an example has no response, its prompt does not fit, or its response is cut to nothing; or if the
            tokens of the prompt are not the first tokens of the conversation.
    """
    if max_length < 1 or (response_tokens is not None and response_tokens < 1):
        raise InputError(f"max_length and response_tokens must be at least 1, got {max_length} and {response_tokens}.")
    return [_encode(example, tokenizer, max_length, response_tokens) for example in examples]


def _encode(example: Example, tokenizer: Any, max_length: int, response_tokens: int | None) -> EncodedExample:
    prompt = prompt_tokens(example, tokenizer)
    if len(prompt) > max_length:
        raise DataError(
            f"{example.source}: the prompt has {len(prompt)} tokens, but at most {max_length} fit; "
            "shorten it, or remove the row."
        )
    response = _response_tokens(example, prompt, tokenizer)[:response_tokens]
    kept = response[: max_length - len(prompt)]
    if not kept:
        raise DataError(
            f"{example.source}: no response token is left: the prompt has {len(prompt)} tokens and at most "
            f"{max_length} fit; shorten the prompt, or remove the row."
        )
    shortened = len(kept) < len(response)
    return EncodedExample((*prompt, *kept), len(prompt), example.weight, example.source, shortened)


def _response_tokens(example: Example, prompt: list[int], tokenizer: Any) -> list[int]:
    if example.response is None:
        raise DataError(f"{example.source} has no response; generate one first (see completions_missing), or add one.")
    if not tokenizer.chat_template:
        response = list(tokenizer(example.response, add_special_tokens=False)["input_ids"])
        return [*response, tokenizer.eos_token_id]
    answer = {"role": "assistant", "content": example.response}
    whole = _apply_template(example, [*example.messages, answer], tokenizer, generation_prompt=False)
    if whole[: len(prompt)] != prompt:
        raise DataError(
            f"{example.source}: the tokens of the prompt are not the first tokens of prompt and response, so the "
            "response has no exact beginning; does it begin with whitespace, or does the chat template change earlier "
            "messages?"
        )
    return _without_tail(whole[len(prompt) :], tokenizer)


def _without_tail(response: list[int], tokenizer: Any) -> list[int]:
    # Many templates write a newline after the token that ends the turn; a model never generates it.
    special = set(tokenizer.all_special_ids)
    special.update(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
    last = max((position for position, token in enumerate(response) if token in special), default=None)
    if last is not None and not tokenizer.decode(response[last + 1 :]).strip():
        return response[: last + 1]
    return response


def _apply_template(
    example: Example, messages: list[dict[str, str]], tokenizer: Any, *, generation_prompt: bool
) -> list[int]:
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt, tokenize=True)
    except TemplateError as error:
        raise DataError(f"{example.source}: the tokenizer's chat template does not accept it: {error}.") from error
    # transformers 5 returns a BatchEncoding here, transformers 4 a list.
    return list(encoded["input_ids"] if isinstance(encoded, Mapping) else encoded)


def make_batches(
    encoded: Sequence[EncodedExample], *, pad_token_id: int, tokens_per_batch: int = 2048, batch_size: int | None = None
) -> list[Batch]:
    """Cut encoded examples into right-padded batches of similar length.

    Every example is in exactly one batch; the examples are sorted by length (stable), so that little is padded.

    Args:
        encoded: The whole data set: `Batch.index` is the position in it.
        pad_token_id: Token id that fills the right of shorter sequences.
        tokens_per_batch: Largest number of tokens in a batch, padding included; a longer sequence has its own batch.
        batch_size: Largest number of sequences in a batch; None sets no limit.

    Returns:
        The batches, the shortest sequences first.

    Raises:
        InputError: If a limit is below 1.
    """
    if tokens_per_batch < 1 or (batch_size is not None and batch_size < 1):
        raise InputError(
            f"tokens_per_batch and batch_size must be at least 1, got {tokens_per_batch} and {batch_size}."
        )
    groups = length_groups([len(example.input_ids) for example in encoded], tokens_per_batch, batch_size)
    return [_batch(encoded, group, pad_token_id) for group in groups]


def _batch(encoded: Sequence[EncodedExample], group: list[int], pad_token_id: int) -> Batch:
    shape = (len(group), max(len(encoded[position].input_ids) for position in group))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for row, position in enumerate(group):
        example = encoded[position]
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        attention_mask[row, :length] = 1
        loss_mask[row, example.prompt_length : length] = True
    weight = torch.tensor([encoded[position].weight for position in group], dtype=torch.float32)
    return Batch(input_ids, attention_mask, loss_mask, torch.tensor(group), weight)
