"""The error that a user can act on, and how a command line shows it."""

from __future__ import annotations

import sys
import threading
from multiprocessing.dummy import DummyProcess
from types import TracebackType

_PATIENCE = 60.0  # seconds


class InputError(ValueError):
    """Input that the package refuses.

    The message says what was found, what is allowed and what to do.
    """


def clear_errors() -> None:
    """Let the running program end on an InputError with its message alone, exit code 1, in place of a traceback.

    MONAI wraps what a config's expression raises, so the message would be lost in pages of its stack. Any other
    exception is shown as always.
    """
    sys.excepthook = _show


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"\nError: {cause}", file=sys.stderr, flush=True)
    _await_loaders()


def _await_loaders() -> None:
    """Let the threads that fill a cache end their volume.

    Python would stop them within torch's code when it exits, which aborts the process with another exit code.
    """
    for thread in threading.enumerate():
        if isinstance(thread, DummyProcess):  # a worker of multiprocessing.pool.ThreadPool
            thread.join(_PATIENCE)
