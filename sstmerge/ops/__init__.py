"""The ops that may run natively: validation, allocation and the choice of a backend.

This is the only part that loads the compiled extension and cupy. Where a backend is missing, `backends` says why.
"""

from sstmerge.ops.backends import BackendInfo, BackendName, backends
from sstmerge.ops.cores import filter_cores
from sstmerge.ops.eigen import DriverName, generalized_eigh
from sstmerge.reference import GeneralizedEigh, SolveStatus

__all__ = [
    "BackendInfo",
    "BackendName",
    "DriverName",
    "GeneralizedEigh",
    "SolveStatus",
    "backends",
    "filter_cores",
    "generalized_eigh",
]
