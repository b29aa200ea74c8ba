"""The command line: one typer command per job. Errors of sstmerge are sentences on stderr and exit code 2."""

from sstmerge.cli.app import app, main

__all__ = ["app", "main"]
