"""Concurrent requests as one call of the model: in the event loop if the call is short, otherwise in a thread.

Everything except `_Worker._run` runs in the event loop, so nothing needs a lock.
"""

import asyncio
import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from alacarte.serving.model import ServedModel
from alacarte.serving.rows import Answer, RequestError, Rows

QUICK = 0.001  # seconds: a longer call runs in the thread, so that health checks are answered meanwhile
STOP_AGAIN = 0.05  # seconds until the next attempt to stop a thread
PATIENCE = 1.0  # seconds until a thread that does not stop counts as stuck

Result = Answer | RequestError | RuntimeError


class _Stop(BaseException):
    """Raised in a predict that takes too long. It is not an Exception, so that `except Exception` does not catch it."""


@dataclass(eq=False)
class _Request:
    """A request that waits for its answer."""

    model: ServedModel
    rows: Rows
    future: asyncio.Future[Answer]
    can_join: bool
    timer: asyncio.TimerHandle | None = None

    def resolve(self, result: Result) -> None:
        if self.timer:
            self.timer.cancel()
        if self.future.done():  # it timed out, or the client has gone
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class _Worker:
    """A thread that predicts one batch after the other."""

    def __init__(self, finish: Callable[["_Worker", list[Result]], None]) -> None:
        self.batch: list[_Request] = []
        self.stopped_at = 0.0
        self._finish, self._loop = finish, asyncio.get_running_loop()
        self._batches: SimpleQueue[list[_Request]] = SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="predict", daemon=True)
        self.thread.start()

    def start(self, batch: list[_Request]) -> None:
        self.batch = batch
        self._batches.put(batch)

    def stop(self) -> None:
        """Raise _Stop in the thread until it ends. Python raises it between two steps of Python code, not inside C code."""
        if self.thread.is_alive():
            self._batches.put([])
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread.ident or 0), ctypes.py_object(_Stop))
            self._loop.call_later(STOP_AGAIN, self.stop)

    def _run(self) -> None:
        try:
            while batch := self._batches.get():
                results = _predict(batch)
                self._loop.call_soon_threadsafe(self._finish, self, results)
                del batch
        except (_Stop, RuntimeError):  # stopped, or the event loop is closed
            pass


class Batcher:
    """One per event loop. `timeout` is in seconds per request, `max_rows` the limit of one call of a model."""

    def __init__(self, timeout: float, max_rows: int) -> None:
        self._timeout, self._max_rows = timeout, max_rows
        self._arrived: list[_Request] = []  # in this tick of the event loop
        self._waiting: deque[_Request] = deque()  # for the thread
        self._worker: _Worker | None = None
        self._stopped: list[_Worker] = []

    @property
    def stuck(self) -> bool:
        """Whether a stopped predict still runs. Only a restart of the process ends it."""
        self._stopped = [worker for worker in self._stopped if worker.thread.is_alive()]
        return any(time.monotonic() - worker.stopped_at > PATIENCE for worker in self._stopped)

    async def predict(self, model: ServedModel, rows: Rows) -> Answer:
        """Answer in one call of `model` together with the other requests of this tick of the event loop.

        Raises RequestError if the model refuses the rows. Raises TimeoutError after `timeout` seconds, and then no work
        continues for this request.
        """
        request = _Request(model, rows, asyncio.get_running_loop().create_future(), model.can_join(rows))
        self._arrived.append(request)
        if len(self._arrived) == 1:
            try:
                await asyncio.sleep(0)  # the other requests of this tick join
            except asyncio.CancelledError:
                request.future.cancel()
                raise
            finally:  # the others are answered also if this client has gone
                self._answer_arrived()
        return await request.future

    def _answer_arrived(self) -> None:
        arrived, self._arrived = deque(request for request in self._arrived if not request.future.done()), []
        if any(request.model is not arrived[0].model for request in arrived):  # a swap in this tick
            arrived = deque(sorted(arrived, key=lambda request: id(request.model)))
        while arrived:
            batch = self._take_batch(arrived)
            model, n = batch[0].model, sum(request.rows.n for request in batch)
            if batch[0].can_join and model.cost(n) <= QUICK:
                answers = model.predict_fast([request.rows for request in batch])
                for request, answer in zip(batch, answers, strict=True):
                    if answer:
                        request.resolve(answer)
                batch = [request for request, answer in zip(batch, answers, strict=True) if answer is None]
                for request in batch:
                    request.can_join = False
            for request in batch:
                request.timer = asyncio.get_running_loop().call_later(self._timeout, self._expire, request)
            self._waiting.extend(batch)
        self._start_next()

    def _take_batch(self, requests: deque[_Request]) -> list[_Request]:
        """Remove the requests of one call from the front: one request, or up to max_rows rows that can be joined."""
        batch = [requests.popleft()]
        n = batch[0].rows.n
        while requests and batch[0].can_join and requests[0].can_join and requests[0].model is batch[0].model:
            n += requests[0].rows.n
            if n > self._max_rows:
                break
            batch.append(requests.popleft())
        return batch

    def _start_next(self) -> None:
        """Give the thread its next batch if it is idle. Requests whose client has gone are dropped."""
        if self._worker and self._worker.batch:
            return
        self._waiting = deque(request for request in self._waiting if not request.future.done())
        if self._waiting:
            self._worker = self._worker or _Worker(self._finish)
            self._worker.start(self._take_batch(self._waiting))

    def _finish(self, worker: _Worker, results: list[Result]) -> None:
        for request, result in zip(worker.batch, results, strict=True):
            request.resolve(result)
        worker.batch = []
        if worker is self._worker:
            self._start_next()

    def _expire(self, request: _Request) -> None:
        if not request.future.done():
            request.future.set_exception(TimeoutError(f"no answer within {self._timeout} s"))
        worker = self._worker
        # A batch goes on while one of its requests has time left.
        if worker and request in worker.batch and all(each.future.done() for each in worker.batch):
            self._worker = None
            worker.stopped_at = time.monotonic()
            self._stopped.append(worker)
            worker.stop()
            self._start_next()


def _predict(batch: Sequence[_Request]) -> list[Result]:
    try:
        return list(batch[0].model.predict([request.rows for request in batch]))
    except _Stop:
        raise
    except BaseException as error:  # an error of the server, or a model that calls sys.exit
        return [RuntimeError(f"predict failed: {type(error).__name__}")] * len(batch)
