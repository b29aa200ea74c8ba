"""Standard tasks (MMLU, GSM8K, ARC, BoolQ, …) through EleutherAI's lm-evaluation-harness, an optional extra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sstmerge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STANDARD_TASKS = (
    "mmlu",
    "gsm8k",
    "arc_easy",
    "arc_challenge",
    "boolq",
    "hellaswag",
    "piqa",
    "winogrande",
    "openbookqa",
)
"""Tasks often reported with a merge; the harness knows thousands more."""
PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "mcc")


@dataclass(frozen=True)
class TaskScore:
    """What the harness measured of one task.

    Attributes:
        task: Its name in the harness.
        metric: Name of the reported metric, with its filter, such as "exact_match,strict-match".
        value: Its value.
        standard_error: The harness's standard error over examples; None where it gives none.
        version: Version of the task.
        shots: Number of examples in the prompt; None where the harness does not say.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    version: str
    shots: int | None


def run_standard_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    batch_size: int = 8,
    task_folder: str | Path | None = None,
    seed: int = 0,
) -> list[TaskScore]:
    """Run tasks of the lm-evaluation-harness on a model that is already loaded, with or without adapters.

    Args:
        model: A causal language model, or a PEFT model around one; taps and adapters stay as they are.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups.
        limit: Examples of each task; None for all. A limited score is for trying out only.
        shots: Examples in the prompt; None for the task's own number.
        chat: Put the prompt into the chat template.
        batch_size: Examples answered together.
        task_folder: Folder of task files (.yaml) of your own.
        seed: Seed of the harness's random choices.

    Returns:
        One score for each task and subtask that has a metric.

    Raises:
        InputError: If the harness is not installed, or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            "Standard tasks need the lm-evaluation-harness; install the extra: pip install 'sstmerge[evaluation]'."
        ) from error
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise InputError(f"The lm-evaluation-harness knows no task {unknown}; 'lm-eval ls tasks' lists them.")
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device)),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        apply_chat_template=chat,
        task_manager=manager,
        bootstrap_iters=0,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return [score for task in found["results"] if (score := _score(task, found)) is not None]


def _score(task: str, found: Any) -> TaskScore | None:
    """Return the first preferred metric of a task; None for a group without a metric of its own."""
    results = found["results"][task]
    for wanted in PREFERRED:
        for key, value in results.items():
            metric, _, filtered = key.partition(",")
            if metric == wanted and isinstance(value, float | int):
                error = results.get(f"{metric}_stderr,{filtered}")
                return TaskScore(
                    task,
                    key,
                    float(value),
                    float(error) if isinstance(error, float | int) else None,
                    str(found.get("versions", {}).get(task, "")),
                    found.get("n-shot", {}).get(task),
                )
    return None
