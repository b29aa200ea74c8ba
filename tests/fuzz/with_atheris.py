"""Coverage-guided fuzzing of the same tests: python tests/fuzz/with_atheris.py TEST [libFuzzer's options].

TEST is a function of test_fuzz_files.py or test_fuzz_commands.py. atheris instruments the package's byte code and steers
hypothesis' choices towards branches that were not reached before. The extra `fuzz` installs it (CPython 3.11 to 3.13, Linux
and macOS on x86-64 or ARM); `tests/fuzz/test_fuzz_with_atheris.py` runs it for a moment where it is installed.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path

import atheris
from hypothesis import given

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

MODULES = ("cli.data_commands", "cli.merge_commands", "pipeline.curve", "pipeline.inspection", "pipeline.method_merge")
with atheris.instrument_imports(include=["sstmerge"]):
    for module in MODULES:
        import_module(f"sstmerge.{module}")


def main() -> None:
    name, *options = sys.argv[1:]
    modules = [import_module(module) for module in ("test_fuzz_files", "test_fuzz_commands")]
    test = next(getattr(module, name) for module in modules if hasattr(module, name))
    with tempfile.TemporaryDirectory() as folder:
        valid = import_module("valid_files").write_valid_files(Path(folder))
        takes_files = "valid" in test.hypothesis.inner_test.__code__.co_varnames
        fuzz_one = bound(test, valid) if takes_files else test.hypothesis.fuzz_one_input
        atheris.Setup([sys.argv[0], *options], lambda content: (fuzz_one(content), None)[1])
        atheris.Fuzz()


def bound(test, valid):
    """Return the fuzzing entry of a test with the fixture `valid` filled in."""
    inner = test.hypothesis.inner_test

    def filled(**choices):
        inner(valid, **choices)

    return given(**test.hypothesis._given_kwargs)(filled).hypothesis.fuzz_one_input


if __name__ == "__main__":
    main()
