"""Collecting a Fisher: forward, closed-form label scores at the logits, backward through the taps, sums."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import sstmerge
from sstmerge.adapters import CoreSpace
from sstmerge.errors import FisherError, InputError
from sstmerge.fisher.batch import Batch
from sstmerge.fisher.fisher import Counts, Fisher
from sstmerge.fisher.head import Head, label_scores
from sstmerge.fisher.points import reference_points
from sstmerge.fisher.structures import (
    Accumulator,
    GroupScores,
    KroneckerBasis,
    Structure,
    WeightSharing,
    parse_structure,
)
from sstmerge.fisher.taps import Tap, Taps, frozen, installed_taps
from sstmerge.ops import BackendName

# float16 gradients underflow below 6e-8; scores are scaled up by this power of two on the way down, and back after.
FLOAT16_SCALE = 1024.0


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
                    run = _BatchScores(model, head, taps, batch.to(_device(model)), seed * len(points) + number)
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


class _BatchScores:
    """One batch at one reference point: forward, label scores, one backward pass per draw."""

    def __init__(self, model: nn.Module, head: Head, taps: Taps, batch: Batch, seed: int) -> None:
        self.model = model
        self.head = head
        self.taps = taps
        self.batch = batch
        self.seed = seed
        self.halves = batch.index % 2
        self.root_weight = batch.weight.sqrt()
        # Token t is predicted from position t - 1.
        self.predicts = torch.zeros_like(batch.loss_mask)
        self.predicts[:, :-1] = batch.loss_mask[:, 1:]
        self.rows = self.predicts.nonzero()[:, 0]  # sequence of every selected position, ascending

    def collect(self, accumulator: Accumulator, labels: str, draws: int) -> Counts:
        """Add the batch to the accumulator and return what was counted."""
        hidden = self._forward()
        scale = FLOAT16_SCALE if hidden.dtype == torch.float16 else 1.0
        weight = self.root_weight[self.rows] * scale
        self.taps.clear()
        draw = self._sampled(draws) if labels == "sampled" else self._given(draws)
        gradients = label_scores(self.head, hidden, draw, weight, draws=draws)
        head_records = self._take_records()  # where the head itself is adapted
        counts = Counts.zero()
        for k in range(draws):
            if hidden.requires_grad:  # not where the head alone is adapted; layers without a record are refused below
                hidden.backward(gradients[k], retain_graph=k < draws - 1)
            records = self._take_records()
            # One record per chunk of rows and draw, draws innermost; taps below the head have none here.
            records |= {tap: chunks[k::draws] for tap, chunks in head_records.items() if chunks}
            self._accumulate(records, accumulator, scale)
            counts = counts + self._counts()
        return counts

    def _forward(self) -> Tensor:
        """Return the hidden states at the positions that predict a response token, shape (N, d)."""
        captured: list[Tensor] = []
        with torch.enable_grad(), self.head.capturing(captured):
            output = self.model(
                input_ids=self.batch.input_ids, attention_mask=self.batch.attention_mask, use_cache=False
            )
        if len(captured) != 1:
            raise FisherError(f"The model called its output head {len(captured)} times in one pass; expected once.")
        self.head.check(captured[0], output.logits)
        return captured[0][self.predicts]

    def _given(self, draws: int) -> Callable[[Tensor, slice], Tensor]:
        labels = self.batch.input_ids[:, 1:][self.batch.loss_mask[:, 1:]]
        return lambda probability, rows: labels[rows].expand(draws, -1)

    def _sampled(self, draws: int) -> Callable[[Tensor, slice], Tensor]:
        """Return a sampler by inversion, whose random numbers belong to the sequence and not to the batch."""
        counts = torch.bincount(self.rows, minlength=len(self.batch.index)).tolist()
        generator = torch.Generator()
        parts = []
        for index, count in zip(self.batch.index.tolist(), counts, strict=True):
            digest = hashlib.sha256(f"{self.seed} {index}".encode()).digest()
            generator.manual_seed(int.from_bytes(digest[:7], "little"))
            parts.append(torch.rand(count, draws, generator=generator, dtype=torch.float64))
        uniform = torch.cat(parts).to(self.rows.device)

        def draw(probability: Tensor, rows: slice) -> Tensor:
            cumulative = probability.cumsum(dim=-1)
            level = uniform[rows].to(cumulative.dtype) * cumulative[:, -1:]
            return torch.searchsorted(cumulative, level).clamp_max(probability.shape[-1] - 1).mT

        return draw

    def _take_records(self) -> dict[Tap, list[tuple[Tensor, Tensor]]]:
        taken = {tap: list(tap.records) for group in self.taps.groups for tap in group}
        self.taps.clear()
        return taken

    def _accumulate(
        self, records: dict[Tap, list[tuple[Tensor, Tensor]]], accumulator: Accumulator, scale: float
    ) -> None:
        for i, group in enumerate(self.taps.groups):
            scores = self._group_scores([self._sequences(tap, records[tap]) for tap in group], scale, accumulator)
            accumulator.update(i, scores, self.root_weight.to(scores.gamma.device))
        accumulator.finish_batch(self.halves)

    def _sequences(self, tap: Tap, records: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Bring a layer's records to the shape (B, S, R), calls one after the other, with their mask (B, S)."""
        if not records:
            raise FisherError(
                f"Layer '{tap.name}' received no gradient from the loss, so it has no scores. Either the model does not "
                "use it for these inputs, or it detaches it (reentrant gradient checkpointing does): switch that off."
            )
        size, length = self.batch.input_ids.shape
        parts = []
        for x, delta in records:
            if x.dim() == 3 and x.shape[0] == size:
                parts.append((x, delta))
            elif x.dim() == 2 and x.shape[0] == size * length:
                parts.append((x.unflatten(0, (size, length)), delta.unflatten(0, (size, length))))
            elif x.dim() != 2:
                raise FisherError(
                    f"Layer '{tap.name}' saw an input of shape {tuple(x.shape)} for a batch of {size} sequences of "
                    f"{length} tokens; expected one row per token. Layers that mix sequences are not supported."
                )
        if not parts:
            return (*self._head_sequences(tap, records), self.predicts)
        x, delta = torch.cat([x for x, _ in parts], dim=1), torch.cat([d for _, d in parts], dim=1)
        return x, delta, self.batch.attention_mask.repeat(1, len(parts))

    def _head_sequences(self, tap: Tap, records: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Scatter the output head's records, one row per response position, back to (B, S, R)."""
        x, delta = torch.cat([x for x, _ in records]), torch.cat([d for _, d in records])
        if x.shape[0] != len(self.rows):
            raise FisherError(
                f"Layer '{tap.name}' saw {x.shape[0]} tokens of {self.batch.input_ids.numel()}, so its rows cannot be "
                "told apart by sequence (a routed expert, for instance); leave it out of the merge."
            )
        shape = self.predicts.shape
        full_x, full_delta = x.new_zeros(*shape, x.shape[1]), delta.new_zeros(*shape, delta.shape[1])
        full_x[self.predicts], full_delta[self.predicts] = x, delta
        return full_x, full_delta

    def _group_scores(
        self, parts: list[tuple[Tensor, Tensor, Tensor]], scale: float, accumulator: Accumulator
    ) -> GroupScores:
        device = _accumulator_device(accumulator)
        precision = torch.promote_types(parts[0][0].dtype, torch.float32)
        x = _stack_calls([x for x, _, _ in parts], device, precision)
        delta = _stack_calls([d for _, d, _ in parts], device, precision)
        mask = _stack_calls([m[:, :, None] for _, _, m in parts], device, precision)
        if scale != 1.0:
            delta = delta / scale
        x = x * mask
        gamma = delta.mT @ x
        return GroupScores(x, delta, gamma, mask.sum(dim=(2, 3)), self.halves.to(device))

    def _counts(self) -> Counts:
        weight, tokens = self.batch.weight.double().cpu(), self.predicts.sum(dim=1).double().cpu()
        positions = self.batch.attention_mask.sum(dim=1).double().cpu()
        membership = torch.nn.functional.one_hot(self.halves.cpu(), 2).double()
        columns = (weight, weight * tokens, weight * positions, weight.square())
        return Counts(*(column @ membership for column in columns))


def _stack_calls(parts: list[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Stack tensors (B, S_l, R) to (L, B, S, R); layers that were called less often are padded with zeros."""
    longest = max(part.shape[1] for part in parts)
    if any(part.shape[1] < longest for part in parts):
        parts = [torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts]
    return torch.stack([part.to(device) for part in parts]).to(dtype)


def model_fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over the names, shapes and a few values of a model's base weights; adapters do not count."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" in name:
            continue
        plain = name.replace("base_model.model.", "").replace(".base_layer.", ".")
        digest.update(f"{plain}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().reshape(-1)[:16].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def data_fingerprint(batches: Sequence[Batch]) -> str:
    """Return a SHA-256 over the sequences in the order of their indices, however the batches are cut."""
    rows: dict[int, str] = {}
    for batch in batches:
        for i, index in enumerate(batch.index.tolist()):
            length = int(batch.attention_mask[i].sum())
            content = (
                batch.input_ids[i, :length].tolist(),
                batch.loss_mask[i, :length].tolist(),
                float(batch.weight[i]),
            )
            rows[index] = repr(content)
    return hashlib.sha256("\n".join(rows[i] for i in sorted(rows)).encode()).hexdigest()


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


def _accumulator_device(accumulator: Accumulator) -> torch.device:
    return next(iter(accumulator.sums.values())).device
