"""End a program on SIGTERM and Ctrl-C by an exception, whatever library runs at that moment.

Libraries drop or replace exceptions: Python itself in a finalizer, in a callback of a weak reference and in a hook of os.fork,
SQLite's module while it binds the values of a statement.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import mlflow.tracking.fluent

arrived: int | None = None  # the signal that told the program to end


class Terminated(SystemExit):
    """SIGTERM arrived; 143 is what a shell reports for it."""


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """SIGTERM raises Terminated, and Ctrl-C raises KeyboardInterrupt: again every 10 ms until the exception leaves the block.

    After the block, a signal raises once. A process that ignores Ctrl-C, because a shell started it with `&`, still ignores it.
    """
    sys.unraisablehook = _report_dropped
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _end(number: int, frame: FrameType | None) -> None:
    """Raise the exception, except while MLflow opens or closes a run, which has no owner at that time."""
    global arrived
    if number != signal.SIGALRM:
        arrived = number
        signal.signal(signal.SIGALRM, _end)
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    elif _is_ending():
        return
    while frame:
        code, frame = frame.f_code, frame.f_back
        if code.co_name in ("start_run", "end_run") and code.co_filename == mlflow.tracking.fluent.__file__:
            return
    raise KeyboardInterrupt if arrived == signal.SIGINT else Terminated(128 + signal.SIGTERM)


def _is_ending() -> bool:
    """The code that runs is a `finally`, an `except` or an `__exit__` on the way of the exception to its end."""
    error = sys.exception()
    while error and not isinstance(error, Terminated | KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _report_dropped(dropped: "sys.UnraisableHookArgs") -> None:
    if not isinstance(dropped.exc_value, Terminated | KeyboardInterrupt):  # these come again
        sys.__unraisablehook__(dropped)
