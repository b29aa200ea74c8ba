"""Collecting a sketch of a base model: one pass over the data, shared among processes, interrupted and taken up again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sstmerge
from sstmerge.errors import FisherError, InputError
from sstmerge.fisher.batch import Batch
from sstmerge.fisher.batch_scores import FLOAT16_SCALE, BatchScores
from sstmerge.fisher.checkpoint import Checkpoint
from sstmerge.fisher.distributed import Ranks
from sstmerge.fisher.fingerprints import data_fingerprint, layout_fingerprint, model_fingerprint
from sstmerge.fisher.fisher import Counts
from sstmerge.fisher.head import Head, label_scores
from sstmerge.fisher.partial_sums import MOST_LEAVES_OF_LARGE_SUMS
from sstmerge.fisher.placement import input_device, refuse_shared_sharding
from sstmerge.fisher.shared_work import SharedWork
from sstmerge.fisher.sketch import INPUT, OUTPUT, Sketch, score_cores
from sstmerge.fisher.sketch_plan import SketchPlan, plan_sketch
from sstmerge.fisher.sketch_sums import nystrom_factor, residual_of
from sstmerge.fisher.sketch_taps import BatchRows, SketchTaps, installed_sketch_taps
from sstmerge.fisher.taps import Taps, frozen
from sstmerge.fisher.work import all_items


def collect_sketch(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    rank: int = 256,
    labels: str = "data",
    draws: int = 1,
    seed: int = 0,
    targets: Sequence[str] | None = None,
    metadata: dict[str, Any] | None = None,
    announce: Callable[[SketchPlan], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
    checkpoint: Checkpoint | None = None,
) -> Sketch:
    """Collect a sketch of a base model, to be projected later into the core space of any adapters.

    As in `collect_fisher`, neither the number of processes nor an interruption changes a bit.

    Args:
        model: A causal language model from transformers, or a `peft.PeftModel`, whose adapters are switched off; used in
            evaluation mode, restored afterwards, and never changed. Its weights may be quantised.
        batches: The data.
        rank: Columns of the test matrices; layers of at most this width are kept exactly.
        labels: `data` (gain: harmful prompts with refusals) or `sampled` (cost: benign prompts), as in `collect_fisher`.
        draws: Draws of the labels per forward pass, for `sampled`.
        seed: Seed of the test matrices and of the sampled labels. Sketches that are to be added need the same.
        targets: Last names of the layers to sketch; by default all linear layers but the output head.
        metadata: Further entries of the result's metadata.
        announce: Called with the plan, its memory and the layers left out, before the data pass begins.
        progress: Called with the numbers of sequences done, by all processes, and in all.
        ranks: The processes that share the work; all must call this function with the same arguments, and all get the
            result. This process alone by default.
        checkpoint: Where to save what was collected, and to go on from. With one, SIGINT and SIGTERM save it and raise
            `Interrupted`.

    Returns:
        The sketch.

    Raises:
        InputError: If an option is unusable, or the data hold no response token.
        FisherError: If scores are not finite, a layer received no gradient, or the checkpoint belongs to something else.
    """
    _check_options(labels, draws, batches)
    ranks = ranks or Ranks()
    refuse_shared_sharding(model, ranks)
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
    head, device = Head(model), input_device(model)
    projecting = Taps([])  # none: nothing is projected
    with frozen(model), installed_sketch_taps(model, plan) as taps:
        work = SharedWork(
            all_items(MOST_LEAVES_OF_LARGE_SUMS, 1, len(batches)),
            batches,
            taps.cleared,
            ranks=ranks,
            checkpoint=checkpoint,
            configuration=lambda: {
                "rank": rank,
                **recorded,
                "layers": sorted(plan.layers),
                "batches": layout_fingerprint(batches),
                "device": device.type,
            },
        )
        with work.signals_held_back() as signalled:
            for item in work.items_in_turn(signalled, progress):
                batch = _SketchedBatch(model, head, projecting, batches[item.batch].to(device), seed)
                work.collected.add(item, batch.add_to(work.collected.accumulator(item), labels, draws))
        devices = taps.devices
    sums, counts = work.total(progress)
    return Sketch(plan.layers, plan.signs, _finished(sums, plan, devices, ranks), counts, recorded)


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


def _finished(
    sums: Mapping[str, Tensor], plan: SketchPlan, devices: Mapping[str, torch.device], ranks: Ranks
) -> dict[str, Tensor]:
    """Turn sums into factors, one layer at a time; every process does some layers, and all get all of them."""
    own: dict[str, Tensor] = {}
    for name in list(plan.layers)[ranks.rank :: ranks.size]:
        own |= _finished_layer(name, sums, plan, devices[name])
    everything = {name: tensor for part in ranks.gather(own) for name, tensor in part.items()}
    return ranks.broadcast(everything)


def _finished_layer(name: str, sums: Mapping[str, Tensor], plan: SketchPlan, device: torch.device) -> dict[str, Tensor]:
    kinds = ("input_product", "input_diagonal", "output_product", "output_diagonal", "score_left", "score_right")
    of_layer = {kind: sums[f"{kind}.{name}"] for kind in kinds if f"{kind}.{name}" in sums}
    for kind, tensor in of_layer.items():
        if not bool(torch.isfinite(tensor).all()):
            raise FisherError(
                f"The scores of layer '{name}' are not finite ({kind}.{name}): the model overflows in its dtype on these "
                "data. Load it in bfloat16 or float32."
            )
    tensors = {f"input_count.{name}": sums[f"input_count.{name}"]}
    for side in (INPUT, OUTPUT):
        if f"{side}_product" in of_layer:
            product, diagonal = (of_layer[f"{side}_{kind}"].to(device) for kind in ("product", "diagonal"))
            factor = nystrom_factor(product, plan.signs)
            residual = residual_of(factor, diagonal)
            tensors |= {f"{side}_factor.{name}": factor.cpu(), f"{side}_residual.{name}": residual.cpu()}
    if "score_left" in of_layer:
        scores = {f"{kind}.{name}": of_layer[kind] for kind in ("score_left", "score_right")}
        tensors |= scores | score_cores(scores, plan.signs)
    return tensors


def _check_options(labels: str, draws: int, batches: Sequence[Batch]) -> None:
    if labels not in ("data", "sampled"):
        raise InputError(f"Unknown labels '{labels}'; expected 'data' or 'sampled'.")
    if draws < 1 or (draws > 1 and labels == "data"):
        raise InputError(
            f"draws={draws} with labels='{labels}': expected at least 1, and more only for sampled labels."
        )
    if not any(bool(batch.loss_mask.any()) for batch in batches):
        raise InputError("The data hold no response token, so there is no loss and no score; give rows with responses.")
