"""The unit of data a Fisher is collected from: a right-padded batch of token sequences."""

from __future__ import annotations

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
