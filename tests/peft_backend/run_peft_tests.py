"""Run PEFT's own tests of `add_weighted_adapter` through sstmerge's backend.

    python tests/peft_backend/run_peft_tests.py [--sdist peft-0.21.2.tar.gz] [--plain] [pytest options]

The tests come from PEFT's source distribution of the installed version, which pip downloads unless a file is given; nothing
of it is kept. Hub models are replaced by tiny random ones of the same architecture. `--plain` leaves PEFT's own function in.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

FILES = (
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_target_parameters.py",
)
# Every test that calls the function; test_stablediffusion and test_torch_compile need diffusers and a compiler.
SELECTION = "weighted or merging_adapters or (test_multiple_active_adapters_forward and LoRA)"


def download(folder: Path) -> Path:
    """Return the source distribution of the installed PEFT, fetched with pip."""
    command = [sys.executable, "-m", "pip", "download", f"peft=={version('peft')}", "--no-deps", "--no-binary", "peft"]
    subprocess.run([*command, "--no-build-isolation", "-q", "-d", str(folder)], check=True, timeout=300)
    return next(folder.glob("peft-*.tar.gz"))


def run(
    sdist: Path | None, *, plain: bool = False, options: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the tests and return the finished process, whose output ends with pytest's summary."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        archive = sdist or download(folder)
        with tarfile.open(archive) as tar:
            tar.extractall(folder / "source", filter="data")
        tests = next((folder / "source").glob("peft-*/tests"))
        (tests / "__init__.py").touch()
        (tests / "conftest.py").unlink(missing_ok=True)
        here = str(Path(__file__).resolve().parent)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]),
            "SSTMERGE_PEFT_TESTS_PLAIN": "1" if plain else "0",
            "HF_HUB_OFFLINE": "1",
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "peft_test_plugin",
            "-c",
            os.devnull,
            "--rootdir",
            str(tests.parent),
        ]
        command += ["-q", "--tb=short", "-p", "no:cacheprovider", "-k", SELECTION, *(options or [])]
        command += [str(tests / name) for name in FILES]
        return subprocess.run(command, env=environment, cwd=tests.parent, capture_output=True, text=True, check=False)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path)
    parser.add_argument("--plain", action="store_true")
    arguments, options = parser.parse_known_args()
    finished = run(arguments.sdist and arguments.sdist.resolve(), plain=arguments.plain, options=options)
    print(finished.stdout, finished.stderr)
    return finished.returncode


if __name__ == "__main__":
    sys.exit(main())
