"""Collecting a sketch of a base model: one pass over the data, which can be interrupted and taken up again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sstmerge
from sstmerge.errors import FisherError, InputError
from sstmerge.fisher.batch import Batch
from sstmerge.fisher.batch_scores import FLOAT16_SCALE, BatchScores
from sstmerge.fisher.checkpoint import DEFAULT_MINUTES
from sstmerge.fisher.fingerprints import data_fingerprint, model_fingerprint
from sstmerge.fisher.fisher import Counts
from sstmerge.fisher.head import Head, label_scores
from sstmerge.fisher.interruption import held_back, interruptible
from sstmerge.fisher.placement import input_device
from sstmerge.fisher.sketch import Sketch, score_cores
from sstmerge.fisher.sketch_file import read_checkpoint, write_checkpoint
from sstmerge.fisher.sketch_plan import SketchPlan, plan_sketch
from sstmerge.fisher.sketch_sums import nystrom_factor, residual_of
from sstmerge.fisher.sketch_taps import BatchRows, SketchTaps, installed_sketch_taps
from sstmerge.fisher.taps import Taps, frozen


def collect_sketch(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    rank: int = 256,
    labels: str = "data",
    draws: int = 1,
    seed: int = 0,
    targets: Sequence[str] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float | None = DEFAULT_MINUTES,
    checkpoint_batches: int | None = None,
    metadata: dict[str, Any] | None = None,
    announce: Callable[[SketchPlan], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sketch:
    """Collect a sketch of a base model, to be projected later into the core space of any adapters.

    Args:
        model: A causal language model from transformers, or a `peft.PeftModel`, whose adapters are switched off; used in
            evaluation mode, restored afterwards, and never changed. Its weights may be quantised.
        batches: The data.
        rank: Columns of the test matrices; layers of at most this width are kept exactly.
        labels: `data` (gain: harmful prompts with refusals) or `sampled` (cost: benign prompts), as in `collect_fisher`.
        draws: Draws of the labels per forward pass, for `sampled`.
        seed: Seed of the test matrices and of the sampled labels. Sketches that are to be added need the same.
        targets: Last names of the layers to sketch; by default all linear layers but the output head.
        checkpoint: File that the sums are written to while data pass, and when the run is stopped. Where it exists
            already, the collection goes on from there, and the result has the bits of an unbroken one. It stays; remove
            it when the sketch is saved.
        checkpoint_minutes: Minutes between two savings; None saves by batches alone.
        checkpoint_batches: Batches between two savings; None saves by time alone.
        metadata: Further entries of the result's metadata.
        announce: Called with the plan, its memory and the layers left out, before the data pass begins.
        progress: Called with the numbers of sequences done and in all.

    Returns:
        The sketch.

    Raises:
        InputError: If an option is unusable, or the data hold no response token.
        FisherError: If scores are not finite, a layer received no gradient, or the checkpoint belongs to something else.
        Interrupted: If SIGINT or SIGTERM came; the checkpoint holds every batch up to then.
    """
    _check_options(labels, draws, checkpoint_batches, batches)
    plan = plan_sketch(model, batches, rank=rank, seed=seed, targets=targets, scores=labels == "data")
    if announce is not None:
        announce(plan)
    recorded = {
        "labels": labels,
        "reference": "base",
        "draws": draws,
        "weight_sharing": "expand",
        "seed": seed,
        "model": model_fingerprint(model),
        "data": data_fingerprint(batches),
        "versions": {"sstmerge": sstmerge.__version__, "torch": torch.__version__},
        "left_out": plan.left_out,
        **(metadata or {}),
    }
    identity = {**recorded, "rank": rank, "layers": sorted(plan.layers), "batches": _cut(batches)}
    done, counts, total = 0, Counts.zero(), sum(len(batch.index) for batch in batches)
    head, device = Head(model), input_device(model)
    projecting = Taps([])  # none: nothing is projected
    saved_at, saved_after = time.monotonic(), 0
    with frozen(model), installed_sketch_taps(model, plan) as taps, interruptible():
        if checkpoint is not None and Path(checkpoint).exists():
            done, counts = read_checkpoint(checkpoint, identity, taps.tensors())
        for number, batch in enumerate(batches, start=1):
            if number > done:
                with held_back() as signal:
                    counts = counts + _SketchedBatch(model, head, projecting, batch.to(device), seed).add_to(
                        taps, labels, draws
                    )
                    by_time = checkpoint_minutes is not None and time.monotonic() - saved_at >= 60 * checkpoint_minutes
                    by_number = checkpoint_batches is not None and number - saved_after >= checkpoint_batches
                    if checkpoint is not None and (by_time or by_number or signal() is not None):
                        write_checkpoint(checkpoint, identity, taps.tensors(), counts, number)
                        saved_at, saved_after = time.monotonic(), number
            if progress is not None:
                progress(sum(len(b.index) for b in batches[:number]), total)
        return Sketch(plan.layers, plan.signs, _finished(taps, plan), counts, recorded)


class _SketchedBatch(BatchScores):
    """One batch at the base model, its scores sketched instead of projected."""

    def add_to(self, taps: SketchTaps, labels: str, draws: int) -> Counts:
        """Add the batch to the taps' sums and return what was counted."""
        hidden = self._forward()
        scale = FLOAT16_SCALE if hidden.dtype == torch.float16 else 1.0
        draw = self._sampled(draws) if labels == "sampled" else self._given(draws)
        gradients = label_scores(self.head, hidden, draw, self.root_weight[self.rows] * scale, draws=draws)
        rows, counts = BatchRows(self.batch, scale, draws), Counts.zero()
        for k in range(draws):
            taps.begin(rows, k)
            if hidden.requires_grad:
                hidden.backward(gradients[k], retain_graph=k < draws - 1)
            taps.check_all_called()
            counts = counts + self._counts()
        return counts


def _finished(taps: SketchTaps, plan: SketchPlan) -> dict[str, Tensor]:
    """Turn sums into factors, one at a time, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for tap in taps.taps.values():
        for name, tensor in tap.tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise FisherError(
                    f"The scores of layer '{tap.name}' are not finite ({name}): the model overflows in its dtype on these "
                    "data. Load it in bfloat16 or float32."
                )
        for side, sums in (("input", tap.input), ("output", tap.output)):
            if sums is not None:
                factor = nystrom_factor(sums.product, plan.signs)
                residual = residual_of(factor, sums.diagonal)
                tensors |= {f"{side}_factor.{tap.name}": factor.cpu(), f"{side}_residual.{tap.name}": residual.cpu()}
        if tap.score is not None:
            tensors |= {
                f"score_left.{tap.name}": tap.score.left.cpu(),
                f"score_right.{tap.name}": tap.score.right.cpu(),
            }
        tensors[f"input_count.{tap.name}"] = tap.input_count
    return tensors | score_cores(tensors, plan.signs)


def _check_options(labels: str, draws: int, checkpoint_batches: int | None, batches: Sequence[Batch]) -> None:
    if labels not in ("data", "sampled"):
        raise InputError(f"Unknown labels '{labels}'; expected 'data' or 'sampled'.")
    if draws < 1 or (draws > 1 and labels == "data"):
        raise InputError(
            f"draws={draws} with labels='{labels}': expected at least 1, and more only for sampled labels."
        )
    if checkpoint_batches is not None and checkpoint_batches < 1:
        raise InputError(f"checkpoint_batches must be at least 1, but is {checkpoint_batches}.")
    if not any(bool(batch.loss_mask.any()) for batch in batches):
        raise InputError("The data hold no response token, so there is no loss and no score; give rows with responses.")


def _cut(batches: Sequence[Batch]) -> str:
    """Return a SHA-256 of how the data are cut into batches, which decides the order of the additions."""
    return hashlib.sha256(repr([batch.index.tolist() for batch in batches]).encode()).hexdigest()
