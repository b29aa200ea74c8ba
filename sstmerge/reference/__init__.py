"""The executable specification: a plain-torch twin of every native op, on any device.

The twins are the oracle of the tests, the check of `sstmerge doctor` and the implementation wherever nothing compiled
is there. They expect valid arguments; `sstmerge.ops` validates.
"""

from sstmerge.reference.cores import filter_cores
from sstmerge.reference.eigen import GeneralizedEigh, SolveStatus, generalized_eigh
from sstmerge.reference.projection import project_accumulate
from sstmerge.reference.scores import SequenceScores, sequence_scores
from sstmerge.reference.sparsify import dare, magnitude_prune, probability_in, ties, torch_dare

__all__ = [
    "GeneralizedEigh",
    "SequenceScores",
    "SolveStatus",
    "dare",
    "filter_cores",
    "generalized_eigh",
    "magnitude_prune",
    "probability_in",
    "project_accumulate",
    "sequence_scores",
    "ties",
    "torch_dare",
]
