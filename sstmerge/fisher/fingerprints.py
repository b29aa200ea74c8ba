"""What a Fisher was collected from, as hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from sstmerge.fisher.batch import Batch


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
