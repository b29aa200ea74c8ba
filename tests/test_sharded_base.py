"""A base model whose weights FSDP2 has sharded over processes gives the Fisher of the whole model."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed
from builders import random_adapter, random_batch
from pico_models import build_llama

from sstmerge.adapters import CoreSpace
from sstmerge.errors import InputError
from sstmerge.fisher import collect_fisher
from sstmerge.fisher.distributed import ProcessGroup, Ranks
from sstmerge.fisher.fingerprints import model_fingerprint

PROCESSES = 2


def collect(model: torch.nn.Module, ranks: Ranks | None = None) -> dict[str, torch.Tensor]:
    plain = build_llama(0, tie_word_embeddings=False)
    space = CoreSpace.of([random_adapter(plain, name, seed=i) for i, name in enumerate("ab")])
    batches = [random_batch([9, 7, 5]), random_batch([4, 8], seed=1, first_index=3)]
    fisher = collect_fisher(model, batches, space, structure="kfac", labels="sampled", reference="a", ranks=ranks)
    return {"factors": torch.cat([factor.flatten() for pair in fisher.kronecker_factors() for factor in pair])}


def run_rank(rank: int, port: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    model = build_llama(0, tie_word_embeddings=False)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(InputError, match="each pass needs all of them"):
        collect(model, ranks=ProcessGroup())
    torch.save({**collect(model), "fingerprint": model_fingerprint(model)}, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_a_sharded_base_gives_the_fisher_of_the_whole(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (port, str(tmp_path)), nprocs=PROCESSES)

    plain = build_llama(0, tie_word_embeddings=False)
    want = collect(plain)["factors"]
    for rank in range(PROCESSES):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert float((got["factors"] - want).norm()) < 1e-6 * float(want.norm())
        assert got["fingerprint"] == model_fingerprint(plain)
