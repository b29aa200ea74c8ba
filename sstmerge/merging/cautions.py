"""Sentences about a merge whose numbers mean less than they seem to."""

from __future__ import annotations

from torch import Tensor

from sstmerge.fisher import Structure
from sstmerge.gevp import Spectrum

# Below this number of effective sequences the largest λ are mostly noise of the selection.
FEW_SEQUENCES = 32
# Above this length, over that of the adapter as trained, or this KL in nats per token, a quadratic model says little.
LARGEST_LENGTH = 1.5
# Below this one a filter has left next to nothing of the adapter.
SMALLEST_LENGTH = 0.1
LARGEST_KL = 1.0
# A spectrum whose largest values lie this close together, for this share of its directions, prefers nothing.
_NEARLY_EQUAL = 0.95
_PLATEAU = 0.1


def cautions(
    spectrum: Spectrum, length: float, predicted_kl: float, effective: tuple[float, float], *, filtered: bool = False
) -> list[str]:
    """Say what to look at before believing a merge.

    Args:
        spectrum: The solved pair of Fishers.
        length: Norm of the change over that of the adapter as trained.
        predicted_kl: Predicted benign KL, nats per token.
        effective: Effective numbers of sequences behind gain and cost.
        filtered: Whether a filter has shrunk every direction, so that a larger scale is no extrapolation.

    Returns:
        Sentences; none where nothing stands out.
    """
    sentences = []
    if length > LARGEST_LENGTH:
        sentences.append(
            f"The change is {length:.2f} times as long as the adapter as trained: so far out the quadratic model is a guess."
        )
    if filtered and length < SMALLEST_LENGTH:
        sentences.append(
            f"The filter leaves {length:.1%} of the adapter's length, which hardly does anything; raise the scale (or the "
            "budget), or lower μ or the exponent."
        )
    if predicted_kl > LARGEST_KL:
        sentences.append(
            f"The predicted benign KL is {predicted_kl:.3g} nats per token, where a quadratic model says only that it is "
            "large; measure it (sstmerge evaluate), or take a budget below 1."
        )
    for role, sequences in zip(("harm", "benign"), effective, strict=True):
        if sequences < FEW_SEQUENCES:
            sentences.append(
                f"Only {sequences:.0f} effective {role} sequences: the largest λ are then mostly selection noise."
            )
    sentences += _about_data(spectrum)
    sentences += _about_spectrum(spectrum.eigenvalues)
    return sentences


def about_budget(structure: Structure) -> str:
    """Say what the predicted KL, which a budget is spent in, leaves out (docs/RESULTS.md, experiment C).

    Args:
        structure: Structure of the Fishers.

    Returns:
        A sentence.
    """
    if structure is Structure.GLOBAL:
        return (
            "The budget is spent on the prompts that the directions were chosen on; on others it is many times as large: "
            "see that of the split halves, or measure it (sstmerge evaluate --reference)."
        )
    return (
        f"The budget is spent in the nats of '{structure}', which leave out that layers act together; the KL is likely "
        "several times as large: measure it (sstmerge evaluate --reference)."
    )


def _about_data(spectrum: Spectrum) -> list[str]:
    gain, cost = spectrum.gain.metadata, spectrum.cost.metadata
    sentences = []
    if gain.get("reference") != cost.get("reference"):
        sentences.append(f"The gain was taken at '{gain.get('reference')}' but the cost at '{cost.get('reference')}'.")
    if gain.get("data") is not None and gain.get("data") == cost.get("data"):
        sentences.append(
            "The gain and the cost come from the same data, so λ compares labels alone and cannot tell apart what refusals "
            "need from what benign answers need; give different harm and benign files."
        )
    if cost.get("labels") == "data":
        sentences.append(
            "The cost was collected with the labels of its data: it measures what makes those responses likelier, and what "
            "is called predicted benign KL here is no KL (that takes labels='sampled')."
        )
    if cost.get("penalty") is not None:
        sentences.append(
            "Refusals of benign prompts count as cost here, so what is called predicted benign KL is no KL."
        )
    return sentences


def _about_spectrum(eigenvalues: Tensor) -> list[str]:
    largest = float(eigenvalues.max()) if len(eigenvalues) else 0.0
    if largest == 0:
        return [
            "The gain is zero in every direction: the harm data do not pull at these adapters at all (or their gradients "
            "underflow in the model's dtype), so nothing of the safety adapter was measured to help."
        ]
    alike = int((eigenvalues > _NEARLY_EQUAL * largest).sum())
    if alike >= max(3.0, _PLATEAU * len(eigenvalues)):
        return [
            f"The largest λ are nearly equal ({largest:.3g} for {alike} of {len(eigenvalues)} directions): harm and benign "
            "data do not tell apart what to keep. Are the two files the same?"
        ]
    return []
