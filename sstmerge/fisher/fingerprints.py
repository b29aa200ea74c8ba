"""What a Fisher was collected from, as hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from weakref import WeakKeyDictionary

import numpy
import torch
from torch import Tensor, nn

from sstmerge.fisher.batch import Batch
from sstmerge.fisher.placement import base_parameters

_WORDS_PER_BLOCK = 2**14
_BLOCKS_AT_ONCE = 4  # half a megabyte, which stays in the cache
_SAMPLED = 1024
# Fingerprints of models, with what was sampled of the weights then.
_known: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()


def model_fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over the names, shapes, dtypes and values of a model's base weights; adapters do not count.

    Every bit of every weight counts. A SHA-256 of 140 GB would take minutes, so the values enter as a multilinear hash
    (Lemire and Kaser 2014, https://arxiv.org/abs/1202.4961), which runs where they are. It finds accidents and other models,
    not attackers. It is computed again when a weight has moved, was written to by torch (but for `tensor.data`), or differs
    in one of a thousand values.
    """
    sample = hashlib.sha256()
    for name, values in base_parameters(model):
        writes = 0 if values.is_inference() else values._version
        sample.update(f"{name}{values.dtype}{tuple(values.shape)}{values.data_ptr()} {writes}".encode())
        step = values.numel() // _SAMPLED | 1  # odd, so that it does not stay in one column
        sample.update(values.reshape(-1)[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    sampled, known = sample.hexdigest(), _known.get(model)
    if known is None or known[0] != sampled:
        known = _known[model] = (sampled, _hash_of_weights(model))
    return known[1]


def _hash_of_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, values in base_parameters(model):
        digest.update(f"{name}{values.dtype}{tuple(values.shape)}".encode())
        for sums in list(_block_sums(values)):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def _block_sums(values: Tensor) -> Iterator[Tensor]:
    """Yield Σ lo_i a_i + hi_i (2³² a_i + b_i) modulo 2⁶⁴ over the two halves of every block's 64-bit words.

    a and b are odd and fixed. An accident in one half of a word always alters the sum; any other one leaves it as it was
    about once in 2³³ times.
    """
    if not values.numel():
        return
    a, b = _multipliers().to(values.device)
    size = 8 * _WORDS_PER_BLOCK
    for piece in values.detach().contiguous().reshape(-1).view(torch.uint8).split(size * _BLOCKS_AT_ONCE):
        if rest := -len(piece) % size:
            piece = torch.nn.functional.pad(piece, (0, rest))
        elif piece.storage_offset() % 8:  # words begin at multiples of their size
            piece = piece.clone()
        words = piece.view(torch.int64).view(-1, _WORDS_PER_BLOCK)
        yield (words * a).sum(dim=1) + ((words >> 32) * b).sum(dim=1)


@cache
def _multipliers() -> Tensor:
    """Return a and b, shape (2, words), int64: bits of SHAKE-256, equal in every version of every library."""
    bits = hashlib.shake_256(b"sstmerge model fingerprint").digest(16 * _WORDS_PER_BLOCK)
    return torch.from_numpy(numpy.frombuffer(bits, dtype="<i8").reshape(2, -1) | 1)


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
