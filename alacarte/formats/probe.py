"""Try a model in a child process before it is loaded here.

A file can pass every check and still end the process that predicts with it, or keep a core busy for ever: both happen in
C code, where no exception arrives. So a child process loads the model first and predicts the input example and rows made
from it. It has limits of time and memory, and only its end is judged here. The rows cannot reach every node of every tree,
so a forged model may still pass.
"""

import contextlib
import ctypes
import faulthandler
import gc
import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.pyfunc import PyFuncModel
from mlflow.types import DataType

from alacarte import formats
from alacarte.errors import UserError
from alacarte.formats.load import load

# The limits of a child. Both grow with the size of the model folder.
SECONDS = 60
MEGABYTES = 2048

FORK = sys.platform == "linux"
ROWS = 64  # of each table that is made from the input example
EXAMPLE_ROWS = 100  # of the input example, at most
UNSEEN = "a category that no model has seen"
MODERATE = (0.0, 1e-30, -1e-30, 1.0, -1.0, 1e6, -1e6, 1e30, -1e30)  # finite as float32 too
HUGE = (1e300, -1e300, 5e-324, -5e-324)
MISSING = (math.nan,)


# What a caller does with a model before anybody asks it: takes the folder and the result of `load`.
Rehearsal = Callable[[Path, str, Any, PyFuncModel], object]


class OwnerEnded(Exception):
    """The process that asked for a trial has ended."""


def load_safely(folder: str | Path, trust_code: bool = False) -> tuple[str, Any, PyFuncModel]:
    """Try a model in a child process, then load it here. The result is that of `alacarte.formats.load.load`.

    Raises UserError for a model that cannot be loaded, and for one that crashed its child, or exceeded a limit.
    """
    check(folder, trust_code)
    return load(Path(folder), trust_code)


def check(
    folder: str | Path,
    trust_code: bool = False,
    rehearse: Rehearsal | None = None,
    owner: Connection | None = None,
) -> None:
    """Load a model in a child process and let it predict, then `rehearse`. Takes 0.1 s for a small scikit-learn model.

    Raises UserError where the child ends before it is ready, exceeds a limit, or cannot load the model, and for any
    exception of `rehearse`. An exception that the model raises for single rows is no reason to refuse it. With `owner`, a
    connection to the process that asked, raises OwnerEnded when that process ends first.
    """
    formats.skops_io()  # imported once, before the child exists, and not again in each child
    folder = Path(folder)
    seconds, megabytes = limits(folder)
    context: Any = multiprocessing.get_context("fork" if FORK else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, str(folder), trust_code, rehearse, seconds, megabytes)
    process = context.Process(target=_try, args=arguments, name="probe")
    with receiver:
        with sender:
            process.start()
        try:
            ready = wait([process.sentinel, *([owner] if owner else [])], seconds)
            in_time = process.sentinel in ready
            process.kill()
            process.join()
            if owner and owner in ready and not in_time:
                raise OwnerEnded
            reason = _refusal(receiver, process.exitcode, in_time, seconds)
        finally:
            process.kill()
            process.join()
    if reason:
        raise UserError(f"{folder}: {reason}")


def limits(folder: Path) -> tuple[int, int]:
    """Seconds, and megabytes above the memory that the child starts with. Large models take longer and need more."""
    size = sum(path.lstat().st_size for path in folder.rglob("*")) / 1e6
    return math.ceil(SECONDS + size / 10), math.ceil(MEGABYTES + 4 * size)


def _refusal(receiver: Connection, exit_code: int | None, in_time: bool, seconds: int) -> str | None:
    """Why a model is refused. The child has ended, so that nothing is waited for."""
    if not in_time or exit_code == -signal.SIGXCPU:
        return f"the process that tried it did not answer within {seconds} s"
    with contextlib.suppress(EOFError, OSError, ValueError):
        if receiver.poll():
            # JSON, because the child may be under the control of the model, and a pickle from it could run code here
            answer = json.loads(receiver.recv_bytes())
            return None if answer is None else str(answer)
    assert exit_code is not None
    end = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
    return f"the process that tried it ended with {end}"


# --- in the child ---


def _try(
    sender: Connection, folder: str, trust_code: bool, rehearse: Rehearsal | None, seconds: int, megabytes: int
) -> None:
    """Send null, or the reason for a refusal, and end without Python's own end, which would close the parent's files."""
    answer = None
    try:
        _isolate()
        set_limits(seconds, megabytes)
        tried = _load_and_predict(Path(folder), trust_code)
        if rehearse:
            rehearse(Path(folder), *tried)
    except BaseException as error:  # SystemExit of a model's own code too
        set_limits(seconds, None)
        text = " ".join(str(error).split()).removeprefix(f"{folder}: ")
        answer = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
        if is_memory_error(error):
            answer = f"the process that tried it needed more than {megabytes} MB"
        answer = answer[:500]
    with contextlib.suppress(OSError):
        sender.send_bytes(json.dumps(answer).encode())
    os._exit(0)


def _isolate() -> None:
    """Let nothing that happens here reach the parent: no signal, no output, no finalizer of an inherited object."""
    gc.freeze()
    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # where memory is short, this process ends first
    # Threads of OpenMP and OpenBLAS do not survive a fork. A second one would wait for them for ever.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # for a library that is loaded later, such as torch
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if "lightgbm" in sys.modules:  # it starts as many threads as the n_jobs of a model says
        sys.modules["lightgbm"].basic._LIB.LGBM_SetMaxThreads(1)


def set_limits(seconds: int, megabytes: int | None) -> None:
    """Limit CPU time, memory (None lifts its limit) and core dumps. Memory is what RLIMIT_DATA counts: not mapped files."""
    if sys.platform != "linux":
        return
    import resource

    def limit(kind: int, value: int) -> None:
        _, most = resource.getrlimit(kind)
        resource.setrlimit(kind, (value if most < 0 else min(value, most), most))

    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, seconds + 5)
    data_pages = int(Path("/proc/self/statm").read_text().split()[5])
    used = data_pages * resource.getpagesize()
    limit(resource.RLIMIT_DATA, sys.maxsize if megabytes is None else used + megabytes * 1_000_000)


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes of memory that a call needs while it runs. OSError where the system does not count them."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # otherwise the call can use memory that glibc keeps from earlier calls
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the largest size so far, starts again
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def is_memory_error(error: BaseException | None) -> bool:
    while error:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _load_and_predict(folder: Path, trust_code: bool) -> tuple[str, Any, PyFuncModel]:
    from joblib import parallel_config

    kind, implementation, model = load(folder, trust_code)
    example = model.input_example
    if example is None:
        example = _from_signature(model)
    if isinstance(example, pd.DataFrame | np.ndarray):
        example = example[:EXAMPLE_ROWS]
    with parallel_config(backend="threading"):  # other processes would outlive this one
        models = [model]
        if kind == "sklearn" and hasattr(implementation, "predict_proba"):
            models.append(PyFuncModel(model.metadata, implementation, "predict_proba"))
        for rows in (example, *trial_tables(example, np.random.default_rng())):
            for each in models:
                _predict(each, rows)
    return kind, implementation, model


def _predict(model: PyFuncModel, rows: Any) -> None:
    """A model is not refused for an exception: the server answers the request with it."""
    try:
        model.predict(rows)
    except Exception as error:
        if is_memory_error(error):
            raise


# --- the rows ---


def trial_tables(example: Any, draw: np.random.Generator) -> Iterator[pd.DataFrame | np.ndarray]:
    """Tables of ROWS rows like an example, each with another kind of unusual values; none for an example that is no table.

    A model may refuse a kind, such as unseen categories, and with it all rows of a call. So each kind has a table. The rows
    are drawn anew each time, so that nobody can forge a model around them.
    """
    if not isinstance(example, pd.DataFrame | np.ndarray) or not len(example):
        return
    chosen = draw.integers(len(example), size=ROWS)
    base = example[chosen] if isinstance(example, np.ndarray) else example.iloc[chosen].reset_index(drop=True)
    for extremes in (MODERATE, MISSING, HUGE):
        yield (
            base.apply(_vary, args=(extremes, draw)) if isinstance(base, pd.DataFrame) else _vary(base, extremes, draw)
        )
    if isinstance(base, pd.DataFrame):
        texts = base.select_dtypes(["object", "string"])
        base[texts.columns] = texts.map(lambda cell: UNSEEN if isinstance(cell, str) and draw.random() < 0.5 else cell)
        yield base


def _vary(values: Any, extremes: Sequence[float], draw: np.random.Generator) -> Any:
    """Numbers in the range of a column or an array and a little outside it; every second one is an extreme."""
    if not isinstance(values.dtype, np.dtype) or values.dtype.kind not in "fiu":
        return values
    finite = np.asarray(values, "float64")[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    margin = (high - low) or 1.0
    usual = draw.uniform(low - margin, high + margin, values.shape)
    varied = np.where(draw.random(values.shape) < 0.5, draw.choice(extremes, values.shape), usual)
    if values.dtype.kind != "f":  # a whole number has no missing value: it becomes 0
        bounds = np.iinfo(values.dtype)
        varied = np.clip(np.nan_to_num(varied), bounds.min, bounds.max)
    with np.errstate(over="ignore", invalid="ignore"):
        varied = varied.astype(values.dtype)
    return pd.Series(varied, index=values.index) if isinstance(values, pd.Series) else varied


def _from_signature(model: PyFuncModel) -> Any:
    """Two rows of zeros and empty texts, for a model without an input example."""
    inputs = model.metadata.signature.inputs
    if inputs.is_tensor_spec():
        spec = inputs.inputs[0]
        return np.zeros([2 if size < 0 else size for size in spec.shape], dtype=spec.type)
    columns = {}
    for number, spec in enumerate(inputs.inputs):
        zero = {DataType.string: "", DataType.binary: b""}.get(spec.type, 0)
        dtype = spec.type.to_pandas() if isinstance(spec.type, DataType) else None
        columns[number if spec.name is None else spec.name] = pd.Series([zero] * 2, dtype=dtype)
    return pd.DataFrame(columns)
