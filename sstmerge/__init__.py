"""sstmerge: merge LoRA adapters by measured effect, safety gained per unit of damage to benign work."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sstmerge.adapters import Adapter, CoreSpace, adapter_from_model, load_adapter, save_adapter
    from sstmerge.fisher import Batch, Fisher, Sketch, collect_fisher, collect_sketch, load_sketch, save_sketch
    from sstmerge.gevp import solve
    from sstmerge.merging import Selection, merge_cores, merge_experts
    from sstmerge.peft_drop_in import add_weighted_adapter, peft_backend
    from sstmerge.pipeline.calibration import CollectionOptions
    from sstmerge.pipeline.merge import merge, merge_from_fishers
    from sstmerge.pipeline.method_merge import StatisticsFiles, available_methods, merge_adapters

_EXPORTS = {
    "sstmerge.adapters": ("Adapter", "CoreSpace", "adapter_from_model", "load_adapter", "save_adapter"),
    "sstmerge.fisher": ("Batch", "Fisher", "Sketch", "collect_fisher", "collect_sketch", "load_sketch", "save_sketch"),
    "sstmerge.gevp": ("solve",),
    "sstmerge.merging": ("Selection", "merge_cores", "merge_experts"),
    "sstmerge.peft_drop_in": ("add_weighted_adapter", "peft_backend"),
    "sstmerge.pipeline.calibration": ("CollectionOptions",),
    "sstmerge.pipeline.merge": ("merge", "merge_from_fishers"),
    "sstmerge.pipeline.method_merge": ("StatisticsFiles", "available_methods", "merge_adapters"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "Adapter",
    "Batch",
    "CollectionOptions",
    "CoreSpace",
    "Fisher",
    "Selection",
    "Sketch",
    "StatisticsFiles",
    "__version__",
    "adapter_from_model",
    "add_weighted_adapter",
    "available_methods",
    "collect_fisher",
    "collect_sketch",
    "load_adapter",
    "load_sketch",
    "merge",
    "merge_adapters",
    "merge_cores",
    "merge_experts",
    "merge_from_fishers",
    "peft_backend",
    "save_adapter",
    "save_sketch",
    "solve",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `sstmerge --help` need not import torch.
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'sstmerge' has no attribute '{name}'")
