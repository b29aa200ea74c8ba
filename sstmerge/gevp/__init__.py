"""Generalized eigenvalue problems of a gain and a cost Fisher."""

from sstmerge.gevp.spectrum import DEFAULT_DAMPING, KroneckerSpectrum, Spectrum, solve

__all__ = ["DEFAULT_DAMPING", "KroneckerSpectrum", "Spectrum", "solve"]
