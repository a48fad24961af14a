"""End a program on SIGTERM and Ctrl-C by an exception, whatever code runs at that moment.

Python drops an exception in a finalizer, in a callback of a weak reference and in a hook of os.fork. Libraries catch all
exceptions, or fail while they handle one, which replaces it.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

RUN_CHANGES = {("mlflow.tracking.fluent", "start_run"), ("mlflow.tracking.fluent", "end_run")}

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
        if arrived:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _end(number: int, frame: FrameType | None) -> None:
    """Raise the exception, or let it wait for some milliseconds.

    It waits while MLflow opens or closes a run, which has no owner at that time, and while SQLAlchemy works: the traceback would
    keep the cursor of a query, and the cursor a lock on SQLite's file.
    """
    global arrived
    if number != signal.SIGALRM:
        arrived = number
        signal.signal(signal.SIGALRM, _end)
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    elif _is_ending():
        return
    while frame:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith("sqlalchemy.") or (module, function) in RUN_CHANGES:
            return
        frame = frame.f_back
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
