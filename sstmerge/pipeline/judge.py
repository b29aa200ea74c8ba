"""The former place of the string judge; it lives in `sstmerge.evaluation`."""

from sstmerge.evaluation.degeneration import degenerate, is_bare_label, is_loop
from sstmerge.evaluation.refusal import Verdict, judge_refusal, refuses
from sstmerge.evaluation.text import exact_match, normalise

__all__ = ["Verdict", "degenerate", "exact_match", "is_bare_label", "is_loop", "judge_refusal", "normalise", "refuses"]
