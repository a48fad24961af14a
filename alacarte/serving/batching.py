"""Concurrent requests to one predict: in the event loop when that is quick, else in a thread that can be stopped.

Everything here runs in the event loop but `_Worker._run`, so nothing needs a lock.
"""

import asyncio
import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from alacarte.serving.model import Answer, RequestError, Rows, ServedModel

# Seconds that a batch may hold up the event loop; longer ones go to the thread, so that health checks stay live.
QUICK = 0.001

# Seconds between two tries to stop a thread, and until it counts as stuck.
AGAIN, PATIENCE = 0.05, 1.0


class _Stop(BaseException):
    """Thrown into a predict that took too long; not an Exception, so that a model does not swallow it by habit."""


@dataclass(eq=False)
class _Item:
    """One request that waits for its answer."""

    model: ServedModel
    rows: Rows
    future: asyncio.Future[Answer]
    joins: bool
    timer: asyncio.TimerHandle | None = None


@dataclass(eq=False)
class _Worker:
    """A thread that predicts one batch after the other."""

    done: Callable[["_Worker", list[_Item], Any], None]  # called in the event loop
    loop: asyncio.AbstractEventLoop
    batch: list[_Item] | None = None
    stopped_at: float = 0.0
    inbox: SimpleQueue[list[_Item] | None] = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name="predict", daemon=True)
        self.thread.start()

    def start(self, batch: list[_Item]) -> None:
        self.batch = batch
        self.inbox.put(batch)

    def stop(self) -> None:
        """Throw _Stop into the thread. It arrives between two steps of Python code: not inside one long call of C."""
        self.inbox.put(None)
        ident = self.thread.ident
        if ident is not None and self.thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(_Stop))

    def _run(self) -> None:
        try:
            while batch := self.inbox.get():
                found = _predict(batch)
                self.loop.call_soon_threadsafe(self.done, self, batch, found)
                batch = None
        except (_Stop, RuntimeError):  # told to end, or the event loop is gone
            pass


class Batcher:
    """One per event loop. `timeout` in seconds, from the call of predict to its answer; `max_rows` per call of a model."""

    def __init__(self, timeout: float, max_rows: int) -> None:
        self._timeout, self._max_rows = timeout, max_rows
        self._arrived: list[_Item] = []
        self._waiting: deque[_Item] = deque()
        self._worker: _Worker | None = None
        self._retired: list[_Worker] = []

    @property
    def stuck(self) -> bool:
        """Whether a predict that was stopped goes on all the same, which only a restart of the process ends."""
        self._retired = [worker for worker in self._retired if worker.thread.is_alive()]
        return any(time.monotonic() - worker.stopped_at > PATIENCE for worker in self._retired)

    async def predict(self, model: ServedModel, rows: Rows) -> Answer:
        """The answer, from one call of `model` with what else arrived in the same tick of the event loop.

        Raises RequestError where the model refuses the rows, TimeoutError after `timeout` seconds, in which case no
        work goes on for this request.
        """
        loop = asyncio.get_running_loop()
        item = _Item(model, rows, loop.create_future(), model.joins(rows))
        self._arrived.append(item)
        if len(self._arrived) == 1:
            try:
                await asyncio.sleep(0)  # what else is ready in the event loop now joins in
            except asyncio.CancelledError:
                item.future.cancel()
                raise
            finally:  # the others get their answers, also when this client has gone
                self._tick()
        return await item.future

    def _tick(self) -> None:
        arrived, self._arrived = deque(item for item in self._arrived if not item.future.done()), []
        if any(item.model is not arrived[0].model for item in arrived):  # a swap: old and new at once
            arrived = deque(sorted(arrived, key=lambda item: id(item.model)))
        while arrived:
            batch = self._take(arrived)
            model, n = batch[0].model, sum(item.rows.n for item in batch)
            if batch[0].joins and model.cost(n) <= QUICK:
                found = model.predict_fast([item.rows for item in batch])
                _resolve(batch, found)
                batch = [item for item, answer in zip(batch, found, strict=True) if answer is None]
                for item in batch:
                    item.joins = False
            self._enqueue(batch)

    def _enqueue(self, items: list[_Item]) -> None:
        if not items:
            return
        loop = asyncio.get_running_loop()
        for item in items:
            item.timer = loop.call_later(self._timeout, self._expire, item)
        self._waiting.extend(items)
        self._next()

    def _take(self, items: deque[_Item]) -> list[_Item]:
        """Remove from the front what goes into one call: one request, or up to max_rows rows that gain from it."""
        batch = [items.popleft()]
        total = batch[0].rows.n
        while items and batch[0].joins and items[0].joins and items[0].model is batch[0].model:
            if (total := total + items[0].rows.n) > self._max_rows:
                break
            batch.append(items.popleft())
        return batch

    def _next(self) -> None:
        """Give the thread its next batch, when it is free; what nobody waits for any more is dropped."""
        if self._worker and self._worker.batch is not None:
            return
        self._waiting = deque(item for item in self._waiting if not item.future.done())
        if self._waiting:
            if self._worker is None:
                self._worker = _Worker(self._done, asyncio.get_running_loop())
            self._worker.start(self._take(self._waiting))

    def _done(self, worker: _Worker, batch: list[_Item], found: Any) -> None:
        _resolve(batch, found)
        worker.batch = None
        if worker is self._worker:
            self._next()

    def _expire(self, item: _Item) -> None:
        if not item.future.done():
            item.future.set_exception(TimeoutError(f"no answer within {self._timeout} s"))
        worker = self._worker
        # Requests that came later into the same batch still have time, and whoever waits for them is not let down.
        if worker and worker.batch and item in worker.batch and all(each.future.done() for each in worker.batch):
            self._worker = None
            worker.stopped_at = time.monotonic()
            self._retired.append(worker)
            self._stop(worker)
            self._next()

    def _stop(self, worker: _Worker) -> None:
        """Until the thread has ended: a model may swallow one _Stop, or several."""
        if worker.thread.is_alive():
            worker.stop()
            asyncio.get_running_loop().call_later(AGAIN, self._stop, worker)


def _predict(batch: list[_Item]) -> list[Answer | RequestError] | Exception:
    try:
        return batch[0].model.predict([item.rows for item in batch])
    except _Stop:
        raise
    except BaseException as error:  # a fault of the server, or a model that calls sys.exit
        return RuntimeError(f"predict failed: {type(error).__name__}")


def _resolve(batch: list[_Item], found: Sequence[Answer | RequestError | None] | Exception) -> None:
    """Hand out the answers; where one is None the request waits on."""
    for i, item in enumerate(batch):
        answer = found if isinstance(found, Exception) else found[i]
        if answer is None:
            continue
        if item.timer:
            item.timer.cancel()
        if item.future.done():  # timed out, or the client went away
            continue
        if isinstance(answer, Exception):
            item.future.set_exception(answer)
        else:
            item.future.set_result(answer)
