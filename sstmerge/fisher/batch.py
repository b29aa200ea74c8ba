"""The unit of data a Fisher is collected from: a right-padded batch of token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Right-padded token sequences and where their responses are.

    Attributes:
        input_ids: Token ids, shape (B, S), int64.
        attention_mask: 1 for real tokens and 0 for padding, shape (B, S), int64; padding is on the right.
        loss_mask: True where the token itself is a response token that enters the loss, shape (B, S), bool. Token t is
            predicted from position t - 1, so column 0 is never True.
        index: Position of each sequence in the data set, shape (B,), int64. It decides the split half and the random
            numbers of the sequence, so that neither depends on how batches are cut.
        weight: Weight of each sequence, shape (B,), float32.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    index: Tensor
    weight: Tensor

    def select(self, rows: Tensor) -> Batch:
        """Return the batch of the sequences where `rows` (B,), bool, is True."""
        return replace(self, **{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on `device`."""
        return replace(self, **{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


def length_groups(lengths: Sequence[int], tokens_per_batch: int, batch_size: int | None = None) -> list[list[int]]:
    """Put sequences of similar length together, so that little is padded.

    Args:
        lengths: Length of every sequence, in tokens.
        tokens_per_batch: Largest number of tokens in a group, padding included; a longer sequence has its own group.
        batch_size: Largest number of sequences in a group; None sets no limit.

    Returns:
        The positions of every group's sequences, the shortest first; equal lengths keep their order.
    """
    groups: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda position: lengths[position]):
        # Lengths ascend, so the newest sequence decides the width of the whole batch.
        largest = max(1, tokens_per_batch // lengths[position])
        if not groups or len(groups[-1]) >= min(largest, batch_size or largest):
            groups.append([])
        groups[-1].append(position)
    return groups


def regroup(batches: Sequence[Batch], indices: Sequence[int], tokens_per_batch: int) -> list[Batch]:
    """Cut some sequences of a data set into batches anew.

    Args:
        batches: The data set.
        indices: The sequences that are wanted, by `Batch.index`.
        tokens_per_batch: Largest number of tokens in a batch, padding included.

    Returns:
        The batches, the shortest sequences first.
    """
    wanted = torch.tensor(sorted(indices), dtype=torch.int64)
    rows = [
        batch.select(torch.tensor([row]))
        for batch in batches
        for row in torch.isin(batch.index.cpu(), wanted).nonzero()[:, 0].tolist()
    ]
    rows.sort(key=lambda row: int(row.index))
    lengths = [int(row.attention_mask.sum()) for row in rows]
    groups = length_groups(lengths, tokens_per_batch)
    return [_joined([rows[i] for i in group], max(lengths[i] for i in group)) for group in groups]


def _joined(rows: Sequence[Batch], width: int) -> Batch:
    """Put sequences into one batch of some width, in tokens; padding keeps whatever was in it, or is 0."""

    def columns(name: str) -> Tensor:
        parts = [getattr(row, name)[:, :width] for row in rows]
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])

    wide = {name: columns(name) for name in ("input_ids", "attention_mask", "loss_mask")}
    return Batch(**wide, index=torch.cat([r.index for r in rows]), weight=torch.cat([r.weight for r in rows]))
