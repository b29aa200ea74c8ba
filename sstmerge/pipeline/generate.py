"""The former place of greedy decoding; it lives in `sstmerge.evaluation`."""

from sstmerge.evaluation.generate import evaluating, generate

__all__ = ["evaluating", "generate"]
