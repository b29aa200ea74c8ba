"""Evaluating several adapters, or points of a core space, on one base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from sstmerge.adapters import Adapter, CoreSpace
from sstmerge.errors import DataError, InputError
from sstmerge.fisher import Batch, installed_taps
from sstmerge.pipeline.evaluate import Evaluation, PromptSets, evaluate_model, measured_kl
from sstmerge.pipeline.progress import Progress, no_progress
from sstmerge.prompts import Example

BASE = "base"
# Makes a context in which the base model behaves as one of the evaluated models.
State = Callable[[], AbstractContextManager[Any]]


def adapter_state(model: nn.Module, adapter: Adapter | None) -> State:
    """Return a state in which the model carries an adapter, in the graph and not folded into rounded weights.

    Args:
        model: The base model.
        adapter: The adapter; None for the base model itself.

    Returns:
        A function that makes the context.
    """
    space = None if adapter is None else CoreSpace.of([adapter])
    if adapter is None or space is None:
        return _Nothing
    return lambda: installed_taps(model, space, space.core(adapter.name))


def core_state(model: nn.Module, space: CoreSpace, core: Tensor) -> State:
    """Return a state in which the model behaves as a point (D,) of a core space."""
    return lambda: installed_taps(model, space, core)


class _Nothing(AbstractContextManager[None]):
    """A context that changes nothing."""

    def __exit__(self, *_: object) -> None:
        return None


def evaluate_states(
    model: nn.Module,
    tokenizer: Any,
    states: Mapping[str, State],
    prompts: PromptSets,
    *,
    reference: str | None = None,
    kl_batches: Sequence[Batch] = (),
    max_new_tokens: int = 16,
    utility_new_tokens: int = 40,
    batch_size: int = 128,
    progress: Progress = no_progress,
) -> list[Evaluation]:
    """Evaluate every state of a model on the same prompts.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        states: Contexts by name.
        prompts: Prompt sets.
        reference: Name of the state that the KL divergence is taken from; None measures none.
        kl_batches: The sequences that the KL is measured on, such as the batches of `kl_examples`; needed with a reference.
        max_new_tokens: Longest answer to a prompt.
        utility_new_tokens: Longest answer to a utility task.
        batch_size: Prompts per generation batch.
        progress: Progress.

    Returns:
        One evaluation per state.

    Raises:
        InputError: If the reference is none of the states, or there is nothing to measure its KL on.
    """
    if reference is not None and reference not in states:
        raise InputError(f"The reference '{reference}' is none of the evaluated models {list(states)}.")
    if reference is not None and not kl_batches:
        raise InputError(f"The KL from '{reference}' needs sequences to be measured on; give `kl_batches`.")
    per_model = sum(len(getattr(prompts, name)) for name in PromptSets.__dataclass_fields__)
    done, total = 0, per_model * len(states)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("answering prompts", done, total)

    evaluations = []
    for name, state in states.items():
        kl = None
        if reference is not None:
            kl = 0.0 if name == reference else measured_kl(model, kl_batches, states[reference], state)
        with state():
            evaluations.append(
                evaluate_model(
                    model,
                    tokenizer,
                    prompts,
                    name=name,
                    max_new_tokens=max_new_tokens,
                    utility_new_tokens=utility_new_tokens,
                    batch_size=batch_size,
                    kl_to_reference=kl,
                    progress=advance,
                )
            )
    return evaluations


def kl_examples(prompts: PromptSets) -> list[Example]:
    """Return what the KL to a reference is measured on: the benign and the borderline prompts that have responses.

    Raises:
        DataError: If there are none.
    """
    examples = [example for example in (*prompts.benign, *prompts.borderline) if example.response is not None]
    if not examples:
        raise DataError(
            "The KL to a reference is measured on the responses to benign and borderline prompts, but of "
            f"{len(prompts.benign)} benign and {len(prompts.borderline)} borderline prompts none has a response; give some "
            "that have, or no reference."
        )
    return examples
