"""Writing results so that a reader sees all of them or nothing: temporary name first, then a rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sstmerge.errors import OutputError


@contextmanager
def atomic_file(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it there when the block ends without an error.

    Args:
        path: File to write; its folder is made if need be.
        overwrite: Replace an existing file.

    Yields:
        The temporary path to write to.

    Raises:
        OutputError: If the file exists and `overwrite` is False, or it cannot be written.
    """
    target = Path(path)
    refuse_existing_file(target, overwrite=overwrite)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputError(_written_nothing(target, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path`, and move it there when the block ends without an error.

    Args:
        path: Directory to create; an existing empty one is accepted.
        overwrite: Replace an existing directory.

    Yields:
        The temporary directory to write into.

    Raises:
        OutputError: If the directory exists and `overwrite` is False, or it cannot be written.
    """
    target = Path(path)
    refuse_existing(target, overwrite=overwrite)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if target.is_dir():
            shutil.rmtree(target)
        temporary.replace(target)
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputError(_written_nothing(target, error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing_file(path: str | Path, *, overwrite: bool) -> None:
    """Refuse an output file that is there, before any long work begins.

    Args:
        path: File that is to be written.
        overwrite: Whether it may be replaced.

    Raises:
        OutputError: If the path is a directory, or a file and `overwrite` is False.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError(
            f"'{target}' exists already and is a directory, but the result is a file; choose another name."
        )
    if target.exists() and not overwrite:
        raise OutputError(f"'{target}' exists already; choose another name or allow overwriting (--overwrite).")


def refuse_existing(path: str | Path, *, overwrite: bool) -> None:
    """Refuse an output directory that holds files, before any long work begins.

    Args:
        path: Directory that is to be written.
        overwrite: Whether it may be replaced.

    Raises:
        OutputError: If the path is a file, or a non-empty directory and `overwrite` is False.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise OutputError(f"'{target}' is a file, but the result is a directory; choose another name.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputError(f"'{target}' exists and is not empty; choose another name or pass --overwrite.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _written_nothing(target: Path, error: OSError | SafetensorError) -> str:
    reason = getattr(error, "strerror", None) or error
    return f"'{target}' could not be written: {reason}. Nothing was left behind."
