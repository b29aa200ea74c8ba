"""Every merging method that can be asked for by name."""

from sstmerge.merging.methods.registry import CoreBatch, DeltaLayer, Method, Option, Registry

__all__ = ["CoreBatch", "DeltaLayer", "Method", "Option", "Registry"]
