"""Every merging method that can be asked for by name."""

from sstmerge.merging.methods import factorwise, knots, linear, safety, sparse, spectral, statistical
from sstmerge.merging.methods.registry import (
    CoreBatch,
    DeltaLayer,
    FactorLayer,
    Layers,
    LowRank,
    Method,
    Option,
    RebasedCores,
    Registry,
)
from sstmerge.merging.methods.similarity import expert_similarity

REGISTRY = Registry()
for _family in (linear, sparse, spectral, knots, statistical, safety, factorwise):
    REGISTRY.add(_family.METHODS)

__all__ = [
    "REGISTRY",
    "CoreBatch",
    "DeltaLayer",
    "FactorLayer",
    "Layers",
    "LowRank",
    "Method",
    "Option",
    "RebasedCores",
    "Registry",
    "expert_similarity",
]
