"""Predictions on their way to the store: the event loop queues them in microseconds, and a thread writes them in batches."""

import logging
import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from alacarte.feedback import Prediction, Store, StoreError, request_id
from alacarte.serving.rows import Answer, Rows
from alacarte.serving.settings import Settings

EVERY = 0.2  # seconds between writes: what a kill can lose
RETRY = 0.5  # seconds, while the store is away
BATCH = 2_000  # requests in one transaction,
BATCH_BYTES = 32_000_000  # or as many as take this
PRUNE_EVERY = 600.0  # seconds,
PRUNE_SHARE = 0.02  # or whenever this share of feedback.keep_gb was written
PRUNE_SECONDS = 1.0  # at a time, so that predictions do not wait for long
ROOM = 256_000_000  # bytes that may wait; beyond it the oldest go
REQUEST_BYTES = 1_000  # what a request takes beside its rows

logger = logging.getLogger(__name__)


class PredictionLog:
    """Gives every row its id, draws the audit share, and stores requests in the background.

    `add` is called by one thread. `healthy` is False while the store does not take predictions; they wait. `dropped`
    counts requests that are not stored because too many waited, or because they cannot be.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._name, self._settings = store, settings.registered_model_name, settings.feedback
        self._redact = frozenset(settings.feedback.redact)
        self._random = random.Random()  # seeded by the operating system, in every process anew
        self._until_audit = self._gap()
        self._waiting: deque[tuple] = deque()
        self._came = self._went = 0  # bytes; each is counted by one thread at a time
        self._seen: Sequence[str] = ()
        self._columns: tuple[str, ...] = ()
        self._suffixes: list[str] = []
        self._lock = threading.Lock()  # held by who writes
        self._more, self._stopping = threading.Event(), threading.Event()
        self._pruned, self._written = -math.inf, 0
        self._thread = threading.Thread(target=self._write_on, name="prediction log", daemon=True)
        self._trouble = "the database does not answer, it may be locked"  # of the last write that failed
        self.dropped = 0
        self.healthy = True

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, if the store takes it, and end."""
        self._stopping.set()
        self._more.set()
        if self._thread.is_alive():
            self._thread.join(10)
        try:
            self.flush(5)
        except StoreError as error:
            logger.warning("%d requests are lost: %s", len(self._waiting), error)

    def add(
        self, version: str, columns: Sequence[str], rows: Rows, answer: Answer, seconds: float
    ) -> tuple[list[str] | list[None], list[str]]:
        """The ids of a request's n rows, None where it is not in the sample, and those of them drawn for a label."""
        n, settings = rows.n, self._settings
        if settings.sample < 1 and self._random.random() >= settings.sample:
            return [None] * n, []
        now = time.time_ns()
        request = request_id(now, int.from_bytes(os.urandom(5), "big"))  # nobody guesses another one's
        if self._until_audit >= n:
            self._until_audit -= n
            audit = None
        else:
            audit = self._draw(n)
        size = REQUEST_BYTES + 8 * n * len(columns) + len(rows.body)
        self._waiting.append((request, now, version, columns, rows, answer, audit, seconds, size))
        self._came += size
        if self._came - self._went > BATCH_BYTES or len(self._waiting) >= BATCH:
            self._press()
        if n == 1:
            return [request], [request] if audit else []
        while len(self._suffixes) < n:
            self._suffixes.append(f".{len(self._suffixes)}")
        ids = [request + suffix for suffix in self._suffixes[:n]]
        return ids, [ids[row] for row in audit or ()]

    def flush(self, timeout: float = 1.0) -> None:
        """Write what waits now, once others that write are done, for which it waits `timeout` seconds.

        StoreError where the store does not take it; it goes on waiting then.
        """
        if not self._lock.acquire(timeout=timeout):
            raise StoreError(f"predictions wait to be stored: {self._trouble}")
        try:
            self._write()
        finally:
            self._lock.release()

    # --- in the thread of `add` ---

    def _gap(self) -> float:
        """Rows until the next one drawn: independent draws of each row, with one random number for each drawn row."""
        share = self._settings.audit_share
        if share in (0, 1):
            return math.inf if share == 0 else 0
        return int(math.log(1 - self._random.random()) / math.log1p(-share))

    def _draw(self, n: int) -> list[int]:
        drawn = []
        while self._until_audit < n:
            drawn.append(int(self._until_audit))
            self._until_audit += 1 + self._gap()
        self._until_audit -= n
        return drawn

    def _press(self) -> None:
        self._more.set()
        while self._came - self._went > ROOM:
            try:
                self._came -= self._waiting.popleft()[-1]
            except IndexError:  # all of it is in the writer's hands
                return
            self.dropped += 1

    # --- where the store is written ---

    def _write_on(self) -> None:
        while not self._stopping.is_set():
            self._more.wait(EVERY if self.healthy else RETRY)
            if not self.healthy:
                self._stopping.wait(RETRY)
            self._more.clear()
            with suppress(StoreError):  # it is logged, and tried again
                self.flush(EVERY)
                self._prune()

    def _write(self) -> None:
        left = len(self._waiting)  # what comes meanwhile is for the next time: this one ends
        while left > 0 and (batch := self._take(left)):
            left -= len(batch)
            try:
                try:
                    self._store.write_predictions(self._records(batch))
                except StoreError:
                    raise
                except Exception:
                    self._write_singly(batch)
            except StoreError as error:
                self._waiting.extendleft(reversed(batch))
                if self.healthy:
                    logger.warning("predictions wait for the store: %s", error)
                self.healthy, self._trouble = False, str(error)
                raise
            self._count(batch)
            self.healthy = True

    def _take(self, most: int) -> list[tuple]:
        batch: list[tuple] = []
        size = 0
        with suppress(IndexError):  # `add` may drop the last ones
            while len(batch) < min(BATCH, most) and size < BATCH_BYTES:
                batch.append(self._waiting.popleft())
                size += batch[-1][-1]
        return batch

    def _write_singly(self, batch: list[tuple]) -> None:
        """A request that cannot be stored must not take others with it. What is done leaves the batch."""
        while batch:
            try:
                self._store.write_predictions(self._records(batch[:1]))
            except StoreError:
                raise
            except Exception as error:
                logger.error("a request could not be stored: %s: %s", type(error).__name__, str(error).split("\n")[0])
                self.dropped += 1
            self._count([batch.pop(0)])

    def _count(self, gone: list[tuple]) -> None:
        size = sum(one[-1] for one in gone)
        self._went += size
        self._written += size

    def _records(self, batch: list[tuple]) -> list[Prediction]:
        records = []
        for request, now, version, columns, rows, answer, audit, seconds, _ in batch:
            if self._seen is not columns:
                self._seen = columns
                self._columns = tuple(name for name in columns if name not in self._redact)
                if unknown := self._redact - set(columns):
                    logger.warning("feedback.redact: the model has no column %s", ", ".join(sorted(unknown)))
            form, inputs = rows.encode(self._redact)
            assert form != "f8" or len(inputs) == 8 * rows.n * len(self._columns)
            records.append(
                Prediction(
                    request, now / 1e9, self._name, version, rows.n, self._columns, form, inputs, answer.labels,
                    answer.confidence, seconds * 1000, audit, self._settings.audit_share, self._settings.sample,
                )
            )  # fmt: skip
        return records

    def _prune(self) -> None:
        limit = self._settings.keep_gb * 1e9
        if time.monotonic() - self._pruned < PRUNE_EVERY and self._written < limit * PRUNE_SHARE:
            return
        end = time.monotonic() + PRUNE_SECONDS
        try:
            while self._store.prune(self._name, self._settings.keep_days, limit):
                if time.monotonic() > end or self._stopping.is_set():
                    return  # it goes on after the next write
        except StoreError as error:
            logger.warning("old predictions stay: %s", error)
        except Exception:  # predictions are written all the same
            logger.exception("old predictions stay")
        self._pruned, self._written = time.monotonic(), 0
