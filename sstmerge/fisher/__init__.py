"""Fishers in core space: collecting, adding, saving."""

from sstmerge.fisher.batch import Batch
from sstmerge.fisher.collect import collect_fisher
from sstmerge.fisher.fisher import Fisher
from sstmerge.fisher.points import reference_points
from sstmerge.fisher.structures import KroneckerBasis, Structure, WeightSharing
from sstmerge.fisher.taps import installed_taps

__all__ = [
    "Batch",
    "Fisher",
    "KroneckerBasis",
    "Structure",
    "WeightSharing",
    "collect_fisher",
    "installed_taps",
    "reference_points",
]
