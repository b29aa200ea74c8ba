"""One batch at one reference point: forward, closed-form label scores at the logits, backward through the taps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sstmerge.errors import FisherError
from sstmerge.fisher.batch import Batch
from sstmerge.fisher.fisher import Counts
from sstmerge.fisher.head import Head, label_scores
from sstmerge.fisher.structures import Accumulator, GroupScores
from sstmerge.fisher.taps import Tap, Taps

# float16 gradients underflow below 6e-8; scores are scaled up by this power of two on the way down, and back after.
FLOAT16_SCALE = 1024.0


class BatchScores:
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
        one_token = {"input_ids": self.batch.input_ids[:1, :1], "attention_mask": self.batch.attention_mask[:1, :1]}
        self.taps.find_shared_inputs(lambda: self.model(**one_token, use_cache=False))
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


def _accumulator_device(accumulator: Accumulator) -> torch.device:
    return next(iter(accumulator.sums.values())).device
