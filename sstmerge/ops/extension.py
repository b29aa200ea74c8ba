"""Loading the compiled extension `sstmerge._C`, with a reason where it cannot be used."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from sstmerge import __version__

REBUILD = "rebuild it with `pip install .` in a checkout of sstmerge, where g++ or clang++ is installed"


@cache
def load_extension() -> tuple[ModuleType | None, str]:
    """Import the extension and hand it scipy's LAPACK.

    Returns:
        The extension and what it is; or None, the reason and the fix.
    """
    try:
        compiled = importlib.import_module("sstmerge._C")
    except ImportError as error:
        return None, f"the extension sstmerge._C cannot be imported ({error}): {REBUILD}"
    if __version__ != compiled.VERSION:
        return None, f"the extension is of version {compiled.VERSION} and sstmerge of {__version__}: {REBUILD}"
    try:
        lapack = importlib.import_module("scipy.linalg.cython_lapack").__pyx_capi__
        compiled.bind_lapack(lapack["ssygvd"], lapack["dsygvd"])
    except (ImportError, AttributeError, KeyError, ValueError) as error:
        return None, f"scipy's LAPACK cannot be used ({error}): install scipy from a wheel of PyPI"
    return compiled, f"LAPACK of scipy, {'OpenMP' if compiled.HAS_OPENMP else 'one thread (built without OpenMP)'}"
