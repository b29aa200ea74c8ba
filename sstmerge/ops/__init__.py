"""The ops that may run natively: validation, allocation and the choice of a backend.

This is the only part that loads the compiled extension and cupy. Where a backend is missing, `backends` says why.
"""

from sstmerge.ops.backends import BackendInfo, BackendName, backends
from sstmerge.ops.cores import filter_cores
from sstmerge.ops.device import default_device
from sstmerge.ops.eigen import DriverName, available_drivers, eigh, generalized_eigh, generalized_eigh_mixed
from sstmerge.ops.projection import project_accumulate
from sstmerge.ops.scores import sequence_scores
from sstmerge.ops.sparsify import dare, magnitude_prune, ties
from sstmerge.ops.torch_dare import torch_dare
from sstmerge.reference import GeneralizedEigh, SequenceScores, SolveStatus

__all__ = [
    "BackendInfo",
    "BackendName",
    "DriverName",
    "GeneralizedEigh",
    "SequenceScores",
    "SolveStatus",
    "available_drivers",
    "backends",
    "dare",
    "default_device",
    "eigh",
    "filter_cores",
    "generalized_eigh",
    "generalized_eigh_mixed",
    "magnitude_prune",
    "project_accumulate",
    "sequence_scores",
    "ties",
    "torch_dare",
]
