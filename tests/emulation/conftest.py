"""The kernels' own sources, run on the CPU as the backends `emulated` and `sanitized` of the ops."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import compiling
import pytest
from launchers import ORDERS, EmulatedLauncher, EmulationError, PartlyBrokenLauncher, SanitizedLauncher

from sstmerge.ops import launch


@pytest.fixture(scope="session")
def emulation_cache(request) -> Path:
    """Folder of what was compiled, kept between runs."""
    if compiling.compiler() is None:
        pytest.skip("the emulation needs g++ (or a compiler in $CXX)")
    return request.config.cache.mkdir("emulation")


@pytest.fixture(params=ORDERS, ids=["forwards", "backwards", "shuffled"])
def emulated(request, emulation_cache, monkeypatch) -> EmulatedLauncher:
    """The backend `emulated`, in every order of threads and blocks."""
    launcher = EmulatedLauncher(compiling.build(emulation_cache))
    launcher.order = request.param
    monkeypatch.setitem(launch.LAUNCHERS, "emulated", lambda: (launcher, "emulation"))
    return launcher


@pytest.fixture
def sanitized(emulation_cache, monkeypatch) -> SanitizedLauncher:
    """The backend `sanitized`: every launch under the address and undefined-behaviour sanitizers."""
    launcher = SanitizedLauncher(compiling.build(emulation_cache, sanitized=True))
    monkeypatch.setitem(launch.LAUNCHERS, "sanitized", lambda: (launcher, "emulation under sanitizers"))
    return launcher


@pytest.fixture
def is_caught(emulation_cache, monkeypatch, tmp_path) -> Callable[..., bool]:
    """A function that breaks a kernel and tells whether a check notices.

    `is_caught(header, old, new, check, sanitized=False, kernel=None)` replaces a text that occurs once in a source,
    compiles the kernels of `<header>.cuh` (or only the one kernel, the only one of that header that the check may
    launch), and runs `check(backend)` in every order, with intact kernels of all other headers. It is noticed where the
    check raises AssertionError, or the emulation or a sanitizer stops the kernel.
    """

    def run(
        header: str,
        old: str,
        new: str,
        check: Callable[[str], None],
        *,
        sanitized: bool = False,
        kernel: str | None = None,
    ) -> bool:
        kernels = tmp_path / "kernels"
        shutil.copytree(compiling.KERNELS, kernels, dirs_exist_ok=True)
        places = [path for path in kernels.glob("*.cuh") if old in path.read_text(encoding="utf-8")]
        if len(places) != 1 or places[0].read_text(encoding="utf-8").count(old) != 1:
            raise ValueError(f"the text to break must occur once in the sources, and is in {places}: {old}")
        places[0].write_text(places[0].read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        product = compiling.build(emulation_cache, sanitized=sanitized, kernels=kernels, only=header, kernel=kernel)
        broken = (SanitizedLauncher if sanitized else EmulatedLauncher)(product)
        intact = EmulatedLauncher(compiling.build(emulation_cache))
        launcher = PartlyBrokenLauncher(broken, intact, header, kernel)
        monkeypatch.setitem(launch.LAUNCHERS, "mutant", lambda: (launcher, "a broken kernel"))
        for launcher.order in ORDERS:
            try:
                check("mutant")
            except (AssertionError, EmulationError):
                return True
        return False

    return run
