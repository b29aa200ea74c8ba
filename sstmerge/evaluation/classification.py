"""Classification by the most probable label word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sstmerge.errors import DataError
from sstmerge.evaluation.likelihood import continuation_log_likelihoods
from sstmerge.evaluation.rates import Rate
from sstmerge.prompts import Example, prompt_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Classification:
    """What a model answered to the examples of a task.

    Attributes:
        labels: The label words.
        predicted: The most probable label of each example; the first of equally probable ones.
        correct: Whether it is the right one, (examples,) bool.
        log_likelihoods: log p(label | prompt) in nats, (examples, labels) float64.
    """

    labels: tuple[str, ...]
    predicted: tuple[str, ...]
    correct: npt.NDArray[np.bool_]
    log_likelihoods: npt.NDArray[np.float64]

    @property
    def accuracy(self) -> Rate:
        """Share of right answers."""
        return Rate(int(self.correct.sum()), len(self.correct))

    def to_json(self) -> dict[str, Any]:
        """Return the accuracy and every prediction as plain JSON values."""
        return {"accuracy": self.accuracy.to_json(), "labels": list(self.labels), "predicted": list(self.predicted)}


def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    tokens_per_batch: int = 8192,
    progress: Callable[[int], None] | None = None,
) -> Classification:
    """Answer a classification task by the log-likelihoods of its label words.

    A label is scored as it would be generated: its tokens right after the prompt, without what ends a turn. Longer labels
    are not corrected for their length; choose words of a token each where you can, which also need one forward pass only.

    Args:
        model: A causal language model, or a PEFT model around one.
        tokenizer: Its tokenizer.
        examples: Prompts whose responses are label words.
        labels: The label words.
        tokens_per_batch: Largest number of tokens in a batch, padding included.
        progress: Called with the number of sequences just finished.

    Returns:
        Predictions and log-likelihoods.

    Raises:
        DataError: If there are no examples or fewer than two labels, a label appears twice, or a response is no label.
    """
    if not examples or len(set(labels)) < 2 or len(set(labels)) < len(labels):
        raise DataError(f"A classification needs examples and two different labels or more, got {list(labels)}.")
    for example in examples:
        if example.response not in labels:
            raise DataError(
                f"{example.source}: the response {example.response!r} is none of the labels {list(labels)}."
            )
    endings = [tokenizer.encode(label, add_special_tokens=False) for label in labels]
    contexts = [prompt_tokens(example, tokenizer) for example in examples]
    scores = continuation_log_likelihoods(
        model,
        [(context, ending) for context in contexts for ending in endings],
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    table = np.array(scores).reshape(len(examples), len(labels))
    predicted = tuple(labels[position] for position in table.argmax(axis=1))
    correct = np.array([label == e.response for label, e in zip(predicted, examples, strict=True)])
    return Classification(tuple(labels), predicted, correct, table)
