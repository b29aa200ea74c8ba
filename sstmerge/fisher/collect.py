"""Collecting a Fisher: forward, closed-form label scores at the logits, backward through the taps, sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

import sstmerge
from sstmerge.adapters import CoreSpace
from sstmerge.errors import FisherError, InputError
from sstmerge.fisher.batch import Batch
from sstmerge.fisher.batch_scores import BatchScores
from sstmerge.fisher.checkpoint import Checkpoint
from sstmerge.fisher.distributed import Ranks
from sstmerge.fisher.fingerprints import content_hash, data_fingerprint, layout_fingerprint, model_fingerprint
from sstmerge.fisher.fisher import Fisher
from sstmerge.fisher.head import Head
from sstmerge.fisher.partial_sums import most_leaves
from sstmerge.fisher.placement import input_device, refuse_shared_sharding
from sstmerge.fisher.points import reference_points
from sstmerge.fisher.shared_work import SharedWork
from sstmerge.fisher.structures import (
    Accumulator,
    KroneckerBasis,
    Structure,
    WeightSharing,
    parse_structure,
)
from sstmerge.fisher.taps import Taps, frozen, installed_taps
from sstmerge.fisher.work import all_items
from sstmerge.ops import BackendName


def collect_fisher(
    model: nn.Module,
    batches: Sequence[Batch],
    space: CoreSpace,
    *,
    structure: str = "kfac",
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
    ranks: Ranks | None = None,
    checkpoint: Checkpoint | None = None,
) -> Fisher:
    """Collect a Fisher in the core space of some adapters.

    The sums are added in an order that depends on the batches alone (`sstmerge.fisher.partial_sums`), so that neither the
    number of processes nor an interruption changes a bit, as long as the machine computes one batch alike.

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
        progress: Called with the numbers of sequences done, by all processes, and in all.
        ranks: The processes that share the work; all must call this function with the same arguments, and all get the
            result. This process alone by default.
        checkpoint: Where to save what was collected, and to go on from. With one, SIGINT and SIGTERM save it and raise
            `Interrupted`.

    Returns:
        The Fisher.

    Raises:
        InputError: If an option is unknown or missing, or the data hold no response token.
        FisherError: If scores are not finite, or a layer received no gradient.
    """
    kind = parse_structure(structure)
    sharing = _parse_sharing(weight_sharing)
    _check_options(kind, labels, draws, basis, batches)
    ranks = ranks or Ranks()
    refuse_shared_sharding(model, ranks)
    home = reference_space or space
    points = reference_points(reference, home) if isinstance(reference, str) else [reference]
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
    shapes = [group.core_shape for group in space.groups]
    work = SharedWork(
        all_items(most_leaves(kind), len(points), len(batches)),
        batches,
        partial(Accumulator, kind, shapes, weight_sharing=sharing, basis=basis, device=input_device(model)),
        ranks=ranks,
        checkpoint=checkpoint,
        configuration=lambda: {
            "structure": kind.value,
            **recorded,
            "batches": layout_fingerprint(batches),
            "adapters": space.fingerprint,
            "bases": content_hash(space.basis_tensors() | {f"home.{n}": t for n, t in home.basis_tensors().items()}),
            "points": content_hash({str(i): point for i, point in enumerate(points)}),
            "Kronecker basis": basis and content_hash({str(i): t for i, t in enumerate(basis.P + basis.Q)}),
            "device": input_device(model).type,
            "backend": backend,
        },
    )
    head = Head(model)
    with frozen(model), work.signals_held_back() as signalled:
        head.check_causal(model)
        # A batch is over when the next one is asked for: then checkpoints, signals and progress have their turn.
        for number, items in groupby(work.items_in_turn(signalled, progress), key=lambda item: item.point):
            with _taps_at(model, space, home, points[number], backend) as taps:
                for item in items:
                    batch = batches[item.batch].to(input_device(model))
                    run = BatchScores(model, head, taps, batch, seed * len(points) + number)
                    accumulator = work.collected.accumulator(item)
                    work.collected.add(item, run.collect(accumulator, labels, draws))
    statistics, counts = work.total(progress)
    if basis is not None:
        statistics |= basis.statistics()
    _check_finite(statistics, space)
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
