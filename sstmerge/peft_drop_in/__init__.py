"""The drop-in for PEFT's `add_weighted_adapter`."""

from sstmerge.peft_drop_in.backend import add_weighted_adapter, peft_backend

__all__ = ["add_weighted_adapter", "peft_backend"]
