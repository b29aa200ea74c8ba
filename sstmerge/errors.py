"""Exceptions of sstmerge: every message is a sentence that says what was expected, what came and how to fix it."""


class SSTMergeError(Exception):
    """Base class of every error that sstmerge raises on purpose; the command line turns it into exit code 2."""


class InputError(SSTMergeError, ValueError):
    """An argument, a file or a data row is not usable; the message names it and says how to fix it."""


class AdapterError(InputError):
    """An adapter cannot be read, or its tensors, layers or configuration do not fit."""


class DataError(InputError):
    """A prompt file or one of its rows is not usable."""


class FisherError(InputError):
    """A Fisher file is damaged, of the wrong kind, or was collected for another model or other adapters."""


class SolverError(SSTMergeError, ArithmeticError):
    """A generalized eigenproblem could not be solved; the message names the layer, the matrix and the reason."""


class BackendError(SSTMergeError, RuntimeError):
    """A backend that was asked for by name is not there; the message says why and how to get it."""


class OutputError(SSTMergeError, OSError):
    """A result could not be written; nothing half-written is left behind."""


class PeerError(SSTMergeError, RuntimeError):
    """Another process of a distributed run failed or died, so this one cannot go on.

    Attributes:
        reported: Whether some process has told the user why already.
    """

    def __init__(self, message: str, *, reported: bool = False) -> None:
        super().__init__(message)
        self.reported = reported


class Interrupted(SSTMergeError):
    """The run was stopped by SIGINT or SIGTERM; what was collected is kept where there is a checkpoint.

    Attributes:
        signal: The signal's number; the exit code is 128 more.
        reported: Whether another process has told the user already.
    """

    def __init__(self, message: str, *, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
        self.reported = False
