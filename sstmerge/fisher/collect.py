"""Collecting a Fisher: forward, closed-form label scores at the logits, backward through the taps, sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import sstmerge
from sstmerge.adapters import CoreSpace
from sstmerge.errors import FisherError, InputError
from sstmerge.fisher.batch import Batch
from sstmerge.fisher.batch_scores import BatchScores
from sstmerge.fisher.fingerprints import data_fingerprint, model_fingerprint
from sstmerge.fisher.fisher import Counts, Fisher
from sstmerge.fisher.head import Head
from sstmerge.fisher.points import reference_points
from sstmerge.fisher.structures import (
    Accumulator,
    KroneckerBasis,
    Structure,
    WeightSharing,
    parse_structure,
)
from sstmerge.fisher.taps import Taps, frozen, installed_taps
from sstmerge.ops import BackendName


def collect_fisher(
    model: nn.Module,
    batches: Sequence[Batch],
    space: CoreSpace,
    *,
    structure: str = "global",
    labels: str = "data",
    reference: str | Tensor = "base",
    reference_space: CoreSpace | None = None,
    draws: int = 1,
    weight_sharing: str = "expand",
    basis: KroneckerBasis | None = None,
    seed: int = 0,
    backend: BackendName = "auto",
    metadata: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Fisher:
    """Collect a Fisher in the core space of some adapters.

    Args:
        model: A causal language model from transformers, or a `peft.PeftModel` of it; used in evaluation mode, restored
            afterwards, and never changed. Its weights may be quantised.
        batches: The data.
        space: The core space; the model's layers are found by its layer names.
        structure: One of `diagonal`, `kfac`, `ekfac`, `block`, `global` (`sstmerge.fisher.structures`).
        labels: `data` for the responses as they are (the empirical Fisher, whose mean score shows the way to them), or
            `sampled` for labels drawn from the model at every response position: the true Fisher, the curvature of
            KL(p_reference ‖ p). Kunstner et al. 2019, https://arxiv.org/abs/1905.12558, on why they differ.
        reference: Where scores are taken: `base`, an adapter's name, `A+0.5*B`, `path:A:B:n`, or
            the coordinates of a point, shape (D,).
        reference_space: The space that the reference is a point of, where `space` is only part of it (a module filter);
            `space` itself by default.
        draws: Draws of the labels per forward pass, for `sampled`.
        weight_sharing: For `kfac`: `expand` or `reduce`.
        basis: For `ekfac`: the Kronecker basis to refit in (`KroneckerSpectrum.basis`).
        seed: Seed of the sampled labels. The labels of a sequence depend on its index, not on how batches are cut.
        backend: What projects activations and gradients, as in `installed_taps`.
        metadata: Further entries of the result's metadata.
        progress: Called with the numbers of sequences done and in all.

    Returns:
        The Fisher.

    Raises:
        InputError: If an option is unknown or missing, or the data hold no response token.
        FisherError: If scores are not finite, or a layer received no gradient.
    """
    kind = parse_structure(structure)
    sharing = _parse_sharing(weight_sharing)
    _check_options(kind, labels, draws, basis, batches)
    home = reference_space or space
    points = reference_points(reference, home) if isinstance(reference, str) else [reference]
    accumulator = Accumulator(
        kind, [group.core_shape for group in space.groups], weight_sharing=sharing, basis=basis, device=_device(model)
    )
    counts = Counts.zero()
    done, total = 0, sum(len(batch.index) for batch in batches) * len(points)
    head = Head(model)
    with frozen(model):
        for number, point in enumerate(points):
            with _taps_at(model, space, home, point, backend) as taps:
                for batch in batches:
                    run = BatchScores(model, head, taps, batch.to(_device(model)), seed * len(points) + number)
                    counts = counts + run.collect(accumulator, labels, draws)
                    done += len(batch.index)
                    if progress is not None:
                        progress(done, total)
    statistics = accumulator.statistics()
    _check_finite(statistics, space)
    recorded = {
        "labels": labels,
        "reference": reference if isinstance(reference, str) else "a point",
        "draws": draws,
        "weight_sharing": sharing.value,
        "seed": seed,
        "model": model_fingerprint(model),
        "data": data_fingerprint(batches),
        "versions": {"sstmerge": sstmerge.__version__, "torch": torch.__version__},
        **(metadata or {}),
    }
    return Fisher(kind, space, statistics, counts, recorded)


@contextmanager
def _taps_at(
    model: nn.Module, space: CoreSpace, home: CoreSpace, point: Tensor, backend: BackendName
) -> Iterator[Taps]:
    """Install recording taps of `space` on a model that behaves as a point of `home`."""
    if home is space:
        with installed_taps(model, space, point, record=True, backend=backend) as taps:
            yield taps
    else:
        with (
            installed_taps(model, home, point, backend=backend),
            installed_taps(model, space, record=True, backend=backend) as taps,
        ):
            yield taps


def _parse_sharing(name: str) -> WeightSharing:
    try:
        return WeightSharing(name)
    except ValueError:
        raise InputError(f"Unknown weight_sharing '{name}'; expected 'expand' or 'reduce'.") from None


def _check_options(
    structure: Structure, labels: str, draws: int, basis: KroneckerBasis | None, batches: Sequence[Batch]
) -> None:
    if labels not in ("data", "sampled"):
        raise InputError(f"Unknown labels '{labels}'; expected 'data' or 'sampled'.")
    if draws < 1 or (draws > 1 and labels == "data"):
        raise InputError(
            f"draws={draws} with labels='{labels}': expected at least 1, and more only for sampled labels."
        )
    if (structure is Structure.EKFAC) != (basis is not None):
        raise InputError(
            "structure='ekfac' refits eigenvalues in a Kronecker basis and needs one (solve a pair of kfac Fishers "
            "first and pass spectrum.basis); no other structure takes a basis."
        )
    if not any(bool(batch.loss_mask.any()) for batch in batches):
        raise InputError("The data hold no response token, so there is no loss and no score; give rows with responses.")


def _check_finite(statistics: dict[str, Tensor], space: CoreSpace) -> None:
    for name, tensor in statistics.items():
        if bool(torch.isfinite(tensor).all()):
            continue
        layer = "some layer"
        if tensor.dim() > 2:
            group = space.groups[int(name.rsplit(".", 1)[1])]
            bad = (~torch.isfinite(tensor)).flatten(2).any(dim=2).any(dim=0)
            layer = f"layer '{group.names[int(bad.nonzero()[0])]}'"
        raise FisherError(
            f"The scores of {layer} are not finite ({name}): the model overflows in its dtype on these data. Load it in "
            "bfloat16 or float32."
        )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
