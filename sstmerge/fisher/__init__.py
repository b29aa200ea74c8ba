"""Fishers in core space: collecting, adding, saving."""

from sstmerge.fisher.batch import Batch
from sstmerge.fisher.collect import collect_fisher
from sstmerge.fisher.fisher import Fisher
from sstmerge.fisher.points import reference_points
from sstmerge.fisher.sketch import Sketch
from sstmerge.fisher.sketch_collect import collect_sketch
from sstmerge.fisher.sketch_file import load_sketch, save_sketch
from sstmerge.fisher.structures import KroneckerBasis, Structure, WeightSharing
from sstmerge.fisher.taps import installed_taps

__all__ = [
    "Batch",
    "Fisher",
    "KroneckerBasis",
    "Sketch",
    "Structure",
    "WeightSharing",
    "collect_fisher",
    "collect_sketch",
    "installed_taps",
    "load_sketch",
    "reference_points",
    "save_sketch",
]
