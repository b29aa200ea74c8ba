"""What a Fisher was collected from, as hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sstmerge.fisher.batch import Batch
from sstmerge.fisher.placement import base_parameters


def model_fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over the names, shapes and a few values of a model's base weights; adapters do not count."""
    digest = hashlib.sha256()
    for name, values in base_parameters(model):
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.reshape(-1)[:16].cpu().contiguous().view(torch.uint8).numpy().tobytes())
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


def layout_fingerprint(batches: Sequence[Batch]) -> str:
    """Return a SHA-256 over how the sequences are cut into batches, which decides the order of additions."""
    layout = [(batch.index.tolist(), batch.input_ids.shape[1]) for batch in batches]
    return hashlib.sha256(repr(layout).encode()).hexdigest()


def content_hash(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """Return a SHA-256 over texts and tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():  # a tensor of one dimension, because views of another dtype need a last axis
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
