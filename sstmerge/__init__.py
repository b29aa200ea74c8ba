"""sstmerge: merge LoRA adapters by measured effect."""

__version__ = "0.1.0"
