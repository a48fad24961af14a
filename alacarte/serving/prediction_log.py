"""Predictions on their way to the store: the event loop queues them in microseconds, a thread writes them in batches."""

import logging
import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from alacarte.feedback import Prediction, Store, StoreError, request_id
from alacarte.serving.rows import Answer, Rows
from alacarte.serving.settings import Settings

WRITE_SECONDS = 0.2  # between two writes: the predictions that a kill can lose
RETRY_SECONDS = 0.5  # between two writes while the store does not answer
TROUBLE_SECONDS = 1.0  # that `flush` waits for the thread while the store does not answer
BATCH_REQUESTS, BATCH_BYTES = 2_000, 32_000_000  # of one transaction
MAX_BYTES = 256_000_000  # of requests that wait; beyond it the oldest are dropped
REQUEST_BYTES = 1_000  # memory of a request beside its rows
PRUNE_SECONDS = 600.0  # between two deletions of old predictions,
PRUNE_SHARE = 0.02  # or after this share of feedback.keep_gb was written
PRUNE_LIMIT = 1.0  # seconds of deletions at a time, so that predictions do not wait

logger = logging.getLogger(__name__)


class _Entry(NamedTuple):
    """A request that waits to be stored."""

    request: str
    nanoseconds: int
    version: str
    rows: Rows
    answer: Answer
    audit_rows: list[int] | None
    seconds: float
    size: int


class PredictionLog:
    """Gives every row its id, draws the audit sample, and stores requests in the background.

    One thread calls `add`. `healthy` is False while the store does not accept predictions; they wait. `dropped` counts
    requests that are not stored, because too many waited or because the store refuses them.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._name, self._settings = store, settings.registered_model_name, settings.feedback
        self._redact = frozenset(settings.feedback.redact)
        self._columns: Sequence[str] = ()  # of the last model
        self._stored_columns: tuple[str, ...] = ()  # without the columns in `redact`
        self._random = random.Random()
        self._waiting: deque[_Entry] = deque()
        self._bytes_added = self._bytes_removed = 0  # each is changed by one thread at a time
        self._bytes_written, self._pruned_at = 0, -math.inf
        self._lock = threading.Lock()  # of the thread that writes
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._flush_seconds = 2 * store.database.timeout  # for the lock of the database, and for the write
        self._error = ""  # of the store, while it is not healthy
        self._thread = threading.Thread(target=self._run, name="prediction log", daemon=True)
        self.dropped = 0
        self.healthy = True

    def start(self) -> None:
        """Start to write in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Write what waits if the store accepts it, and end."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(10)
        try:
            self.flush()
        except StoreError as error:
            logger.warning("%d requests are lost: %s", len(self._waiting), error)

    def add(self, version: str, rows: Rows, answer: Answer, seconds: float) -> tuple[list[str] | list[None], list[str]]:
        """The ids of the n rows of a request (None if it is not in the sample), and the ids drawn for the audit."""
        n, sample = rows.n, self._settings.sample
        if sample < 1 and self._random.random() >= sample:
            return [None] * n, []
        now = time.time_ns()
        request = request_id(now, int.from_bytes(os.urandom(5), "big"))  # nobody can guess it
        share = self._settings.audit_share
        audit_rows = [row for row in range(n) if self._random.random() < share] or None
        size = REQUEST_BYTES + 8 * n * len(rows.schema.names) + len(rows.body) + rows.size
        self._waiting.append(_Entry(request, now, version, rows, answer, audit_rows, seconds, size))
        self._bytes_added += size
        if self._bytes_added - self._bytes_removed > BATCH_BYTES or len(self._waiting) >= BATCH_REQUESTS:
            self._wake.set()
            self._drop_oldest()
        if n == 1:
            return [request], [request] if audit_rows else []
        ids = [f"{request}.{row}" for row in range(n)]
        return ids, [ids[row] for row in audit_rows or ()]

    def flush(self) -> None:
        """Write what waits now. Raises StoreError if the store does not accept it, or the thread writes for too long."""
        seconds = self._flush_seconds if self.healthy else TROUBLE_SECONDS
        if not self._lock.acquire(timeout=seconds):
            reason = f"an earlier write is not finished after {seconds:g} s" if self.healthy else self._error
            raise StoreError(f"predictions wait to be stored: {reason}")
        try:
            self._write()
        finally:
            self._lock.release()

    # --- called by `add` ---

    def _drop_oldest(self) -> None:
        with suppress(IndexError):  # the thread has taken all
            while self._bytes_added - self._bytes_removed > MAX_BYTES:
                self._bytes_added -= self._waiting.popleft().size
                self.dropped += 1

    # --- in the thread ---

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait(WRITE_SECONDS)
            if not self.healthy:
                self._stopping.wait(RETRY_SECONDS)
            self._wake.clear()
            with suppress(StoreError):  # _write has logged it
                self.flush()
                self._prune()

    def _write(self) -> None:
        remaining = len(self._waiting)  # requests that arrive meanwhile are written next time
        while remaining > 0 and (batch := self._take_batch(remaining)):
            remaining -= len(batch)
            try:
                self._store_batch(batch)
            except StoreError as error:
                self._waiting.extendleft(reversed(batch))
                if self.healthy:
                    logger.warning("predictions wait for the store: %s", error)
                self._error, self.healthy = str(error), False
                raise
            self.healthy = True

    def _take_batch(self, limit: int) -> list[_Entry]:
        batch: list[_Entry] = []
        size = 0
        with suppress(IndexError):  # `add` may have dropped the last ones
            while len(batch) < min(BATCH_REQUESTS, limit) and size < BATCH_BYTES:
                batch.append(self._waiting.popleft())
                size += batch[-1].size
        return batch

    def _store_batch(self, batch: list[_Entry]) -> None:
        """Store the entries and remove them from the batch. A request that cannot be stored is dropped alone."""
        at_once = len(batch)
        while batch:
            entries = batch[:at_once]
            try:
                self._store.write_predictions([self._record(entry) for entry in entries])
            except StoreError:
                raise
            except Exception as error:
                if at_once > 1:
                    at_once = 1
                    continue
                logger.error("a request could not be stored: %s: %s", type(error).__name__, str(error).split("\n")[0])
                self.dropped += 1
            size = sum(entry.size for entry in entries)
            self._bytes_removed += size
            self._bytes_written += size
            del batch[:at_once]

    def _record(self, entry: _Entry) -> Prediction:
        columns = entry.rows.schema.names
        if self._columns is not columns:
            self._columns = columns
            self._stored_columns = tuple(name for name in columns if name not in self._redact)
            if unknown := self._redact - set(columns):
                logger.warning("feedback.redact: the model has no column %s", ", ".join(sorted(unknown)))
        encoding, inputs = entry.rows.encode(self._redact)
        return Prediction(
            entry.request, entry.nanoseconds / 1e9, self._name, entry.version, entry.rows.n, self._stored_columns,
            encoding, inputs, entry.answer.labels, entry.answer.confidence, entry.seconds * 1000, entry.audit_rows,
            self._settings.audit_share, self._settings.sample,
        )  # fmt: skip

    def _prune(self) -> None:
        limit = self._settings.keep_gb * 1e9
        start = time.monotonic()
        if start - self._pruned_at < PRUNE_SECONDS and self._bytes_written < limit * PRUNE_SHARE:
            return
        try:
            while self._store.prune(self._name, self._settings.keep_days, limit):
                if time.monotonic() - start > PRUNE_LIMIT or self._stopping.is_set():
                    return  # it continues after the next write
        except StoreError as error:
            logger.warning("old predictions stay: %s", error)
        except Exception:  # predictions are still written
            logger.exception("old predictions stay")
        self._pruned_at, self._bytes_written = time.monotonic(), 0
