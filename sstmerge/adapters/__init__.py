"""LoRA adapters and the core space they share."""

from sstmerge.adapters.adapter import Adapter, LoraFactors
from sstmerge.adapters.apply import changed_weight
from sstmerge.adapters.core import CoreSpace
from sstmerge.adapters.files import adapter_from_model, load_adapter, save_adapter

__all__ = [
    "Adapter",
    "CoreSpace",
    "LoraFactors",
    "adapter_from_model",
    "changed_weight",
    "load_adapter",
    "save_adapter",
]
