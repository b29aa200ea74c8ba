"""What one merged model does on the test prompts, as plain values that can be kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from prompts import Prompts

from sstmerge.evaluation.classification import classify
from sstmerge.evaluation.classification_tasks import CLASSIFICATION_TASKS
from sstmerge.evaluation.generate import generate
from sstmerge.evaluation.judges import StringJudge
from sstmerge.evaluation.outcomes import Outcome
from sstmerge.pipeline.evaluate import write_json

KINDS = ("harmful", "borderline", "ordinary")
OUTCOMES_FILE = "outcomes.json"


def measure(
    model: Any,
    tokenizer: Any,
    state: Callable[[], AbstractContextManager[Any]],
    prompts: Prompts,
    folder: Path,
    *,
    answer_tokens: int,
) -> None:
    """Answer and judge all test prompts and write outcomes and completions.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        state: Makes the context in which it behaves as the merged model.
        prompts: The prompts.
        folder: Folder to write into.
        answer_tokens: Longest answer.
    """
    judge = StringJudge(labels=[label for task in prompts.tasks for label in CLASSIFICATION_TASKS[task].labels])
    found: dict[str, Any] = {"outcomes": {}, "completions": {}, "correct": {}, "predicted": {}}
    with state():
        examples = [example for kind in KINDS for example in prompts.test[kind]]
        answers = generate(model, tokenizer, examples, max_new_tokens=answer_tokens, batch_size=96)
        for kind in KINDS:
            own, answers = answers[: len(prompts.test[kind])], answers[len(prompts.test[kind]) :]
            judged = judge.judge([example.prompt for example in prompts.test[kind]], own)
            found["completions"][kind], found["outcomes"][kind] = own, [outcome.value for outcome in judged]
        for task, rows in prompts.tasks.items():
            answered = classify(model, tokenizer, rows, CLASSIFICATION_TASKS[task].labels, tokens_per_batch=4096)
            found["correct"][task] = [int(right) for right in answered.correct]
            found["predicted"][task] = list(answered.predicted)
    write_json(found, folder / OUTCOMES_FILE)


def as_arrays(found: Mapping[str, Any]) -> dict[str, npt.NDArray[np.float64]]:
    """Return 0 and 1 for each prompt: refused and degenerate by kind of prompt, correct by task.

    Args:
        found: What `measure` wrote.

    Returns:
        Arrays (prompts,) named "refused harmful", "degenerate harmful", …, "correct sst2", ….
    """
    refused = (Outcome.REFUSAL.value, Outcome.PARTIAL_REFUSAL.value)
    arrays: dict[str, npt.NDArray[np.float64]] = {}
    for kind, outcomes in found["outcomes"].items():
        arrays[f"refused {kind}"] = np.array([float(outcome in refused) for outcome in outcomes])
        arrays[f"degenerate {kind}"] = np.array([float(o == Outcome.DEGENERATE.value) for o in outcomes])
    for task, correct in found["correct"].items():
        arrays[f"correct {task}"] = np.array(correct, dtype=float)
    return arrays


def together(tests: Sequence[Mapping[str, npt.NDArray[np.float64]]]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the answers of several tests as those of one.

    Args:
        tests: What `as_arrays` returned for each.

    Returns:
        All of their prompts; the examples of the tasks, which are the same in all tests, once.
    """
    return {
        name: array if name.startswith("correct ") else np.concatenate([test[name] for test in tests])
        for name, array in tests[0].items()
    }
