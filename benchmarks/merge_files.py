"""Adapter files and Fisher files in, a merged adapter file out, in a process of its own: time and peak memory.

python benchmarks/merge_files.py '{"step": "prepare", "folder": "…", "model": "Llama-2-70B"}'
python benchmarks/merge_files.py '{"step": "merge", "folder": "…"}'
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

RANK = 16


def prepare(folder: Path, model: str) -> dict:
    """Write two adapters with random factors in bfloat16, and K-FAC Fishers of them."""
    import torch
    from merge_shapes import MODELS, random_adapter, random_fisher
    from safetensors.torch import save_file

    from sstmerge.adapters import CoreSpace, load_adapter

    shape = MODELS[model]
    for name in ("utility", "safety"):
        adapter = random_adapter(name, shape, RANK, dtype=torch.bfloat16, device=torch.device("cpu"))
        tensors = {}
        for path, factors in adapter.layers.items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = factors.A
            tensors[f"base_model.model.{path}.lora_B.weight"] = factors.B
        (folder / name).mkdir()
        save_file(tensors, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = [module.split(".")[1] for module in shape.block()]
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        del tensors, adapter
    space = CoreSpace.of([load_adapter(folder / name) for name in ("utility", "safety")])
    for seed, role in enumerate(("gain", "cost")):
        random_fisher(space, "kfac", seed).save(folder / f"{role}.safetensors")
    return {}


def merge(folder: Path) -> dict:
    """Merge them as `sstmerge merge --gain … --cost …` does, and say what it took."""
    import peft  # noqa: F401 (the configuration of what is written; its import takes longer than the merge)

    from sstmerge.merging import Selection
    from sstmerge.pipeline.merge import merge_from_fishers

    imported = _peak_bytes()
    cpu, wall = time.process_time(), time.perf_counter()
    merge_from_fishers(
        folder / "gain.safetensors",
        folder / "cost.safetensors",
        utility=folder / "utility",
        safety=folder / "safety",
        out=folder / "merged",
        selection=Selection(top=16),
        stability=False,
    )
    files = [folder / name / "adapter_model.safetensors" for name in ("utility", "safety", "merged")]
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "peak_rss_gib": _peak_bytes() / 2**30,
        "rss_after_imports_gib": imported / 2**30,
        "bytes_read": sum(file.stat().st_size for file in files[:2]),
        "bytes_written": files[2].stat().st_size,
    }


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    place = Path(task["folder"])
    print(json.dumps(prepare(place, task["model"]) if task["step"] == "prepare" else merge(place)))
